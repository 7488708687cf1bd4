"""Training samples as vertices: exact, and certified without any data. Beyond the paper.

Where the first layer reveals the subspace of the data (`kkt_jax.analysis.Subspace`), every training sample lies in its
r dimensions, and in the range of its inputs. Images hold many pixels that are black or white: far more than the r that
determine a point of the subspace. So a training image is a *highly degenerate vertex* of a polytope that the weights
alone reveal, and there are few such vertices. `polish` moves samples to the vertex nearby. `certify` counts the values
at an end of the range: any point of the subspace can be chosen to have r of them, but only training images have more.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax.analysis.subspace import Subspace
from kkt_jax.criteria import Criteria

# How the search goes; what is claimed of what it finds is decided by `Criteria` alone.
_EXPONENT = 0.5  # of the distance from the ends of the range: 1 is what a linear program minimises, near 0 it counts
_OUTSIDE = 10.0  # weight of values outside the range, beside those inside
_FIRST, _LAST = 0.1, 1e-3  # distance from an end that counts as none, at the first iteration and at the last
_REFITS, _FAR = 8, 20.0  # fits to values that have arrived; how much farther they may be in the first one
_APART = 0.1  # weight of what known samples say of the others; 1 loses those that are hardly written into the weights
_AT_ONCE = 50  # samples
_PRODUCTS = 2**25  # numbers of products of directions that are kept while samples are polished
_NEAR = 0.2  # from an end of the range, from where polishing can still bring a value there
_VARIANCE = 0.05  # of a value, at least, where random points are drawn: the start may be 0 throughout
_ALONE = 0.75  # share of a pixel's distance from its end that is its own; the rest is that of the pixels around it
_NEAREST = 8  # neighbours that are asked where a value will end
_REACHED = 0.15  # from an end of the range, up to which a neighbour's value is taken to be there
_UNSURE = 0.05  # least share of the neighbours that a value is given at either end
_DARKEST, _DARK = 12.0, (0.1, 0.03)  # steps: most that a black value may have come to; distances that count as none
_WHITE, _NEARLY, _BEYOND = 0.97, 1.2, 2.0  # nearly white: from there; so many steps off, or more
_BENT = 60.0  # steps that polishing may have bent a direction
_KNOWN = 0.03  # steps: deviation of what is known
_COLUMNS = 512  # of the projection out of the subspace that are in memory at once
_TRIES, _MOVES = 3, 50  # fits to levels, and values that are moved a step after each
_DEFAULT = Criteria()


class Others(NamedTuple):
  """What known samples say of the others: next to 0 is the sum of squares of ``rows @ (c, 1)`` over that of ``size``.

  Attributes:
    gram: ``rows^T rows`` [r + 1, r + 1] of c the coordinates in the subspace.
    size: [N, r + 1].
  """

  gram: jax.Array
  size: jax.Array


class Certificates(NamedTuple):
  """How samples lie in the subspace and in the range: the evidence for training samples that needs no equations.

  Attributes:
    tight: how many values of each sample lie at an end of the range [M]; only those that `Subspace.free_coordinates`
      counts. Any sample can be given r of them.
    overshoot: how far each sample is from the range [M], the Euclidean norm over its values.
    firmness: the least singular value of the rows of the basis where a sample is tight [M]: 0 if it can still be moved
      without leaving any of these ends, as a mixture of two training samples can.
    contrast: the same where black values may become one grey, and white ones another [M]: near 0 if it can be a picture
      with even areas, made brighter or darker; 0 also where it is not firm, for it is at most the firmness.
    vertex: whether it is tight, firm and in the range, and not the origin [M].
    certified: whether it has contrast, too, and would be a vertex by its values at one end alone [M], as data that
      reach one end of the range need not reach the other: it passes for a training sample if nothing else explains it.
  """

  tight: np.ndarray
  overshoot: np.ndarray
  firmness: np.ndarray
  contrast: np.ndarray
  vertex: np.ndarray
  certified: np.ndarray


@full_precision
def polish(
  x: ArrayLike,
  subspace: Subspace,
  *,
  likely: ArrayLike | None = None,
  others: Others | None = None,
  num_steps: int = 60,
) -> jax.Array:
  """Moves samples to nearby points of a subspace with as many values as possible at an end of the range.

  Iteratively reweighted least squares on ``sum_p |x_p - e_p|^(1/2)``, with e_p the nearer end of the range, smoothed
  ever less; then least squares on the values that have arrived. The exponent is between that of a linear program, which
  has one solution, and counting. Neighbouring pixels of images arrive together, and values that are likely to end where
  they are going weigh more. One iteration solves M systems of r equations.

  Args:
    x: samples [M, ...] in units of the range, [0, 1]; they need not lie in the subspace.
    subspace: of the training data.
    likely: the shares of `likely_ends` [2, M, ...]; all values are alike if None.
    others: leads to other samples than those that are known (`kkt_jax.extraction.certificates.of_the_others`), but for
      the fits at the end.
    num_steps: iterations.

  Returns:
    Samples [M, ...] of the subspace, not clipped.

  Raises:
    ValueError: shapes that do not fit, or values that are not finite.

  >>> line = Subspace(jnp.full(4, 0.5), jnp.array([[1.0], [1.0], [0.5], [-1.0]]) / 3.25**0.5, jnp.ones(1))
  >>> print(np.abs(polish(jnp.array([[0.8, 0.7, 0.6, 0.1]]), line)).round(3))
  [[1.   1.   0.75 0.  ]]
  """
  x = _checked(x, subspace)
  if likely is not None:
    _checks.check_shape("likely", likely, (2, *x.shape), "[2, M, ...]")
  return _polished(x, likely, subspace, subspace.moving, others, num_steps)


@jax.jit
@full_precision
def likely_ends(x: ArrayLike, y: ArrayLike, others: ArrayLike, others_y: ArrayLike) -> jax.Array:
  """How likely each value is to end black, or white: the share of similar samples of its label that have it there.

  Args:
    x: samples [M, ...] in units of the range.
    y: their labels [M].
    others: samples [K, ...] to compare with, such as the guesses and those found; the 8 nearest of the label count.
    others_y: their labels [K].

  Returns:
    Shares black and white [2, M, ...], from .05 to .95.
  """
  x, others = jnp.asarray(x), jnp.clip(jnp.asarray(others), 0.0, 1.0)
  flat, rest = jnp.clip(x, 0.0, 1.0).reshape(x.shape[0], -1), others.reshape(others.shape[0], -1)
  distances = jnp.sum(rest**2, axis=1)[None] - 2 * flat @ rest.T
  distances = jnp.where(jnp.asarray(y)[:, None] == jnp.asarray(others_y)[None], distances, jnp.inf)
  near, nearest = jax.lax.top_k(-distances, min(_NEAREST, len(others)))
  counts = jnp.isfinite(near).astype(rest.dtype)
  counts /= jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1.0)
  shares = [jnp.einsum("mkp,mk->mp", at_end[nearest], counts) for at_end in (rest < _REACHED, rest > 1 - _REACHED)]
  return (_UNSURE + (1 - 2 * _UNSURE) * jnp.stack(shares)).reshape(2, *x.shape)


def certify(x: ArrayLike, subspace: Subspace, criteria: Criteria = _DEFAULT) -> Certificates:
  """Which samples have the evidence of the range: tight, firm, in the range, and not the origin.

  Whether they are certified is decided by `kkt_jax.extraction.certificates.unambiguous`.

  They must be firm also where all black values may become one grey, and all white ones another. Else a picture with
  even areas would pass when it is made so bright that one of them is white, if a black image is in it. Where the
  origin is one value throughout, every sample can be made brighter, so that none is certified by its range.

  Args:
    x: polished samples [M, ...] in units of the range.
    subspace: of the training data.
    criteria: the thresholds.

  Returns:
    `Certificates`.

  Raises:
    ValueError: see `polish`.
  """
  x, origin, free = _checked(x, subspace), subspace.origin, subspace.free_coordinates
  unit = np.asarray(x, np.float64).reshape(x.shape[0], -1)[:, free]
  black, white = np.abs(unit) < criteria.tight, np.abs(unit - 1) < criteria.tight
  tight, overshoot = (black | white).sum(axis=1), np.linalg.norm(np.maximum(0.0, np.maximum(-unit, unit - 1)), axis=1)
  away = np.abs(np.asarray(x - origin[None])).reshape(x.shape[0], -1).max(axis=1) > criteria.away
  required = subspace.required_active(criteria)
  enough = (tight >= required) & (overshoot <= criteria.overshoot) & away
  firmness, contrast, one_sided = np.zeros((3, len(unit)))
  ends, which = np.unique(np.where(black | white, unit > 0.5, -1)[enough], axis=0, return_inverse=True)
  if len(ends):  # many samples come to one vertex
    rows = np.asarray(subspace.basis, np.float64)[free]
    measured = np.array([_held(rows, vertex, required, criteria.firmness) for vertex in ends])
    firmness[enough], contrast[enough], one_sided[enough] = measured[which.ravel()].T
  vertex = enough & (firmness >= criteria.firmness)
  certified = vertex & (contrast >= criteria.contrast) & (one_sided >= criteria.firmness)
  certified &= np.ptp(origin) >= criteria.tight
  return Certificates(tight, overshoot, firmness, contrast, vertex, certified)


def _held(basis: np.ndarray, ends: np.ndarray, count: int, least: float) -> tuple[float, float, float]:
  """Firmness and contrast of a vertex, and its firmness by the values at one end, if there are so many.

  Of its values [D], ``ends``, some are 0, some 1, and the others -1.
  """
  parts = [basis[ends == 0], basis[ends == 1]]
  firmness = _least_singular(np.concatenate(parts))
  if firmness < least:
    return firmness, 0.0, 0.0
  contrast = _least_singular(np.concatenate([rows - rows.mean(axis=0) for rows in parts if len(rows)]))
  most = max(parts, key=len)
  return firmness, contrast, _least_singular(most) if len(most) >= count else 0.0


def _least_singular(rows: np.ndarray) -> float:
  return max(float(np.linalg.eigvalsh(rows.T @ rows)[0]), 0.0) ** 0.5


def to_levels(x: ArrayLike, subspace: Subspace, criteria: Criteria = _DEFAULT) -> tuple[np.ndarray, np.ndarray]:
  """Images of whole levels, such as 8-bit ones, from polished samples: bit for bit, where they are training images.

  Nearly white values that polishing took for white bend a sample a little. So it is fitted to its black values by
  reweighted least squares, which trust white ones to a step or two only. Then the remaining values are put on their
  levels one after another, the surest first, and all others follow (Babai, 1986); from there once more, if need be. A
  point of the subspace can choose as many values as there are dimensions; that all others are whole levels, too, is no
  coincidence.

  Args:
    x: certified samples [M, ...] in units of the range.
    subspace: of the training data.
    criteria: the thresholds, among them the number of levels.

  Returns:
    The samples in whole levels [M, ...], and the greatest distance of a value of the point from its level [M], in
    steps: of the training images that were found at most .08, of all else at least .14 (docs/certificates.md); .5 for
    what has become another image.

  Raises:
    ValueError: see `polish`.
  """
  x, levels = _checked(x, subspace), criteria.levels
  basis, origin = np.asarray(subspace.basis, np.float64), levels * np.asarray(subspace.origin, np.float64).reshape(-1)
  unit = np.asarray(x, np.float64).reshape(x.shape[0], -1)
  points, bound, moving = levels * unit, off_level(subspace, criteria), subspace.moving
  for index, point in enumerate(points):
    light = np.mean(point) > levels / 2  # then its white values are the surest
    point, flat = (levels - point, levels - origin) if light else (point, origin)
    for _ in range(_TRIES):  # from where it came to, if that is not on levels
      point[moving] = _on_levels(point[moving], flat[moving], basis[moving], levels)
      point = _settled(point, flat, basis, levels)
      if np.abs(point - _rounded(point, levels)).max() < bound:
        break
    points[index] = levels - point if light else point
  off = np.abs(points - _rounded(points, levels)).max(axis=1, initial=0.0)
  moved = np.abs(_rounded(points, levels) / levels - unit).max(axis=1, initial=0.0)
  off = np.where(moved < criteria.bent, np.minimum(off, 0.5), 0.5)  # all black, for instance, is whole levels, too
  return (_rounded(points, levels) / levels).reshape(x.shape).astype(np.float32), off


def _on_levels(point: np.ndarray, origin: np.ndarray, basis: np.ndarray, levels: int) -> np.ndarray:
  """The point of the subspace whose values [D], in steps, are put on levels in turn, the surest first."""
  white, held = point > _WHITE * levels, basis.T @ (point - origin) / _BENT**2
  wanted = np.where(white, levels - 1.0, 0.0)
  for smooth in np.geomspace(*_DARK, 6):
    black = np.where(point < _DARKEST, _DARK[0] ** -0.5 * (np.square(point) + smooth**2) ** -0.75, 0.0)
    black *= np.where(point < 0, 3.0, 1.0)  # nothing is blacker than black
    beyond = np.maximum(np.abs(point - wanted) - _BEYOND, 0.0)
    weights = np.where(white, 1 / (_NEARLY**2 + beyond**2), black)
    weighed = basis * weights[:, None]
    gram = weighed.T @ basis + np.eye(basis.shape[1]) / _BENT**2
    point = origin + basis @ np.linalg.solve(gram, weighed.T @ (wanted - origin) + held)
  precision, directions = np.linalg.eigh(gram)
  open_ = precision < _KNOWN**-2
  rows, covariance = basis @ directions[:, open_], np.diag(1 / precision[open_])
  variances, free = np.square(rows) @ (1 / precision[open_]), np.ones(len(point), bool)
  for _ in range(len(point)):
    wanted = _rounded(point, levels)
    free &= variances > _KNOWN**2
    if not free.any():
      break
    distances = np.minimum(np.abs(point - wanted), 0.5)
    next_ = int(np.argmax(np.where(free, (1 - 2 * distances) / np.maximum(variances, 1e-12), -1.0)))  # by its odds
    free[next_] = False
    gain = covariance @ rows[next_]
    moves, variance = rows @ gain, rows[next_] @ gain + _KNOWN**2 / 4
    point = point + moves * (wanted[next_] - point[next_]) / variance
    covariance -= np.outer(gain, gain) / variance
    variances = variances - moves**2 / variance
  return point


def _rounded(point: np.ndarray, levels: int) -> np.ndarray:
  return np.asarray(np.clip(np.round(point), 0, levels))


def _settled(point: np.ndarray, origin: np.ndarray, basis: np.ndarray, levels: int) -> np.ndarray:
  """The point of the subspace nearest to a point's levels, moved a step one by one while that brings them nearer."""
  for _ in range(4):
    wanted = _rounded(point, levels)
    point = origin + basis @ (basis.T @ (wanted - origin))
  alone = 1 - np.sum(np.square(basis), axis=1)  # squared distance that a step of one value brings
  wanted = _rounded(point, levels)
  rest = wanted - origin - basis @ (basis.T @ (wanted - origin))
  for _ in range(_MOVES):
    steps = -np.sign(rest)
    inside = (wanted + steps >= 0) & (wanted + steps <= levels)
    gains = np.where(inside, 2 * np.abs(rest) - alone, 0.0)
    best = int(np.argmax(gains))
    if gains[best] < 1e-9:
      break
    wanted[best] += steps[best]
    rest -= steps[best] * (basis @ basis[best])
    rest[best] += steps[best]
  return wanted - rest


