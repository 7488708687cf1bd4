"""The joint training of theta, eta and alpha: its state and one jitted step.

One classifier is the case T = 1 of T classifiers. All of them share one generator g(noise, y, t; theta) and the
multipliers h(x, y, t; eta), which take the classifier's index t; each has its own alpha. A step generates M samples for
each classifier, sums the losses over the classifiers (Eqs. 7, 12, 13) and moves theta, eta and alpha together, as
section 4 of the paper describes it. `kkt_jax.reconstruction.reconstruct` is the door to all of this.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from kkt_jax import _checks, sharding
from kkt_jax._precision import full_precision
from kkt_jax._typing import PyTree
from kkt_jax.classifiers.classifier import Classifier, Evaluation
from kkt_jax.classifiers.relaxation import computed_in, pre_activations
from kkt_jax.generators.base import code_of, Generator
from kkt_jax.kkt import losses, multipliers
from kkt_jax.kkt.conditions import Conditions
from kkt_jax.reconstruction.coordinates import Equations
from kkt_jax.reconstruction.recipes import Multipliers, Stationarity
from kkt_jax.reconstruction.terms import Batch, Term

PullBack = Callable[[jax.Array], tuple[PyTree]]


@dataclasses.dataclass(frozen=True)
class Problem:
  """What a training step is made of; all of it is static.

  Attributes:
    generator: the generator.
    multipliers: the multipliers.
    stationarity: how the equations are measured and when they count.
    terms: the other terms of the loss by name.
    optimizer: of the tree ``{"theta": ..., "eta": ..., "alpha": ...}``, with ``"gates"`` if they are free.
    classes: the output indices of each classifier's batch, T arrays [M]; see `class_sequence`.
    num_steps: training steps altogether, through which schedules run.
    microbatch_size: samples for each classifier that are in memory at once, a divisor of M; all of them if None. It
      changes memory and time, not the result, and needs samples that do not interact: no batch norm on batch
      statistics, in generator or classifier, no term of the batch as a whole.
    mesh: devices over which the samples of every batch, or microbatch, are split (`kkt_jax.sharding`).
  """

  generator: Generator
  multipliers: Multipliers
  stationarity: Stationarity
  terms: Mapping[str, Term]
  optimizer: optax.GradientTransformation
  classes: Sequence[np.ndarray]
  num_steps: int
  microbatch_size: int | None = None
  mesh: Mesh | None = None

  @property
  def active_terms(self) -> dict[str, Term]:
    """The terms that have a weight."""
    return {name: term for name, term in self.terms.items() if term.weight}

  @functools.cached_property
  def first_batch(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The log-scale and the median absolute margin of each classifier on a first batch, compiled once."""
    return jax.jit(functools.partial(_first_batch, self))


class TrainState(NamedTuple):
  """Everything that a bitwise resume needs; a pytree of arrays.

  Attributes:
    step: steps taken.
    params: ``{"theta": ..., "eta": {"multipliers": ..., "log_scale": [T]}, "alpha": [T]}``; with free gates also
      ``"gates"``, for each classifier and gate the logits at its kink [C, codes, ...].
    statistics: the generator's running averages.
    opt_state: of the optimizer.
    key: the random key of the next step.
    origin: what it is trained from, a digest [2, 8] of the classifiers and of the recipe, zeros if nobody
      says; see `kkt_jax.reconstruction.Reconstruction.load`.
  """

  step: jax.Array
  params: PyTree
  statistics: PyTree
  opt_state: PyTree
  key: jax.Array
  origin: jax.Array


TrainStep = Callable[
  [TrainState, Sequence[Classifier], Sequence[Equations], Any], tuple[TrainState, dict[str, jax.Array]]
]


