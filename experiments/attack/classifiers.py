"""The classifiers that the experiments attack: trained to their convergence point, or restored.

The functions of this file are the only ones on the way to a generator that see training data, as plain arrays.
"""

from collections.abc import Callable, Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifiers import Classifier, PyTree, Subject, two_logits
from kkt_jax.cli.progress import Progress, say
from kkt_jax.cli.workdir import Workdir
from kkt_jax.kkt import pretrain
from kkt_jax.networks import MLPClassifier

_SMALL = 0.05  # of a batch-normalised classifier's later kernels and of its last batch norm's scale


def label_groups(num_labels: int, num_classifiers: int) -> list[tuple[int, ...]]:
  """The labels shared out in order: 0-4 and 5-9 of ten digits for two classifiers, as in Fig. 8.

  >>> label_groups(10, 2)
  [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
  """
  return [tuple(int(label) for label in part) for part in np.array_split(np.arange(num_labels), num_classifiers)]


def train(subject: Subject, variables: PyTree, x: np.ndarray, classes: np.ndarray, **settings: Any) -> PyTree:
  """Trains a network to its convergence point: with weight decay, or with batch norm by loss-scaled steps.

  Args:
    subject: the network.
    variables: where it starts.
    x: inputs [N, *input_shape].
    classes: output indices [N].
    **settings: of `kkt_jax.kkt.pretrain.Descent.to_convergence`; one step in a compiled call unless they say otherwise.

  Returns:
    The trained variables, with the statistics that batch norm stores.
  """
  train_fn = subject.train_fn
  rest = {} if train_fn is None else {name: tree for name, tree in variables.items() if name != "params"}
  inputs = jnp.asarray(x)

  def apply_fn(params: PyTree, x: jax.Array) -> jax.Array:
    return subject.apply_fn(params, x) if train_fn is None else train_fn(rest | {"params": params}, x)[0]

  progress = Progress("classifier", settings["num_steps"])
  result = pretrain.gradient_descent(
    two_logits(apply_fn),
    variables if train_fn is None else variables["params"],
    inputs,
    jnp.asarray(classes),
    pretrain.Descent.to_convergence(**{"steps_per_call": 1} | settings),
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


def _kept(folder: pathlib.Path, like: PyTree, make: Callable[[], PyTree]) -> PyTree:
  """What a folder holds; if nothing, what is made now and kept there."""
  with Checkpointer(folder) as checkpointer:
    restored = checkpointer.restore(like)
    if restored:
      return restored[1]
    made = make()
    checkpointer.save(0, made)
    return made


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
  groups = label_groups(len(np.unique(y)), config.classifiers)
  keys = [jax.random.fold_in(jax.random.key(seed), index) for index in range(len(groups))]
  subsets = [(x[chosen], y[chosen]) for chosen in (np.isin(y, labels) for labels in groups)]
  parts = enumerate(zip(groups, subsets, keys, strict=True))
  return [_of_labels(config, *images, labels, folder / str(t), key) for t, (labels, images, key) in parts]


def _of_labels(
  config: Any, x: np.ndarray, y: np.ndarray, labels: Sequence[int], folder: pathlib.Path, key: jax.Array
) -> Classifier:
  """One of these classifiers, of images of its own labels."""
  module = MLPClassifier(
    num_classes=len(labels),
    hidden=(config.width, config.second_width),
    batch_norm=config.batch_norm,
    init_scale=_SMALL if config.batch_norm else 1.0,
  )
  variables: Any = jax.jit(module.init)(key, x[:1])
  if config.batch_norm:
    params = variables["params"]
    params["Dense_0"]["kernel"] *= config.first_init_scale / _SMALL
    params["BatchNorm_1"]["scale"] *= _SMALL  # a small last normalisation, like small weights
  else:
    variables = variables["params"]
  weight_decay = None if config.batch_norm else config.weight_decay

  def subject(mean: Any) -> Subject:
    offset = mean if config.mean_image else None
    return Subject.from_linen(module, input_shape=x.shape[1:], offset=offset, weight_decay=weight_decay)

  settings = {"num_steps": config.pretrain_steps, "learning_rate": config.pretrain_learning_rate}
  settings |= {"weight_decay": weight_decay}
  start = {"variables": variables, "mean": x.mean(axis=0)}
  make = lambda: train(subject(start["mean"]), variables, x, np.searchsorted(labels, y), **settings)
  kept = _kept(folder, start, lambda: start | {"variables": make()})
  return subject(kept["mean"]).classifier(kept["variables"], labels)


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
  settings = {"num_steps": config.pretrain_steps, "last_share": 0.025, "steps_per_call": 1000}
  settings |= {"learning_rate": 0.02 if config.batch_norm else 0.05, "weight_decay": weight_decay}
  return subject.classifier(_kept(folder, variables, lambda: train(subject, variables, x, y, **settings)))


def shared_folder(out: Workdir, config: Any, names: Sequence[str], **settings: Any) -> pathlib.Path:
  """The folder of what runs that agree in some settings share, the named ones of their config and more."""
  if not config.shared_dir:
    return out.path
  settings |= {name: getattr(config, name) for name in names}
  return Workdir(config.shared_dir, settings, flag="shared_dir", alone=False).path
