"""What the experiments on the circle and on images share: training of the attacked, conditions, multipliers, terms."""

from collections.abc import Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from experiments import common
from kkt_jax import homogeneity, networks, pretrain, priors, training
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import Conditions, max_margin_conditions, weight_decay_conditions

OPTIMIZERS = ("adam", "sgd")


def train_classifier(
  module: networks.MLPClassifier,
  variables: PyTree,
  x: ArrayLike,
  y: ArrayLike,
  *,
  num_steps: int,
  learning_rate: float,
  last_share: float,
  weight_decay: float | None,
  steps_per_call: int = 1,
) -> PyTree:
  """Trains a classifier to its convergence point: with weight decay, or without by loss-scaled steps.

  Args:
    module: the classifier.
    variables: where it starts.
    x: inputs [N, ...].
    y: output indices [N].
    num_steps: steps of full-batch gradient descent.
    learning_rate: their size; of loss-scaled ones that of the first fifth.
    last_share: the last loss-scaled step's size over the first's.
    weight_decay: its weight; loss-scaled steps where None.
    steps_per_call: steps in one compiled call.

  Returns:
    The trained variables, with the statistics that batch norm stores.
  """
  apply: Any = module.clone(gate_sharpness=None, dtype=None).apply

  def train_mode(params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
    """Logits and the statistics that batch norm stores, if any."""
    return apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])

  hold = num_steps // 5
  form: dict[str, Any] = {"learning_rate": learning_rate, "weight_decay": weight_decay, "momentum": 0.9}
  if weight_decay is None:
    falling = optax.schedules.exponential_decay(learning_rate, num_steps - hold, last_share, transition_begin=hold)
    form = {"learning_rate": falling, "loss_scaled": True}
  progress = common.Progress("classifier", num_steps)
  x = jnp.asarray(x)
  result = pretrain.gradient_descent(
    lambda params, x: train_mode(params, x)[0],
    variables["params"],
    x,
    jnp.asarray(y),
    num_steps=num_steps,
    steps_per_call=steps_per_call,
    on_progress=lambda step, log_loss: progress.update(step, {"log loss": log_loss}),
    **form,
  )
  low, median, high = np.percentile(result.margins, [5, 50, 95])
  common.say(
    f"classifier: log loss {result.log_loss:.4g}, |gradient| / |zeta| {result.relative_gradient:.2g},"
    f" margins {low:.4g}, {median:.4g}, {high:.4g} (5%, median, 95%)"
  )
  return {"params": result.params, **train_mode(result.params, x)[1]}


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


def adam(peak: float, *, num_steps: int) -> optax.GradientTransformation:
  """Adam with a constant learning rate for a third of the training and a cosine after it."""
  held = num_steps // 3
  schedule = optax.schedules.join_schedules(
    [
      optax.schedules.constant_schedule(peak),
      optax.schedules.cosine_decay_schedule(peak, max(num_steps - held, 1), alpha=0.02),
    ],
    boundaries=[held],
  )
  return optax.adam(schedule, b2=0.99)


def every_sample(
  method: training.Method, state: training.TrainState, classifiers: Sequence[Classifier]
) -> tuple[jax.Array, np.ndarray]:
  """The samples of every noise that the generator was trained on, M for each classifier, and their labels."""
  assert state.noise is not None  # a method with fixed noise
  y = np.concatenate([training.balanced_labels(c, method.batch_size) for c in classifiers])
  t = np.repeat(np.arange(len(classifiers)), method.batch_size)
  return training.generate_from(method, state, state.noise.reshape(len(y), -1), y, t), y


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
  return common.Workdir(shared_dir, settings, flag="shared_dir", alone=False).path if shared_dir else workdir
