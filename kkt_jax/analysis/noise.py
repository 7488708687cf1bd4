"""The directions above the noise that a small random initialisation leaves in a first layer. Beyond the paper."""

from typing import NamedTuple

from jax.typing import ArrayLike
import numpy as np

from kkt_jax.criteria import AnalysisCriteria

_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # quantiles of the spectrum that are held against those of noise
_DEFAULT = AnalysisCriteria()


class Directions(NamedTuple):
  """In which directions the columns of a first layer's kernel lie; its fields are those of `Subspace`.

  Attributes:
    basis: orthonormal columns [D, r], the most important direction first.
    singular_values: how strongly each direction is written into the weights [r].
    blur: what noise is left outside of them, in the unit of ``singular_values``.
  """

  basis: np.ndarray
  singular_values: np.ndarray
  blur: float = 0.0


class NoiseFloor(NamedTuple):
  """What remains of a matrix after its greatest singular values, if that is noise.

  Attributes:
    rank: how many singular values stand out.
    deviation: standard deviation of the entries of the noise.
  """

  rank: int
  deviation: float


def noise_floor(
  singular_values: ArrayLike, shape: tuple[int, int], criteria: AnalysisCriteria = _DEFAULT
) -> NoiseFloor | None:
  """How many singular values stand out of independent random entries, after Kritchman and Nadler (2008).

  A first layer that starts at W_0, with independent entries of deviation s, and is trained without weight decay ends
  at ``W = W_0 + sum_i x_i delta_i^T``. If the r directions of the sum are strong, W's first r singular vectors on
  either side are theirs, and the other singular values are those of W_0 without them: of a random matrix n x m with
  n = D - r and m = F - r. Of such a matrix is known

  - the sum of its squares, n m s^2, which tells s,
  - the law of its squares (Marchenko and Pastur 1967), between ``s (sqrt(m) -+ sqrt(n))`` squared,
  - how far beyond that the greatest may be (Tracy and Widom; Johnstone 2001): its square is
    ``s^2 (mu^2 + mu (1 / sqrt(m) + 1 / sqrt(n))^(1/3) t)``, mu = sqrt(m) + sqrt(n), with t < 3.27 in 99.9 of 100.

  The rank is the least r for which the greatest of the others is below that edge. They pass for noise if their
  quantiles are those of the law, to 2 % of the edge.

  There is none where

  - weights stay near their start (an edge above 1 % of the greatest value, as with PyTorch's initialisation): most
    directions of the data would be below it,
  - more than 90 % of the directions are filled,
  - what follows falls off or is rounding, as with weight decay: it is no noise,
  - all values are 0.

  Args:
    singular_values: all of the matrix [min(D, F)], falling.
    shape: (D, F).
    criteria: the thresholds; the defaults are those above.

  Returns:
    A `NoiseFloor`, or None if there is none.

  >>> random = np.random.default_rng(0)
  >>> weights = 1e-3 * random.normal(size=(60, 90)) + random.normal(size=(60, 5)) @ random.normal(size=(5, 90))
  >>> noise_floor(np.linalg.svd(weights, compute_uv=False), (60, 90)).rank
  5
  """
  values = np.asarray(singular_values, np.float64)
  ranks = np.arange(int(criteria.filled * len(values)))
  n, m = shape[0] - ranks, shape[1] - ranks
  deviations = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1][ranks] / (n * m))
  mu = np.sqrt(m) + np.sqrt(n)
  edges = deviations * np.sqrt(mu**2 + criteria.sure * mu * (1 / np.sqrt(m) + 1 / np.sqrt(n)) ** (1 / 3))
  below = np.flatnonzero(values[ranks] <= edges)
  if not below.size or edges[below[0]] > criteria.faint * values[0] or not values[0]:
    return None
  rank = int(below[0])
  rest, reach = values[rank:] / deviations[rank], mu[rank]
  unlike = np.abs(np.quantile(rest, _SHARES) - _noise_quantiles(n[rank], m[rank])) / reach
  alike = unlike.max() <= criteria.like_noise + 1 / len(rest)
  return NoiseFloor(rank, float(deviations[rank])) if alike else None


def _noise_quantiles(n: int, m: int) -> np.ndarray:
  """Quantiles of the singular values of an n x m matrix of independent entries of variance 1 (Marchenko-Pastur)."""
  low, high = abs(m**0.5 - n**0.5) ** 2, (m**0.5 + n**0.5) ** 2
  angle = np.linspace(0, np.pi, 2001)[1:-1]  # squares are (low + high) / 2 - (high - low) / 2 cos(angle)
  squares = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
  distribution = np.cumsum(np.sin(angle) ** 2 / squares)
  return np.sqrt(np.interp(_SHARES, distribution / distribution[-1], squares))


def directions_above_noise(kernel: ArrayLike, criteria: AnalysisCriteria = _DEFAULT) -> Directions | None:
  """The directions of the training inputs above what is left of a small random initialisation, see `noise_floor`.

  Inputs that never vary, such as black pixels at the border, have rows of W that only hold the initialisation; they are
  recognised by their length, and left out, so that they blur nothing.

  Args:
    kernel: W [D, F].
    criteria: the thresholds.

  Returns:
    `Directions` with their blur; None if there is no such floor.

  >>> random = np.random.default_rng(0)
  >>> weights = 1e-3 * random.normal(size=(60, 90)) + random.normal(size=(60, 5)) @ random.normal(size=(5, 90))
  >>> found = directions_above_noise(weights)
  >>> found.basis.shape, round(found.blur, 4)  # 1e-3 sqrt(60 - 5)
  ((60, 5), 0.0074)
  """
  kernel = np.asarray(kernel)
  above = _above_noise(kernel, len(kernel), criteria)
  if above is None:
    return None
  floor, directions = above
  squares = np.sum(np.square(kernel, dtype=np.float64), axis=1)
  width = kernel.shape[1]
  loud = squares > floor.deviation**2 * (width + criteria.quiet * (2 * width) ** 0.5)
  if not loud.all():
    above = _above_noise(np.where(loud[:, None], kernel, 0), int(loud.sum()), criteria)
  return directions if above is None else above[1]


def _above_noise(kernel: np.ndarray, rows: int, criteria: AnalysisCriteria) -> tuple[NoiseFloor, Directions] | None:
  """The noise floor and the directions of a matrix of which ``rows`` rows are not 0."""
  basis, values, _ = np.linalg.svd(kernel, full_matrices=False)
  floor = noise_floor(values[:rows], (rows, kernel.shape[1]), criteria)
  if floor is None or not floor.rank:
    return None
  rank, deviation = floor
  return floor, Directions(basis[:, :rank], values[:rank], deviation * (rows - rank) ** 0.5)
