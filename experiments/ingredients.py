"""What the experiments on the circle and on images build their methods from: conditions, multipliers, shared terms."""

from collections.abc import Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import common
from kkt_jax import homogeneity, networks, priors, training
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import Conditions, max_margin_conditions, weight_decay_conditions

OPTIMIZERS = ("adam", "sgd")


def rates_of(classifiers: Sequence[Classifier], x: jax.Array, *, rule: str) -> list[homogeneity.RateSolution]:
  """Lambda of each classifier from its derivative equations on inputs x [K, *input_shape]; any random ones will do."""
  return [
    homogeneity.solve_rates(homogeneity.derivative_equations(c.apply_fn, c.params, x), c.params, rule=rule)
    for c in classifiers
  ]


def conditions_of(
  classifiers: Sequence[Classifier], rates: Sequence[homogeneity.RateSolution], *, weight_decay: float
) -> list[Conditions]:
  """The stationarity condition of each classifier: the max-margin problem's, or without rates weight decay's."""
  if not rates:
    return [weight_decay_conditions(c.params, weight_decay=weight_decay) for c in classifiers]
  return [max_margin_conditions(c.params, own) for c, own in zip(classifiers, rates, strict=True)]


def raw_multipliers(form: str, network: networks.MultiplierNetwork) -> training.MultiplierFn | None:
  """What the multipliers of a form are made from; nothing where they are the classifier's softmax."""
  if form == "softmax":
    return None
  if form == "runner_up":  # a table: every batch holds the same samples in the same order
    return lambda table, x, y, t: table[t[0]]
  apply: Any = network.apply
  return apply


def init_multipliers(
  form: str, network: networks.MultiplierNetwork, key: jax.Array, *, batch_size: int, input_shape: Sequence[int]
) -> PyTree:
  """Their first parameters."""
  if form == "softmax":
    return None
  if form == "runner_up":
    return jax.random.uniform(key, (network.num_classifiers, batch_size, 1))
  zero = jnp.zeros(1, jnp.int32)
  return network.init(key, jnp.zeros((1, *input_shape)), zero, zero)


def learns_scale(form: str, residual: str) -> bool:
  """Whether multipliers need a learned scale: the cosine is free of it; the softmax and free numbers have their own."""
  return form in ("softplus", "relu") and residual != "cosine"


def cross_entropy(classifier: Classifier, batch: training.Batch) -> jax.Array:
  """The classification loss of generated samples [M]."""
  logits = classifier.predict_fn(classifier.params, batch.x)
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, classifier.local_labels(batch.y))


def statistics(classifier: Classifier, batch: training.Batch) -> jax.Array:
  """How far a batch is from the stored batch-norm statistics."""
  assert classifier.statistics_fn is not None  # a classifier with batch norm
  return priors.statistics_distance(classifier.statistics_fn(classifier.params, batch.x), classifier.statistics)


def shared_folder(shared_dir: str, workdir: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
  """The folder of what several runs can share if they agree in some settings; the workdir where none is named.

  Raises:
    UsageError: it belongs to runs with other settings.
  """
  return common.Workdir(shared_dir, settings, flag="shared_dir").path if shared_dir else workdir
