"""The losses of the method, one equation a function.

Conventions: ``logits`` is [M, C], ``y`` holds output indices [M] in 0..C-1, ``mu`` is [M, C] with the entry of the true
class ignored. Losses return one value a sample or a tensor; the caller weighs and reduces. Pure functions of arrays and
pytrees: they work on anybody's network.
"""

from collections.abc import Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import optax

from kkt_jax import _checks
from kkt_jax.classifier import ApplyFn, PyTree
from kkt_jax.conditions import Conditions
from kkt_jax.jacobians import per_sample_jacobians

ROUTES = ("vjp", "jacobian")


def margins(logits: ArrayLike, y: ArrayLike) -> jax.Array:
  """Classification margins Phi_y - Phi_c, the left-hand side of Eq. 3b.

  Args:
    logits: [M, C], C at least 2.
    y: true classes [M], in 0..C-1; values are not checked, so that it works under `jax.jit`.

  Returns:
    [M, C]; +inf in the column of the true class, so that a minimum over classes skips it.

  Raises:
    ValueError: shapes or dtypes do not fit, or there is one class only.

  >>> import jax.numpy as jnp
  >>> print(margins(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])))
  [[inf  2.  1.]]
  """
  logits, y = _checked_logits(logits, y)
  true = jnp.take_along_axis(logits, y[:, None], axis=1)
  return jnp.where(is_true_class(logits, y), jnp.inf, true - logits)


def runner_up_margin(logits: ArrayLike, y: ArrayLike) -> jax.Array:
  """Margin to the strongest wrong class, ``min_c Phi_y - Phi_c``, the quantity that Eq. 11 minimises over the data.

  Args:
    logits: [M, C].
    y: true classes [M].

  Returns:
    [M]; negative where the sample is misclassified. Among tied runners-up the gradient is shared evenly.

  >>> import jax.numpy as jnp
  >>> print(runner_up_margin(jnp.array([[3.0, 1.0, 2.0], [0.0, 4.0, 0.0]]), jnp.array([0, 0])))
  [ 1. -4.]
  """
  return jnp.min(margins(logits, y), axis=1)


def runner_up_set(logits: ArrayLike, y: ArrayLike, *, tolerance: float = 0.0) -> jax.Array:
  """The set S_i of Eq. 6: the wrong classes whose logit is the greatest among the wrong ones.

  Args:
    logits: [M, C].
    y: true classes [M].
    tolerance: logits within this of the greatest count as tied.

  Returns:
    Boolean [M, C], at least one True in each row; several at a tie.

  >>> import jax.numpy as jnp
  >>> print(runner_up_set(jnp.array([[3.0, 2.0, 2.0]]), jnp.array([0])))
  [[False  True  True]]
  """
  values = margins(logits, y)
  # A NaN counts as a runner-up, so that it reaches the loss and stops the run.
  return (values <= jnp.min(values, axis=1, keepdims=True) + tolerance) | jnp.isnan(values)


def u_shape(margin: ArrayLike, alpha: ArrayLike, *, delta: float) -> jax.Array:
  """The U-shaped function of Fig. 2: ``max(m - e^-alpha - delta, 0) - min(m - e^-alpha, 0)``.

  Args:
    margin: m, any shape.
    alpha: the learned scale; the margin of the training data is e^-alpha, in logits.
    delta: width of the flat bottom, at least 0.

  Returns:
    The shape of ``margin``; 0 on [e^-alpha, e^-alpha + delta], slope -1 below and 1 above. At both kinks the gradient
    is 0.

  Raises:
    ValueError: ``delta`` is negative.

  >>> import jax.numpy as jnp
  >>> print(u_shape(jnp.array([0.0, 1.0, 1.5, 3.0]), 0.0, delta=0.5))
  [1.  0.  0.  1.5]
  """
  _checks.check_at_least("delta", delta, 0)
  above = jnp.asarray(margin) - jnp.exp(-jnp.asarray(alpha))
  return jax.nn.relu(above - delta) + jax.nn.relu(-above)  # relu, not maximum: gradient 0 at the kink


