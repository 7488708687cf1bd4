"""The losses of the method, one equation per function.

Conventions: ``logits`` is [M, C]; ``classes`` [M] holds the output index of each true class, 0..C-1; ``mu`` is [M, C]
with the entry of the true class ignored. Classes out of range are refused; inside a transformation that hides their
values (`jax.jit`, `jax.vmap`) the result is undefined. Losses return one value per sample or per tensor; the caller
weighs and reduces. 16-bit numbers (bfloat16, float16) are computed with in float32, and so are the results. Pure
functions of arrays and pytrees: they work on anybody's network.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.kkt.conditions import Conditions


def is_true_class(values: jax.Array, classes: ArrayLike) -> jax.Array:
  """Boolean, True in the column of the true class.

  Args:
    values: [M, C].
    classes: [M].

  Returns:
    [M, C].

  >>> print(is_true_class(jnp.zeros((1, 3)), jnp.array([1])))
  [[False  True False]]
  """
  return jnp.arange(values.shape[1])[None, :] == _checks.integers(classes)[:, None]


@_checks.annotated
def margins(logits: ArrayLike, classes: ArrayLike) -> jax.Array:
  """Classification margins Phi_y - Phi_c, the left-hand side of Eqs. 2b and 3b.

  Args:
    logits: [M, C], C at least 2.
    classes: true classes [M].

  Returns:
    [M, C]; +inf in the column of the true class, so that a minimum over classes skips it. `runner_up_margin` is that
    minimum.

  Raises:
    ValueError: shapes, dtypes or classes that do not fit, or fewer than two columns.

  >>> print(margins(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])))
  [[inf  2.  1.]]
  """
  logits, classes = checked(logits, classes)
  true = jnp.take_along_axis(logits, classes[:, None], axis=1)
  return jnp.where(is_true_class(logits, classes), jnp.inf, true - logits)


@_checks.annotated
def runner_up_margin(logits: ArrayLike, classes: ArrayLike) -> jax.Array:
  """Margin to the strongest wrong class, ``min_c Phi_y - Phi_c``, the quantity that Eq. 11 minimises over the data.

  Args:
    logits: [M, C].
    classes: true classes [M].

  Returns:
    [M]; negative for misclassified samples. Among tied runners-up the gradient is shared evenly.

  Raises:
    ValueError: as `margins`.

  >>> print(runner_up_margin(jnp.array([[3.0, 1.0, 2.0], [0.0, 4.0, 0.0]]), jnp.array([0, 0])))
  [ 1. -4.]
  """
  return jnp.min(margins(logits, classes), axis=1)


@_checks.annotated
def runner_up_set(logits: ArrayLike, classes: ArrayLike, *, tolerance: float = 0.0) -> jax.Array:
  """The set S_i of Eqs. 2d, 3d and 6: the wrong classes whose logit is the greatest among the wrong ones.

  Args:
    logits: [M, C].
    classes: true classes [M].
    tolerance: logits within this of the greatest count as tied.

  Returns:
    Boolean [M, C], at least one True in each row; several in a tie.

  Raises:
    ValueError: as `margins`.

  >>> print(runner_up_set(jnp.array([[3.0, 2.0, 2.0]]), jnp.array([0])))
  [[False  True  True]]
  """
  values = margins(logits, classes)
  # A NaN counts as a runner-up, so that it reaches the loss and stops the run.
  return (values <= jnp.min(values, axis=1, keepdims=True) + tolerance) | jnp.isnan(values)


@_checks.annotated
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

  >>> print(u_shape(jnp.array([0.0, 1.0, 1.5, 3.0]), 0.0, delta=0.5))
  [1.  0.  0.  1.5]
  """
  _checks.check_at_least("delta", delta, 0)
  above = _checks.floats(margin) - jnp.exp(-_checks.floats(alpha))
  return jax.nn.relu(above - delta) + jax.nn.relu(-above)  # relu, not maximum: gradient 0 at the kink


