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
has in them. ``_units_of`` finds the coefficients (here 1 and -1) by trying, ``_along_units`` adds up p and G.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.criteria import AnalysisCriteria
from kkt_jax.kkt import functionals
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


@_checks.annotated
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

  >>> import jax.numpy as jnp
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
  params = _checks.arrays("params", params)
  _checks.check_batch("x", x)
  _checks.check_finite("x", x)
  known = functionals.functionals(apply_fn, params, x)
  return Symmetries(known, criteria=criteria).bound(conditions)([])


_Parts = dict[str, dict[str, float]]  # squared length of what the target has in a family, by tensor that it moves


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
  """One parameter tensor.

  Attributes:
    name: its path.
    shape: its own.
    changes: of random sums of margins along directions in it.
    squares: of its values v, a sum over all but the last two axes [D, F].
    products: ``v t`` with the target t [D, F].
    shifted: squared length of what the target has in shifts of all logits.
  """

  name: str
  shape: tuple[int, ...]
  changes: functionals.Changes
  squares: np.ndarray
  products: np.ndarray
  shifted: float

  @classmethod
  def of(cls, name: str, value: Any, target: Any, changes: functionals.Changes) -> "_Tensor":
    """A tensor from its values and its target, arrays of one shape."""
    v, t = np.asarray(value, np.float64), np.asarray(target, np.float64)
    shape = v.shape[-2:] if v.ndim > 1 else (1, v.size)
    summed = lambda entries: entries.reshape(-1, *shape).sum(axis=0)
    shifted = float(np.sum(np.square(t.mean(axis=-1))) * v.shape[-1]) if v.ndim else 0.0
    return cls(name, v.shape, changes, summed(v * v), summed(v * t), shifted)


_Known = dict[tuple[_Tensor, ...], tuple[str, dict[str, float]] | None]