def off_level(subspace: Subspace, criteria: Criteria = _DEFAULT) -> float:
  """Steps up to which all values of a point are on their levels: half of what a step of any one value leaves at least.

  Then no point with one value on another level passes beside the right one. At most ``criteria.off_level``; 0 if a
  value can move by itself.
  """
  basis, moving = np.asarray(subspace.basis, np.float64), subspace.moving
  least = 2 * criteria.off_level
  for begin in range(0, len(moving), _COLUMNS):
    columns = moving[begin : begin + _COLUMNS]
    left = -basis @ basis[columns].T
    left[columns, np.arange(len(columns))] += 1
    least = min(least, float(np.abs(left).max(axis=0).min()))
  return least / 2


def left_open(x: np.ndarray, subspace: Subspace, criteria: Criteria = _DEFAULT) -> np.ndarray:
  """How many directions of the subspace the black values of images leave open [M]; of light ones the white values.

  Args:
    x: images [M, ...] in whole levels, in units of the range.
    subspace: of the training data.
    criteria: a direction is open where the least singular value is below ``firmness``.
  """
  basis, flat = np.asarray(subspace.basis, np.float64), x.reshape(len(x), subspace.origin.size)
  ends = flat == (np.mean(flat, axis=1, keepdims=True) > 0.5)
  grams = (basis[at_end].T @ basis[at_end] for at_end in ends)
  return np.array([np.sum(np.linalg.eigvalsh(gram) < criteria.firmness**2) for gram in grams], int)