def duality_loss(
  logits: ArrayLike, y: ArrayLike, alpha: ArrayLike, *, delta: float, relative: bool = False
) -> jax.Array:
  """Eq. 6: primal feasibility and complementary slackness, the U-shape summed over the runners-up of each sample.

  Args:
    logits: [M, C].
    y: true classes [M].
    alpha: scalar.
    delta: width of the flat bottom, in logits, or in units of e^-alpha where ``relative``.
    relative: divide by e^-alpha, as a constant without gradient. Beyond the paper: the loss then has the same size for
      every classifier, and e^-alpha cannot shrink to make it small.

  Returns:
    [M]; the mean over M is the paper's L_duality.

  >>> import jax.numpy as jnp
  >>> print(duality_loss(jnp.array([[3.0, 0.0, 0.0]]), jnp.array([0]), 0.0, delta=0.5))  # two runners-up, 1.5 each
  [3.]
  """
  unit = jax.lax.stop_gradient(jnp.exp(-jnp.asarray(alpha))) if relative else 1.0
  logits = jnp.asarray(logits) / unit
  # In these units e^-alpha is 1, but alpha keeps its gradient.
  alpha = jnp.asarray(alpha) + jnp.log(unit)
  values = margins(logits, y)
  runners_up = jax.lax.stop_gradient(runner_up_set(logits, y))
  # The inner where keeps the infinite margin of the true class out of the gradient.
  finite = jnp.where(runners_up, values, 0.0)
  return jnp.sum(jnp.where(runners_up, u_shape(finite, alpha, delta=delta), 0.0), axis=1)


def stationarity_sum(
  apply_fn: ApplyFn,
  params: PyTree,
  x: ArrayLike,
  y: ArrayLike,
  mu: ArrayLike,
  *,
  route: str = "vjp",
) -> PyTree:
  """The right-hand side of Eq. 4 with the sign of Eq. 5: ``1/M sum_i sum_c mu_ic [grad Phi_y(x_i) - grad Phi_c(x_i)]``.

  Where it departs from the paper: Eqs. 2a, 3a and 4 bracket the gradients with the opposite sign. With mu >= 0 and the
  constraint 1b the Lagrangian gives the sign of Eq. 5, which stands here.

  Args:
    apply_fn: ``(params, x[M, ...]) -> logits[M, C]``. On the route ``"vjp"`` the samples of a batch may interact;
      gradients then flow through the batch statistics.
    params: zeta.
    x: inputs [M, ...], floating point.
    y: output indices of the true classes [M].
    mu: multipliers [M, C]; the entry of the true class is ignored.
    route: ``"vjp"``, one vector-Jacobian product, whose memory grows neither with C nor with M x P; or ``"jacobian"``,
      M x C x P explicit numbers, the reference.

  Returns:
    A pytree like ``params``. All multipliers 0 give zeros.

  Raises:
    ValueError: shapes, dtypes or ``route`` do not fit, or interacting samples on the route ``"jacobian"``.

  >>> import jax.numpy as jnp
  >>> linear = lambda w, x: x @ w
  >>> x, y, mu = jnp.array([[2.0]]), jnp.array([0]), jnp.array([[9.0, 3.0]])
  >>> print(stationarity_sum(linear, jnp.ones((1, 2)), x, y, mu))  # 3 * (2 on class 0, -2 on class 1)
  [[ 6. -6.]]
  """
  x, mu = jnp.asarray(x), jnp.asarray(mu)
  _checks.check_batch("x", x)
  _checks.check_choice("route", route, ROUTES)
  num_samples = x.shape[0]
  _checks.check_labels("y", y, num_samples)
  _checks.check_rank("mu", mu, 2, "[M, C]")
  y = jnp.asarray(y)

  def weights(shape: tuple[int, ...]) -> jax.Array:
    """What multiplies the gradient of each logit: the sum of mu on the true class, minus mu on the others."""
    _checks.check_shape("mu", mu, shape, "[M, C]")
    others = jnp.where(is_true_class(mu, y), 0.0, mu)
    total = jnp.sum(others, axis=1, keepdims=True)
    return jnp.where(is_true_class(mu, y), total, -others) / num_samples

  if route == "vjp":
    logits, pull_back = jax.vjp(lambda p: apply_fn(p, x), params)
    return pull_back(weights(logits.shape).astype(logits.dtype))[0]

  jacobians = per_sample_jacobians(apply_fn, params, x)
  cotangent = weights(jax.tree.leaves(jacobians)[0].shape[:2])
  return jax.tree.map(lambda jacobian: jnp.tensordot(cotangent, jacobian, axes=2), jacobians)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["squared", "target_squared"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class StationarityResidual:
  """How far a stationarity sum is from its target, as squared norms a tensor; the readings are properties.

  Attributes:
    squared: ``|mask (target - sum)|^2`` of each tensor, a pytree of scalars.
    target_squared: ``|target|^2`` of each tensor, a pytree of scalars.
  """

  squared: PyTree
  target_squared: PyTree

  @property
  def absolute(self) -> jax.Array:
    """L_stationarity of Eq. 5, the norm over all parameters. At 0 its gradient is 0, not NaN."""
    squared = _sum_leaves(self.squared)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)

  @property
  def relative(self) -> jax.Array:
    """``|target - sum|^2 / |target|^2`` over all parameters: 0 is a perfect fit, 1 what a sum of 0 gives."""
    return _sum_leaves(self.squared) / _positive(_sum_leaves(self.target_squared))

  @property
  def relative_per_tensor(self) -> PyTree:
    """The same a tensor. A tensor whose target is 0 is measured against the whole target."""
    total = _sum_leaves(self.target_squared)
    return jax.tree.map(
      lambda squared, own: squared / _positive(jnp.where(own > 0, own, total)), self.squared, self.target_squared
    )


