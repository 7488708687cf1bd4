"""How far a classifier is from every KKT point, from its weights alone.

A direction in parameter space along which no margin changes, whatever the input, is orthogonal to every gradient of
every margin: to the stationarity sum of Eq. 4 of *any* data with *any* multipliers. What the target has in such a
direction no data can account for: its share of the target is a lower bound on the relative residual. Networks have
many such directions. A ReLU layer can be scaled up and the next one down, unit by unit; weights before a normalisation
can be scaled at will; a common shift of all logits changes no margin. They are found by trying, not by knowing the
network.

The scaling of units, for ``relu(relu(x A) C) B`` with w units in either hidden layer and the target T. Unit k of the
first layer is A's column k and C's row k: scaling these by 1 + e and 1 - e changes nothing to first order, so
``d_k = (A_:k, -C_k:, 0)`` is a direction of no change, and likewise ``d'_k = (0, C_:k, -B_k:)`` of the second. Their
products with the target and with one another are

- ``<T, d_k>   = sum_i A_ik T^A_ik - sum_j C_kj T^C_kj``, a difference of sums per unit,
- ``<d_k, d_k> = sum_i A_ik^2 + sum_j C_kj^2`` and ``<d_k, d_l> = 0``: two units of one layer share no entry,
- ``<d_k, d'_l> = -C_kl^2``: both scale the entry from unit k to unit l, which is what makes a square C special,

and with p the products and G the Gram matrix of all directions, ``p' G^-1 p`` is the squared length of what the target
has in them. ``_units`` finds the coefficients (here 1 and -1) by trying, ``_along_units`` adds up p and G.
"""

from collections.abc import Mapping, Sequence
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
from kkt_jax.criteria import AnalysisCriteria
from kkt_jax.kkt.conditions import Conditions

_DEFAULT = AnalysisCriteria()


@dataclasses.dataclass(frozen=True)
class LeastResidual:
  """A lower bound on the relative squared stationarity residual of any data with any multipliers.

  Attributes:
    value: the bound, the greatest of those below; 0 where no symmetry says anything, 1 where no target is left.
    by_symmetry: the bound that each family of symmetries gives, by what it scales or shifts.
    by_tensor: for each tensor that a symmetry moves, the share of the whole target that lies in it and is out of reach;
      the greatest of those that families of symmetries give. Of other tensors the bound says nothing.
  """

  value: float
  by_symmetry: Mapping[str, float]
  by_tensor: Mapping[str, float]


