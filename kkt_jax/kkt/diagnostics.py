"""How well a classifier satisfies its own conditions, when its training data are at hand.

This is the yardstick of every experiment: the residual that the true data reach bounds what any generator can be asked
for, and the residual of random data says how much the equations tell data from noise.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._descent import accelerated, greatest_value
from kkt_jax._precision import full_precision
from kkt_jax._tree import tensor_names
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers import relaxation
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import Criteria
from kkt_jax.kkt import losses
from kkt_jax.kkt.conditions import Conditions

_PROBES = 8  # random combinations that tell how much each gate bears on the errors


def _with_gates(apply_fn: ApplyFn, gates: list[jax.Array]) -> ApplyFn:
  given = relaxation.given_gates(apply_fn)
  return lambda params, x: given(params, x, gates)


@_checks.annotated
@full_precision
def nonnegative_multipliers(
  gradient_fn: ApplyFn,
  params: PyTree,
  x: ArrayLike,
  classes: ArrayLike,
  conditions: Conditions,
  *,
  gates: list[jax.Array] | None = None,
  num_steps: int = 1000,
) -> jax.Array:
  """The multipliers mu >= 0 that satisfy the stationarity condition best on given samples.

  Non-negative least squares, ``min |mask (sum - target)|``, by an accelerated projected gradient method (FISTA). The
  operator from multipliers to the stationarity sum is applied by vector-Jacobian products and its transpose by
  Jacobian-vector products, so that memory grows neither with M x P nor with C x P, and samples may interact.

  Args:
    gradient_fn: ``(params, x[M, ...]) -> logits[M, C]``.
    params: zeta.
    x: samples [M, ...], floating point.
    classes: true classes [M].
    conditions: target and mask, of any weights.
    gates: of `kkt_jax.classifiers.relaxation.given_gates`; exact ones if None.
    num_steps: iterations; each costs one backward and one forward-mode pass.

  Returns:
    mu [M, C], 0 in the column of the true class.

  >>> import jax.numpy as jnp
  >>> conditions = Conditions(target=jnp.array([[6.0, -6.0]]), mask=jnp.ones((1, 2)))
  >>> mu = nonnegative_multipliers(
  ...     lambda w, x: x @ w, jnp.ones((1, 2)), jnp.array([[2.0]]), jnp.array([0]), conditions)
  >>> [round(float(value), 3) for value in mu[0]]  # 3 * (2 on class 0, -2 on class 1)
  [0.0, 3.0]
  """
  arguments = (params, jnp.asarray(x), jnp.asarray(classes), conditions, gates)
  if _in_one_loop(gradient_fn, *arguments):
    return _in_one_program(gradient_fn, *arguments, num_steps=num_steps)
  return _multipliers(jax.jit(_operator, static_argnums=0)(gradient_fn, *arguments), num_steps, compiled_loop=False)


def _in_one_loop(apply_fn: ApplyFn, params: PyTree, x: jax.Array, *others: Any) -> bool:
  """Whether all steps of a descent are one program; with convolutions on a CPU that would be slow."""
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, x, *others)))
  return traced or jax.default_backend() != "cpu" or "conv_general" not in str(jax.make_jaxpr(apply_fn)(params, x))


class _Operator(NamedTuple):
  """From multipliers to the masked stationarity sum, a pytree."""

  pull_back: Callable[[jax.Array], tuple[PyTree]]
  push_forward: Callable[[PyTree], jax.Array]
  logits: jax.Array
  classes: jax.Array
  conditions: Conditions

  def __call__(self, mu: jax.Array) -> PyTree:
    (sums,) = self.pull_back(losses.cotangent(self.logits, self.classes, mu).astype(self.logits.dtype))
    return jax.tree.map(jnp.multiply, self.conditions.mask, sums)

  def transpose(self, cotangent: PyTree) -> jax.Array:
    masked = jax.tree.map(jnp.multiply, self.conditions.mask, cotangent)
    moved = self.push_forward(masked)
    differences = jnp.take_along_axis(moved, self.classes[:, None], axis=1) - moved
    return jnp.where(losses.is_true_class(self.logits, self.classes), 0.0, differences) / len(self.logits)

  def squared(self, mu: jax.Array) -> jax.Array:
    return self.transpose(self(mu))

  def descended(self, step_size: jax.Array, mu: jax.Array) -> jax.Array:
    target = jax.tree.map(jnp.multiply, self.conditions.mask, self.conditions.target)
    step = step_size * self.transpose(jax.tree.map(jnp.subtract, self(mu), target))
    return jnp.where(losses.is_true_class(self.logits, self.classes), 0.0, jax.nn.relu(mu - step))


def _operator(
  gradient_fn: ApplyFn, params: PyTree, x: jax.Array, classes: jax.Array, conditions: Conditions, gates: Any
) -> _Operator:
  function = gradient_fn if gates is None else _with_gates(gradient_fn, gates)
  logits, pull_back = jax.vjp(lambda p: function(p, x), params)
  _, push_forward = jax.linearize(lambda p: function(p, x), params)
  return _Operator(pull_back, push_forward, logits, classes, conditions)


def _multipliers(operator: _Operator, num_steps: int, *, compiled_loop: bool) -> jax.Array:
  ones = jnp.where(losses.is_true_class(operator.logits, operator.classes), 0.0, 1.0)
  squared = jax.tree_util.Partial(_Operator.squared, operator)
  step_size = 0.9 / greatest_value(squared, ones, num_steps=30, compiled_loop=compiled_loop)
  descend = jax.tree_util.Partial(_Operator.descended, operator, step_size)
  return accelerated(descend, jnp.zeros_like(ones), num_steps=num_steps, compiled_loop=compiled_loop)


@functools.partial(jax.jit, static_argnames=("gradient_fn", "num_steps"))
def _in_one_program(gradient_fn: ApplyFn, *arguments: Any, num_steps: int) -> jax.Array:
  return _multipliers(_operator(gradient_fn, *arguments), num_steps, compiled_loop=True)


@_checks.annotated
@full_precision
def free_gates(
  classifier: Classifier,
  conditions: Conditions,
  x: ArrayLike,
  classes: ArrayLike,
  mu: ArrayLike,
  *,
  kink: float = Criteria().kink,
  num_steps: int = 300,
) -> list[jax.Array]:
  """The gates that satisfy the stationarity condition best: from 0 to 1 at kinks, exact elsewhere.

  At a kink ReLU has no derivative, and a stationary point asks for one from its sub-differential, [0, 1] (Clarke's
  stationarity, as in Theorem 1). Gradient descent with weight decay drives a sixth of all pairs of sample and unit
  there, and with exact gates these are nearly all of the residual of the training data. Bounded least squares by an
  accelerated projected gradient method (FISTA), each gate in units of its share in the sum.

  Args:
    classifier: the classifier.
    conditions: its stationarity condition.
    x: samples [M, *input_shape].
    classes: true classes [M].
    mu: multipliers [M, C].
    kink: up to which a gate's argument is at its kink, in standard deviations of its layer's arguments.
    num_steps: iterations; each costs two gradients of the stationarity sum.

  Returns:
    The gates of `kkt_jax.classifiers.relaxation.given_gates`, the share of the slope above each kink.
  """
  x, classes, mu = jnp.asarray(x), jnp.asarray(classes), jnp.asarray(mu)
  roots = relaxation.pre_activations(classifier.apply_fn, classifier.params, x)
  if not roots:
    return []
  problem = _gates_problem(classifier, conditions, x, classes, mu, roots, kink)
  if _in_one_loop(classifier.apply_fn, classifier.params, x, problem):
    return _gates_in_one_program(problem, num_steps)
  return _descended_gates(problem, num_steps, compiled_loop=False)


class _Gates(NamedTuple):
  """The bounded least squares of `free_gates`, a pytree: of gates that are ``free`` [M, ...] in units of their own."""

  classifier: Classifier
  conditions: Conditions
  x: jax.Array
  classes: jax.Array
  mu: jax.Array
  exact: list[jax.Array]
  free: list[jax.Array]
  unit: list[jax.Array]

  def start(self) -> list[jax.Array]:
    return self.chosen([jnp.full_like(gate, 0.5) for gate in self.exact])

  def chosen(self, gates: list[jax.Array]) -> list[jax.Array]:
    return [jnp.where(is_free, gate, shut) for is_free, gate, shut in zip(self.free, gates, self.exact, strict=True)]

  def error(self, gates: list[jax.Array]) -> PyTree:
    function = _with_gates(self.classifier.apply_fn, gates)
    sums = losses.stationarity_sum(function, self.classifier.params, self.x, self.classes, self.mu)
    return jax.tree.map(lambda m, s, t: m * (s - t), self.conditions.mask, sums, self.conditions.target)

  def squared(self, vector: list[jax.Array]) -> list[jax.Array]:
    change = jax.jvp(self.error, (self.start(),), (_times(vector, self.unit),))[1]
    return _times(jax.vjp(self.error, self.start())[1](change)[0], self.unit)

  def descended(self, step: jax.Array, gates: list[jax.Array]) -> list[jax.Array]:
    value, pull_back = jax.vjp(self.error, gates)
    moves = _times(_times(pull_back(value)[0], self.unit), self.unit)
    return self.chosen([jnp.clip(gate - step * move, 0.0, 1.0) for gate, move in zip(gates, moves, strict=True)])


def _times(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
  return [one * other for one, other in zip(a, b, strict=True)]


@jax.jit
def _gates_problem(
  classifier: Classifier,
  conditions: Conditions,
  x: jax.Array,
  classes: jax.Array,
  mu: jax.Array,
  roots: list[jax.Array],
  kink: float,
) -> _Gates:
  exact = [(root > 0).astype(root.dtype) for root in roots]
  free = [jnp.abs(root) < kink * jnp.std(root) for root in roots]
  problem = _Gates(classifier, conditions, x, classes, mu, exact, free, exact)
  pull_back = jax.vjp(problem.error, problem.start())[1]

  def share(key: jax.Array) -> list[jax.Array]:  # the mean square of a random combination of errors by each gate
    leaves, structure = jax.tree.flatten(conditions.target)
    keys = jax.random.split(key, len(leaves))
    random = [jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return [jnp.square(gradient) for gradient in pull_back(jax.tree.unflatten(structure, random))[0]]

  squares = [jnp.mean(square, axis=0) for square in jax.vmap(share)(jax.random.split(jax.random.key(0), _PROBES))]
  units = [1 / (jnp.sqrt(s) + 1e-3 * jnp.sqrt(jnp.max(s)) + 1e-30) for s in squares]
  return problem._replace(unit=[jnp.where(is_free, unit, 0.0) for is_free, unit in zip(free, units, strict=True)])


def _descended_gates(problem: _Gates, num_steps: int, *, compiled_loop: bool) -> list[jax.Array]:
  ones = [is_free.astype(gate.dtype) for is_free, gate in zip(problem.free, problem.exact, strict=True)]
  squared = jax.tree_util.Partial(_Gates.squared, problem)
  step = 0.8 / greatest_value(squared, ones, num_steps=20, compiled_loop=compiled_loop)
  descend = jax.tree_util.Partial(_Gates.descended, problem, step)
  return accelerated(descend, problem.start(), num_steps=num_steps, compiled_loop=compiled_loop)


@functools.partial(jax.jit, static_argnames="num_steps")
def _gates_in_one_program(problem: _Gates, num_steps: int) -> list[jax.Array]:
  return _descended_gates(problem, num_steps, compiled_loop=True)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """How well a set of samples satisfies one classifier's conditions.

  Attributes:
    residual: relative squared residual with the given or the best non-negative multipliers and with free gates at kinks
      (`free_gates`); 0 is perfect, 1 is what no samples at all give.
    residual_exact_gates: the same with the network's own derivative, where every gate is 0 or 1.
    residual_per_tensor: the former per parameter tensor, by path.
    active_multipliers: share of the wrong-class multipliers above 1e-3 of the greatest.
    median_margin: median of the margin to the runner-up, in logits, of ``predict_fn``.
    margin_spread: (95th - 5th percentile) / median of that margin; 0 where all samples are equally far.
    accuracy: share of positive margins.
  """

  residual: float
  residual_exact_gates: float
  residual_per_tensor: dict[str, float]
  active_multipliers: float
  median_margin: float
  margin_spread: float
  accuracy: float


@_checks.annotated
@full_precision
def diagnose(
  classifier: Classifier,
  conditions: Conditions,
  x: ArrayLike,
  labels: ArrayLike,
  *,
  mu: ArrayLike | None = None,
  num_steps: int = 1000,
) -> Diagnosis:
  """Measures how well samples satisfy a classifier's conditions.

  Args:
    classifier: the classifier.
    conditions: its stationarity condition.
    x: samples [M, *input_shape]: the training data, or a control.
    labels: their labels [M], among the classifier's ``labels``.
    mu: multipliers [M, C]; the best non-negative ones (`nonnegative_multipliers`) if None.
    num_steps: iterations of the search for them.

  Returns:
    A `Diagnosis`.

  Raises:
    ValueError: samples or labels that do not fit the classifier.

  >>> import jax.numpy as jnp
  >>> from kkt_jax.classifiers.classifier import make_classifier
  >>> w = jnp.array([[1.0, -1.0]])
  >>> linear = make_classifier(lambda w, x: x @ w, w, (1,), labels=(0, 1))
  >>> diagnosis = diagnose(linear, Conditions(w, jnp.ones_like(w)), jnp.array([[0.5], [-0.5]]), jnp.array([0, 1]))
  >>> round(diagnosis.residual, 6), diagnosis.median_margin
  (0.0, 1.0)
  """
  x = jnp.asarray(x)
  _checks.check_batch("x", x)
  _checks.check_shape("x", x, (x.shape[0], *classifier.input_shape), "[M, *input_shape]")
  _checks.check_labels("labels", labels, x.shape[0])
  classes = classifier.classes_of(labels)
  classifier = relaxation.relaxed(classifier, 0)  # the same programs serve both kinds of gates, and any sharpness
  solve = functools.partial(nonnegative_multipliers, classifier.apply_fn, classifier.params, x, classes, conditions)
  given = None if mu is None else jnp.asarray(mu)
  measured = lambda mu, gates: _measured(classifier, conditions, x, classes, mu, gates)
  roots = relaxation.pre_activations(classifier.apply_fn, classifier.params, x)
  gates = [(root > 0).astype(root.dtype) for root in roots]
  mu = solve(gates=gates, num_steps=num_steps) if given is None else given
  exact, margin = measured(mu, gates)
  residual = exact
  if gates:
    gates = free_gates(classifier, conditions, x, classes, mu)
    mu = solve(gates=gates, num_steps=num_steps) if given is None else given
    residual, _ = measured(mu, gates)
  wrong = np.asarray(mu)[np.arange(mu.shape[1]) != np.asarray(classes)[:, None]]
  low, median, high = np.percentile(margin, [5, 50, 95])
  with np.errstate(divide="ignore", invalid="ignore"):  # infinite if the median is 0
    spread = float((high - low) / np.abs(median))
  return Diagnosis(
    residual=float(residual.relative),
    residual_exact_gates=float(exact.relative),
    residual_per_tensor={
      name: float(value)
      for name, value in zip(
        tensor_names(classifier.params), jax.tree.leaves(residual.relative_per_tensor), strict=True
      )
    },
    active_multipliers=float(np.mean(wrong > 1e-3 * np.max(wrong))),
    median_margin=float(median),
    margin_spread=spread,
    accuracy=float(np.mean(np.asarray(margin) > 0)),
  )


@jax.jit
def _measured(
  classifier: Classifier,
  conditions: Conditions,
  x: jax.Array,
  classes: jax.Array,
  mu: jax.Array,
  gates: list[jax.Array],
) -> tuple[losses.StationarityResidual, jax.Array]:
  """The residual with multipliers mu and given gates, and the margins [M] at inference."""
  sums = losses.stationarity_sum(_with_gates(classifier.apply_fn, gates), classifier.params, x, classes, mu)
  margins = losses.runner_up_margin(classifier.predict_fn(classifier.params, x), classes)
  return losses.stationarity_residual(conditions, sums), margins