def promising(x: ArrayLike, subspace: Subspace) -> np.ndarray:
  """Which samples [M, ...] have enough values near the ends of the range to be certified after polishing."""
  values = np.asarray(x).reshape(np.shape(x)[0], -1)[:, subspace.free_coordinates]
  near = np.sum(np.minimum(np.abs(values), np.abs(values - 1)) < _NEAR, axis=1)
  return near >= subspace.required_active()


def search(
  key: jax.Array,
  subspace: Subspace,
  num_samples: int,
  *,
  around: ArrayLike | None = None,
  known: ArrayLike | None = None,
) -> jax.Array:
  """Random points of the subspace, from which `polish` finds training samples without any equation.

  Args:
    key: typed random key.
    subspace: of the training data.
    num_samples: M.
    around: a point of the data's affine hull [...], such as their mean; the origin if None.
    known: samples [K, ...] that are found already: the points are drawn where these have nothing, and so near others.

  Returns:
    Points [M, ...], as far from there as black and white values of its mean would be, and not next to it.
  """
  start, basis = np.asarray(subspace.origin if around is None else around), np.asarray(subspace.basis)
  c = np.array(jax.random.normal(key, (num_samples, subspace.dimension)))
  if known is not None and np.size(known):
    offsets = (np.asarray(known) - start[None]).reshape(np.shape(known)[0], -1)
    directions = np.linalg.qr((offsets @ basis).T)[0]
    c -= c @ directions @ directions.T
  variances = np.where(subspace.free_coordinates, np.maximum(start * (1 - start), _VARIANCE).reshape(-1), 0.0)
  c *= np.sqrt(np.sum(variances)) / np.maximum(np.linalg.norm(c, axis=1, keepdims=True), 1e-6)
  points = (start.reshape(1, -1) + c @ basis.T).reshape(num_samples, *start.shape)
  return jnp.asarray(points, subspace.basis.dtype)