def class_sequence(
  classifier: Classifier, num_samples: int, label_weights: Mapping[int, float] | None = None
) -> np.ndarray:
  """The classes [num_samples] of a batch, in proportion to the weights of their labels, dealt in turn.

  Rounded by largest remainders, so that a batch has no sampling error in its classes.

  Args:
    classifier: says which labels there are.
    num_samples: M.
    label_weights: relative frequency of each label, not negative; equal if None.

  Raises:
    ValueError: a label of the classifier has no weight, a weight is negative or not finite, or all are 0.

  >>> from kkt_jax.classifiers.classifier import make_classifier
  >>> linear = make_classifier(lambda w, x: x @ w, jnp.ones((1, 2)), (1,))
  >>> class_sequence(linear, 4).tolist(), class_sequence(linear, 4, {0: 3.0, 1: 1.0}).tolist()
  ([0, 1, 0, 1], [0, 0, 1, 0])
  """
  wanted = [1.0 if label_weights is None else label_weights.get(label, math.nan) for label in classifier.labels]
  if not all(math.isfinite(value) and value >= 0 for value in wanted) or not sum(wanted):
    raise ValueError(
      f"label_weights must hold a weight of at least 0 for each label, {classifier.labels}, and one above 0; got"
      f" {label_weights}."
    )
  exact = np.asarray(wanted) / sum(wanted) * num_samples
  counts = np.floor(exact).astype(int)
  counts[np.argsort(counts - exact, kind="stable")[: num_samples - counts.sum()]] += 1
  places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
  return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]


@full_precision
def init_state(
  key: jax.Array,
  problem: Problem,
  classifiers: Sequence[Classifier],
  equations: Sequence[Equations],
  *,
  theta: PyTree,
  statistics: PyTree,
  eta: PyTree,
  margins: Sequence[float | None],
) -> TrainState:
  """The state at step 0. Scaled multipliers make the sum as long as its target; alpha is at the given or first margin.

  Args:
    key: typed random key.
    problem: the problem.
    classifiers: T classifiers.
    equations: those of each, see `kkt_jax.reconstruction.coordinates`.
    theta: initial parameters of the generator.
    statistics: its initial running averages.
    eta: initial parameters of the multipliers.
    margins: e^-alpha at the start of each classifier, in logits; the median absolute margin of the first samples if
      None.

  Returns:
    The `TrainState`.

  Raises:
    ValueError: microbatches of samples that interact, non-finite parameters, or first samples without any margin.
  """
  _checks.check_finite("theta", theta)
  coupled = jax.tree.leaves(statistics) or any(classifier.batch_coupled for classifier in classifiers)
  if problem.microbatch_size is not None:
    _checks.check_at_least("microbatch_size", problem.microbatch_size, 1)
    if problem.generator.batch_size % problem.microbatch_size:
      raise ValueError(
        f"microbatch_size must divide the batch size, {problem.generator.batch_size}; got {problem.microbatch_size}."
      )
    if coupled:
      raise ValueError(
        "microbatch_size must be None with batch norm on batch statistics, in the generator or in a classifier, whose"
        f" samples interact; got {problem.microbatch_size}."
      )
  _, first_key, key = jax.random.split(key, 3)
  params = {
    "theta": theta,
    "eta": {"multipliers": eta, "log_scale": jnp.zeros(len(classifiers))},
    "alpha": jnp.zeros(len(classifiers)),
  }
  if problem.stationarity.free_gates and problem.generator.codes:
    params["gates"] = [_first_gates(classifier, problem.generator.codes) for classifier in classifiers]

  first = [margin for margin in margins if margin is not None]
  if problem.multipliers.scaled or None in margins:
    log_scales, sizes = problem.first_batch(first_key, params, statistics, classifiers, equations)
    first = [float(size) if margin is None else margin for margin, size in zip(margins, sizes, strict=True)]
  if not all(margin > 0 for margin in first):
    raise ValueError(f"margin must be given: the first samples have none that is positive; got {first}.")
  if problem.multipliers.scaled:
    params["eta"]["log_scale"] = log_scales
  params["alpha"] = -jnp.log(jnp.asarray(first, jnp.float32))
  return TrainState(
    jnp.zeros((), jnp.int32), params, statistics, problem.optimizer.init(params), key, jnp.zeros((2, 8), jnp.int32)
  )