@_checks.annotated
def duality_loss(
  logits: ArrayLike, classes: ArrayLike, alpha: ArrayLike, *, delta: float, relative: bool = False
) -> jax.Array:
  """Eq. 6: primal feasibility and complementary slackness, the U-shape summed over the runners-up of each sample.

  Args:
    logits: [M, C].
    classes: true classes [M].
    alpha: a scalar.
    delta: width of the flat bottom, in logits, or in units of e^-alpha if ``relative``.
    relative: divide by e^-alpha, as a constant without gradient. Beyond the paper: the loss then has the same size for
      every classifier, and e^-alpha cannot shrink to make it small.

  Returns:
    [M]; the mean over M is the paper's L_duality.

  Raises:
    ValueError: as `margins`; ``alpha`` is no scalar, or ``delta`` is negative.

  >>> print(duality_loss(jnp.array([[3.0, 0.0, 0.0]]), jnp.array([0]), 0.0, delta=0.5))  # two runners-up, 1.5 each
  [3.]
  """
  _checks.check_rank("alpha", alpha, 0, "()")
  logits, alpha = _checks.floats(logits), _checks.floats(alpha)
  if relative:  # in these units e^-alpha is 1, but alpha keeps its gradient
    constant = jax.lax.stop_gradient(alpha)
    logits, alpha = logits * jnp.exp(constant), alpha - constant
  values = margins(logits, classes)
  runners_up = jax.lax.stop_gradient(runner_up_set(logits, classes))
  return jnp.sum(jnp.where(runners_up, u_shape(values, alpha, delta=delta), 0.0), axis=1)


@_checks.annotated
@full_precision
def stationarity_sum(gradient_fn: ApplyFn, params: PyTree, x: ArrayLike, classes: ArrayLike, mu: ArrayLike) -> PyTree:
  """The right-hand side of Eq. 4 with the sign of Eq. 5: ``1/M sum_i sum_c mu_ic [grad Phi_y(x_i) - grad Phi_c(x_i)]``.

  One vector-Jacobian product: its memory grows neither with C nor with M x P.

  Where it departs from the paper: Eqs. 2a, 3a and 4 bracket the gradients with the opposite sign. With mu >= 0 and the
  constraint 1b the Lagrangian gives the sign of Eq. 5, which stands here.

  Args:
    gradient_fn: ``(params, x[M, ...]) -> logits[M, C]``, C at least 2. The samples of a batch may interact; gradients
      then flow through the batch statistics.
    params: zeta.
    x: inputs [M, ...], floating point.
    classes: true classes [M].
    mu: multipliers [M, C]; the entry of the true class is ignored.

  Returns:
    A pytree like ``params``. All multipliers 0 give zeros.

  Raises:
    ValueError: shapes, dtypes or classes that do not fit.

  >>> linear = lambda w, x: x @ w
  >>> x, classes, mu = jnp.array([[2.0]]), jnp.array([0]), jnp.array([[9.0, 3.0]])
  >>> print(stationarity_sum(linear, jnp.ones((1, 2)), x, classes, mu))  # 3 * (2 on class 0, -2 on class 1)
  [[ 6. -6.]]
  """
  _checks.check_all_floating("params", params)
  params, x = jax.tree.map(_checks.floats, params), _checks.floats(x)
  _checks.check_batch("x", x)

  def logits_of(params: PyTree) -> jax.Array:
    logits = gradient_fn(params, x)
    if not jnp.issubdtype(getattr(logits, "dtype", object), jnp.floating):
      got = getattr(logits, "dtype", f"a {type(logits).__name__}")
      raise ValueError(f"gradient_fn must return logits [M, C], one array in floating point; got {got}.")
    return _checks.floats(logits)

  logits, pull_back = jax.vjp(logits_of, params)
  return pull_back(cotangent(logits, classes, mu).astype(logits.dtype))[0]