def stationarity_residual(conditions: Conditions, sums: PyTree) -> StationarityResidual:
  """Compares a stationarity sum with its target (Eq. 5), tensor by tensor.

  Args:
    conditions: target and mask.
    sums: `stationarity_sum`, a pytree like the target.

  Returns:
    A `StationarityResidual`; ``.absolute`` is Eq. 5.

  Raises:
    ValueError: the trees differ.

  >>> import jax.numpy as jnp
  >>> conditions = Conditions(target={"w": jnp.array([3.0, 4.0])}, mask={"w": jnp.ones(2)})
  >>> residual = stationarity_residual(conditions, {"w": jnp.zeros(2)})
  >>> float(residual.absolute), float(residual.relative)
  (5.0, 1.0)
  """
  _checks.check_same_shapes("sums", sums, "conditions.target", conditions.target)
  return StationarityResidual(
    squared=jax.tree.map(lambda t, s, m: jnp.sum(jnp.square(m * (t - s))), conditions.target, sums, conditions.mask),
    target_squared=jax.tree.map(lambda t, m: jnp.sum(jnp.square(m * t)), conditions.target, conditions.mask),
  )


def best_scale(conditions: Conditions, sums: PyTree) -> jax.Array:
  """The factor on all multipliers that makes a stationarity sum fit its target best: ``<target, sum> / |sum|^2``.

  It makes a residual scale-free: neither the factor of Lambda-bar nor a weight decay need be known.

  Args:
    conditions: target and mask.
    sums: `stationarity_sum`, a pytree like the target.

  Returns:
    A scalar; 0 where the sum is 0, and below 0 where it points away from the target.

  >>> import jax.numpy as jnp
  >>> conditions = Conditions(target={"w": jnp.array([3.0, 4.0])}, mask={"w": jnp.ones(2)})
  >>> float(best_scale(conditions, {"w": jnp.array([6.0, 8.0])}))
  0.5
  """
  product, size, _ = _inner_products(conditions, sums)
  return product / _positive(size)


