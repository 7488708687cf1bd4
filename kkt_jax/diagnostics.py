"""How well a classifier satisfies its own conditions, when its training data are at hand.

This is the yardstick of every experiment: the residual that the true data reach bounds what any generator can be asked
for, and the residual of random data says how much the equations tell data from noise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks, losses
from kkt_jax._precision import full_precision
from kkt_jax.classifier import ApplyFn, Classifier, PyTree
from kkt_jax.conditions import Conditions
from kkt_jax.homogeneity import tensor_names


@functools.partial(jax.jit, static_argnames=("gradient_fn", "num_steps"))
@full_precision
def nonnegative_multipliers(
  gradient_fn: ApplyFn,
  params: PyTree,
  x: ArrayLike,
  classes: ArrayLike,
  conditions: Conditions,
  *,
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
  x, classes = jnp.asarray(x), jnp.asarray(classes)
  logits, pull_back = jax.vjp(lambda p: gradient_fn(p, x), params)
  _, push_forward = jax.linearize(lambda p: gradient_fn(p, x), params)
  true_class = losses.is_true_class(logits, classes)
  target = jax.tree.map(jnp.multiply, conditions.mask, conditions.target)

  def apply(mu: jax.Array) -> PyTree:
    (sums,) = pull_back(losses.cotangent(logits, classes, mu).astype(logits.dtype))
    return jax.tree.map(jnp.multiply, conditions.mask, sums)

  def transpose(cotangent: PyTree) -> jax.Array:
    masked = jax.tree.map(jnp.multiply, conditions.mask, cotangent)
    moved = push_forward(masked)
    differences = jnp.take_along_axis(moved, classes[:, None], axis=1) - moved
    return jnp.where(true_class, 0.0, differences) / x.shape[0]

  def power_iteration(vector: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
    image = transpose(apply(vector))
    size = jnp.linalg.norm(image)
    return image / jnp.where(size > 0, size, 1.0), size

  ones = jnp.where(true_class, 0.0, 1.0)
  _, sizes = jax.lax.scan(power_iteration, ones / jnp.linalg.norm(ones), length=30)
  step_size = 0.9 / jnp.where(sizes[-1] > 0, sizes[-1], 1.0)

  def fista(
    carry: tuple[jax.Array, jax.Array, jax.Array], _: None
  ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
    mu, ahead, inertia = carry
    error = jax.tree.map(jnp.subtract, apply(ahead), target)
    following = jnp.where(true_class, 0.0, jax.nn.relu(ahead - step_size * transpose(error)))
    # The inertia is dropped when it points uphill (O'Donoghue and Candes 2015), which keeps the descent monotone.
    uphill = jnp.sum((ahead - following) * (following - mu)) > 0
    inertia = jnp.where(uphill, 1.0, inertia)
    next_inertia = 0.5 * (1 + jnp.sqrt(1 + 4 * inertia**2))
    ahead = following + (inertia - 1) / next_inertia * (following - mu)
    return (following, ahead, next_inertia), None

  start = jnp.zeros_like(ones)
  (mu, _, _), _ = jax.lax.scan(fista, (start, start, jnp.ones(())), length=num_steps)
  return mu


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """How well a set of samples satisfies one classifier's conditions.

  Attributes:
    residual: relative squared residual with the given or the best non-negative multipliers; 0 is perfect, 1 is what
      no samples at all give.
    residual_per_tensor: the same per parameter tensor, by path.
    active_multipliers: share of the wrong-class multipliers above 1e-3 of the greatest.
    median_margin: median of the margin to the runner-up, in logits, of ``predict_fn``.
    margin_spread: (95th - 5th percentile) / median of that margin; 0 where all samples are equally far.
    accuracy: share of positive margins.
  """

  residual: float
  residual_per_tensor: dict[str, float]
  active_multipliers: float
  median_margin: float
  margin_spread: float
  accuracy: float


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
  >>> from kkt_jax.classifier import make_classifier
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
  if mu is None:
    mu = nonnegative_multipliers(classifier.gradient_fn, classifier.params, x, classes, conditions, num_steps=num_steps)
  mu = jnp.asarray(mu)
  residual, margin = _measured(classifier, conditions, x, classes, mu)
  wrong = np.asarray(mu)[np.arange(mu.shape[1]) != np.asarray(classes)[:, None]]
  low, median, high = np.percentile(margin, [5, 50, 95])
  with np.errstate(divide="ignore", invalid="ignore"):  # infinite if the median is 0
    spread = float((high - low) / np.abs(median))
  return Diagnosis(
    residual=float(residual.relative),
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
  classifier: Classifier, conditions: Conditions, x: jax.Array, classes: jax.Array, mu: jax.Array
) -> tuple[losses.StationarityResidual, jax.Array]:
  """The residual with multipliers mu, and the margins [M] at inference."""
  sums = losses.stationarity_sum(classifier.gradient_fn, classifier.params, x, classes, mu)
  margins = losses.runner_up_margin(classifier.predict_fn(classifier.params, x), classes)
  return losses.stationarity_residual(conditions, sums), margins
