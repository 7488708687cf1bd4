"""What the first layer alone reveals about the data: the subspace they span, and with batch norm their moments.

Beyond the paper, and data-free: everything is read off the given parameters.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax.criteria import Criteria

_ROWS = 1024  # of the basis that are compared with all before them at once
_TOGETHER = 0.999  # cosine of two values' rows of the basis from which they are one equation
_VARIES = 1e-3  # least length of a value's row of the basis for it to vary in the span
_DEFAULT = Criteria()
_FAINT = 0.01  # of the greatest singular value: the most that noise may reach for a span to be told above it
_FILLED = 0.9  # greatest share of the directions that data may fill
_SURE = 3.2724  # Tracy-Widom's law (beta = 1) lies below it with a probability of 99.9 %
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # quantiles of the spectrum that are held against those of noise
_LIKE_NOISE = 0.02  # greatest difference of these, in units of the edge; of K values one more K-th
_BIAS_OUTSIDE = 1e-3  # share of a bias outside of its kernel's row space, up to which both hold one sum over the data
_QUIET = 4.0  # standard deviations of a squared row's length up to which it is one of noise


@dataclasses.dataclass(frozen=True)
class FirstLayer:
  """A fully connected first layer: ``gain * (x - start) @ (gain * kernel) + bias``.

  Attributes:
    kernel: W over the gain [D, F], a sum of ``(x_i - start) s_i^T`` over the training data; less what is left of a
      known start.
    start: what is subtracted from the inputs [D].
    place: of the kernel among the parameters' leaves.
    turned: whether it is stored as [F, D], as PyTorch does.
    gain: what the inputs are multiplied by before the stored kernel, as far as a bias tells; else 1.
    bias: of the layer [F], if it has one whose weight decay is not known to be another than the kernel's.
    rank: how many directions the kernel holds, the others being rounding errors; 0 if that cannot be told.
    decay: the kernel's weight decay; 1 if it is unknown.
  """

  kernel: np.ndarray
  start: np.ndarray
  place: int
  turned: bool
  gain: float
  bias: np.ndarray | None
  rank: int
  decay: float

  @functools.cached_property
  def factors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular vectors [D, r], values [r] and vectors [r, F] of the kernel up to its rank, in float64."""
    u, s, rows = np.linalg.svd(np.asarray(self.kernel, np.float64), full_matrices=False)
    return u[:, : self.rank], s[: self.rank], rows[: self.rank]

  @functools.cached_property
  def normal(self) -> np.ndarray | None:
    """The v [D] with ``v . (x - start) = 1`` for every training input x; None if the bias does not tell it.

    Every step of gradient descent adds ``sum_i x_i s_i^T`` to the kernel and ``sum_i s_i`` to the bias, with the same
    s_i. So once the same weight decay has shrunk the start of both, ``bias = kernel^T v``, whether training has
    converged or not. That the bias lies in the kernel's row space, F - r equations, is checked: without decay on the
    bias, or with another step size or start, it does not. Two decays that differ pass this check at convergence: such a
    bias is left out where they are known, and where they are not, they are taken for equal.
    """
    if self.bias is None or not self.rank:
      return None
    u, s, rows = self.factors
    bias = np.asarray(self.bias, np.float64)
    inside = bias @ rows.T
    told = np.linalg.norm(bias) > 0 and np.linalg.norm(bias - inside @ rows) <= _BIAS_OUTSIDE * np.linalg.norm(bias)
    return u @ (inside / s) if told else None


class InputSpan(NamedTuple):
  """A subspace in which the training inputs lie, less the constant that the classifier subtracts from them.

  Attributes:
    basis: orthonormal columns [D, r], the most important direction first.
    strengths: how strongly each direction is written into the weights [r], positive, falling.
    blur: what is left of the initialisation outside of the true span, in the unit of ``strengths``; 0 if nothing is.
      The angle of direction k with the true span is about ``blur / strengths[k]``.
  """

  basis: jax.Array
  strengths: jax.Array
  blur: float = 0.0


def affine_span(first: FirstLayer) -> tuple[np.ndarray, InputSpan] | None:
  """The affine subspace of the training inputs: its point next to the layer's start [D], and directions within it.

  Among the r directions of the kernel, the equation ``normal . (x - start) = 1`` leaves r - 1 free. It is what tells a
  sample from a darker or a brighter one.

  >>> inputs = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
  >>> signals = np.array([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]])
  >>> layer = FirstLayer(inputs.T @ signals, np.zeros(3), 0, False, 1.0, signals.sum(axis=0), 2, 1.0)
  >>> origin, span = affine_span(layer)
  >>> print(origin.round(6), np.abs(span.basis[:, 0]).round(3))
  [0.5 0.5 0. ] [0.707 0.707 0.   ]
  """
  normal = first.normal
  if normal is None:
    return None
  u, s, _ = first.factors
  along = u.T @ normal
  along /= np.linalg.norm(along)
  basis, strengths, _ = np.linalg.svd((u - np.outer(u @ along, along)) * s, full_matrices=False)
  free = first.rank - 1
  span = InputSpan(jnp.asarray(basis[:, :free], jnp.float32), jnp.asarray(strengths[:free], jnp.float32))
  return first.start + normal / float(normal @ normal), span


