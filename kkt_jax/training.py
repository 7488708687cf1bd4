"""The joint training of generator, multipliers and alpha: Algorithms 1 and 2 as one code path.

One classifier is the case T = 1 of T classifiers. All of them share one generator g(noise, y, t; theta) and one
multiplier network h(x, y, t; eta), which take the classifier's index t; each has its own alpha. A step generates M
samples for each classifier, sums the losses over the classifiers (Eq. 13) and moves theta, eta and alpha together.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
import optax

from kkt_jax import _checks, losses, multipliers, parallel
from kkt_jax.accumulation import microbatch_mean
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import Conditions, weigh_tensors
from kkt_jax.homogeneity import tensor_names

RESIDUALS = ("cosine", "relative", "absolute", "squared")

# (theta, statistics, noise[M, D], y[M], t[M], train) -> (x[M, ...], statistics); the statistics are the generator's own
# running averages (batch norm), an empty tree for generators without them.
GenerateFn = Callable[[PyTree, PyTree, jax.Array, jax.Array, jax.Array, bool], tuple[jax.Array, PyTree]]
# (eta, x[M, ...], y[M], t[M]) -> raw multipliers [M, C], C the greatest number of classes of any classifier.
MultiplierFn = Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array]
Schedule = Callable[[ArrayLike], Any]


class Batch(NamedTuple):
  """What was generated for one classifier in one step.

  Attributes:
    x: samples [M, *input_shape].
    y: their labels [M].
    noise: what they were generated from [M, D].
  """

  x: jax.Array
  y: jax.Array
  noise: jax.Array


Prior = Callable[[Classifier, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Method:
  """How the generator is trained: functions and hyper-parameters, all static.

  Attributes:
    generate: the generator.
    optimizer: of the tree ``{"theta": ..., "eta": ..., "alpha": ...}``; see `partitioned`.
    noise_dim: D, size of the noise.
    batch_size: M, samples for each classifier in each step.
    weights: weight of each term of the loss by name: ``"stationarity"``, ``"duality"`` (the paper's beta),
      ``"fresh_duality"`` where ``num_fresh`` is not 0, ``"least_multiplier"`` where that is not, and every prior;
      numbers, or schedules of the step. Free multipliers are drawn to the classifier's own probabilities where there is
      one for ``"softmax_distance"``; see `kkt_jax.multipliers.softmax_distance`.
    priors: further terms by name, each a function of the classifier and its batch; see `kkt_jax.priors`.
    residual: how stationarity is measured: ``"relative"`` and ``"cosine"`` are scale-free, ``"absolute"`` is the
      paper's unsquared norm (Eq. 5), ``"squared"`` its square (Haim et al. 2022).
    target_exponent: how the target follows alpha, ``e^(alpha target_exponent)`` times what it is, with a gradient: the
      paper's Lambda-bar (Eq. 3) with 2 lambda_max - 1. A constant target where 0; see
      `kkt_jax.conditions.max_margin_conditions`.
    tensor_weights: weights by tensor name (1 where a name is missing): of the residuals per tensor, whose mean is then
      taken, for ``"relative"``; of the squared errors for ``"cosine"``. All parameters alike where None.
    multiplier_form: ``"softplus"`` or ``"relu"`` (the network h), ``"softmax"`` (the classifier's probabilities), or
      ``"runner_up"`` (one free number a sample, on the runner-up class).
    raw_multipliers: the network h; not needed with ``"softmax"``. With ``"runner_up"`` it returns [M, 1].
    least_multiplier: lambda_min of the term ``"least_multiplier"``, see `kkt_jax.multipliers.shortfall`; no such term
      where 0.
    learn_scale: whether the multipliers have a learned log-scale for each classifier. False only where their size is
      known, as with a known weight decay.
    delta: width of the flat bottom of the duality loss.
    relative_duality: measure the duality loss in units of e^-alpha.
    fixed_noise: whether every step uses the same M noise vectors of each classifier instead of new ones. The sum over
      samples then has no sampling error: a random batch of M biases the squared residual by its variance / M.
    stratified_noise: whether the first noise coordinate of a batch is drawn once from each of as many equally likely
      intervals as a class has samples; its distribution stays normal. A generator with a codebook then uses every code
      in every step.
    num_fresh: samples from never-trained noise that enter ``"fresh_duality"`` alone, so that every noise vector gives a
      sample of the wanted class.
    microbatch_size: samples for each classifier that are held in memory at once, a divisor of ``batch_size``; all of
      them where None. It changes memory and time, not the result (`kkt_jax.accumulation`), and needs samples that do
      not interact: no batch norm on batch statistics, in generator or classifier, and no prior of a batch as a whole.
    mesh: devices over which the samples of every batch, or microbatch, are split (`kkt_jax.parallel`); wherever the
      state lies where None. It changes time and memory, not the result, up to rounding.
  """

  generate: GenerateFn
  optimizer: optax.GradientTransformation
  noise_dim: int
  batch_size: int
  weights: Mapping[str, float | Schedule]
  priors: Mapping[str, Prior] = dataclasses.field(default_factory=dict)
  residual: str = "relative"
  target_exponent: float = 0.0
  tensor_weights: Mapping[str, float] | None = None
  multiplier_form: str = "softplus"
  raw_multipliers: MultiplierFn | None = None
  least_multiplier: float = 0.0
  learn_scale: bool = True
  delta: float = 0.1
  relative_duality: bool = True
  fixed_noise: bool = False
  stratified_noise: bool = False
  num_fresh: int = 0
  microbatch_size: int | None = None
  mesh: Mesh | None = None

  def __post_init__(self) -> None:
    _checks.check_choice("residual", self.residual, RESIDUALS)
    _checks.check_choice("multiplier_form", self.multiplier_form, multipliers.FORMS)
    for name in ("noise_dim", "batch_size"):
      _checks.check_at_least(name, getattr(self, name), 1)
    _checks.check_at_least("delta", self.delta, 0)
    _checks.check_at_least("least_multiplier", self.least_multiplier, 0)
    _checks.check_at_least("num_fresh", self.num_fresh, 0)
    if (self.multiplier_form == "softmax") != (self.raw_multipliers is None):
      raise ValueError(
        "raw_multipliers must be given for every form but 'softmax', and not for that; got"
        f" multiplier_form = {self.multiplier_form!r}."
      )
    if self.microbatch_size is not None:
      _checks.check_at_least("microbatch_size", self.microbatch_size, 1)
      if self.batch_size % self.microbatch_size:
        raise ValueError(f"microbatch_size must divide batch_size = {self.batch_size}; got {self.microbatch_size}.")
      if self.multiplier_form == "runner_up":
        raise ValueError(
          "microbatch_size must be None with multiplier_form = 'runner_up', whose numbers are a batch's."
        )
      if "softmax_distance" in self.weights:
        raise ValueError("microbatch_size must be None with a weight of softmax_distance, a variance over a batch.")


class TrainState(NamedTuple):
  """Everything that a bitwise resume needs; a pytree of arrays.

  Attributes:
    step: steps taken.
    params: ``{"theta": ..., "eta": {"network": ..., "log_scale": [T]}, "alpha": [T]}``.
    statistics: the generator's running averages.
    opt_state: of the optimizer.
    noise: the noise of every step [T, M, D]; None where it is drawn anew.
    key: the random key of the next step.
  """

  step: jax.Array
  params: PyTree
  statistics: PyTree
  opt_state: PyTree
  noise: jax.Array | None
  key: jax.Array


class TrainStep(NamedTuple):
  """A compiled step and how many steps one call of it takes; see `make_train_step`."""

  call: Callable[[TrainState, Sequence[Classifier], Sequence[Conditions]], tuple[TrainState, dict[str, jax.Array]]]
  steps_per_call: int


class TrainingDiverged(FloatingPointError):
  """A loss term or the gradient became NaN or infinite; the message names it."""


def partitioned(
  theta: optax.GradientTransformation, eta: optax.GradientTransformation, alpha: optax.GradientTransformation
) -> optax.GradientTransformation:
  """One optimizer for each of the three groups of unknowns, as one `optax.GradientTransformation`."""
  return optax.partition(
    {"theta": theta, "eta": eta, "alpha": alpha}, {"theta": "theta", "eta": "eta", "alpha": "alpha"}
  )


def init_state(
  key: jax.Array,
  method: Method,
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  *,
  theta: PyTree,
  statistics: PyTree,
  eta: PyTree = None,
  margin: ArrayLike | Sequence[float] | None = None,
) -> TrainState:
  """A start that cannot die: multipliers as long as their target, alpha at a given or the generated margin.

  Args:
    key: typed random key.
    method: the method.
    classifiers: T classifiers.
    conditions: the stationarity condition of each.
    theta: initial parameters of the generator.
    statistics: its initial running averages.
    eta: initial parameters of the multiplier network; None with softmax multipliers.
    margin: e^-alpha at the start, in logits, positive, one for all or for each classifier [T]; the median absolute
      margin of the first samples where None.

  Returns:
    The `TrainState` at step 0.

  Raises:
    ValueError: no classifier, another number of conditions, non-finite parameters, a margin that is not positive, or
      microbatches of samples that interact.
  """
  if not classifiers:
    raise ValueError("classifiers must hold at least one classifier; got none.")
  if len(classifiers) != len(conditions):
    raise ValueError(f"conditions must hold one for each of {len(classifiers)} classifiers; got {len(conditions)}.")
  if margin is not None:
    for value in jnp.atleast_1d(jnp.asarray(margin)).tolist():
      _checks.check_positive("margin", value)
  _checks.check_finite("theta", theta)
  if method.microbatch_size is not None and (
    jax.tree.leaves(statistics) or any(classifier.batch_coupled for classifier in classifiers)
  ):
    raise ValueError(
      "microbatch_size must be None with batch norm on batch statistics, in the generator or in a classifier: its"
      f" samples interact; got {method.microbatch_size}."
    )
  noise_key, first_key, key = jax.random.split(key, 3)
  num_classifiers = len(classifiers)
  params = {
    "theta": theta,
    "eta": {"network": eta, "log_scale": jnp.zeros(num_classifiers)},
    "alpha": jnp.zeros(num_classifiers),
  }
  fixed = _new_noise(method, classifiers, noise_key) if method.fixed_noise else None
  state = TrainState(jnp.zeros((), jnp.int32), params, statistics, (), fixed, key)
  noise = fixed if fixed is not None else _new_noise(method, classifiers, first_key)

  @jax.jit
  def first_batch(
    params: PyTree, classifiers: Sequence[Classifier], conditions: Sequence[Conditions]
  ) -> tuple[jax.Array, jax.Array]:
    """The log-scale and the median absolute margin of each classifier on a first batch."""
    log_scales, margins = [], []
    few = slice(method.microbatch_size)  # enough for a start
    batches, _ = _generate(method, params, statistics, classifiers, noise[:, few], _labels(method, classifiers)[:, few])
    for index, (classifier, condition, batch) in enumerate(zip(classifiers, conditions, batches, strict=True)):
      sums = _stationarity_sum(classifier, batch, _multipliers(method, params, classifier, index, batch))
      log_scales.append(multipliers.initial_log_scale(condition, sums))
      logits = classifier.predict_fn(classifier.params, batch.x)
      margins.append(jnp.median(jnp.abs(losses.runner_up_margin(logits, classifier.local_labels(batch.y)))))
    return jnp.stack(log_scales), jnp.stack(margins)

  log_scales, margins = first_batch(params, classifiers, conditions)
  if method.learn_scale:
    params["eta"]["log_scale"] = log_scales
  params["alpha"] = -jnp.log(margins if margin is None else jnp.broadcast_to(jnp.asarray(margin), (num_classifiers,)))
  return state._replace(params=params, opt_state=method.optimizer.init(params))


def make_train_step(method: Method, *, steps_per_call: int = 1) -> "TrainStep":
  """The jitted step ``(state, classifiers, conditions) -> (state, metrics)`` over theta, eta and alpha.

  Args:
    method: the method.
    steps_per_call: steps in one compiled call, by `jax.lax.scan`. More than 1 pays for tiny networks, whose steps are
      shorter than the call itself; on a CPU convolutions run at half speed inside a scan.

  Returns:
    The step. Its metrics, those of the last step of the call before its update, are every term of the loss [T],
    ``"total"`` and ``"gradient_norm"`` (scalars), ``"residual"`` (relative squared, or the cosine distance where that
    is what is trained; [T]) and ``"margin"`` (e^-alpha, [T]). Samples of a batch interact through the stationarity sum,
    and through batch norm where a network has it.
  """

  def loss_fn(
    params: PyTree,
    state: TrainState,
    noise: jax.Array,
    fresh_noise: jax.Array,
    classifiers: Sequence[Classifier],
    conditions: Sequence[Conditions],
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:

    def means(part: tuple[jax.Array, jax.Array]) -> tuple[list[tuple[PyTree, dict[str, jax.Array]]], PyTree]:
      if method.mesh is not None:
        part = parallel.split_samples(part, method.mesh)
      noise, y = (jnp.swapaxes(leaf, 0, 1) for leaf in part)
      batches, statistics = _generate(method, params, state.statistics, classifiers, noise, y)
      own = [_means(method, params, *pair, index) for index, pair in enumerate(zip(classifiers, batches, strict=True))]
      return own, statistics

    samples = (jnp.swapaxes(noise, 0, 1), _labels(method, classifiers).T)  # samples first, to be cut into microbatches
    own, statistics = microbatch_mean(means, samples, size=method.microbatch_size)
    residuals = [
      _stationarity(method, params, condition, sums, index)
      for index, (condition, (sums, _)) in enumerate(zip(conditions, own, strict=True))
    ]
    terms = {"stationarity": jnp.stack([stationarity for stationarity, _ in residuals])}
    terms |= {name: jnp.stack([terms[name] for _, terms in own]) for name in own[0][1]}
    if method.num_fresh:
      frozen = jax.lax.stop_gradient(statistics)
      y = _labels(method, classifiers, method.num_fresh)
      fresh, _ = _generate(method, params, frozen, classifiers, fresh_noise, y, train=False)
      terms["fresh_duality"] = jnp.stack(
        [
          _duality(method, params, classifier, index, batch)
          for index, (classifier, batch) in enumerate(zip(classifiers, fresh, strict=True))
        ]
      )
    weights = {name: jnp.asarray(w(state.step)) if callable(w) else w for name, w in method.weights.items()}
    total = losses.total_loss(terms, weights)
    metrics = terms | {
      "total": total,
      "residual": jnp.stack([logged for _, logged in residuals]),
      "margin": jnp.exp(-params["alpha"]),
    }
    return total, (metrics, statistics)

  def one_step(
    state: TrainState, classifiers: Sequence[Classifier], conditions: Sequence[Conditions]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    noise_key, fresh_key, key = jax.random.split(state.key, 3)
    noise = state.noise if state.noise is not None else _new_noise(method, classifiers, noise_key)
    fresh_noise = jax.random.normal(fresh_key, (len(classifiers), method.num_fresh, method.noise_dim))
    gradient, (metrics, statistics) = jax.grad(loss_fn, has_aux=True)(
      state.params, state, noise, fresh_noise, classifiers, conditions
    )
    metrics["gradient_norm"] = optax.tree.norm(gradient)
    updates, opt_state = method.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, statistics, opt_state, state.noise, key), metrics

  # Without saying so, several processes could each end up with a part of the state.
  everywhere = None if method.mesh is None else parallel.replicated(method.mesh)

  @functools.partial(jax.jit, out_shardings=everywhere)
  def steps(
    state: TrainState, classifiers: Sequence[Classifier], conditions: Sequence[Conditions]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    if steps_per_call == 1:
      return one_step(state, classifiers, conditions)
    state, metrics = jax.lax.scan(
      lambda state, _: one_step(state, classifiers, conditions), state, length=steps_per_call
    )
    return state, jax.tree.map(lambda values: values[-1], metrics)

  return TrainStep(steps, steps_per_call)


def fit(
  step: TrainStep,
  state: TrainState,
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  *,
  num_steps: int,
  log_every: int = 50,
  on_log: Callable[[int, dict[str, float]], None] | None = None,
  checkpointer: Checkpointer | None = None,
  checkpoint_every: int = 500,
) -> TrainState:
  """Runs steps until ``state.step`` reaches ``num_steps``; a restored state goes on where it was.

  Metrics are read one log interval late, so that the device never waits for them; before a checkpoint they are read at
  once, so that no checkpoint holds a state that a NaN has reached. An interruption (Ctrl-C) is passed on after one more
  checkpoint.

  Args:
    step: from `make_train_step`.
    state: where to start.
    classifiers: T classifiers.
    conditions: the stationarity condition of each.
    num_steps: step at which to stop.
    log_every: steps between logged metrics. Like ``num_steps`` and ``checkpoint_every``, a multiple of the step's
      ``steps_per_call``.
    on_log: called with (step, metrics as floats); metrics of several classifiers have names such as ``"residual/1"``.
    checkpointer: where to save, every ``checkpoint_every`` steps and at the end.
    checkpoint_every: steps between checkpoints.

  Returns:
    The final state.

  Raises:
    TrainingDiverged: a NaN or an infinity appeared. Checkpoints written before are kept.
    ValueError: an interval below 1 or not a multiple of ``steps_per_call``.
  """
  for name, value in (("log_every", log_every), ("checkpoint_every", checkpoint_every), ("num_steps", num_steps)):
    _checks.check_at_least(name, value, 1)
    if value % step.steps_per_call:
      raise ValueError(f"{name} must be a multiple of steps_per_call = {step.steps_per_call}; got {value}.")
  pending: tuple[int, dict[str, jax.Array]] | None = None

  def flush() -> None:
    if pending is not None:
      at, metrics = pending
      floats = _floats(metrics)
      _check_converging(at, floats)
      if on_log is not None:
        on_log(at, floats)

  taken = step.steps_per_call
  try:
    for number in range(int(state.step) + taken, num_steps + 1, taken):
      state, metrics = step.call(state, classifiers, conditions)
      saving = checkpointer is not None and (number % checkpoint_every == 0 or number == num_steps)
      if saving or number % log_every == 0 or number == num_steps:
        flush()
        pending = (number, metrics)
      if saving:
        assert checkpointer is not None
        flush()
        pending = None
        checkpointer.save(number, state)
  except KeyboardInterrupt:
    flush()
    if checkpointer is not None and int(state.step) not in checkpointer.steps() and _is_finite(state.params):
      checkpointer.save(int(state.step), state)
    raise
  flush()
  return state


def sample(
  method: Method,
  state: TrainState,
  classifiers: Sequence[Classifier],
  key: jax.Array,
  y: ArrayLike,
  *,
  t: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Draws from the trained generator with noise that it has never been trained on.

  Args:
    method: the method.
    state: the trained state.
    classifiers: the classifiers it was trained from.
    key: random key.
    y: wanted labels [S].
    t: classifier indices [S]; where None, each is drawn uniformly from T_y, the classifiers that know label y (the end
      of section 4).

  Returns:
    Samples [S, *input_shape] and the indices [S] that were used.

  Raises:
    ValueError: a label that no classifier knows, or that classifier ``t`` does not know.
  """
  y = jnp.asarray(y)
  _checks.check_labels("y", y, y.shape[0])
  noise_key, index_key = jax.random.split(key)
  knows = jnp.stack([jnp.isin(y, jnp.asarray(classifier.labels)) for classifier in classifiers], axis=1)  # [S, T]
  if t is None:
    if not bool(jnp.all(jnp.any(knows, axis=1))):
      unknown = sorted(set(y[~jnp.any(knows, axis=1)].tolist()))
      raise ValueError(f"y must hold labels that a classifier knows; no classifier knows {unknown}.")
    t = jax.random.categorical(index_key, jnp.where(knows, 0.0, -jnp.inf), axis=1)
  t = jnp.asarray(t)
  _checks.check_labels("t", t, y.shape[0])
  if not bool(jnp.all(jnp.take_along_axis(knows, t[:, None], axis=1))):
    raise ValueError("t must hold classifiers that know the label at the same place of y.")
  noise = jax.random.normal(noise_key, (y.shape[0], method.noise_dim))
  return generate_from(method, state, noise, y, t), t


def generate_from(method: Method, state: TrainState, noise: ArrayLike, y: ArrayLike, t: ArrayLike) -> jax.Array:
  """Samples [S, *input_shape] for given noise [S, D], labels [S] and classifier indices [S], as at inference."""
  theta, statistics = state.params["theta"], state.statistics
  return method.generate(theta, statistics, jnp.asarray(noise), jnp.asarray(y), jnp.asarray(t), False)[0]


def balanced_labels(classifier: Classifier, num_samples: int) -> jax.Array:
  """The labels [num_samples] of a batch: the classifier's classes in turn, so that each comes equally often."""
  return jnp.asarray(classifier.labels)[jnp.arange(num_samples) % classifier.num_classes]


def _new_noise(method: Method, classifiers: Sequence[Classifier], key: jax.Array) -> jax.Array:
  """Standard normal noise [T, M, D], stratified in its first coordinate where the method says so."""
  keys = jax.random.split(key, 2 * len(classifiers)).reshape(-1, 2)
  batches = []
  for (normal_key, uniform_key), classifier in zip(keys, classifiers, strict=True):
    noise = jax.random.normal(normal_key, (method.batch_size, method.noise_dim))
    if method.stratified_noise:
      # `balanced_labels` deals the classes out in turn: sample i is number i // C of its class.
      number = jnp.arange(method.batch_size) // classifier.num_classes
      strata = -(-method.batch_size // classifier.num_classes)
      uniform = (number + jax.random.uniform(uniform_key, number.shape)) / strata
      tiny = 1e-6  # the quantile of 0 and of 1 is not finite
      noise = noise.at[:, 0].set(jax.scipy.stats.norm.ppf(jnp.clip(uniform, tiny, 1 - tiny)))
    batches.append(noise)
  return jnp.stack(batches)


def _labels(method: Method, classifiers: Sequence[Classifier], num_samples: int | None = None) -> jax.Array:
  """The labels [T, M] of a step's samples, or of another number of samples."""
  return jnp.stack([balanced_labels(classifier, num_samples or method.batch_size) for classifier in classifiers])


def _generate(
  method: Method,
  params: PyTree,
  statistics: PyTree,
  classifiers: Sequence[Classifier],
  noise: jax.Array,
  y: jax.Array,
  *,
  train: bool = True,
) -> tuple[list[Batch], PyTree]:
  """One pass of the generator for all classifiers: from noise [T, M, D] and labels [T, M] to a batch for each.

  The new running averages come with it. The classifiers take turns sample by sample, so that a batch whose samples are
  split among devices stays where it is.
  """
  num_classifiers, num_samples, _ = noise.shape
  t = jnp.tile(jnp.arange(num_classifiers), num_samples)
  flat = jnp.swapaxes(noise, 0, 1).reshape(num_samples * num_classifiers, -1)
  x, statistics = method.generate(params["theta"], statistics, flat, y.T.reshape(-1), t, train)
  x = x.reshape(num_samples, num_classifiers, *x.shape[1:])
  return [Batch(x[:, index], y[index], noise[index]) for index in range(num_classifiers)], statistics


def _multipliers(method: Method, params: PyTree, classifier: Classifier, index: int, batch: Batch) -> jax.Array:
  """mu [M, C] of a batch."""
  log_scale = params["eta"]["log_scale"][index]
  if not method.learn_scale:
    log_scale = jax.lax.stop_gradient(log_scale)
  if method.raw_multipliers is None:
    return multipliers.from_softmax(classifier.gradient_fn(classifier.params, batch.x), log_scale=log_scale)
  t = jnp.full(batch.y.shape, index)
  raw = method.raw_multipliers(params["eta"]["network"], batch.x, batch.y, t)
  if method.multiplier_form == "runner_up":
    logits = classifier.gradient_fn(classifier.params, batch.x)
    return multipliers.on_runner_up(jnp.exp(log_scale) * raw, logits, classifier.local_labels(batch.y))
  raw = raw[:, : classifier.num_classes]
  return multipliers.from_network(raw, form=method.multiplier_form, log_scale=log_scale)


def _stationarity_sum(classifier: Classifier, batch: Batch, mu: jax.Array) -> PyTree:
  local = classifier.local_labels(batch.y)
  return losses.stationarity_sum(classifier.gradient_fn, classifier.params, batch.x, local, mu)


def _duality(method: Method, params: PyTree, classifier: Classifier, index: int, batch: Batch) -> jax.Array:
  """The mean duality loss of a batch (Eq. 6), on the classifier at inference."""
  logits = classifier.predict_fn(classifier.params, batch.x)
  local = classifier.local_labels(batch.y)
  alpha = params["alpha"][index]
  return jnp.mean(losses.duality_loss(logits, local, alpha, delta=method.delta, relative=method.relative_duality))


def _means(
  method: Method, params: PyTree, classifier: Classifier, batch: Batch, index: int
) -> tuple[PyTree, dict[str, jax.Array]]:
  """What is a mean over the samples of one classifier: its stationarity sum, and the other terms of its loss."""
  mu = _multipliers(method, params, classifier, index, batch)
  terms = {"duality": _duality(method, params, classifier, index, batch)}
  if method.least_multiplier:
    terms["least_multiplier"] = jnp.mean(multipliers.shortfall(mu, method.least_multiplier))
  if "softmax_distance" in method.weights:
    logits = classifier.gradient_fn(classifier.params, batch.x)
    terms["softmax_distance"] = multipliers.softmax_distance(mu, logits, classifier.local_labels(batch.y))
  for name, prior in method.priors.items():
    value = prior(classifier, batch)
    if method.microbatch_size is not None and jnp.ndim(value) == 0:
      raise ValueError(
        f"microbatch_size must be None with the prior {name!r}: it gives one value for a batch as a whole, not one for"
        f" each sample; got {method.microbatch_size}."
      )
    terms[name] = jnp.mean(value)
  return _stationarity_sum(classifier, batch, mu), terms


def _stationarity(
  method: Method, params: PyTree, condition: Conditions, sums: PyTree, index: int
) -> tuple[jax.Array, jax.Array]:
  """The stationarity term of one classifier (Eq. 5), and its relative residual for the log."""
  if method.target_exponent:
    factor = jnp.exp(params["alpha"][index] * method.target_exponent)
    condition = dataclasses.replace(condition, target=optax.tree.scale(factor, condition.target))
  if method.residual == "cosine":
    weighed = weigh_tensors(condition, method.tensor_weights or {})
    return losses.cosine_distance(weighed, sums), losses.cosine_distance(condition, sums)
  residual = losses.stationarity_residual(condition, sums)
  if method.residual == "absolute":
    return residual.absolute, residual.relative
  if method.residual == "squared":
    return residual.absolute**2, residual.relative
  if method.tensor_weights is None:
    return residual.relative, residual.relative
  names = tensor_names(condition.target)
  weights = jnp.asarray([method.tensor_weights.get(name, 1.0) for name in names])
  values = jnp.stack(jax.tree.leaves(residual.relative_per_tensor))
  return jnp.sum(weights * values) / jnp.sum(weights), residual.relative


def _floats(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
  """Metrics as floats: [T] becomes one entry for each classifier, named ``name/t`` where there are several."""
  floats = {}
  for name, value in metrics.items():
    if value.ndim == 0 or value.shape == (1,):
      floats[name] = float(value.reshape(()))
    else:
      floats |= {f"{name}/{t}": float(entry) for t, entry in enumerate(value)}
  return floats


def _is_finite(tree: PyTree) -> bool:
  return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def _check_converging(step: int, metrics: Mapping[str, float]) -> None:
  broken = [name for name, value in metrics.items() if not math.isfinite(value)]
  if broken:
    cause = next((name for name in broken if name not in ("total", "gradient_norm")), broken[0])
    raise TrainingDiverged(
      f"{cause} became {metrics[cause]} at or before step {step}. The last checkpoint is from before that; a smaller"
      f" learning rate or a smaller weight of {cause} is the usual cure."
    )
