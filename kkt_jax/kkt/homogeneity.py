"""Derivative equations of a quasi-homogeneous classifier, and how far it is from being one.

A classifier is Lambda-quasi-homogeneous if Phi(x; e^(a Lambda) zeta) = e^a Phi(x; zeta) for every a and x (section 3 of
the paper). Its derivative at a = 0 is linear in Lambda (Eq. 9), so Lambda is the solution of a linear system, which
`kkt_jax.kkt.rates` solves.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._tree import tensor_names
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers.dataflow import bias_tensors
from kkt_jax.kkt import functionals

_QUIET = 1e-2  # what scaling a bias changes, next to the logits, below which its rate takes rows along a direction


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["coefficients", "values", "sizes"], meta_fields=["biases"]
)
@dataclasses.dataclass(frozen=True)
class DerivativeEquations:
  """A linear system for Lambda, ``coefficients @ rates = values``.

  Attributes:
    coefficients: [R, U], a row per equation, a column per unknown rate.
    values: [R].
    sizes: [U], the norm that each column would have if no symmetry made it small; 1 each if None. The rank is decided
      with the columns divided by it: a kernel before batch norm has a column of 0 at size 1, a tiny bias has not.
    biases: which unknowns are rates of biases, U of them; none is if empty.
  """

  coefficients: jax.Array
  values: jax.Array
  sizes: jax.Array | None = None
  biases: tuple[bool, ...] = ()


@_checks.annotated
@full_precision
def derivative_equations(
  apply_fn: ApplyFn,
  params: PyTree,
  x: ArrayLike,
  *,
  higher_order: Sequence[tuple[str, tuple[int, ...]]] = (),
  biases: PyTree | None = None,
) -> DerivativeEquations:
  """Rows of the derivative equations (Eqs. 9 and 10) at the inputs ``x``, for every output; a rate per tensor.

  First order, Eq. 9, a row per sample and output: ``sum_j zeta_j Lambda_j dPhi_c/dzeta_j = Phi_c``.

  Second order, Eq. 10 (by Eq. 8) multiplied by ``1 - Lambda_j``, which makes it linear: that of Eq. 9 by zeta_j is
  ``sum_k Lambda_k (zeta_k d2Phi_c/dzeta_k dzeta_j + [k = j] dPhi_c/dzeta_j) = dPhi_c/dzeta_j``. One block of such rows
  is always added if there are biases or vectors: their sum over a fixed random direction v in these tensors. It
  determines the rate of a bias that is 0 or nearly 0, whose column in Eq. 9 vanishes.

  Args:
    apply_fn: ``(params, x[K, ...]) -> logits[K, C]`` with exact derivatives: relaxed ReLU gates, whose derivatives do
      not belong to their values, give a wrong Lambda. The samples may interact.
    params: zeta, floating point; 16-bit numbers are computed with in float32.
    x: K inputs [K, ...]; any inputs will do, random ones are usual.
    higher_order: single parameters whose rows of Eq. 10 are added as well, each a path such as ``"Dense_0/kernel"``
      and an index into that tensor.
    biases: a pytree of bool like ``params``: which tensors are biases. If None, those that the function adds to its
      data and combines with them in no other way, whatever their names; see
      `kkt_jax.classifiers.dataflow.bias_tensors`.

  Returns:
    The system: K * C rows of first order, K * C rows along v, and K * C for each of ``higher_order``.

  Raises:
    ValueError: ``x`` is no batch of floats; ``params`` is empty, not floating point, not finite or holds a tensor
      without entries; a path or an index of ``higher_order`` does not exist; ``biases`` has another structure.

  >>> import jax.numpy as jnp
  >>> params = {"weight": jnp.array([[2.0]]), "shift": jnp.array([3.0])}
  >>> equations = derivative_equations(lambda p, x: x @ p["weight"] + p["shift"], params, jnp.array([[5.0]]))
  >>> print(equations.biases, equations.coefficients[0], equations.values[0])  # shift * 3 + weight * 10 = 13
  (True, False) [ 3. 10.] 13.0
  """
  params, x = _prepare(params, x)
  if biases is None:
    known_biases = bias_tensors(apply_fn, params, x)
  else:
    _checks.check_same_structure("biases", biases, "params", params)
    known_biases = tuple(bool(bias) for bias in jax.tree.leaves(biases))
  directions = [_unit_vector(params, path, index) for path, index in higher_order]
  chosen = [known_biases[k] or leaf.ndim <= 1 for k, leaf in enumerate(jax.tree.leaves(params))]
  random = np.random.default_rng(0)
  factors = jax.tree.map(lambda leaf: random.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype), params)
  normal = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype(leaf.dtype), params)

  @jax.jit
  def system(params: PyTree, x: jax.Array, factors: PyTree, normal: PyTree) -> tuple[jax.Array, ...]:
    logits = lambda p: apply_fn(p, x)

    def rows(p: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
      """The logits [R]; their derivatives along each tensor [U, R]; those along each with its entries made uneven."""
      uneven = jax.tree.map(jnp.multiply, factors, p)
      return logits(p).reshape(-1), _along_each(logits, p, p), _along_each(logits, p, uneven)

    along = []
    if any(chosen):
      moved = jnp.linalg.norm(_along_each(logits, params, normal), axis=1)
      along = [_second_order_direction(params, normal, moved, jnp.linalg.norm(logits(params)), np.array(chosen))[0]]
    pairs = [jax.jvp(rows, (params,), (direction,)) for direction in along + directions]
    blocks = [pairs[0][0] if pairs else rows(params), *(moved for _, moved in pairs)]
    values, coefficients, uneven = (jnp.concatenate(parts, axis=-1) for parts in zip(*blocks, strict=True))
    return coefficients.T, values, jnp.linalg.norm(uneven, axis=1)

  coefficients, values, sizes = system(params, x, factors, normal)
  return DerivativeEquations(coefficients, values, sizes, known_biases)


@full_precision
def summed_equations(known: functionals.Functionals) -> DerivativeEquations:
  """`derivative_equations` of random sums of the logits, hardly more than there are tensors.

  For large networks rows along a random direction are added only if some bias or vector hardly moves the logits.

  Args:
    known: the sums, of parameters of at least 32 bits.

  >>> params = {"weight": jnp.array([[2.0]]), "shift": jnp.array([3.0])}
  >>> apply_fn, x = lambda p, x: x @ p["weight"] + p["shift"], jnp.array([[5.0]])
  >>> equations = summed_equations(functionals.functionals(apply_fn, params, x, margins=False))
  >>> print((equations.coefficients[0] / equations.values[0] * 13).round(2))  # shift * 3 + weight * 10 = 13
  [ 3. 10.]
  """
  leaves = jax.tree.leaves(known.params)
  chosen = np.array([bias or leaf.ndim <= 1 for bias, leaf in zip(known.biases, leaves, strict=True)])
  scaled, uneven, random = (np.stack([change[k] for change in known.changes], axis=1) for k in range(3))
  rows, sizes = [scaled], [scaled, uneven]
  values = [known.values]
  size, scale, moved = (np.linalg.norm(block[: len(known.logits)], axis=0) for block in (known.values, scaled, random))
  direction, heard = _second_order_direction(known.params, known.normals, moved, size, chosen)
  quiet = scale < _QUIET * size if functionals.large(known.params) else True
  if np.any(np.asarray(heard) & quiet):
    for parts, more in zip((values, rows, sizes), known.along(direction), strict=True):
      parts.append(more)
  dtype = jnp.result_type(*leaves)
  coefficients, whole, squares = (jnp.asarray(np.concatenate(blocks), dtype) for blocks in (rows, values, sizes))
  return DerivativeEquations(coefficients, whole, jnp.linalg.norm(squares, axis=0), known.biases)


def scale_params(params: PyTree, rates: PyTree, alpha: ArrayLike) -> PyTree:
  """psi_alpha(zeta) = e^(alpha Lambda) zeta, section 3 of the paper.

  >>> import jax.numpy as jnp
  >>> print(scale_params({"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}, jnp.log(3.0))["w"].round(3))
  [9.]
  """
  return jax.tree.map(lambda p, rate: jnp.exp(alpha * rate) * p, params, rates)


@_checks.annotated
@full_precision
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
  return jnp.max(jnp.stack([_scaling_error(apply_fn, params, rates, x, alpha) for alpha in alphas]))


@functools.partial(jax.jit, static_argnames="apply_fn")
def _scaling_error(apply_fn: ApplyFn, params: PyTree, rates: PyTree, x: jax.Array, alpha: jax.Array) -> jax.Array:
  expected = jnp.exp(alpha) * apply_fn(params, x)
  difference = jnp.abs(apply_fn(scale_params(params, rates, alpha), x) - expected)
  return jnp.max(difference / jnp.where(expected == 0, 1.0, jnp.abs(expected)))


def _prepare(params: PyTree, x: ArrayLike) -> tuple[PyTree, jax.Array]:
  """Checked, as arrays of at least single precision."""
  _checks.check_batch("x", x)
  _checks.check_params("params", params)
  tensor_names(params)  # refuses paths that are not distinct
  arrays = jax.tree.map(jnp.asarray, (params, x))
  return jax.tree.map(lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)), arrays)


def _along_each(logits: Callable[[PyTree], jax.Array], params: PyTree, tangents: PyTree) -> jax.Array:
  """[U, R]: the derivatives of the logits along the tangent of each tensor alone."""
  leaves, structure = jax.tree.flatten(tangents)

  def along(index: jax.Array) -> jax.Array:
    alone = [jnp.where(index == k, leaf, 0) for k, leaf in enumerate(leaves)]
    return jax.jvp(logits, (params,), (jax.tree.unflatten(structure, alone),))[1].reshape(-1)

  return jax.lax.map(along, jnp.arange(len(leaves)))


@jax.jit  # one compilation for all tensors
def _second_order_direction(
  params: PyTree, normal: PyTree, moved: ArrayLike, norm: jax.Array | np.ndarray, chosen: ArrayLike
) -> tuple[PyTree, jax.Array]:
  """The random direction in the ``chosen`` tensors [U]; the part of each moves the logits by their own ``norm``.

  A part that cannot move them (a bias before batch norm) is 0, or else rounding errors would be blown up; the second
  result [U] says which can. A step is judged at the size of the greatest tensor; ``moved`` [U] is what ``normal``, a
  step of size 1, changes.
  """
  leaves, structure = jax.tree.flatten(params)
  unit = jnp.max(jnp.stack([jnp.sqrt(jnp.mean(leaf**2)) for leaf in leaves]))
  reached = unit * jnp.asarray(moved, unit.dtype)
  norm = jnp.where(norm > 0, norm, jnp.max(reached))
  heard = (reached > jnp.finfo(unit.dtype).eps ** 0.5 * norm) & chosen
  shares = jnp.where(heard, unit * norm / jnp.where(heard, reached, 1), 0)
  parts = zip(jax.tree.leaves(normal), shares, strict=True)
  return jax.tree.unflatten(structure, [share.astype(step.dtype) * step for step, share in parts]), heard


def _unit_vector(params: PyTree, path: str, index: tuple[int, ...]) -> PyTree:
  """The direction of one parameter, as a pytree like ``params``."""
  names = tensor_names(params)
  if path not in names:
    raise ValueError(f"higher_order must name tensors of params, {names}; got {path!r}.")
  leaves, structure = jax.tree.flatten(params)
  shape = leaves[names.index(path)].shape
  if len(index) != len(shape) or not all(0 <= i < size for i, size in zip(index, shape, strict=True)):
    raise ValueError(f"higher_order must hold an index into shape {shape} for {path!r}; got {index}.")
  zeros = [jnp.zeros_like(leaf) for leaf in leaves]
  zeros[names.index(path)] = zeros[names.index(path)].at[index].set(1)
  return jax.tree.unflatten(structure, zeros)