def cotangent(logits: ArrayLike, classes: ArrayLike, mu: ArrayLike) -> jax.Array:
  """What `stationarity_sum` pulls back from the logits to the parameters, for those who have the pull-back already.

  Args:
    logits: [M, C]; only their shape counts.
    classes: true classes [M].
    mu: multipliers [M, C].

  Returns:
    [M, C]: the sum of mu for the true class, minus mu for the others, over M.

  Raises:
    ValueError: shapes, dtypes or classes that do not fit.

  >>> print(cotangent(jnp.zeros((1, 3)), jnp.array([0]), jnp.array([[9.0, 1.0, 2.0]])))
  [[ 3. -1. -2.]]
  """
  logits, classes = checked(logits, classes)
  _checks.check_shape("mu", mu, logits.shape, "[M, C]")
  true = is_true_class(logits, classes)
  others = jnp.where(true, 0.0, _known(_checks.floats(mu), classes))
  return jnp.where(true, jnp.sum(others, axis=1, keepdims=True), -others) / logits.shape[0]


@full_precision
def stationarity_sum_from_jacobians(jacobians: PyTree, classes: ArrayLike, mu: ArrayLike) -> PyTree:
  """`stationarity_sum` from explicit Jacobians, which hold M x C x P numbers: the reference for the fast one.

  Args:
    jacobians: a pytree like the parameters with leaves [M, C, ...], see `kkt_jax.kkt.per_sample_jacobians`.
    classes: true classes [M].
    mu: multipliers [M, C].

  Returns:
    A pytree like the parameters.

  Raises:
    ValueError: shapes, dtypes or classes that do not fit.

  >>> of_two_logits = jnp.array([[[2.0, 0.0], [0.0, 2.0]]])  # M = 1, C = 2, two parameters
  >>> print(stationarity_sum_from_jacobians(of_two_logits, jnp.array([0]), jnp.array([[9.0, 3.0]])))
  [ 6. -6.]
  """
  weights = cotangent(jnp.zeros(jax.tree.leaves(jacobians)[0].shape[:2]), classes, mu)
  return jax.tree.map(lambda jacobian: jnp.tensordot(weights, _checks.floats(jacobian), axes=2), jacobians)


class StationarityResidual(NamedTuple):
  """How far a stationarity sum is from its target.

  Attributes:
    absolute: see `absolute_residual`.
    relative: see `relative_residual`.
    squared: ``|mask (target - sum)|^2`` per tensor, a pytree of scalars.
    relative_per_tensor: ``squared / |mask target|^2`` per tensor, a pytree of scalars. A tensor whose target is 0 is
      measured against the whole target.
  """

  absolute: jax.Array
  relative: jax.Array
  squared: PyTree
  relative_per_tensor: PyTree


@_checks.annotated
def stationarity_residual(conditions: Conditions, sums: PyTree) -> StationarityResidual:
  """Compares a stationarity sum with its target (Eq. 5), as a whole and per tensor.

  This and the measures below are right for sums of any size, down to the smallest multipliers of a sure classifier.

  Args:
    conditions: target and mask.
    sums: `stationarity_sum`, a pytree like the target.

  Returns:
    A `StationarityResidual`. What is relative is measured against 1 if the whole target is 0.

  Raises:
    ValueError: the trees or shapes differ.

  >>> conditions = Conditions(target={"w": jnp.array([3.0, 4.0])}, mask={"w": jnp.ones(2)})
  >>> residual = stationarity_residual(conditions, {"w": jnp.zeros(2)})
  >>> float(residual.absolute), float(residual.relative)
  (5.0, 1.0)
  """
  errors, sizes = _tensor_norms(conditions, sums)
  absolute, whole = _norms([errors, sizes])
  of_tensors = functools.partial(jax.tree.unflatten, jax.tree.structure(conditions.target))
  return StationarityResidual(
    absolute=absolute,
    relative=_squared_ratio(absolute, whole),
    squared=of_tensors(list(jnp.square(errors))),
    relative_per_tensor=of_tensors(list(_squared_ratio(errors, jnp.where(sizes == 0, whole, sizes)))),
  )


