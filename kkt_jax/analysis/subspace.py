"""The affine subspace of the training inputs that the weights reveal, as one object."""

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax.criteria import AnalysisCriteria, Criteria

_ROWS = 1024  # of the basis that are compared with all before them at once


def is_image(origin: jax.Array, criteria: AnalysisCriteria) -> bool:
  """Whether an origin varies, and so is taken for a blend of samples, as their mean is."""
  return float(jnp.std(origin)) > criteria.alike


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Subspace:
  """Where the training inputs lie, ``origin + basis @ c``, in units of their range: a pytree of arrays.

  Methods compute in the precision of the arrays: JAX's own, or NumPy's with `in_float64`.

  Attributes:
    origin: a point of it [*input_shape].
    basis: orthonormal columns [D, r], the most important direction first.
    singular_values: how strongly each direction is written into the weights [r], positive, falling.
    blur: what is left of the initialisation outside of the true subspace, in the unit of ``singular_values``; 0 if
      nothing is. The angle of direction k with the true subspace is about ``blur / singular_values[k]``.
    criteria: by which it was recognised, and by which values count as free.

  Raises:
    ValueError: shapes that do not fit, or values that are not finite.

  >>> line = Subspace(jnp.array([0.5, 0.0]), jnp.array([[0.0], [1.0]]), jnp.ones(1))
  >>> line.coordinates(jnp.array([[3.5, 4.0]])).tolist(), line.points(jnp.array([[4.0]])).tolist()
  ([[4.0]], [[0.5, 4.0]])
  >>> round(float(line.distance(jnp.array([[3.5, 4.0]]))[0]), 2), line.free_coordinates.tolist()
  (0.6, [False, True])
  """

  origin: jax.Array
  basis: jax.Array
  singular_values: jax.Array
  blur: float = 0.0
  criteria: AnalysisCriteria = AnalysisCriteria()

  def __post_init__(self) -> None:
    _checks.check_rank("basis", self.basis, 2, "[D, r]")
    _checks.check_shape("basis", self.basis, (math.prod(np.shape(self.origin)), self.dimension), "[D, r]")
    _checks.check_shape("singular_values", self.singular_values, (self.dimension,), "[r]")
    for name in ("origin", "basis", "singular_values", "blur"):
      _checks.check_finite(name, getattr(self, name))

  @classmethod
  def whole(cls, origin: jax.Array) -> Self:
    """All inputs around an origin: every coordinate is a direction."""
    return cls(origin, jnp.eye(origin.size), jnp.ones(origin.size))

  @property
  def dimension(self) -> int:
    """The number r of its directions."""
    return self.basis.shape[1]

  @functools.cached_property
  def holds_mean(self) -> bool:
    """Whether its origin is among the samples' blends, see `is_image`."""
    return is_image(self.origin, self.criteria)

  @property
  def most_samples(self) -> int:
    """How many independent samples it can hold: r, and one more around their mean."""
    return self.dimension + self.holds_mean

  @functools.cached_property
  def in_float64(self) -> Self:
    """The same in NumPy's float64."""
    origin: Any = np.asarray(self.origin, np.float64)
    basis: Any = np.asarray(self.basis, np.float64)
    return dataclasses.replace(self, origin=origin, basis=basis)

  @full_precision
  def coordinates(self, x: jax.Array | np.ndarray) -> jax.Array:
    """The coordinates [M, r] of samples' projections; x [M, *input_shape]."""
    return self._offsets(x) @ self.basis

  @full_precision
  def points(self, coordinates: jax.Array | np.ndarray) -> jax.Array:
    """The points [M, *input_shape] with coordinates [M, r]."""
    flat = self.origin.reshape(1, -1) + coordinates @ self.basis.T
    return flat.reshape(len(coordinates), *self.origin.shape)

  @full_precision
  def distance(self, x: jax.Array | np.ndarray) -> jax.Array:
    """How much of samples' offsets from the origin lies outside [M], relative to their length; x [M, *input_shape]."""
    offsets = self._offsets(x)
    outside = offsets - (offsets @ self.basis) @ self.basis.T
    return jnp.linalg.norm(outside, axis=1) / jnp.maximum(jnp.linalg.norm(offsets, axis=1), 1e-12)

  @functools.cached_property
  def moving(self) -> np.ndarray:
    """The indices of the values that differ among its points."""
    return np.flatnonzero(np.linalg.norm(np.asarray(self.basis, np.float64), axis=1) > self.criteria.moves)

  @functools.cached_property
  def free_coordinates(self) -> np.ndarray:
    """Which values [D] differ among its points; of those that always move together, the first one."""
    rows, moving = np.asarray(self.basis, np.float64), self.moving
    directions = rows[moving] / np.linalg.norm(rows[moving], axis=1, keepdims=True)
    free = np.zeros(len(rows), bool)
    for begin in range(0, len(moving), _ROWS):  # a block at a time: images have many values
      end = begin + _ROWS
      alike = np.abs(directions[begin:end] @ directions[:end].T) > self.criteria.together
      free[moving[begin:end]] = ~np.tril(alike, begin - 1).any(axis=1)
    return free

  def required_active(self, criteria: Criteria | None = None) -> int:
    """How many of the free values must be at an end of the range for a sample to be certified.

    r of them say nothing. Of polished points that are no training samples, chance brings up to a fifth of all values
    there besides, however many dimensions there are (docs/lab/exact.md).

    >>> Subspace.whole(jnp.full(100, 0.5)).required_active()
    121
    """
    return self.dimension + math.ceil((criteria or Criteria()).beyond * int(self.free_coordinates.sum()))

  @property
  def certifies(self) -> bool:
    """Whether as many of its values can be at an end of the range as a certificate asks for."""
    return self.required_active() <= int(self.free_coordinates.sum())

  def _offsets(self, x: Any) -> jax.Array:
    return x.reshape(len(x), -1) - self.origin.reshape(1, -1)

  def tree_flatten(self) -> tuple[tuple[ArrayLike, ...], AnalysisCriteria]:
    """Its arrays, and its criteria."""
    return (self.origin, self.basis, self.singular_values, self.blur), self.criteria

  @classmethod
  def tree_unflatten(cls, criteria: AnalysisCriteria, leaves: tuple[ArrayLike, ...]) -> Self:
    """The subspace of any leaves, unchecked: JAX puts other things than arrays there."""
    made = object.__new__(cls)
    names = ("origin", "basis", "singular_values", "blur", "criteria")
    vars(made).update(zip(names, (*leaves, criteria), strict=True))
    return made
