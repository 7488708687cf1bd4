"""The rates Lambda, by least squares on the derivative equations, and the choice of a solution.

The solution is not unique: the layers of a network can be rescaled against each other, and *every* solution is an exact
quasi-homogeneity. Which one describes the max-margin problem that gradient descent solved is a choice, made by one of
three rules: `balanced` (the default elsewhere), `least_norm` (the paper's) and `last_layer`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._tree import tensor_names
from kkt_jax._typing import PyTree
from kkt_jax.kkt.homogeneity import DerivativeEquations


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rates", "residual", "rank", "null_space_dimension", "target_rate", "undetermined"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RateSolution:
  """Lambda, and how well and how uniquely the equations determine it.

  Attributes:
    rates: the diagonal of Lambda, a pytree shaped like the parameters.
    residual: ``|A rates - values| / |values|`` of the equations; a quasi-homogeneous network reaches rounding error.
    rank: rank of the system.
    null_space_dimension: unknowns minus rank, the dimension of the family of exact solutions.
    target_rate: lambda_max of the group of parameters that the rule aims at; see `parameter_groups`.
    undetermined: True where the logits do not depend on a tensor (a bias before batch norm, a kernel of zeros), so that
      its rate is any; a boolean pytree shaped like the parameters.
  """

  rates: PyTree
  residual: jax.Array
  rank: jax.Array
  null_space_dimension: jax.Array
  target_rate: jax.Array
  undetermined: PyTree


@_checks.annotated
@full_precision
def balanced(equations: DerivativeEquations, params: PyTree) -> RateSolution:
  """Lambda whose greatest rate of a multiplicative tensor (everything but biases) is least, then the sum of squares.

  It describes trained classifiers best (BUILD_NOTES.md, "Lambda"). The target group is every tensor with that greatest
  rate; faster biases are left out of the conditions.

  ============================  ==========================================================================
  network                       rates
  ============================  ==========================================================================
  L layers                      1/L on every kernel; a bias has the sum of the rates up to its layer
  batch norm after every layer  1/2 on the last scale and shift and on the last kernel, 0 before them
  branches that are added up    1/2 on each, however many they are, and 1/2 on the last kernel
  biases of 0                   as any other bias
  tensor without influence      0, `RateSolution.undetermined`
  linear last layer, else GELU  1 on the last layer, 0 before; null space of dimension 0 is the sign of it
  no solution                   the least squares; the residual says so
  ============================  ==========================================================================

  Args:
    equations: the system, from `derivative_equations`. Singular values below the root of the dtype's eps (at least
      1e-6) times the greatest count as 0, and so do columns of such a size.
    params: zeta, whose tensors the columns stand for.

  Returns:
    A `RateSolution`; its rates are constants, through which no gradient flows.

  Raises:
    ValueError: all tensors are biases; the target group is empty, zero or not finite; columns that do not stand for the
      tensors. Values are looked at outside of jit and vmap only.

  >>> import jax.numpy as jnp
  >>> from kkt_jax.kkt import derivative_equations
  >>> params = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[3.0], [1.0]])}
  >>> mlp = lambda p, x: jnp.maximum(x @ p["w1"], 0) @ p["w2"]
  >>> solution = balanced(derivative_equations(mlp, params, jnp.array([[1.0], [2.0]])), params)
  >>> [round(float(rate), 3) for rate in (solution.rates["w1"][0, 0], solution.rates["w2"][0, 0])]
  [0.5, 0.5]
  >>> int(solution.rank), int(solution.null_space_dimension)
  (1, 1)
  """
  kernels = ~_biases(equations)
  cure = "pass derivative_equations(..., biases=) a pytree of bool that says which tensors are biases"
  if not kernels.any():
    raise ValueError(f"equations must have a tensor that is no bias, or no rate can be balanced; {cure}.")
  solution = _solve(equations, params, kernels, kernels, even=True)
  if _checks.concrete(_has_target(params, solution)) is False:
    raise ValueError(
      f"params must have a tensor of the target rate, {float(solution.target_rate):.3g}, that is neither zero nor"
      f" undetermined; got\n{groups_table(solution)}\nIf a bias is taken for a kernel or a kernel for a bias, {cure}."
    )
  return solution


@_checks.annotated
@full_precision
def least_norm(equations: DerivativeEquations, params: PyTree) -> RateSolution:
  """Lambda with the least sum of squares over all tensors: the paper's least squares to the letter.

  The target group is every tensor with the greatest rate; in a network with biases that is the last bias alone.

  Args, Returns and Raises are those of `balanced`, but for the errors of the target group.

  >>> import jax.numpy as jnp
  >>> equations = DerivativeEquations(jnp.array([[1.0, 2.0]]), jnp.array([5.0]))
  >>> print(least_norm(equations, {"a": jnp.ones(1), "b": jnp.ones(1)}).rates["b"].round(4))
  [2.]
  """
  everything = np.ones(equations.coefficients.shape[1], bool)
  return _solve(equations, params, everything, everything)


@_checks.annotated
@full_precision
def last_layer(equations: DerivativeEquations, params: PyTree, *, layer: str) -> RateSolution:
  """Lambda with the least sum of squares over all tensors but those of one layer, which takes the rate.

  If ``layer`` is the last one, its kernel and bias have rate 1 and everything else has rate 0 and zero conditions.

  Args:
    equations: as in `balanced`.
    params: as in `balanced`.
    layer: path of the layer, such as ``"Dense_2"``; its tensors begin with it and ``/`` or ``.``.

  Returns:
    A `RateSolution`; the target group is every tensor with the greatest rate of a multiplicative tensor.

  Raises:
    ValueError: as `balanced`, but for the errors of the target group; or ``layer`` names no tensor.

  >>> import jax.numpy as jnp
  >>> equations = DerivativeEquations(jnp.array([[1.0, 2.0]]), jnp.array([5.0]))
  >>> print(last_layer(equations, {"a": jnp.ones(1), "b": jnp.ones(1)}, layer="b").rates["b"].round(4))
  [2.5]
  """
  names = tensor_names(params)
  inside = np.array([name == layer or name.startswith((f"{layer}/", f"{layer}.")) for name in names])
  if not inside.any():
    raise ValueError(f"layer must be the path of a layer; got {layer!r}, and the tensors are {names}.")
  biases = _biases(equations)
  return _solve(equations, params, ~inside, biases if biases.all() else ~biases)


RULES: Mapping[str, Callable[..., RateSolution]] = {"balanced": balanced, "least_norm": least_norm}


def given_rates(rates: PyTree, params: PyTree, *, target_rate: ArrayLike | None = None) -> RateSolution:
  """Wraps a Lambda that the caller knows, so that it can stand wherever a solved one does.

  Args:
    rates: a pytree like ``params`` whose leaves are scalars or shaped like the parameters.
    params: zeta.
    target_rate: rate of the target group; the greatest rate if None, as in the paper.

  Returns:
    A `RateSolution` with NaN residual and rank -1, since no equation was solved; `scaling_error` checks it.

  Raises:
    ValueError: ``rates`` has another tree structure than ``params``, or a leaf of another shape.

  >>> import jax.numpy as jnp
  >>> given_rates({"w": 1.0}, {"w": jnp.ones((2, 3))}).rates["w"].shape
  (2, 3)
  """
  _checks.check_same_structure("rates", rates, "params", params)
  for name, rate, p in zip(tensor_names(params), *map(jax.tree.leaves, (rates, params)), strict=True):
    if jnp.ndim(rate) != 0:
      _checks.check_shape(f"rates[{name!r}]", rate, jnp.shape(p), "() or that of the parameter")
  full = jax.tree.map(
    lambda rate, p: jnp.broadcast_to(jnp.asarray(rate, jnp.result_type(p)), jnp.shape(p)), rates, params
  )
  if target_rate is None:
    target_rate = jnp.max(jnp.stack([jnp.max(rate) for rate in jax.tree.leaves(full)]))
  unknown, undetermined = jnp.array(-1), jax.tree.map(lambda rate: jnp.zeros(rate.shape, bool), full)
  return RateSolution(full, jnp.array(jnp.nan), unknown, unknown, jnp.asarray(target_rate), undetermined)


@_checks.annotated
@jax.jit  # one compilation for all tensors
def parameter_groups(solution: RateSolution, *, tolerance: float = 1e-3) -> PyTree:
  """Sorts the parameters by their rate (the text below Eq. 2), as integers shaped like the parameters.

  =====  ======================  =========================================================
  group  rate                    condition
  =====  ======================  =========================================================
  -1     slower than the target  Z_2 of the paper: the stationarity sum is 0
  0      the target rate         Z_1 of the paper: the stationarity sum is Lambda-bar zeta
  1      faster, a bias mostly   none, left out
  =====  ======================  =========================================================

  Args:
    solution: Lambda and its target rate.
    tolerance: rates closer than this to the target rate belong to the target group.

  Returns:
    A pytree of int8 arrays.

  >>> import jax.numpy as jnp
  >>> params = {"w": jnp.ones(3)}
  >>> print(parameter_groups(given_rates({"w": jnp.array([0.0, 0.5, 1.0])}, params, target_rate=0.5))["w"])
  [-1  0  1]
  """

  def group(rate: jax.Array) -> jax.Array:
    ahead = rate - solution.target_rate
    return jnp.where(jnp.abs(ahead) > tolerance, jnp.sign(ahead), 0).astype(jnp.int8)

  return jax.tree.map(group, solution.rates)


def groups_table(solution: RateSolution, *, tolerance: float = 1e-3) -> str:
  """The groups as a table for people: tensor, shape, rate, condition.

  >>> import jax.numpy as jnp
  >>> print(groups_table(given_rates({"a": 0.0, "w": 1.0}, {"a": jnp.ones(2), "w": jnp.ones((2, 3))})))
  tensor  shape    rate  condition
  a       (2,)    0.000  zero
  w       (2, 3)  1.000  target
  """
  lines = [("tensor", "shape", "rate", "condition")]
  groups = parameter_groups(solution, tolerance=tolerance)
  trees = (solution.rates, groups, solution.undetermined)
  for name, rate, group, unknown in zip(tensor_names(groups), *map(jax.tree.leaves, trees), strict=True):
    low, high = (round(float(bound), 3) + 0.0 for bound in (rate.min(), rate.max()))  # + 0.0: no "-0.000"
    shown = f"{low:.3f}" if high - low <= tolerance else f"{low:.3f}..{high:.3f}"
    condition = "/".join(("zero", "target", "left out")[code + 1] for code in np.unique(group))
    lines.append((name, str(rate.shape), shown, condition + " (rate undetermined)" * bool(unknown.any())))
  widths = [max(len(line[column]) for line in lines) for column in range(3)]
  return "\n".join(
    f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]}" for line in lines
  )


def _biases(equations: DerivativeEquations) -> np.ndarray:
  """[U] bool; none is a bias if the equations do not say."""
  return np.array(equations.biases or [False] * equations.coefficients.shape[1], bool)


def _solve(
  equations: DerivativeEquations, params: PyTree, minimised: Any, aimed: Any, *, even: bool = False
) -> RateSolution:
  """The solution that is least over the ``minimised`` unknowns [U]; its target rate is the greatest ``aimed`` one."""
  number, columns = len(jax.tree.leaves(params)), equations.coefficients.shape[1]
  if columns != number:
    raise ValueError(f"equations must have one column for each of the {number} tensors of params; got {columns}.")
  return _least_squares(jax.lax.stop_gradient(equations), params, minimised, aimed, even)


@jax.jit
def _has_target(params: PyTree, solution: RateSolution) -> jax.Array:
  """Whether the target group holds a parameter that is not 0."""
  inside = jax.tree.map(lambda p, group: jnp.any((group == 0) & (p != 0)), params, parameter_groups(solution))
  return jnp.isfinite(solution.target_rate) & jnp.any(jnp.stack(jax.tree.leaves(inside)))


@functools.partial(jax.jit, static_argnames="even")
def _least_squares(
  equations: DerivativeEquations, params: PyTree, minimised: Any, aimed: Any, even: bool
) -> RateSolution:
  """The exact solution that `_choose` prefers, as a pytree."""
  # Coefficients are right to a few eps: an equation of size s gives its rates an error of eps / s, and without it an
  # error of s remains; the two meet at the root of eps. (With eps * max(R, U), usual elsewhere, the columns of 1e-5
  # that batch norm's epsilon leaves of a symmetry counted, and moved rates by 2e-3 in single precision. Whether they
  # count makes no other difference: rates of 0 before the normalisation satisfy them.) The floor is for networks that
  # compute in single precision inside of a double one.
  rcond = max(float(jnp.finfo(equations.coefficients.dtype).eps) ** 0.5, 1e-6)
  dtype = jnp.promote_types(equations.coefficients.dtype, jnp.float32)
  coefficients, values = equations.coefficients.astype(dtype), equations.values.astype(dtype)
  num_rows, num_unknowns = coefficients.shape
  sizes = jnp.ones(num_unknowns, dtype) if equations.sizes is None else equations.sizes.astype(dtype)
  undetermined = sizes <= rcond * jnp.max(sizes)
  sizes = jnp.where(undetermined, 1, sizes)[:, None]
  scaled = jnp.where(undetermined[:, None], 0, coefficients.T / sizes)
  # Rows of zeros change no solution, and with R >= U the thin decomposition already holds the whole null space.
  missing = max(0, num_unknowns - num_rows)
  v, s, ut = jnp.linalg.svd(jnp.pad(scaled, ((0, 0), (0, missing))), full_matrices=False)
  kept = s > rcond * s[0]
  inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
  solution = (v @ (inverse * (ut @ jnp.pad(values, (0, missing)))))[:, None] / sizes
  null_space = jnp.where(kept[None], 0, v) / sizes  # columns beyond the null space are 0, so that shapes are static
  tolerance = float(jnp.finfo(dtype).eps) ** 0.5
  choose = functools.partial(_choose, dtype=np.dtype(dtype), even=even, tolerance=tolerance)
  # A program of a few unknowns, which no accelerator need solve. Callbacks run outside of jax.enable_x64, which would
  # round their doubles: bits go in and come back.
  bits = jax.lax.bitcast_convert_type(jnp.concatenate([solution, null_space], axis=1), jnp.uint32)
  chosen = jax.ShapeDtypeStruct(bits[:, 0].shape, bits.dtype)
  rates = jax.pure_callback(choose, chosen, bits, minimised, vmap_method="sequential")
  rates = jax.lax.bitcast_convert_type(rates, dtype)
  scale = jnp.linalg.norm(values)
  residual = jnp.linalg.norm(coefficients @ rates - values) / jnp.where(scale > 0, scale, 1)
  leaves, structure = jax.tree.flatten(params)

  def unflatten(unknowns: jax.Array) -> PyTree:
    whole = [jnp.broadcast_to(unknown, jnp.shape(leaf)) for unknown, leaf in zip(unknowns, leaves, strict=True)]
    return jax.tree.unflatten(structure, whole)

  rank, target_rate = jnp.sum(kept), jnp.max(jnp.where(aimed & ~undetermined, rates, -jnp.inf))
  return RateSolution(unflatten(rates), residual, rank, num_unknowns - rank, target_rate, unflatten(undetermined))


def _choose(bits: ArrayLike, minimised: ArrayLike, *, dtype: np.dtype, even: bool, tolerance: float) -> np.ndarray:
  """The solution [U], in bits, that is least over the ``minimised`` unknowns, then over all.

  Least is the norm of the minimised, or if ``even`` the greatest of them and then their norm.

  Args:
    bits: of [U, 1 + U]: any solution, and directions that span all others; columns of 0 do not count.
    minimised: [U] bool.
    dtype: of the numbers, whose bits are 32-bit integers.
    even: whether the greatest counts.
    tolerance: singular values of orthonormal directions below it are rounding errors.
  """
  numbers = np.ascontiguousarray(bits).view(dtype).reshape(len(np.asarray(bits)), -1).astype(np.float64)
  rates, directions = numbers[:, 0], numbers[:, 1:]
  directions = directions[:, np.any(directions, axis=0)]
  if np.isfinite(numbers).all() and directions.size:
    basis = np.linalg.svd(directions, full_matrices=False)[0]
    rates = rates - basis @ (basis.T @ rates)
    inside, given = basis * np.asarray(minimised)[:, None], rates * np.asarray(minimised)
    wanted = _flattest(given, inside, tolerance) if even else 0
    # The rates are orthogonal to the basis, so that the least shift makes the norm of the whole the least, too.
    rates = rates + basis @ np.linalg.lstsq(inside, wanted - given, rcond=tolerance)[0]
  return rates.astype(dtype).view(np.uint32).reshape(np.shape(bits)[:1] + np.shape(bits)[2:])


def _flattest(given: np.ndarray, directions: np.ndarray, tolerance: float) -> np.ndarray:
  """The flattest of all ``given + directions @ any`` [U]: the greatest absolute value is least, then the norm.

  Both at once, as the least ``greatest^2 + weight * norm^2``. With a weight this small the greatest is as small as it
  can be, and yet no rate grows for the sake of a rounding error of the greatest.
  """
  from scipy import optimize  # type: ignore[import-untyped]

  u, s, _ = np.linalg.svd(directions, full_matrices=False)
  basis = u[:, s > tolerance]
  nearest = given - basis @ (basis.T @ given)
  # Least-distance programming (Lawson and Hanson 1974, ch. 23): the least |v| with G v >= h by non-negative least
  # squares; v holds the coordinates in the basis times root, and the greatest.
  root = (0.1 / len(given)) ** 0.5
  above = np.column_stack([np.concatenate([basis, -basis]) / root, np.ones(2 * len(given))])
  system = np.column_stack([above, np.concatenate([-nearest, nearest])]).T
  last = np.append(np.zeros(len(system) - 1), 1.0)
  rest = system @ optimize.nnls(system, last)[0] - last
  return nearest - basis @ (rest[:-2] / rest[-1]) / root