@_checks.annotated
def absolute_residual(conditions: Conditions, sums: PyTree) -> jax.Array:
  """L_stationarity of Eq. 5: ``|mask (target - sum)|`` over all parameters, a scalar. At 0 its gradient is 0, not NaN.

  >>> print(absolute_residual(Conditions(jnp.array([3.0, 4.0]), jnp.ones(2)), jnp.zeros(2)))
  5.0
  """
  return stationarity_residual(conditions, sums).absolute


@_checks.annotated
def squared_residual(conditions: Conditions, sums: PyTree) -> jax.Array:
  """The square of `absolute_residual`, a scalar.

  >>> print(squared_residual(Conditions(jnp.array([3.0, 4.0]), jnp.ones(2)), jnp.zeros(2)))
  25.0
  """
  return jnp.square(absolute_residual(conditions, sums))


@_checks.annotated
def relative_residual(conditions: Conditions, sums: PyTree) -> jax.Array:
  """``|mask (target - sum)|^2 / |mask target|^2`` over all parameters, a scalar: 0 fits, 1 is what a sum of 0 gives.

  >>> print(relative_residual(Conditions(jnp.array([2.0]), jnp.ones(1)), jnp.array([1.0])))
  0.25
  """
  return stationarity_residual(conditions, sums).relative


@_checks.annotated
def mean_relative_residual(conditions: Conditions, sums: PyTree) -> jax.Array:
  """The mean over tensors of their relative residuals, so that small tensors count as much as large ones.

  Args:
    conditions: target and mask. The weight of a tensor in the mean is the greatest ``mask^2`` in it (see
      `kkt_jax.kkt.conditions.weigh_tensors`); tensors of weight 0 drop out.
    sums: `stationarity_sum`.

  Returns:
    A scalar. A tensor whose target is 0 is measured against the whole target.

  >>> conditions = Conditions([jnp.array([2.0]), jnp.array([10.0])], [jnp.array([3.0**0.5]), jnp.array([1.0])])
  >>> print(mean_relative_residual(conditions, [jnp.array([1.0]), jnp.array([10.0])]).round(4))  # (3 / 4 + 0) / 4
  0.1875
  """
  masks = map(_checks.floats, jax.tree.leaves(conditions.mask))
  weights = jnp.stack([jnp.max(jnp.square(mask), initial=0.0) for mask in masks])
  errors, sizes = (norms / jnp.sqrt(_nonzero(weights)) for norms in _tensor_norms(conditions, sums))
  ratios = _squared_ratio(errors, jnp.where(sizes == 0, _norms([sizes]), sizes))
  return jnp.sum(weights * ratios) / _nonzero(jnp.sum(weights))


@_checks.annotated
def cosine_distance(conditions: Conditions, sums: PyTree) -> jax.Array:
  """Scale-free stationarity, ``1 - cos |cos|`` of the angle between the target and the sum over all masked parameters.

  If the sum points towards the target, it is the relative residual at the scale of all multipliers that fits best.
  Multipliers that shrink to 0 gain nothing, and it keeps a gradient if the sum points away.

  Args:
    conditions: target and mask.
    sums: `stationarity_sum`.

  Returns:
    A scalar in [0, 2]: 0 for parallel, 1 for orthogonal or a sum of 0, 2 for opposite.

  >>> conditions = Conditions(target={"w": jnp.array([3.0, 4.0])}, mask={"w": jnp.ones(2)})
  >>> [round(float(cosine_distance(conditions, {"w": scale * jnp.array([3.0, 4.0])})), 6) for scale in (10.0, -1.0)]
  [0.0, 2.0]
  """
  target, sums = _masked_in_units(conditions, sums)
  product = optax.tree.vdot(target, sums)
  sizes = optax.tree.norm(sums, squared=True) * optax.tree.norm(target, squared=True)
  return 1.0 - product * jnp.abs(product) / _nonzero(sizes)


