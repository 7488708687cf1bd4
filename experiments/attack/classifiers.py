"""The classifiers that the experiments attack: trained to their convergence point, or restored.

The functions of this file are the only ones on the way to a generator that see training data, as plain arrays.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.progress import Progress, say
from kkt_jax import pretrain
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.networks import MLPClassifier
from kkt_jax.subject import Subject

_SMALL = 0.05  # of a batch-normalised classifier's later kernels and of its last batch norm's scale


def label_groups(num_labels: int, num_classifiers: int) -> list[tuple[int, ...]]:
  """The labels shared out in order: 0-4 and 5-9 of ten digits for two classifiers, as in Fig. 8.

  >>> label_groups(10, 2)
  [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
  """
  return [tuple(int(label) for label in part) for part in np.array_split(np.arange(num_labels), num_classifiers)]


def train(
  subject: Subject,
  variables: PyTree,
  x: np.ndarray,
  classes: np.ndarray,
  *,
  num_steps: int,
  learning_rate: float,
  last_share: float = 1e-3,
  weight_decay: float | None,
  steps_per_call: int = 1,
) -> PyTree:
  """Trains a network to its convergence point: with weight decay, or with batch norm by loss-scaled steps.

  Args:
    subject: the network.
    variables: where it starts.
    x: inputs [N, *input_shape].
    classes: output indices [N].
    num_steps: steps of full-batch gradient descent.
    learning_rate: their size; of loss-scaled ones that of the first fifth.
    last_share: the last loss-scaled step's size over the first's.
    weight_decay: its weight; loss-scaled steps if None.
    steps_per_call: steps in one compiled call.

  Returns:
    The trained variables, with the statistics that batch norm stores.
  """
  train_fn = subject.train_fn
  rest = {} if train_fn is None else {name: tree for name, tree in variables.items() if name != "params"}
  inputs = jnp.asarray(x)

  def apply_fn(params: PyTree, x: jax.Array) -> jax.Array:
    return subject.apply_fn(params, x) if train_fn is None else train_fn(rest | {"params": params}, x)[0]

  progress = Progress("classifier", num_steps)
  result = pretrain.to_convergence(
    apply_fn,
    variables if train_fn is None else variables["params"],
    inputs,
    jnp.asarray(classes),
    num_steps=num_steps,
    learning_rate=learning_rate,
    last_share=last_share,
    weight_decay=weight_decay,
    steps_per_call=steps_per_call,
    on_progress=lambda step, log_loss: progress.update(step, {"ln loss": log_loss}),
  )
  low, median, high = np.percentile(result.margins, [5, 50, 95])
  say(
    f"classifier: ln loss {result.log_loss:.4g}, |gradient| / |zeta| {result.relative_gradient:.2g},"
    f" margins {low:.4g}, {median:.4g}, {high:.4g} (5%, median, 95%)"
  )
  if train_fn is None:
    return result.params
  return {"params": result.params, **rest, "batch_stats": train_fn(rest | {"params": result.params}, inputs)[1]}


def of_images(config: Any, x: np.ndarray, y: np.ndarray, folder: pathlib.Path, *, seed: int) -> list[Classifier]:
  """The classifiers of an image experiment, among which the labels are shared out.

  Each stores the mean of its training images, which it subtracts from its inputs, unless the config says otherwise.

  Args:
    config: of `experiments.images`.
    x: training images [N, H, W, C].
    y: their labels [N].
    folder: where they are kept.
    seed: of their first weights.
  """
  classifiers = []
  for index, labels in enumerate(label_groups(len(np.unique(y)), config.classifiers)):
    module = MLPClassifier(
      num_classes=len(labels),
      hidden=(config.width, config.second_width),
      batch_norm=config.batch_norm,
      init_scale=_SMALL if config.batch_norm else 1.0,
    )
    variables: Any = module.init(jax.random.fold_in(jax.random.key(seed), index), jnp.zeros((1, *x.shape[1:])))
    if config.batch_norm:
      params = variables["params"]
      params["Dense_0"]["kernel"] *= config.first_init_scale / _SMALL
      params["BatchNorm_1"]["scale"] *= _SMALL  # a small last normalisation, like small weights
    else:
      variables = variables["params"]
    own = np.isin(y, labels)
    mean = x[own].mean(axis=0) if config.mean_image else np.zeros(x.shape[1:], np.float32)
    weight_decay = None if config.batch_norm else config.weight_decay

    def subject(mean: Any, module: Any = module, weight_decay: float | None = weight_decay) -> Subject:
      offset = mean if config.mean_image else None
      return Subject.from_linen(module, input_shape=x.shape[1:], offset=offset, weight_decay=weight_decay)

    with Checkpointer(folder / str(index)) as checkpointer:
      restored = checkpointer.restore({"variables": variables, "mean": jnp.asarray(mean)})
      if restored:
        variables, mean = restored[1]["variables"], restored[1]["mean"]
      else:
        variables = train(
          subject(mean),
          variables,
          x[own],
          np.searchsorted(labels, y[own]),
          num_steps=config.pretrain_steps,
          learning_rate=config.pretrain_learning_rate,
          weight_decay=weight_decay,
        )
        checkpointer.save(0, {"variables": variables, "mean": jnp.asarray(mean)})
    classifiers.append(subject(mean).classifier(variables, labels))
  return classifiers


def of_the_plane(config: Any, x: np.ndarray, y: np.ndarray, folder: pathlib.Path, *, index: int) -> Classifier:
  """One classifier of `experiments.circle`, of points x [N, 2] with labels y [N], kept in a folder."""
  module = MLPClassifier(
    num_classes=len(np.unique(y)),
    hidden=(config.width, config.width),
    batch_norm=config.batch_norm,
    init_scale=config.init_scale if config.batch_norm else 1.0,
  )
  variables: Any = module.init(jax.random.fold_in(jax.random.key(config.seed), index), jnp.asarray(x))
  if config.batch_norm:
    # With scale 1 the classifier ends far from its KKT point.
    variables["params"]["BatchNorm_1"]["scale"] *= config.init_scale
  else:
    variables = variables["params"]
  weight_decay = None if config.batch_norm else config.weight_decay
  subject = Subject.from_linen(module, input_shape=(2,), value_range=None, weight_decay=weight_decay)
  with Checkpointer(folder) as checkpointer:
    restored = checkpointer.restore(variables)
    if restored:
      variables = restored[1]
    else:
      variables = train(
        subject,
        variables,
        x,
        y,
        num_steps=config.pretrain_steps,
        learning_rate=0.02 if config.batch_norm else 0.05,
        last_share=0.025,
        weight_decay=weight_decay,
        steps_per_call=1000,
      )
      checkpointer.save(0, variables)
  return subject.classifier(variables)
