"""The classifiers that the image experiments attack: their training, and what they say about themselves.

`trained_classifiers` is the only function on the way to a generator that sees data.
"""

from collections.abc import Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, ingredients
from experiments.data import Images
from experiments.image_config import Config
from kkt_jax import networks
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.last_layer import collapsed_margin, typical_margin

_SMALL_INIT = 0.05  # of a batch-normalised classifier's later kernels and of its last batch norm's scale


def label_groups(num_labels: int, num_classifiers: int) -> list[tuple[int, ...]]:
  """The labels shared out in order: 0-4 and 5-9 of ten digits for two classifiers, as in Fig. 8.

  >>> label_groups(10, 2)
  [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
  """
  return [tuple(int(label) for label in part) for part in np.array_split(np.arange(num_labels), num_classifiers)]


def trained_classifiers(config: Config, train: Images, directory: pathlib.Path) -> list[Classifier]:
  """Trains the attacked classifiers, or restores them; nothing else of the data leaves this function.

  Each classifier stores the mean of its training images, which it subtracts from its inputs.
  """
  classifiers = []
  shape = train.x.shape[1:]
  for index, labels in enumerate(label_groups(len(np.unique(train.y)), config.classifiers)):
    module = networks.MLPClassifier(
      num_classes=len(labels),
      hidden=(config.width, config.second_width),
      batch_norm=config.batch_norm,
      init_scale=_SMALL_INIT if config.batch_norm else 1.0,
      gate_sharpness=config.gate_sharpness or None,
      dtype=None if config.compute_dtype == "float32" else config.compute_dtype,
    )
    like = {"variables": _initial_variables(config, module, shape, index), "mean": jnp.zeros(shape)}
    with Checkpointer(directory / str(index)) as checkpointer:
      restored = checkpointer.restore(like)
      stored = restored[1] if restored else _train_classifier(config, module, like["variables"], train, labels)
      if not restored:
        checkpointer.save(0, stored)
    offset = stored["mean"] if config.mean_image else None
    classifiers.append(
      networks.from_module(module, stored["variables"], input_shape=shape, labels=labels, offset=offset)
    )
  return classifiers


def _initial_variables(config: Config, module: networks.MLPClassifier, shape: Sequence[int], index: int) -> PyTree:
  key = jax.random.fold_in(jax.random.key(config.seed), index)
  variables: Any = module.init(key, jnp.zeros((1, *shape)))
  if config.batch_norm:
    params = variables["params"]
    params["Dense_0"]["kernel"] *= config.first_init_scale / _SMALL_INIT
    params["BatchNorm_1"]["scale"] *= _SMALL_INIT  # as in `experiments.circle`
  return variables


def _train_classifier(
  config: Config, module: networks.MLPClassifier, variables: PyTree, train: Images, labels: Sequence[int]
) -> dict[str, PyTree]:
  own = np.isin(train.y, labels)
  x, y = jnp.asarray(train.x[own]), jnp.asarray(np.searchsorted(labels, train.y[own]))
  mean = jnp.mean(x, axis=0) if config.mean_image else jnp.zeros(x.shape[1:])
  variables = ingredients.train_classifier(
    module,
    variables,
    x - mean[None],
    y,
    num_steps=config.pretrain_steps,
    learning_rate=config.pretrain_learning_rate,
    last_share=1e-3,
    weight_decay=None if config.batch_norm else config.weight_decay,
  )
  return {"variables": variables, "mean": mean}


def told_margins(config: Config, classifiers: Sequence[Classifier]) -> list[float]:
  """The margin of each classifier's training samples as its last layer tells it."""
  margins = []
  for params in (classifier.params for classifier in classifiers):
    kernel, bias = params["Dense_2"]["kernel"], params["Dense_2"]["bias"]
    if config.batch_norm:
      margins.append(collapsed_margin(kernel, bias, params["BatchNorm_1"]["scale"], params["BatchNorm_1"]["bias"]))
    else:
      margins.append(typical_margin(kernel, weight_decay=config.weight_decay))
  common.say(f"the last layer tells a typical margin of {', '.join(f'{margin:.4g}' for margin in margins)}")
  return margins
