"""The rates Lambda of a quasi-homogeneous classifier: derivative equations, least squares, choice of a solution.

A classifier is Lambda-quasi-homogeneous if Phi(x; e^(a Lambda) zeta) = e^a Phi(x; zeta) for every a and x (section 3 of
the paper). Its derivative at a = 0 is linear in Lambda (Eq. 9), so Lambda is the solution of a linear system (Eq. 10).

The solution is not unique: the layers of a network can be rescaled against each other, and *every* solution is an exact
quasi-homogeneity. Which one describes the max-margin problem that gradient descent solved is a choice; see
`solve_rates`.
"""

from collections.abc import Sequence
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
from scipy import linalg, optimize  # type: ignore[import-untyped]

from kkt_jax import _checks
from kkt_jax.classifier import ApplyFn, PyTree
from kkt_jax.jacobians import per_sample_jacobians

RULES = ("balanced", "least_norm", "last_layer")
UNKNOWNS = ("tensor", "parameter")
_BIAS_NAMES = ("bias", "b", "beta", "offset")


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["coefficients", "values"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DerivativeEquations:
  """A linear system for Lambda, ``coefficients @ rates = values``.

  Attributes:
    coefficients: [R, U], one row an equation, one column an unknown rate.
    values: [R].
  """

  coefficients: jax.Array
  values: jax.Array


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["rates", "residual", "rank", "null_space_dimension", "target_rate"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class RateSolution:
  """Lambda, and how well and how uniquely the equations determine it.

  Attributes:
    rates: the diagonal of Lambda, a pytree shaped like the parameters.
    residual: |A rates - values| / |values| of the equations; a quasi-homogeneous network reaches rounding error.
    rank: rank of the system.
    null_space_dimension: unknowns minus rank, the dimension of the family of exact solutions.
    target_rate: lambda_max of the group of parameters that the rule aims at; see `parameter_groups`.
  """

  rates: PyTree
  residual: jax.Array
  rank: jax.Array
  null_space_dimension: jax.Array
  target_rate: jax.Array


def derivative_equations(
  apply_fn: ApplyFn,
  params: PyTree,
  x: ArrayLike,
  *,
  unknowns: str = "tensor",
  higher_order: Sequence[tuple[str, tuple[int, ...]]] = (),
) -> DerivativeEquations:
  """Rows of the derivative equations (Eqs. 9 and 10) at the inputs ``x``, for every output.

  First order, Eq. 9, one row a sample and an output: ``sum_j zeta_j Lambda_j dPhi_c/dzeta_j = Phi_c``.

  Higher order, Eq. 10 multiplied by ``1 - Lambda_j``, which makes it linear, for each chosen parameter zeta_j:
  ``sum_k Lambda_k (zeta_k d2Phi_c/dzeta_k dzeta_j + [k = j] dPhi_c/dzeta_j) = dPhi_c/dzeta_j``. It is the derivative
  of Eq. 9 by zeta_j, and is computed so.

  Args:
    apply_fn: ``(params, x[K, ...]) -> logits[K, C]`` with exact derivatives: relaxed ReLU gates, whose derivatives do
      not belong to their values, give a wrong Lambda. With ``unknowns="tensor"`` the samples may interact.
    params: zeta.
    x: K inputs [K, ...]; any inputs will do, random ones are usual.
    unknowns: ``"tensor"``, one rate for each parameter tensor (U = number of tensors), or ``"parameter"``, one for
      each parameter (U = P; builds Jacobians; hopelessly under-determined except for tiny networks).
    higher_order: the chosen parameters, each a path such as ``"Dense_0/kernel"`` and an index into that tensor.

  Returns:
    The system, with R = K * C * (1 + len(higher_order)) rows.

  Raises:
    ValueError: ``x`` is no batch of floats, ``unknowns`` is not a choice, or a path or an index of ``higher_order``
      does not exist.

  >>> import jax.numpy as jnp
  >>> params = {"weight": jnp.array([[2.0]]), "bias": jnp.array([3.0])}
  >>> equations = derivative_equations(lambda p, x: x @ p["weight"] + p["bias"], params, jnp.array([[5.0]]))
  >>> print(equations.coefficients, equations.values)  # bias * 3 + weight * 10 = 13
  [[ 3. 10.]] [13.]
  """
  x = jnp.asarray(x)
  _checks.check_batch("x", x)
  _checks.check_choice("unknowns", unknowns, UNKNOWNS)
  rows_of = _rows_per_tensor if unknowns == "tensor" else _rows_per_parameter
  directions = [_unit_vector(params, path, index) for path, index in higher_order]

  def rows(p: PyTree) -> jax.Array:
    return rows_of(apply_fn, p, x)

  def logits(p: PyTree) -> jax.Array:
    return apply_fn(p, x).reshape(-1)

  blocks = [(rows(params), logits(params))]
  for direction in directions:
    blocks.append(
      (
        jax.jvp(rows, (params,), (direction,))[1],
        jax.jvp(logits, (params,), (direction,))[1],
      )
    )
  return DerivativeEquations(
    coefficients=jnp.concatenate([block[0] for block in blocks]),
    values=jnp.concatenate([block[1] for block in blocks]),
  )


def solve_rates(
  equations: DerivativeEquations,
  params: PyTree,
  *,
  rule: str = "balanced",
  last_layer: str | None = None,
  rcond: float = 1e-4,
) -> RateSolution:
  """Solves the derivative equations for Lambda by one jitted least squares, and chooses among the solutions.

  The singular value decomposition gives the minimum-norm solution and a basis of the null space. Every solution is an
  exact quasi-homogeneity. The rule picks one:

  - ``"balanced"``: the greatest rate of a multiplicative tensor (everything but the biases) is as small as can be, and
    then the sum of the squares. An L-layer network has rate 1/L on every weight matrix; a bias has the sum of the
    rates up to its layer. With batch norm the rates end up on the last normalisation's scale and shift and on the last
    layer, 1/2 each, and are 0 before it; branches that are added up have 1/2 each too, however many they are. The
    target group is every tensor with that greatest multiplicative rate; faster biases are left out of the conditions.
    It is the default, because it describes trained classifiers best (BUILD_NOTES.md, "Lambda").
  - ``"least_norm"``: the least sum of squares over all tensors, the paper's least squares to the letter. For biased
    networks the greatest rate is then the last bias's alone, which becomes the whole target group.
  - ``"last_layer"``: the same over all tensors but the last layer's. Its weights and bias have rate 1 and everything
    else has rate 0, so that everything else must satisfy zero conditions.

  Args:
    equations: the system, from `derivative_equations`.
    params: zeta, whose tensors the columns stand for.
    rule: ``"balanced"``, ``"least_norm"`` or ``"last_layer"``.
    last_layer: path of the last layer for the rule of that name, such as ``"Dense_2"``. Where None, the last module in
      natural order (``Dense_10`` after ``Dense_9``).
    rcond: singular values below ``rcond`` times the greatest count as 0; 1e-4 suits float32.

  Returns:
    A `RateSolution`. Where the system is rank deficient the null-space dimension says by how much. Where no rates
    solve it the residual says so; but a network whose last layer is linear, GELU networks included, always has the
    solution ``"last_layer"``: a null space of dimension 0 with rates on the last layer alone is the sign that nothing
    before it is quasi-homogeneous.

  Raises:
    ValueError: unknown ``rule``, ``last_layer`` that names no tensor, ``rcond`` not positive, or a system whose columns
      stand neither for the tensors nor for the parameters.

  >>> import jax.numpy as jnp
  >>> params = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[3.0], [1.0]])}
  >>> mlp = lambda p, x: jnp.maximum(x @ p["w1"], 0) @ p["w2"]
  >>> solution = solve_rates(derivative_equations(mlp, params, jnp.array([[1.0], [2.0]])), params)
  >>> [round(float(rate), 3) for rate in (solution.rates["w1"][0, 0], solution.rates["w2"][0, 0])]
  [0.5, 0.5]
  >>> int(solution.rank), int(solution.null_space_dimension)
  (1, 1)
  """
  _checks.check_choice("rule", rule, RULES)
  _checks.check_positive("rcond", rcond)
  sizes = [int(np.size(leaf)) for leaf in jax.tree.leaves(params)]
  num_unknowns = equations.coefficients.shape[1]
  if num_unknowns not in (len(sizes), sum(sizes)):
    raise ValueError(
      f"equations must have one column for each of the {len(sizes)} tensors or {sum(sizes)} parameters of params;"
      f" got {num_unknowns} columns."
    )
  repeats = np.ones(len(sizes), int) if num_unknowns == len(sizes) else np.array(sizes)
  biases = np.repeat([_is_bias(name) for name in tensor_names(params)], repeats)
  if rule == "balanced":
    minimised = ~biases if not biases.all() else np.ones_like(biases)
  elif rule == "least_norm":
    minimised = np.ones_like(biases)
  else:
    minimised = ~np.repeat(_in_last_layer(params, last_layer), repeats)

  vector, residual, rank = _least_squares(equations, jnp.asarray(minimised), rcond, even=rule == "balanced")
  aimed = ~biases if rule != "least_norm" and not biases.all() else np.ones_like(biases)
  return RateSolution(
    rates=_unflatten(vector, params),
    residual=residual,
    rank=rank,
    null_space_dimension=num_unknowns - rank,
    target_rate=jnp.max(jnp.where(aimed, vector, -jnp.inf)),
  )


@functools.partial(jax.jit, static_argnames=("rcond", "even"))
def _least_squares(
  equations: DerivativeEquations, minimised: jax.Array, rcond: float, *, even: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The exact solution that is least over the ``minimised`` unknowns, then over all; its residual; the rank.

  Least is the norm of the minimised rates, or where ``even`` the greatest of them and then their norm.
  """
  # Rows of zeros change no solution, and with R >= U the thin decomposition already holds the whole null space.
  missing = max(0, equations.coefficients.shape[1] - equations.coefficients.shape[0])
  u, s, vt = jnp.linalg.svd(jnp.pad(equations.coefficients, ((0, missing), (0, 0))), full_matrices=False)
  kept = s > rcond * s[0]
  inverse = jnp.where(kept, 1.0 / jnp.where(kept, s, 1.0), 0.0)
  least_norm = vt.T @ (inverse * (u.T @ jnp.pad(equations.values, (0, missing))))
  null_space = vt.T * ~kept[None, :]  # columns beyond the null space are zeroed, so that shapes stay static
  inside, given = null_space * minimised[:, None], least_norm * minimised
  wanted = jnp.zeros_like(given)
  if even:  # a quadratic program of a few unknowns, which no accelerator need solve
    single = jax.ShapeDtypeStruct(given.shape, jnp.float32)  # callbacks do not see jax.enable_x64
    wanted = jax.pure_callback(functools.partial(_even, rcond=rcond), single, given, inside).astype(given.dtype)
  # least_norm is orthogonal to the null space, so the least-norm shift also minimises the norm of the whole solution.
  shift = jnp.linalg.lstsq(inside, wanted - given, rcond=rcond)[0]
  rates = least_norm + null_space @ shift
  error = equations.coefficients @ rates - equations.values
  scale = jnp.linalg.norm(equations.values)
  return rates, jnp.linalg.norm(error) / jnp.where(scale > 0, scale, 1.0), jnp.sum(kept)


def _even(given: ArrayLike, directions: ArrayLike, *, rcond: float) -> np.ndarray:
  """The flattest of all ``given + directions @ any`` [U]: the greatest absolute value is least, then the norm.

  Both at once, as the least ``greatest^2 + weight * norm^2``. With a weight this small the greatest is as small as it
  can be, and yet no rate grows for the sake of a rounding error of the greatest.
  """
  start, columns = np.asarray(given, np.float64), np.asarray(directions, np.float64)
  if not (np.isfinite(start).all() and np.isfinite(columns).all()):
    return start.astype(np.float32)
  u, s, _ = linalg.svd(columns, full_matrices=False)
  basis = u[:, s > rcond]  # the null space is orthonormal; what moves other unknowns alone is rounding error here
  nearest = start - basis @ (basis.T @ start)
  # Least-distance programming (Lawson and Hanson 1974, ch. 23): the least |v| with G v >= h by non-negative least
  # squares; v holds the coordinates in the basis times root, and the greatest.
  root = (0.1 / len(start)) ** 0.5
  above = np.column_stack([np.concatenate([basis, -basis]) / root, np.ones(2 * len(start))])
  system = np.column_stack([above, np.concatenate([-nearest, nearest])]).T
  last = np.append(np.zeros(len(system) - 1), 1.0)
  rest = system @ optimize.nnls(system, last)[0] - last
  return (nearest - basis @ (rest[:-2] / rest[-1]) / root).astype(np.float32)


def given_rates(rates: PyTree, params: PyTree, *, target_rate: float | None = None) -> RateSolution:
  """Wraps a Lambda that the caller knows, so that it can stand wherever a solved one does.

  Args:
    rates: a pytree like ``params`` whose leaves are scalars or shaped like the parameters.
    params: zeta.
    target_rate: rate of the target group; the greatest rate where None, as in the paper.

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
  greatest = jnp.max(jnp.stack([jnp.max(rate) for rate in jax.tree.leaves(full)]))
  unknown = jnp.array(-1)
  return RateSolution(
    full, jnp.array(jnp.nan), unknown, unknown, jnp.asarray(greatest if target_rate is None else target_rate)
  )


@functools.partial(jax.tree_util.register_dataclass, data_fields=["target", "zero", "left_out"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ParameterGroups:
  """Which condition each parameter must satisfy; boolean pytrees shaped like the parameters, one of them True.

  Attributes:
    target: rate equal to the target rate (Z_1 of the paper): the stationarity sum must equal Lambda-bar zeta.
    zero: slower rates (Z_2): the stationarity sum must be 0.
    left_out: faster rates, such as biases under the balanced rule: no condition.
  """

  target: PyTree
  zero: PyTree
  left_out: PyTree


def parameter_groups(solution: RateSolution, *, tolerance: float = 1e-3) -> ParameterGroups:
  """Sorts the parameters by their rate into target, zero condition and left out (the text below Eq. 2).

  Args:
    solution: Lambda and its target rate.
    tolerance: rates closer than this to the target rate belong to the target group.

  Returns:
    `ParameterGroups`.

  >>> import jax.numpy as jnp
  >>> params = {"slow": jnp.ones(1), "fast": jnp.ones(1), "faster": jnp.ones(1)}
  >>> solution = given_rates({"slow": 0.0, "fast": 0.5, "faster": 1.0}, params, target_rate=0.5)
  >>> groups = parameter_groups(solution)
  >>> bool(groups.target["fast"][0]), bool(groups.zero["slow"][0]), bool(groups.left_out["faster"][0])
  (True, True, True)
  """
  rate = solution.target_rate
  target = jax.tree.map(lambda r: jnp.abs(r - rate) <= tolerance, solution.rates)
  zero = jax.tree.map(lambda r, inside: ~inside & (r < rate), solution.rates, target)
  left_out = jax.tree.map(lambda r, inside: ~inside & (r > rate), solution.rates, target)
  return ParameterGroups(target, zero, left_out)


def groups_table(solution: RateSolution, *, tolerance: float = 1e-3) -> str:
  """The groups as a table for people: tensor, shape, rate, condition.

  >>> import jax.numpy as jnp
  >>> print(groups_table(given_rates({"a": 0.0, "w": 1.0}, {"a": jnp.ones(2), "w": jnp.ones((2, 3))})))
  tensor  shape    rate  condition
  a       (2,)    0.000  zero
  w       (2, 3)  1.000  target
  """
  groups = parameter_groups(solution, tolerance=tolerance)
  lines = [("tensor", "shape", "rate", "condition")]
  for name, rate, target, zero in zip(
    tensor_names(solution.rates),
    *map(jax.tree.leaves, (solution.rates, groups.target, groups.zero)),
    strict=True,
  ):
    low, high = (round(float(bound), 3) + 0.0 for bound in (rate.min(), rate.max()))  # + 0.0: no "-0.000"
    kinds = np.where(np.asarray(target), "target", np.where(np.asarray(zero), "zero", "left out"))
    shown = f"{low:.3f}" if high - low <= tolerance else f"{low:.3f}..{high:.3f}"
    lines.append((name, str(rate.shape), shown, "/".join(sorted(np.unique(kinds)))))
  widths = [max(len(line[column]) for line in lines) for column in range(3)]
  return "\n".join(
    f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]}" for line in lines
  )


def scale_params(params: PyTree, rates: PyTree, alpha: ArrayLike) -> PyTree:
  """psi_alpha(zeta) = e^(alpha Lambda) zeta, section 3 of the paper.

  >>> import jax.numpy as jnp
  >>> print(scale_params({"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}, jnp.log(3.0))["w"].round(3))
  [9.]
  """
  return jax.tree.map(lambda p, rate: jnp.exp(alpha * rate) * p, params, rates)


def scaling_error(apply_fn: ApplyFn, params: PyTree, rates: PyTree, x: ArrayLike, alphas: ArrayLike) -> jax.Array:
  """How far Lambda is from an exact quasi-homogeneity: the check of Fig. 3 as one number.

  ``max |Phi(x; e^(a Lambda) zeta) / (e^a Phi(x; zeta)) - 1|`` over inputs, outputs and scales.

  Args:
    apply_fn: ``(params, x[K, ...]) -> logits[K, C]``.
    params: zeta.
    rates: Lambda, a pytree like ``params``.
    x: inputs [K, ...].
    alphas: scales a, [A].

  Returns:
    A scalar. Logits that are exactly 0 at ``zeta`` have no ratio; there the absolute difference counts.

  >>> import jax.numpy as jnp
  >>> float(scaling_error(lambda w, x: x * w, 2.0, 1.0, jnp.ones((1, 1)), jnp.array([0.0])))
  0.0
  """
  x, alphas = jnp.asarray(x), jnp.asarray(alphas)
  _checks.check_batch("x", x)
  _checks.check_rank("alphas", alphas, 1, "[A]")
  _checks.check_at_least("len(alphas)", alphas.shape[0], 1)
  _checks.check_same_structure("rates", rates, "params", params)
  logits = apply_fn(params, x)

  def error(alpha: jax.Array) -> jax.Array:
    expected = jnp.exp(alpha) * logits
    difference = jnp.abs(apply_fn(scale_params(params, rates, alpha), x) - expected)
    return jnp.max(difference / jnp.where(expected == 0, 1.0, jnp.abs(expected)))

  return jnp.max(jax.lax.map(error, alphas))


def tensor_names(params: PyTree) -> list[str]:
  """The path of every parameter tensor, in the order of `jax.tree.leaves`.

  >>> tensor_names({"Dense_0": {"bias": 0.0, "kernel": 0.0}})
  ['Dense_0/bias', 'Dense_0/kernel']
  """
  paths = jax.tree_util.tree_leaves_with_path(params)
  return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def _is_bias(name: str) -> bool:
  """Whether a tensor adds to its layer's output rather than multiplies its input, told by its name."""
  return name.split("/")[-1].lower() in _BIAS_NAMES


def _in_last_layer(params: PyTree, last_layer: str | None) -> list[bool]:
  names = tensor_names(params)
  if last_layer is None:
    natural = lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    last_layer = max((name.rpartition("/")[0] or name for name in names), key=natural)
  inside = [name == last_layer or name.startswith(last_layer + "/") for name in names]
  if not any(inside):
    raise ValueError(f"last_layer must be the path of a layer; got {last_layer!r}, and the tensors are {names}.")
  return inside


def _rows_per_tensor(apply_fn: ApplyFn, params: PyTree, x: jax.Array) -> jax.Array:
  """[K * C, U]: the derivative of every logit along each tensor's own value; one forward mode pass a tensor."""
  leaves, structure = jax.tree.flatten(params)

  def along(selected: jax.Array) -> jax.Array:
    tangents = [jnp.where(selected == k, leaf, 0) for k, leaf in enumerate(leaves)]
    return jax.jvp(lambda p: apply_fn(p, x), (params,), (jax.tree.unflatten(structure, tangents),))[1].reshape(-1)

  return jax.lax.map(along, jnp.arange(len(leaves))).T


def _rows_per_parameter(apply_fn: ApplyFn, params: PyTree, x: jax.Array) -> jax.Array:
  """[K * C, P]: every parameter times every logit's derivative by it."""
  jacobians = per_sample_jacobians(apply_fn, params, x)
  scaled = jax.tree.map(
    lambda p, jacobian: (jnp.asarray(p)[None, None] * jacobian).reshape(-1, jnp.size(p)), params, jacobians
  )
  return jnp.concatenate(jax.tree.leaves(scaled), axis=1)


def _unit_vector(params: PyTree, path: str, index: tuple[int, ...]) -> PyTree:
  """The direction of one parameter, as a pytree like ``params``."""
  names = tensor_names(params)
  if path not in names:
    raise ValueError(f"higher_order must name tensors of params, {names}; got {path!r}.")
  leaves, structure = jax.tree.flatten(params)
  shape = jnp.shape(leaves[names.index(path)])
  if len(index) != len(shape) or not all(0 <= i < size for i, size in zip(index, shape, strict=True)):
    raise ValueError(f"higher_order must hold an index into shape {shape} for {path!r}; got {index}.")
  zeros = [jnp.zeros_like(leaf) for leaf in leaves]
  zeros[names.index(path)] = zeros[names.index(path)].at[index].set(1)
  return jax.tree.unflatten(structure, zeros)


def _unflatten(vector: jax.Array, params: PyTree) -> PyTree:
  """The vector of unknowns as a pytree shaped like ``params``."""
  leaves, structure = jax.tree.flatten(params)
  if vector.shape[0] == len(leaves):
    pieces: list[Any] = list(vector)
  else:
    pieces = jnp.split(vector, np.cumsum([jnp.size(leaf) for leaf in leaves])[:-1])
  shapes = [jnp.shape(leaf) for leaf in leaves]
  full = [jnp.broadcast_to(p, s) if p.ndim == 0 else p.reshape(s) for p, s in zip(pieces, shapes, strict=True)]
  return jax.tree.unflatten(structure, full)
