"""The points of `circle`, the classifiers that are trained on them, and what these say about themselves."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ingredients
from experiments.circle_config import Config
from kkt_jax import first_layer, networks
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifier import Classifier

NUM_POINTS, NUM_CLASSES = 18, 3
_GATE_SHARPNESS = 20.0  # without batch norm; see `kkt_jax.networks.relaxed_relu`


def circle(labels: str) -> tuple[np.ndarray, np.ndarray]:
  """The training data: 18 points evenly on the unit circle [18, 2] and their labels [18].

  >>> circle("alternating")[1][:6].tolist(), circle("contiguous")[1][:7].tolist()
  ([0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 0, 1])
  """
  angle = 2 * np.pi * np.arange(NUM_POINTS) / NUM_POINTS
  x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
  index = np.arange(NUM_POINTS)
  return x, index % NUM_CLASSES if labels == "alternating" else index // (NUM_POINTS // NUM_CLASSES)


def trained_classifier(config: Config, x: np.ndarray, y: np.ndarray, index: int, directory: pathlib.Path) -> Classifier:
  """Trains one classifier to its convergence point, or restores it; nothing else of the data leaves this function."""
  module = networks.MLPClassifier(
    num_classes=NUM_CLASSES,
    hidden=(config.width, config.width),
    batch_norm=config.batch_norm,
    init_scale=config.init_scale if config.batch_norm else 1.0,
    gate_sharpness=None if config.batch_norm else _GATE_SHARPNESS,
  )
  variables: Any = module.init(jax.random.fold_in(jax.random.key(config.seed), index), x, train=True)
  if config.batch_norm:
    # A small last normalisation, like small weights: with scale 1 the classifier ends far from its KKT point.
    variables["params"]["BatchNorm_1"]["scale"] *= config.init_scale
  with Checkpointer(directory) as checkpointer:
    restored = checkpointer.restore(variables)
    if restored:
      variables = restored[1]
    else:
      variables = ingredients.train_classifier(
        module,
        variables,
        x,
        y,
        num_steps=config.pretrain_steps,
        learning_rate=0.02 if config.batch_norm else 0.05,
        last_share=0.025,
        weight_decay=None if config.batch_norm else config.weight_decay,
        steps_per_call=1000,
      )
      checkpointer.save(0, variables)
  return networks.from_module(module, variables, input_shape=(2,), labels=range(NUM_CLASSES))


def input_moments(classifier: Classifier) -> tuple[jax.Array, jax.Array]:
  """The mean and the covariance's Cholesky factor of the training points, read off the first batch norm.

  Without batch norm they are not to be had; 0 and the identity stand for the region in which points are searched.
  """
  if classifier.statistics is None:
    return jnp.zeros(2), jnp.eye(2)
  layer, stored = classifier.params["Dense_0"], classifier.statistics["BatchNorm_0"]
  mean, covariance = first_layer.input_moments(layer["kernel"], layer["bias"], stored["mean"], stored["var"])
  return mean, jnp.linalg.cholesky(covariance)