def checked(logits: ArrayLike, classes: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Both as arrays. Raises ValueError if they do not fit; where jit hides classes out of range, their rows are NaN."""
  logits = _checks.floats(logits)
  _checks.check_rank("logits", logits, 2, "[M, C]")
  num_samples, num_classes = logits.shape
  if num_classes < 2:
    raise ValueError(f"logits must have at least two classes; got shape {logits.shape}.")
  _checks.check_labels("classes", classes, num_samples)
  values = _checks.integers(classes) if isinstance(classes, jax.Array) else np.asarray(classes)
  if _checks.concrete(((values >= 0) & (values < num_classes)).all()) is False:
    raise ValueError(f"classes must lie in 0..{num_classes - 1}; got {values.min()}..{values.max()}.")
  classes = _checks.integers(classes)
  return _known(logits, classes), classes


def _known(values: jax.Array, classes: jax.Array) -> jax.Array:
  """Values [M, C], NaN for classes out of range; concrete ones are checked already."""
  known = (classes >= 0) & (classes < values.shape[1])
  return values if _checks.concrete(known.all()) else jnp.where(known[:, None], values, jnp.nan)


def _in_floats(conditions: Conditions, sums: PyTree) -> tuple[PyTree, PyTree, PyTree]:
  """Target, mask and sum, of at least single precision."""
  _checks.check_same_shapes("sums", sums, "conditions.target", conditions.target)
  made: tuple[PyTree, PyTree, PyTree] = jax.tree.map(_checks.floats, (conditions.target, conditions.mask, sums))
  return made


def _tensor_norms(conditions: Conditions, sums: PyTree) -> tuple[jax.Array, jax.Array]:
  """For each tensor the norm of its error and of its target, masked: [U] and [U]."""
  target, mask, sums = _in_floats(conditions, sums)
  target, sums = (jax.tree.map(jnp.multiply, mask, tree) for tree in (target, sums))
  return _norms(jax.tree.map(jnp.subtract, target, sums)), _norms(target)


def _norms(tree: PyTree) -> jax.Array:
  """The Euclidean norm of every leaf [U], none of which under- or overflows; at 0 its gradient is 0."""
  leaves = jax.tree.leaves(tree)
  units = _nonzero(jnp.stack([_largest(leaf) for leaf in leaves]))
  squared = jnp.stack([jnp.sum(jnp.square(leaf / unit)) for leaf, unit in zip(leaves, units, strict=True)])
  return jnp.where(squared == 0, 0.0, units * jnp.sqrt(_nonzero(squared)))


def _masked_in_units(conditions: Conditions, sums: PyTree) -> list[PyTree]:
  """Target and sum, each in units of its largest entry and then times the mask.

  Squares then neither under- nor overflow, unless what is left out is 1e18 times as large as the rest.
  """
  target, mask, sums = _in_floats(conditions, sums)
  scaled = []
  for tree in (target, sums):
    unit = _nonzero(jnp.max(jnp.stack([_largest(leaf) for leaf in jax.tree.leaves(tree)])))
    scaled.append(jax.tree.map(lambda mask, leaf, unit=unit: mask * (leaf / unit), mask, tree))
  return scaled


def _largest(leaf: jax.Array) -> jax.Array:
  """The largest entry, without a gradient: what it is a unit of does not depend on it."""
  return jnp.max(jnp.abs(jax.lax.stop_gradient(leaf)), initial=0.0)


def _squared_ratio(value: jax.Array, reference: jax.Array) -> jax.Array:
  return jnp.square(value / _nonzero(reference))


def _nonzero(value: jax.Array) -> jax.Array:
  """The value, or 1 if it is 0: a denominator. A NaN stays, so that it reaches the loss and stops the run."""
  return jnp.where(value == 0, 1.0, value)