@functools.partial(jax.jit, static_argnames="num_steps")
def _polished(
  x: jax.Array, likely: Any, subspace: Subspace, moving: np.ndarray, others: Others | None, num_steps: int
) -> jax.Array:
  """See `polish`; only the values at the indices ``moving`` count."""
  trust = jnp.ones((2, *x.shape)) if likely is None else (-1 / jnp.log(jnp.asarray(likely))) ** 0.5
  trust = trust.reshape(2, x.shape[0], -1).swapaxes(0, 1)
  shape, start, basis = subspace.origin.shape, subspace.origin.reshape(-1), subspace.basis
  rows = basis[moving]
  gram_of = _weighted_gram(rows)

  def solve(c: jax.Array, weights: jax.Array, ends: jax.Array, others: Others | None) -> jax.Array:
    """Weighted least squares, weakly tied to the present point, which stays where the system cannot be solved."""
    weights = weights[moving]
    gram, wanted = gram_of(weights), rows.T @ (weights * (ends - start)[moving])
    if others is not None:
      apart = _APART * others.gram / jnp.sum(jnp.square(others.size @ jnp.append(c, 1.0)))
      gram, wanted = gram + apart[:-1, :-1], wanted - apart[:-1, -1]
    scale = jnp.trace(gram) / c.shape[0] + 1e-30
    factor = jax.scipy.linalg.cho_factor(gram / scale + 1e-7 * jnp.eye(c.shape[0]))
    solved = jax.scipy.linalg.cho_solve(factor, wanted / scale + 1e-7 * c)
    return jnp.where(jnp.all(jnp.isfinite(solved)), solved, c)

  def one(c: jax.Array, trust: jax.Array) -> jax.Array:
    def descend(c: jax.Array, smooth: jax.Array) -> tuple[jax.Array, None]:
      x = start + basis @ c
      ends = jnp.round(jnp.clip(x, 0.0, 1.0))
      distances = _with_neighbours(jnp.square(x - ends), shape)
      weights = (distances + smooth**2) ** (_EXPONENT / 2 - 1)
      weights *= jnp.where((x < 0) | (x > 1), _OUTSIDE, jnp.where(ends > 0, trust[1], trust[0]))
      return solve(c, weights, ends, others), None

    def refit(c: jax.Array, near: jax.Array) -> tuple[jax.Array, None]:
      x = start + basis @ c
      ends = jnp.round(jnp.clip(x, 0.0, 1.0))
      return solve(c, (jnp.abs(x - ends) < near).astype(x.dtype), ends, None), None

    c, _ = jax.lax.scan(descend, c, jnp.geomspace(_FIRST, _LAST, num_steps))
    return jax.lax.scan(refit, c, jnp.geomspace(_FAR * _LAST, _LAST, _REFITS))[0]

  return subspace.points(jax.lax.map(lambda pair: one(*pair), (subspace.coordinates(x), trust), batch_size=_AT_ONCE))