@full_precision
def least_residual(
  apply_fn: ApplyFn, params: PyTree, conditions: Conditions, x: ArrayLike, *, criteria: AnalysisCriteria = _DEFAULT
) -> LeastResidual:
  """The least relative residual that any data could leave, by the network's own symmetries.

  Near 0, the classifier may be at a KKT point; it need not be. Well above 0, it is not at one, and no generator that
  is trained on its conditions can satisfy them.

  Args:
    apply_fn: ``(params, x[K, ...]) -> logits[K, C]`` with exact derivatives; samples may interact.
    params: zeta.
    conditions: the stationarity condition. Symmetries that move a parameter without a condition do not count.
    x: inputs [K, ...], any: random ones will do. They only tell which directions are symmetries.
    criteria: ``symmetric`` and ``moved`` of it decide what is a symmetry, and of which tensors.

  Returns:
    A `LeastResidual`.

  Raises:
    ValueError: ``x`` is no batch of floats.

  >>> from kkt_jax.kkt.conditions import weight_decay_conditions
  >>> net = lambda p, x: jnp.maximum(x @ p["a"], 0) @ p["b"]
  >>> x = jnp.array([[1.0], [2.0]])
  >>> weights = {"a": jnp.array([[3.0]]), "b": jnp.array([[3.0, -3.0]]) / 2**0.5}  # |a| = |b|: balanced
  >>> round(least_residual(net, weights, weight_decay_conditions(weights), x).value, 6)
  0.0
  >>> weights["a"] *= 3  # the same function, but not at a minimum with weight decay
  >>> round(least_residual(net, weights, weight_decay_conditions(weights), x).value, 2)
  0.64
  """
  params, x = _checks.arrays("params", params), jnp.asarray(x)
  _checks.check_batch("x", x)
  trees = (conditions.target, conditions.mask)
  wanted, masks = ([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in trees)
  targets = [t * m for t, m in zip(wanted, masks, strict=True)]
  usable = [bool(np.all(m == 1)) for m in masks]
  total = sum(float(np.sum(t * t)) for t in targets)
  tensors = [own for own in _tensors(params, targets) if usable[own.index]]
  change = _Change(apply_fn, params, x, criteria)
  num_classes = jax.eval_shape(apply_fn, params, x).shape[1]
  scalable = [t for t in tensors if np.any(t.value)]  # what is 0 has no scale
  parts = _shifts(tensors, num_classes, change) | _whole_tensors(scalable, change) | _units(scalable, change)
  if not total:
    return LeastResidual(1.0, {"no condition is left": 1.0}, {})
  shares = {name: sum(own.values()) / total for name, own in parts.items()}
  moved = {name for own in parts.values() for name in own}
  by_tensor = {name: max(own.get(name, 0.0) for own in parts.values()) / total for name in moved}
  return LeastResidual(max(shares.values(), default=0.0), shares, by_tensor)


@full_precision
def scale_invariant(
  apply_fn: ApplyFn, params: PyTree, x: ArrayLike, *, criteria: AnalysisCriteria = _DEFAULT
) -> PyTree:
  """Which tensors can be scaled up, alone or together with others, without any change of the margins.

  Such are the weights before batch norm or layer norm. Weight decay shrinks them for ever: they are at no stationary
  point of it, and a condition that asks for one asks for the impossible.

  Args:
    apply_fn: ``(params, x[K, ...]) -> logits[K, C]`` with exact derivatives; samples may interact.
    params: zeta.
    x: inputs [K, ...], any.
    criteria: as in `least_residual`.

  Returns:
    A pytree of Python bools like ``params``.

  >>> net = lambda w, x: (x @ w["a"]) / jnp.linalg.norm(x @ w["a"]) @ w["b"]
  >>> params = {"a": jnp.array([[1.0, 2.0, 0.0], [4.0, -3.0, 1.0]]), "b": jnp.eye(3)}
  >>> print(scale_invariant(net, params, jnp.array([[1.0, 2.0], [3.0, -1.0]])))
  {'a': True, 'b': False}
  """
  from scipy import optimize  # type: ignore[import-untyped]

  params, x = _checks.arrays("params", params), jnp.asarray(x)
  _checks.check_batch("x", x)
  names = tensor_names(params)
  scalable = [t for t in _tensors(params, [np.zeros(0)] * len(names)) if np.any(t.value)]
  change = _Change(apply_fn, params, x, criteria)
  null = _whole_relations(scalable, change)
  found = dict.fromkeys(range(len(names)), False)
  for place, tensor in enumerate(scalable if null.shape[1] else []):
    # Is there a combination of null vectors that scales this tensor up and none down?
    solved = optimize.linprog(
      -null[place], A_ub=np.vstack([-null, null]), b_ub=np.repeat([1e-6, 1.0], len(null)), bounds=(None, None)
    )
    found[tensor.index] = bool(solved.success and -solved.fun > criteria.moved)
  return jax.tree.unflatten(jax.tree.structure(params), list(found.values()))


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """One parameter tensor: its place, its name, its value and its target."""

  index: int
  name: str
  value: np.ndarray
  target: np.ndarray


def _tensors(params: PyTree, targets: Sequence[np.ndarray]) -> list[_Tensor]:
  parts = enumerate(zip(tensor_names(params), jax.tree.leaves(params), targets, strict=True))
  return [_Tensor(index, name, np.asarray(leaf, np.float64), target) for index, (name, leaf, target) in parts]


_Parts = dict[str, dict[str, float]]  # squared length of what the target has in a family, by tensor that it moves


@dataclasses.dataclass(frozen=True)
class _Change:
  """How margins change along a direction, given by the tensors it moves: the logits' change less its class mean."""

  apply_fn: ApplyFn
  params: PyTree
  x: jax.Array
  criteria: AnalysisCriteria

  def __call__(self, moved: Mapping[int, np.ndarray]) -> np.ndarray:
    structure = jax.tree.structure(self.params)
    tangents = [jnp.asarray(moved[i], a.dtype) if i in moved else a for i, a in enumerate(self._still)]
    found = _margins_along(self.apply_fn, self.params, self.x, jax.tree.unflatten(structure, tangents))
    return np.asarray(found, np.float64)

  @functools.cached_property
  def _still(self) -> list[jax.Array]:
    return [jnp.zeros_like(leaf) for leaf in jax.tree.leaves(self.params)]


@functools.partial(jax.jit, static_argnames="apply_fn")  # here, so that it is compiled once for all that is tried
def _margins_along(apply_fn: ApplyFn, params: PyTree, x: jax.Array, tangents: PyTree) -> jax.Array:
  change = jax.jvp(lambda p: apply_fn(p, x), (params,), (tangents,))[1]
  return (change - jnp.mean(change, axis=1, keepdims=True)).reshape(-1)


def _shifts(tensors: Sequence[_Tensor], num_classes: int, change: _Change) -> _Parts:
  """What the targets have in shifts of all logits alike: the same change of all output columns."""
  parts: _Parts = {}
  random = np.random.default_rng(0)
  for tensor in tensors:
    if not tensor.value.ndim or tensor.value.shape[-1] != num_classes:
      continue
    direction = np.broadcast_to(random.normal(size=(*tensor.value.shape[:-1], 1)), tensor.value.shape)
    one_sided = direction * (np.arange(num_classes) == 0)
    if np.linalg.norm(change({tensor.index: direction})) <= change.criteria.symmetric * np.linalg.norm(
      change({tensor.index: one_sided})
    ):
      parts[f"shift of {tensor.name}"] = {tensor.name: float(np.sum(tensor.target.mean(axis=-1) ** 2) * num_classes)}
  return parts


def _whole_tensors(tensors: Sequence[_Tensor], change: _Change) -> _Parts:
  """The same in rescalings of whole tensors against one another."""
  null = _whole_relations(tensors, change)
  if not null.shape[1]:
    return {}
  products = np.array([float(np.sum(t.value * t.target)) for t in tensors]) @ null
  squares = np.array([float(np.sum(t.value**2)) for t in tensors])
  scales = null @ _coefficients(products, null.T @ (squares[:, None] * null))
  moved = np.abs(null).max(axis=1) > change.criteria.moved
  parts = zip(tensors, scales**2 * squares, moved, strict=True)
  return {"scales of whole tensors": {t.name: float(part) for t, part, own in parts if own}}


def _whole_relations(tensors: Sequence[_Tensor], change: _Change) -> np.ndarray:
  """Combinations of rescalings of whole tensors that change no margin."""
  columns = [change({t.index: t.value}) for t in tensors]
  return _null_space(columns, [_generic(t, change) for t in tensors], change.criteria.symmetric)


def _units(tensors: Sequence[_Tensor], change: _Change) -> _Parts:
  """The same in rescalings of single units: what comes into each up, what goes out of it down."""
  found: _Parts = {}
  random = np.random.default_rng(1)
  generic = {t.index: _generic(t, change) for t in tensors}
  for width in sorted({t.value.shape[-1] for t in tensors if t.value.ndim}):
    into = [t for t in tensors if t.value.ndim and t.value.shape[-1] == width]
    out = [t for t in tensors if t.value.ndim > 1 and t.value.shape[-2] == width]
    parts = [(t, False) for t in into] + [(t, True) for t in out]
    # A relation that holds for two random scalings of the units holds for all: it is linear in them.
    trials = [random.normal(size=width) for _ in range(2)]
    columns = [
      np.concatenate([change({t.index: _scaled(t.value, v, outgoing)}) for v in trials]) for t, outgoing in parts
    ]
    null = _null_space(columns, [len(trials) ** 0.5 * generic[t.index] for t, _ in parts], change.criteria.symmetric)
    if null.shape[1]:
      coefficients = _coefficients(*_along_units(parts, null, width)).reshape(null.shape[1], width)
      moved = {
        t.index: t for (t, _), weights in zip(parts, null, strict=True) if np.abs(weights).max() > change.criteria.moved
      }
      name = f"units of {', '.join(t.name for t in moved.values())}"
      found[name] = {t.name: _in_tensor(t, parts, null @ coefficients) for t in moved.values()}
  return found


def _in_tensor(tensor: _Tensor, parts: Sequence[tuple[_Tensor, bool]], scales: np.ndarray) -> float:
  """The squared length in one tensor of scalings of units, those of each part a row."""
  factor = np.zeros((1, 1))
  for (own, outgoing), units in zip(parts, scales, strict=True):
    if own is tensor:
      factor = factor + (units[:, None] if outgoing else units[None, :])
  return float(np.sum((tensor.value * (factor[0] if tensor.value.ndim == 1 else factor)) ** 2))


def _along_units(parts: Sequence[tuple[_Tensor, bool]], null: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Products of the target with the directions (relation, unit), [R * width], and those of the directions, a matrix."""
  num_relations = null.shape[1]
  products = np.zeros((num_relations, width))
  gram = np.zeros((num_relations, width, num_relations, width))
  diagonal = np.arange(width)
  for (tensor, outgoing), weights in zip(parts, null, strict=True):
    products += weights[:, None] * _per_unit(tensor.value * tensor.target, outgoing)
    squares = _per_unit(tensor.value**2, outgoing)
    gram[:, diagonal, :, diagonal] += squares[:, None, None] * np.outer(weights, weights)
  for (tensor, outgoing), down in zip(parts, null, strict=True):
    ups = [up for (other, out), up in zip(parts, null, strict=True) if other is tensor and not out]
    if outgoing and ups:  # it comes from as many units as it goes to, and both of its scalings meet
      square = np.sum((tensor.value**2).reshape(-1, width, width), axis=0)
      gram += np.einsum("r,s,ik->risk", down, ups[0], square)
      gram += np.einsum("r,s,ik->rksi", ups[0], down, square)
  return products.reshape(-1), gram.reshape(products.size, products.size)


def _scaled(value: np.ndarray, units: np.ndarray, outgoing: bool) -> np.ndarray:
  return value * (units[:, None] if outgoing else units)


def _per_unit(value: np.ndarray, outgoing: bool) -> np.ndarray:
  """The sum over all axes but that of the units."""
  axis = value.ndim - (2 if outgoing else 1)
  return value.sum(axis=tuple(k for k in range(value.ndim) if k != axis))


def _generic(tensor: _Tensor, change: _Change) -> float:
  """How much margins change when every entry of a tensor is scaled at random: the measure of what counts as none."""
  return float(
    np.linalg.norm(change({tensor.index: tensor.value * np.random.default_rng(2).normal(size=tensor.value.shape)}))
  )


def _null_space(columns: Sequence[np.ndarray], sizes: Sequence[float], tolerance: float) -> np.ndarray:
  """Orthonormal combinations [U, K] of U columns that vanish next to the sizes that generic columns would have."""
  if not columns:
    return np.zeros((0, 0))
  scale = np.array([size if size > 0 else 1.0 for size in sizes])
  matrix = np.stack(columns, axis=1) / scale
  # Only a wide matrix needs full factors for its null space; of a tall one they hold (probes x classes)^2 numbers.
  _, values, rows = np.linalg.svd(matrix, full_matrices=len(matrix) < len(columns))
  small = np.concatenate([values <= tolerance, np.ones(len(rows) - len(values), bool)])
  basis = rows[small].T / scale[:, None]
  return np.linalg.qr(basis)[0] if basis.size else basis


def _coefficients(products: np.ndarray, gram: np.ndarray) -> np.ndarray:
  """Of a vector's projection on directions, from its products with them and theirs among themselves."""
  from scipy import linalg

  ridge = 1e-10 * max(float(np.trace(gram)) / len(gram), 1e-300)  # directions may depend on one another, or be 0
  return linalg.cho_solve(linalg.cho_factor(gram + ridge * np.eye(len(gram))), products)