class NoiseFloor(NamedTuple):
  """What remains of a matrix behind its greatest singular values, if that is noise.

  Attributes:
    rank: how many singular values stand out.
    deviation: standard deviation of the entries of the noise.
  """

  rank: int
  deviation: float


def input_span(kernel: ArrayLike, *, tolerance: float) -> InputSpan:
  """The span of the training inputs, read off the weights of a fully connected first layer.

  With weight decay w the stationarity of the first layer is ``W = (1 / w) mean_i x_i delta_i^T`` with back-propagated
  signals delta: every column of W [D, F] is a combination of the training inputs. With F > N the singular values fall
  off a cliff behind the rank of the data, at most N, and the left singular vectors before it span the training inputs
  exactly. The classifier must be trained to convergence: what is left of the initialisation blurs the cliff.

  Args:
    kernel: W [D, F].
    tolerance: singular values up to this share of the greatest are left out, in (0, 1): between the data's last one and
      what is left of the initialisation; 2e-7 leaves out rounding errors only.

  Returns:
    An `InputSpan` of rank r <= min(D, F).

  Raises:
    ValueError: ``kernel`` is not such a matrix, holds NaN, infinities or only zeros, or ``tolerance`` is out of range.

  >>> import jax.numpy as jnp
  >>> span = input_span(jnp.array([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]), tolerance=1e-6)
  >>> span.basis.shape, span.strengths.tolist()
  ((3, 2), [3.0, 2.0])
  """
  kernel = jnp.asarray(kernel)
  _checks.check_rank("kernel", kernel, 2, "[D, F]")
  _checks.check_finite("kernel", kernel)
  if not 0 < tolerance < 1:
    raise ValueError(f"tolerance must be in (0, 1); got {tolerance}.")
  basis, strengths, _ = jnp.linalg.svd(kernel, full_matrices=False)
  rank = int(jnp.sum(strengths > tolerance * strengths[0]))
  if not rank:
    raise ValueError("kernel must not be all zeros.")
  return InputSpan(basis[:, :rank], strengths[:rank])