def _weighted_gram(rows: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """From weights [P] to ``rows^T diag(weights) rows`` [r, r].

  Products of columns that differ are kept, each pair once, if they are few enough: then there is one matrix product of
  many points, of half as many operations.
  """
  count, r = rows.shape
  if count * r * (r + 1) // 2 > _PRODUCTS:
    return lambda weights: (rows.T * weights[None]) @ rows
  first, second = np.tril_indices(r)
  place = np.zeros((r, r), int)
  place[first, second] = place[second, first] = np.arange(len(first))
  products = rows[:, first] * rows[:, second]
  return lambda weights: (weights @ products)[place]


def _with_neighbours(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The values [D] of an image, each mixed with those of the pixels around it; others as they are."""
  if len(shape) != 3 or min(shape[:2]) < 2:
    return values
  image = values.reshape(shape)
  for axis in (0, 1):
    padded = jnp.pad(image, [(1, 1) if axis == side else (0, 0) for side in range(3)], mode="edge")
    around = sum(jax.lax.slice_in_dim(padded, at, at + shape[axis], axis=axis) for at in (0, 2))
    image = _ALONE * image + (1 - _ALONE) / 2 * around
  return image.reshape(-1)


def _checked(x: ArrayLike, subspace: Subspace) -> jax.Array:
  x = jnp.asarray(x)
  _checks.check_batch("x", x)
  _checks.check_shape("x", x, (len(x), *subspace.origin.shape), "[M, ...] of the subspace")
  _checks.check_finite("x", x)
  return x