def cosine_distance(conditions: Conditions, sums: PyTree) -> jax.Array:
  """Scale-free stationarity, ``1 - cos |cos|`` of the angle between the target and the sum over all masked parameters.

  Where the sum points towards the target, it is the relative residual at the `best_scale`. Multipliers that shrink to 0
  gain nothing, and it keeps a gradient where the sum points away.

  Args:
    conditions: target and mask.
    sums: `stationarity_sum`.

  Returns:
    A scalar in [0, 2]: 0 for parallel, 1 for orthogonal or a sum of 0, 2 for opposite.

  >>> import jax.numpy as jnp
  >>> conditions = Conditions(target={"w": jnp.array([3.0, 4.0])}, mask={"w": jnp.ones(2)})
  >>> [round(float(cosine_distance(conditions, {"w": scale * jnp.array([3.0, 4.0])})), 6) for scale in (10.0, -1.0)]
  [0.0, 2.0]
  """
  product, size, target_size = _inner_products(conditions, sums)
  return 1.0 - product * jnp.abs(product) / _positive(size * target_size)


def total_loss(terms: Mapping[str, jax.Array], weights: Mapping[str, float | jax.Array]) -> jax.Array:
  """Eq. 7, ``L = L_stationarity + beta L_duality``, and Eq. 13 when a term holds one value for each classifier.

  Args:
    terms: the losses by name, each a scalar, or [T] with one value for each classifier.
    weights: their weights by name; a missing name is an error, so that no term is lost silently.

  Returns:
    A scalar. A term whose weight is the number 0 is left out altogether, so that a NaN in it cannot spread.

  Raises:
    ValueError: a term has no weight.

  >>> import jax.numpy as jnp
  >>> float(total_loss({"stationarity": jnp.array([1.0, 2.0]), "duality": jnp.array([3.0, 4.0])},
  ...                  {"stationarity": 1.0, "duality": 10.0}))
  73.0
  """
  missing = set(terms) - set(weights)
  if missing:
    raise ValueError(f"weights must name every term; {sorted(missing)} are missing from {sorted(weights)}.")
  total = jnp.zeros(())
  for name, term in terms.items():
    weight = weights[name]
    if isinstance(weight, jax.Array) or weight != 0:
      total = total + weight * jnp.sum(term)
  return total


def _checked_logits(logits: ArrayLike, y: ArrayLike) -> tuple[jax.Array, jax.Array]:
  _checks.check_rank("logits", logits, 2, "[M, C]")
  num_samples, num_classes = jnp.shape(logits)
  if num_classes < 2:
    raise ValueError(f"logits must have at least two classes; got shape {jnp.shape(logits)}.")
  _checks.check_labels("y", y, num_samples)
  return jnp.asarray(logits), jnp.asarray(y)


def is_true_class(values: jax.Array, y: jax.Array) -> jax.Array:
  """Boolean [M, C], True in the column of the true class."""
  return jnp.arange(values.shape[1])[None, :] == y[:, None]


def _inner_products(conditions: Conditions, sums: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
  """``<target, sum>``, ``|sum|^2`` and ``|target|^2`` over the masked parameters."""
  _checks.check_same_shapes("sums", sums, "conditions.target", conditions.target)
  masked_sums = jax.tree.map(jnp.multiply, conditions.mask, sums)
  masked_target = jax.tree.map(jnp.multiply, conditions.mask, conditions.target)
  return (
    optax.tree.vdot(masked_target, masked_sums),
    optax.tree.norm(masked_sums, squared=True),
    optax.tree.norm(masked_target, squared=True),
  )


def _sum_leaves(tree: PyTree) -> jax.Array:
  return jax.tree.reduce(jnp.add, tree, jnp.zeros(()))


def _positive(value: jax.Array) -> jax.Array:
  """The value where it is positive, else 1: a denominator that cannot divide by 0."""
  return jnp.where(value > 0, value, 1.0)