class Attainable(NamedTuple):
  """Conditions that data can satisfy, the tensors that were left out for that, and the bound on the others."""

  conditions: Conditions
  left_out: Mapping[str, float]
  bound: float

  def short_of(self, least: float) -> "Attainable":
    """The same with a greater bound: at least so much, squared and absolute, is out of reach for another reason."""
    trees = (self.conditions.target, self.conditions.mask)
    parts = zip(*([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in trees), strict=True)
    whole = sum(float(np.sum(np.square(target * mask))) for target, mask in parts)
    return self._replace(bound=max(self.bound, min(1.0, least / max(whole, 1e-300))))


class Symmetries:
  """The symmetries of a network at given parameters, for any conditions; what they need of it is computed once."""

  def __init__(self, known: functionals.Functionals, *, criteria: AnalysisCriteria = _DEFAULT):
    """Takes how random sums of margins change, and the ``criteria`` of `least_residual`."""
    self.params, self.changes, self.criteria = known.params, known.margins, criteria
    self.names, self.leaves, self.num_classes = known.names, jax.tree.leaves(known.params), known.num_classes

  def bound(self, conditions: Conditions) -> Callable[[Collection[str]], LeastResidual]:
    """`least_residual` as a function of the tensors, by name, that are left out."""
    trees = (conditions.target, conditions.mask)
    of = zip(self.names, self.leaves, *map(jax.tree.leaves, trees), self.changes, strict=True)
    totals, usable = {}, []
    known: _Known = {}
    for name, value, target, mask, changes in of:
      masked = np.asarray(target, np.float64) * np.asarray(mask)
      totals[name] = float(np.sum(np.square(masked)))
      if np.all(np.asarray(mask) == 1):
        usable.append(_Tensor.of(name, value, masked, changes))

    def without(left: Collection[str]) -> LeastResidual:
      total = sum(square for name, square in totals.items() if name not in left)
      tensors = [tensor for tensor in usable if tensor.name not in left]
      if not total:
        return LeastResidual(1.0, {"no condition is left": 1.0}, {})
      scalable = [t for t in tensors if t.squares.any()]  # what is 0 has no scale
      parts = self._shifts(tensors) | _whole_tensors(scalable, self.criteria) | _units(scalable, self.criteria, known)
      shares = {name: sum(lengths.values()) / total for name, lengths in parts.items()}
      moved = {name for lengths in parts.values() for name in lengths}
      by_tensor = {name: max(lengths.get(name, 0.0) for lengths in parts.values()) / total for name in moved}
      return LeastResidual(max(shares.values(), default=0.0), shares, by_tensor)

    return without

  def attainable(self, conditions: Conditions, first: int | None) -> "Attainable":
    """The conditions without the tensors of which most is out of reach, if data can satisfy the others.

    A tensor on which no symmetry bears has a bound of 0 whatever it is. So what is left must be moved by one, and be
    the first kernel, at place ``first``, or more than half of the parameters.
    """
    sizes = {name: leaf.size for name, leaf in zip(self.names, self.leaves, strict=True)}

    def tells(residual: LeastResidual) -> bool:
      known = first is not None and self.names[first] in residual.by_tensor
      return known or 2 * sum(sizes[name] for name in residual.by_tensor) > sum(sizes.values())

    judge = self.bound(conditions)
    whole = rest = judge([])
    left: list[str] = []
    while rest.value > self.criteria.unexplained and len(left) < self.criteria.left_out:
      worst = sorted(rest.by_tensor, key=lambda name: -rest.by_tensor[name])[: self.criteria.tried]
      trials = ((name, judge([*left, name])) for name in worst)
      name, trial = next(((name, of) for name, of in trials if tells(of)), ("", rest))
      if not name:
        break
      left, rest = [*left, name], trial
    if rest.value > self.criteria.unexplained:
      return Attainable(conditions, {}, whole.value)
    left_out = {name: whole.by_tensor.get(name, 0.0) for name in left}
    return Attainable(conditions.without(self.tree([name in left for name in self.names])), left_out, rest.value)

  def tree(self, leaves: Sequence[Any]) -> PyTree:
    """One value for each tensor, as a tree like the parameters."""
    return jax.tree.unflatten(jax.tree.structure(self.params), leaves)

  def scale_invariant(self) -> PyTree:
    """Which tensors can be scaled up, alone or together with others, without any change of the margins.

    Such are the weights before batch norm or layer norm. Weight decay shrinks them for ever: they are at no stationary
    point of it, and a condition that asks for one asks for the impossible.

    Returns:
      A pytree of Python bools like ``params``.

    >>> import jax.numpy as jnp
    >>> net = lambda w, x: (x @ w["a"]) / jnp.linalg.norm(x @ w["a"]) @ w["b"]
    >>> params = {"a": jnp.array([[1.0, 2.0, 0.0], [4.0, -3.0, 1.0]]), "b": jnp.eye(3)}
    >>> known = functionals.functionals(net, params, jnp.array([[1.0, 2.0], [3.0, -1.0]]))
    >>> print(Symmetries(known).scale_invariant())
    {'a': True, 'b': False}
    """
    from scipy import optimize  # type: ignore[import-untyped]

    scalable = [place for place, leaf in enumerate(self.leaves) if np.any(np.asarray(leaf))]
    null = _whole_relations([self.changes[place] for place in scalable], self.criteria)
    invariant = dict.fromkeys(range(len(self.names)), False)
    for row, place in enumerate(scalable if null.shape[1] else []):
      # Is there a combination of null vectors that scales this tensor up and none down?
      solved = optimize.linprog(
        -null[row], A_ub=np.vstack([-null, null]), b_ub=np.repeat([1e-6, 1.0], len(null)), bounds=(None, None)
      )
      invariant[place] = bool(solved.success and -solved.fun > self.criteria.moved)
    return self.tree(list(invariant.values()))

  def _shifts(self, tensors: Sequence[_Tensor]) -> _Parts:
    """What the targets have in shifts of all logits alike: the same change of all output columns."""
    length = lambda change: float(np.linalg.norm(change))
    return {
      f"shift of {tensor.name}": {tensor.name: tensor.shifted}
      for tensor in tensors
      if tensor.shape[-1:] == (self.num_classes,)
      and length(tensor.changes.shift) <= self.criteria.symmetric * length(tensor.changes.one_sided)
    }


def _whole_tensors(tensors: Sequence[_Tensor], criteria: AnalysisCriteria) -> _Parts:
  """What the targets have in rescalings of whole tensors against one another."""
  null = _whole_relations([t.changes for t in tensors], criteria)
  if not null.shape[1]:
    return {}
  products = np.array([t.products.sum() for t in tensors]) @ null
  squares = np.array([t.squares.sum() for t in tensors])
  scales = null @ _coefficients(products, null.T @ (squares[:, None] * null))
  moved = np.abs(null).max(axis=1) > criteria.moved
  parts = zip(tensors, scales**2 * squares, moved, strict=True)
  return {"scales of whole tensors": {t.name: float(length) for t, length, is_moved in parts if is_moved}}


def _whole_relations(changes: Sequence[functionals.Changes], criteria: AnalysisCriteria) -> np.ndarray:
  """Combinations of rescalings of whole tensors that change no margin, as `_null_space`."""
  return _null_space([change.scaled for change in changes], [change.generic for change in changes], criteria.symmetric)


def _units(tensors: Sequence[_Tensor], criteria: AnalysisCriteria, known: _Known) -> _Parts:
  """What the targets have in rescalings of single units: what comes in up, what goes out down.

  What depends on the same tensors is ``known`` from call to call.
  """
  families = []
  for width in sorted({t.shape[-1] for t in tensors if t.shape}):
    group = tuple(t for t in tensors if width in t.shape[-2:])
    if group not in known:
      known[group] = _units_of(group, width, criteria)
    families.append(known[group])
  return dict(filter(None, families))


def _units_of(
  tensors: Sequence[_Tensor], width: int, criteria: AnalysisCriteria
) -> tuple[str, dict[str, float]] | None:
  """The same for the units of layers of one width: what is moved, and its lengths; None if nothing is."""
  parts = [(t, False) for t in tensors if t.shape[-1:] == (width,)]
  parts += [(t, True) for t in tensors if t.shape[-2:-1] == (width,)]
  # A relation that holds for two random scalings of the units holds for all: it is linear in them.
  trials = np.random.default_rng([1, width]).normal(size=(width, 2))
  columns = [((t.changes.out if outgoing else t.changes.into) @ trials).ravel() for t, outgoing in parts]
  null = _null_space(columns, [2**0.5 * t.changes.generic for t, _ in parts], criteria.symmetric)
  if not null.shape[1]:
    return None
  coefficients = _coefficients(*_along_units(parts, null, width)).reshape(null.shape[1], width)
  moved = {t.name: t for (t, _), weights in zip(parts, null, strict=True) if np.abs(weights).max() > criteria.moved}
  lengths = {t.name: _in_tensor(t, parts, null @ coefficients) for t in moved.values()}
  return f"units of {', '.join(moved)}", lengths


def _in_tensor(tensor: _Tensor, parts: Sequence[tuple[_Tensor, bool]], scales: np.ndarray) -> float:
  """The squared length in one tensor of scalings of units, those of each part a row."""
  factor = np.zeros((1, 1))
  for (other, outgoing), units in zip(parts, scales, strict=True):
    if other is tensor:
      factor = factor + (units[:, None] if outgoing else units[None, :])
  return float(np.sum(tensor.squares * factor**2))


def _along_units(parts: Sequence[tuple[_Tensor, bool]], null: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Products of the target with the directions (relation, unit), [R * width], and those of the directions, a matrix."""
  num_relations = null.shape[1]
  products = np.zeros((num_relations, width))
  gram = np.zeros((num_relations, width, num_relations, width))
  diagonal = np.arange(width)
  for (tensor, outgoing), weights in zip(parts, null, strict=True):
    products += weights[:, None] * tensor.products.sum(axis=int(outgoing))
    squares = tensor.squares.sum(axis=int(outgoing))
    gram[:, diagonal, :, diagonal] += squares[:, None, None] * np.outer(weights, weights)
  for (tensor, outgoing), down in zip(parts, null, strict=True):
    ups = [up for (other, out), up in zip(parts, null, strict=True) if other is tensor and not out]
    if outgoing and ups:  # it comes from as many units as it goes to, and both of its scalings meet
      for r, s in np.ndindex(num_relations, num_relations):
        gram[r, :, s] += down[r] * ups[0][s] * tensor.squares
        gram[r, :, s] += ups[0][r] * down[s] * tensor.squares.T
  return products.reshape(-1), gram.reshape(products.size, products.size)


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
  """The coefficients of a vector's projection on directions, from its products with them and their Gram matrix."""
  from scipy import linalg

  ridge = 1e-10 * max(float(np.trace(gram)) / len(gram), 1e-300)  # directions may depend on one another, or be 0
  return linalg.cho_solve(linalg.cho_factor(gram + ridge * np.eye(len(gram))), products)