def noise_floor(strengths: ArrayLike, shape: tuple[int, int]) -> NoiseFloor | None:
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
    strengths: all singular values of the matrix [min(D, F)], falling.
    shape: (D, F).

  Returns:
    A `NoiseFloor`, or None if there is none.

  >>> random = np.random.default_rng(0)
  >>> weights = 1e-3 * random.normal(size=(60, 90)) + random.normal(size=(60, 5)) @ random.normal(size=(5, 90))
  >>> noise_floor(np.linalg.svd(weights, compute_uv=False), (60, 90)).rank
  5
  """
  values = np.asarray(strengths, np.float64)
  ranks = np.arange(int(_FILLED * len(values)))
  n, m = shape[0] - ranks, shape[1] - ranks
  deviations = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1][ranks] / (n * m))
  mu = np.sqrt(m) + np.sqrt(n)
  edges = deviations * np.sqrt(mu**2 + _SURE * mu * (1 / np.sqrt(m) + 1 / np.sqrt(n)) ** (1 / 3))
  below = np.flatnonzero(values[ranks] <= edges)
  if not below.size or edges[below[0]] > _FAINT * values[0] or not values[0]:
    return None
  rank = int(below[0])
  rest, reach = values[rank:] / deviations[rank], mu[rank]
  unlike = np.abs(np.quantile(rest, _SHARES) - _noise_quantiles(n[rank], m[rank])) / reach
  return NoiseFloor(rank, float(deviations[rank])) if unlike.max() <= _LIKE_NOISE + 1 / len(rest) else None


def _noise_quantiles(n: int, m: int) -> np.ndarray:
  """Quantiles of the singular values of an n x m matrix of independent entries of variance 1 (Marchenko-Pastur)."""
  low, high = abs(m**0.5 - n**0.5) ** 2, (m**0.5 + n**0.5) ** 2
  angle = np.linspace(0, np.pi, 2001)[1:-1]  # squares are (low + high) / 2 - (high - low) / 2 cos(angle)
  squares = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
  distribution = np.cumsum(np.sin(angle) ** 2 / squares)
  return np.sqrt(np.interp(_SHARES, distribution / distribution[-1], squares))


def span_above_noise(kernel: ArrayLike) -> InputSpan | None:
  """The span of the training inputs above what is left of a small random initialisation, see `noise_floor`.

  Inputs that never vary, such as black pixels at the border, have rows of W that only hold the initialisation; they are
  told by their length, and left out, so that they blur nothing.

  Args:
    kernel: W [D, F].

  Returns:
    An `InputSpan` with its blur; None if there is no such floor.

  >>> random = np.random.default_rng(0)
  >>> weights = 1e-3 * random.normal(size=(60, 90)) + random.normal(size=(60, 5)) @ random.normal(size=(5, 90))
  >>> span = span_above_noise(weights)
  >>> span.basis.shape, round(span.blur, 4)  # 1e-3 sqrt(60 - 5)
  ((60, 5), 0.0074)
  """
  kernel = np.asarray(kernel)
  found = _above_noise(kernel, len(kernel))
  if found is None:
    return None
  floor, span = found
  squares = np.sum(np.square(kernel, dtype=np.float64), axis=1)
  width = kernel.shape[1]
  loud = squares > floor.deviation**2 * (width + _QUIET * (2 * width) ** 0.5)
  if not loud.all():
    found = _above_noise(np.where(loud[:, None], kernel, 0), int(loud.sum()))
  return span if found is None else found[1]


def _above_noise(kernel: np.ndarray, rows: int) -> tuple[NoiseFloor, InputSpan] | None:
  """The floor and the span of a matrix with so many rows that are not 0."""
  basis, strengths, _ = np.linalg.svd(kernel, full_matrices=False)
  floor = noise_floor(strengths[:rows], (rows, kernel.shape[1]))
  if floor is None or not floor.rank:
    return None
  rank, deviation = floor
  blur = deviation * (rows - rank) ** 0.5
  return floor, InputSpan(jnp.asarray(basis[:, :rank]), jnp.asarray(strengths[:rank]), blur)


@full_precision
def input_moments(kernel: ArrayLike, bias: ArrayLike, mean: ArrayLike, var: ArrayLike) -> tuple[jax.Array, jax.Array]:
  """Solves ``W^T m + b = mean`` and ``w_j^T S w_j = var_j`` for the mean m and covariance S of the inputs.

  The stored statistics of a batch-normalised first layer are those of ``W^T x + b`` over the training data. Least
  squares; exact where the layer is wide enough: F >= D for the mean, F >= D (D + 1) / 2 for the covariance.

  Args:
    kernel: W [D, F].
    bias: b [F].
    mean: stored mean of the layer's output [F].
    var: stored variance of the layer's output [F].

  Returns:
    The mean [D] and the covariance [D, D] of the training inputs, symmetric, with eigenvalues of at least 1e-6.

  Raises:
    ValueError: shapes that do not fit, or a layer too narrow for its equations to determine the moments.

  >>> import jax.numpy as jnp
  >>> kernel = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])  # outputs x1, x2 and x1 + x2
  >>> m, s = input_moments(kernel, jnp.zeros(3), jnp.array([5.0, 7.0, 12.0]), jnp.array([4.0, 9.0, 15.0]))
  >>> bool(jnp.allclose(m, jnp.array([5.0, 7.0]), atol=1e-4))
  True
  >>> bool(jnp.allclose(s, jnp.array([[4.0, 1.0], [1.0, 9.0]]), atol=1e-4))  # covariance (15 - 4 - 9) / 2
  True
  """
  kernel = jnp.asarray(kernel)
  _checks.check_rank("kernel", kernel, 2, "[D, F]")
  size, width = kernel.shape
  for name, value in (("bias", bias), ("mean", mean), ("var", var)):
    _checks.check_shape(name, value, (width,), "[F]")
  needed = size * (size + 1) // 2
  if width < needed:
    raise ValueError(f"kernel must have at least D (D + 1) / 2 = {needed} outputs for D = {size}; got {width}.")
  input_mean = jnp.linalg.lstsq(kernel.T, jnp.asarray(mean) - jnp.asarray(bias))[0]
  rows, columns = jnp.triu_indices(size)
  # w^T S w over the upper triangle: off-diagonal entries count twice. Each equation in units of its own variance.
  coefficients = (kernel[rows] * kernel[columns] * jnp.where(rows == columns, 1.0, 2.0)[:, None]).T
  scale = jnp.maximum(jnp.asarray(var), 1e-12)
  entries = jnp.linalg.lstsq(coefficients / scale[:, None], jnp.asarray(var) / scale)[0]
  covariance = jnp.zeros((size, size)).at[rows, columns].set(entries).at[columns, rows].set(entries)
  values, vectors = jnp.linalg.eigh(covariance)
  return input_mean, (vectors * jnp.maximum(values, 1e-6)[None, :]) @ vectors.T


def varying(span: InputSpan) -> np.ndarray:
  """Which values [D] differ among the points of a span, those that always move together counted once."""
  rows = np.asarray(span.basis, np.float64)
  lengths = np.linalg.norm(rows, axis=1)
  moving = np.flatnonzero(lengths > _VARIES)
  directions = rows[moving] / lengths[moving, None]
  counted = np.zeros(len(rows), bool)
  for begin in range(0, len(moving), _ROWS):  # a block at a time: images have many values
    end = begin + _ROWS
    alike = np.abs(directions[begin:end] @ directions[:end].T) > _TOGETHER
    counted[moving[begin:end]] = ~np.tril(alike, begin - 1).any(axis=1)
  return counted


def least_tight(dimensions: int, number: int, criteria: Criteria = _DEFAULT) -> int:
  """How many of a number of values must be at an end of the range for a sample to be certified.

  r of them say nothing. Of polished points that are no training samples, chance brings up to a fifth of all values
  there besides, however many dimensions there are (docs/lab/exact.md).

  >>> least_tight(99, 482), least_tight(499, 552)
  (201, 615)
  """
  return dimensions + math.ceil(criteria.beyond * number)