def _first_batch(
  problem: Problem,
  key: jax.Array,
  params: PyTree,
  statistics: PyTree,
  classifiers: Sequence[Classifier],
  equations: Sequence[Equations],
) -> tuple[jax.Array, jax.Array]:
  """The log-scale and the median absolute margin of each classifier on a first batch."""
  log_scales, sizes = [], []
  noise, y = _samples(problem, classifiers, key, jnp.zeros(()))
  few = slice(problem.microbatch_size)  # enough for a start
  samples, _ = _generate(problem, params, statistics, noise[few], y[few])
  batches = _batches(problem, params, classifiers, equations, samples, noise[few], y[few])
  for equation, (batch, pull_back) in zip(equations, batches, strict=True):
    log_scales.append(multipliers.initial_log_scale(equation.conditions, _stationarity_sum(batch, pull_back)))
    sizes.append(jnp.median(jnp.abs(losses.runner_up_margin(batch.logits, batch.classes))))
  return jnp.stack(log_scales), jnp.stack(sizes)


def make_train_step(problem: Problem) -> TrainStep:
  """The jitted ``(state, classifiers, equations, count) -> (state, metrics)``, which takes ``count`` steps.

  ``count`` is None for a single step, or an integer: then the steps run inside one compiled loop, whatever their
  number.

  Returns:
    The step. Its metrics, those of the last step before its update, are every term of the loss [T], ``"total"`` and
    ``"gradient_norm"`` (scalars), ``"residual"`` (relative squared, or the cosine distance if that is trained; [T]) and
    ``"margin"`` (e^-alpha, [T]). Samples of a batch interact through the stationarity sum, and through batch norm if a
    network has it.
  """

  @full_precision
  def one_step(
    state: TrainState, classifiers: Sequence[Classifier], equations: Sequence[Equations]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    noise_key, _, key = jax.random.split(state.key, 3)
    loss_fn = jax.grad(functools.partial(_loss, problem), has_aux=True)
    gradient, (metrics, statistics) = loss_fn(state.params, state, noise_key, classifiers, equations)
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    updates, opt_state = problem.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, statistics, opt_state, key, state.origin), metrics

  # Without saying so, several processes could each end up with a part of the state.
  everywhere = None if problem.mesh is None else sharding.replicated(problem.mesh)

  @functools.partial(jax.jit, out_shardings=everywhere)
  def steps(
    state: TrainState, classifiers: Sequence[Classifier], equations: Sequence[Equations], count: Any
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    if count is None:
      return one_step(state, classifiers, equations)
    shapes = jax.eval_shape(one_step, state, classifiers, equations)[1]
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.fori_loop(0, count, lambda _, carry: one_step(carry[0], classifiers, equations), (state, zeros))

  return steps


def _loss(
  problem: Problem,
  params: PyTree,
  state: TrainState,
  key: jax.Array,
  classifiers: Sequence[Classifier],
  equations: Sequence[Equations],
) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
  """The loss of a batch (Eq. 7, minimised in Eq. 12), summed over classifiers (Eq. 13), with metrics and averages."""
  progress = _progress(problem, state)
  samples = _samples(problem, classifiers, key, progress)
  of_part = lambda part: _means(problem, params, state.statistics, classifiers, equations, part)
  if problem.microbatch_size is not None:
    mean = optax.microbatching.AccumulationType.MEAN
    of_part = optax.microbatching.microbatch(jax.checkpoint(of_part), 0, problem.microbatch_size, mean)
  means, statistics = of_part(samples)
  active = problem.active_terms
  values = {name: jnp.stack([of_terms[name] for _, of_terms in means]) for name in active}
  weights = {name: _weight(term, progress) for name, term in active.items()}
  metrics = dict(values)
  if problem.stationarity.weight:
    pairs = [
      _stationarity(problem.stationarity, equation.conditions, sums, alpha)
      for equation, (sums, _), alpha in zip(equations, means, params["alpha"], strict=True)
    ]
    values["stationarity"] = jnp.stack([value for value, _ in pairs])
    weights["stationarity"] = _stationarity_weight(problem.stationarity, progress)
    metrics |= {"stationarity": values["stationarity"], "residual": jnp.stack([logged for _, logged in pairs])}
  total = sum((weights[name] * jnp.sum(value) for name, value in values.items()), jnp.zeros(()))
  metrics |= {"total": total, "margin": jnp.exp(-params["alpha"])}
  return total, (metrics, statistics)


def _means(
  problem: Problem,
  params: PyTree,
  statistics: PyTree,
  classifiers: Sequence[Classifier],
  equations: Sequence[Equations],
  samples: tuple[jax.Array, jax.Array],
) -> tuple[list[tuple[PyTree, dict[str, jax.Array]]], PyTree]:
  """For each classifier the stationarity sum and the means of the other terms over (a part of) a batch."""
  if problem.mesh is not None:
    samples = sharding.split_samples(samples, problem.mesh)
  x, statistics = _generate(problem, params, statistics, *samples)
  means = []
  batches = _batches(problem, params, classifiers, equations, x, *samples)
  for classifier, (batch, pull_back) in zip(classifiers, batches, strict=True):
    values = {name: term.function(classifier, batch) for name, term in problem.active_terms.items()}
    whole = [name for name, value in values.items() if jnp.ndim(value) == 0]
    if whole and problem.microbatch_size is not None:
      raise ValueError(f"microbatch_size must be None with terms of the batch as a whole, {', '.join(whole)}.")
    sums = _stationarity_sum(batch, pull_back) if problem.stationarity.weight else {}
    means.append((sums, {name: jnp.mean(value) for name, value in values.items()}))
  return means, statistics


@full_precision
def batch_samples(
  problem: Problem, state: TrainState, classifiers: Sequence[Classifier]
) -> list[tuple[jax.Array, jax.Array]]:
  """One step's batch for each classifier, as at inference: samples [M, *input_shape] and their labels [M]."""
  noise, y = _samples(problem, classifiers, state.key, _progress(problem, state))
  samples, _ = _generate(problem, state.params, state.statistics, noise, y, train=False)
  return [(x, y[:, index]) for index, x in enumerate(samples)]


def _samples(
  problem: Problem, classifiers: Sequence[Classifier], key: jax.Array, progress: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Noise [M, T, D] and labels [M, T] of a step's batch; samples first, to be cut into microbatches."""
  keys = jax.random.split(key, len(classifiers))
  noise = [
    problem.generator.noise(noise_key, progress, classes)
    for noise_key, classes in zip(keys, problem.classes, strict=True)
  ]
  y = [np.asarray(c.labels)[classes] for c, classes in zip(classifiers, problem.classes, strict=True)]
  return jnp.stack(noise, axis=1), jnp.asarray(np.stack(y, axis=1))


def _generate(
  problem: Problem, params: PyTree, statistics: PyTree, noise: jax.Array, y: jax.Array, *, train: bool = True
) -> tuple[list[jax.Array], PyTree]:
  """One pass of the generator for all classifiers: from noise [M, T, D] and labels [M, T] to samples for each.

  The new running averages come with it. The classifiers take turns sample by sample, so that a batch whose samples are
  split among devices stays where it is.
  """
  num_samples, num_classifiers, _ = noise.shape
  t = jnp.tile(jnp.arange(num_classifiers), num_samples)
  flat = noise.reshape(num_samples * num_classifiers, -1)
  x, statistics = problem.generator.generate(params["theta"], statistics, flat, y.reshape(-1), t, train)
  x = x.reshape(num_samples, num_classifiers, *x.shape[1:])
  return [x[:, index] for index in range(num_classifiers)], statistics


def _batches(
  problem: Problem,
  params: PyTree,
  classifiers: Sequence[Classifier],
  equations: Sequence[Equations],
  samples: Sequence[jax.Array],
  noise: jax.Array,
  y: jax.Array,
) -> list[tuple[Batch, PullBack]]:
  """For each classifier what it makes of its samples, with multipliers, and the pull-back from logits to parameters."""
  batches = []
  for index, (classifier, equation, x) in enumerate(zip(classifiers, equations, samples, strict=True)):
    labels, alpha, inputs = y[:, index], params["alpha"][index], x
    code = code_of(noise[:, index], problem.generator.codes) if problem.generator.codes else None
    if equation.size is not None:
      assert problem.generator.coordinates is not None and code is not None
      inputs = equation.inputs(problem.generator.coordinates(params["theta"], code, labels, index))
    classes = classifier.classes_of(labels)
    gates = [[logits[classes, code] for logits in params["gates"][index]]] if "gates" in params else []
    whole, pull_back = _evaluate(equation.classifier, inputs, problem.stationarity.compute_dtype, *gates)
    batch = Batch(x, classifier.to_unit(x), labels, classes, code, index, alpha, *whole)
    mu = problem.multipliers.apply(params["eta"]["multipliers"], classifier, batch)
    if problem.multipliers.scaled:
      mu = jnp.exp(params["eta"]["log_scale"][index]) * mu
    batches.append((batch._replace(mu=mu), pull_back))
  return batches


def _first_gates(classifier: Classifier, codes: int) -> list[jax.Array]:
  """Zeros [C, codes, ...] for each gate: half open at their kinks."""
  probe = jax.ShapeDtypeStruct((2, *classifier.input_shape), jnp.result_type(float))
  roots = jax.eval_shape(lambda x: pre_activations(classifier.apply_fn, classifier.params, x), probe)
  return [jnp.zeros((classifier.num_classes, codes, *root.shape[1:])) for root in roots]


def _evaluate(
  classifier: Classifier, x: jax.Array, compute_dtype: Any, *gates: list[jax.Array]
) -> tuple[Evaluation, PullBack]:
  """Logits, statistics and features in one pass as in training, and the pull-back from logits to parameters.

  Free gates are those of `kkt_jax.classifiers.relaxation.relax_gates`. In another precision only derivatives are
  computed, in a pass of their own: margins and statistics stay exact.
  """
  forward = lambda params, x, *gates: classifier.forward(params, x, True, *gates)
  if compute_dtype is None:
    split = lambda params: ((evaluation := forward(params, x, *gates)).logits, evaluation)
    _, pull_back, whole = jax.vjp(split, classifier.params, has_aux=True)
    return whole, pull_back
  rough = computed_in(lambda params, x, *gates: forward(params, x, *gates).logits, compute_dtype)
  _, pull_back = jax.vjp(lambda params: rough(params, x, *gates), classifier.params)
  return forward(classifier.params, x), pull_back


def _stationarity_sum(batch: Batch, pull_back: PullBack) -> PyTree:
  """See `kkt_jax.kkt.stationarity_sum`."""
  return pull_back(losses.cotangent(batch.logits, batch.classes, batch.mu).astype(batch.logits.dtype))[0]


def _stationarity(
  stationarity: Stationarity, conditions: Conditions, sums: PyTree, alpha: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The stationarity term of one classifier (Eq. 5), and its relative residual for the log."""
  if stationarity.target_exponent:
    factor = jnp.exp(alpha * stationarity.target_exponent)
    conditions = dataclasses.replace(conditions, target=optax.tree.scale(factor, conditions.target))
  value = stationarity.measure(conditions, sums)
  logged = value if stationarity.measure is losses.cosine_distance else losses.relative_residual(conditions, sums)
  return value, logged


def _progress(problem: Problem, state: TrainState) -> jax.Array:
  """How far training has come, from 0 to 1."""
  return state.step / max(problem.num_steps, 1)


def _stationarity_weight(stationarity: Stationarity, progress: jax.Array) -> jax.Array:
  if stationarity.ramp:
    share = jnp.clip((progress - stationarity.begin) / stationarity.ramp, 0.0, 1.0)
  else:
    share = jnp.where(progress < stationarity.begin, 0.0, 1.0)
  return stationarity.weight * share


def _weight(term: Term, progress: jax.Array) -> jax.Array:
  return jnp.asarray(term.weight * (1.0 if term.schedule is None else term.schedule(progress)))
