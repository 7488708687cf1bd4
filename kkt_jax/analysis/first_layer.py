"""What the first layer alone reveals about the data: the subspace they span, and with batch norm their moments.

Beyond the paper, and data-free: everything is read off the given parameters.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax.analysis.noise import Directions, directions_above_noise
from kkt_jax.analysis.probing import Probes
from kkt_jax.analysis.subspace import Subspace
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AnalysisCriteria

_TURNS = 8  # most turns of finding what is left of a known start
_DEFAULT = AnalysisCriteria()


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
    rank: how many directions the kernel holds, the others being rounding errors; 0 if that is undetermined.
    decay: the kernel's weight decay; 1 if it is unknown.
    criteria: by which its bias counts as one sum with its kernel.
  """

  kernel: np.ndarray
  start: np.ndarray
  place: int
  turned: bool
  gain: float
  bias: np.ndarray | None
  rank: int
  decay: float
  criteria: AnalysisCriteria = _DEFAULT

  @functools.cached_property
  def factors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular vectors [D, r], values [r] and vectors [r, F] of the kernel up to its rank, in float64."""
    u, s, rows = self._all_factors
    return u[:, : self.rank], s[: self.rank], rows[: self.rank]

  @functools.cached_property
  def _all_factors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(np.asarray(self.kernel, np.float64), full_matrices=False)

  @functools.cached_property
  def normal(self) -> np.ndarray | None:
    """The v [D] with ``v . (x - start) = 1`` for every training input x; None if the bias does not determine it.

    Every step of gradient descent adds ``sum_i x_i s_i^T`` to the kernel and ``sum_i s_i`` to the bias, with the same
    s_i. So once the same weight decay has shrunk the start of both, ``bias = kernel^T v``, whether training has
    converged or not. That the bias lies in the kernel's row space, F - r equations, is checked: without decay on the
    bias, or with another step size or start, it does not. Nor does it where the start is the mean of the data: there is
    no such v. What is outside must also be less than what tells the kernel's last direction from none: else the bias
    adds a direction of its own, however small. Two decays that differ pass this check at convergence: such a bias is
    left out where they are known, and where they are not, they are taken for equal.
    """
    if self.bias is None or not 0 < self.rank < self.kernel.shape[1]:
      return None
    u, s, rows = self.factors
    bias, values = np.asarray(self.bias, np.float64), self._all_factors[1]
    inside = bias @ rows.T
    beyond = max(values[self.rank] if self.rank < len(values) else 0.0, self.criteria.rounding * values[0])
    most = min(self.criteria.bias_outside * np.linalg.norm(bias), (s[-1] * beyond) ** 0.5)
    determined = np.linalg.norm(bias) > 0 and np.linalg.norm(bias - inside @ rows) <= most
    return u @ (inside / s) if determined else None

  @functools.cached_property
  def affine(self) -> tuple[np.ndarray, Directions] | None:
    """The point nearest to ``start`` [D] with ``normal . (x - start) = 1``, and the r - 1 directions that it leaves.

    It is what tells a sample from a darker or a brighter one. None without a normal.

    >>> inputs = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> signals = np.array([[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]])
    >>> layer = FirstLayer(inputs.T @ signals, np.zeros(3), 0, False, 1.0, signals.sum(axis=0), 2, 1.0)
    >>> point, directions = layer.affine
    >>> print(point.round(6), np.abs(directions.basis[:, 0]).round(3))
    [0.5 0.5 0. ] [0.707 0.707 0.   ]
    """
    normal = self.normal
    if normal is None:
      return None
    u, s, _ = self.factors
    along = u.T @ normal
    along /= np.linalg.norm(along)
    basis, values, _ = np.linalg.svd((u - np.outer(u @ along, along)) * s, full_matrices=False)
    point = self.start + normal / float(normal @ normal)
    return point, Directions(basis[:, : self.rank - 1], values[: self.rank - 1])


def origin_of(classifier: Classifier, start: jax.Array | None) -> jax.Array:
  """Where samples start [*input_shape], in units of the range: what is subtracted from them, or else its middle."""
  bounded = classifier.value_range is not None
  if start is None:
    return jnp.full(classifier.input_shape, 0.5 if bounded else 0.0)
  unit = classifier.to_unit(start)
  return jnp.clip(unit, 0.0, 1.0) if bounded else unit


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


class FirstReading(NamedTuple):
  """What the first layer reveals; all but `left` is None where it is not fully connected or does not see the data.

  Attributes:
    start: what the network subtracts from its inputs [*input_shape].
    layer: the layer, if it is wider than the number of classes.
    subspace: that of the data, affine where the bias tells it.
    place: of its kernel among the parameters' leaves.
    left: how much of a known start is left in the kernel; 1 if that is unknown.
  """

  start: jax.Array | None = None
  layer: FirstLayer | None = None
  subspace: Subspace | None = None
  place: int | None = None
  left: float = 1.0


def read_first_layer(probes: Probes) -> FirstReading:
  """What the first layer of a network reveals, found by its gradients at three inputs.

  The gradient of any logit by the kernel of such a layer is the outer product of the layer's input with another vector.
  So the direction of what the layer sees of each input x_i follows from gradients, ``x_i - m = c_i u_i``, and three
  inputs determine their c_i and the constant m that was subtracted.
  """
  classifier, criteria, leaves = probes.classifier, probes.criteria, probes.leaves
  flat = np.asarray(probes.x[:3], np.float64).reshape(3, -1)
  matrices = probes.matrices(flat.shape[1], axis=0) if flat.shape[1] > 1 else []
  slopes = np.linspace(-1.0, 1.0, classifier.num_classes, dtype=np.float32)
  of_samples = probes.gradients(slopes, len(flat), matrices)
  for place, turned in matrices:
    upright = lambda leaf, turned=turned: np.asarray(leaf).T if turned else np.asarray(leaf)
    gradients = [upright(of_sample[place]) for of_sample in of_samples]
    constant = _constant(flat, gradients, criteria.alike)
    if constant is None:
      continue  # its inputs are not the data: another layer, or they go through something else first
    start = jnp.asarray(constant.reshape(classifier.input_shape), jnp.float32)
    kernel = upright(leaves[place])
    if kernel.shape[1] <= classifier.num_classes:
      return FirstReading(start, place=place)  # such as a last layer, which tells of classes
    initial, left = classifier.initial_params, 1.0
    if initial is not None:
      kernel, left = _change(kernel, upright(jax.tree.leaves(initial)[place]))
    at, gain = _first_bias(leaves, of_samples, gradients, flat - constant, criteria.alike)
    decays = classifier.decays
    bias = None if at is None or decays[at] != decays[place] else np.asarray(leaves[at])
    # Batch norm makes the gradients of a batch add up to 0: their span is one of differences, around the data's mean.
    around_mean = not classifier.batch_coupled or float(np.std(constant)) > criteria.alike * np.abs(flat).max()
    noise = around_mean and initial is None and not probes.rounded
    rank, directions = 0, None
    if around_mean or initial is None:
      rank, directions = _span(kernel, noise=noise, num_classes=classifier.num_classes, criteria=criteria)
    layer = FirstLayer(kernel / gain, constant, place, turned, gain, bias, rank, decays[place], criteria)
    subspace = None if directions is None else _subspace(classifier, layer, directions, start)
    return FirstReading(start, layer, subspace, place, left)
  return FirstReading()


def _subspace(classifier: Classifier, layer: FirstLayer, directions: Directions, start: jax.Array) -> Subspace:
  """The subspace of directions around what is subtracted, or the affine one where the layer's bias tells it."""
  origin = origin_of(classifier, start if classifier.offset is None else classifier.offset)
  if classifier.initial_params is None and not (classifier.batch_coupled or directions.blur) and layer.affine:
    point, directions = layer.affine
    origin = classifier.to_unit(jnp.asarray(point.reshape(classifier.input_shape), jnp.float32))
  basis, values = (jnp.asarray(array, jnp.float32) for array in directions[:2])
  return Subspace(origin, basis, values, directions.blur, layer.criteria)


def _first_bias(
  leaves: list[jax.Array],
  of_samples: list[dict[int, np.ndarray]],
  gradients: list[np.ndarray],
  offsets: np.ndarray,
  alike: float,
) -> tuple[int | None, float]:
  """The place of the first layer's bias, None if there is none, and the factor on its inputs, 1 if that is unknown.

  By the kernel a logit's gradient is the outer product of the layer's input with the one by its bias.
  """
  signals = np.stack([offset @ g / (offset @ offset) for offset, g in zip(offsets, gradients, strict=True)])
  for place, leaf in enumerate(leaves):
    if leaf.shape == signals.shape[1:]:
      by_bias = np.stack([gradient[place] for gradient in of_samples])
      gain = float(np.vdot(signals, by_bias) / max(np.vdot(by_bias, by_bias), 1e-300))
      if gain > 0 and np.linalg.norm(signals - gain * by_bias) <= alike * np.linalg.norm(signals):
        return place, gain if abs(gain - 1) > alike else 1.0
  return None, 1.0


def _constant(x: np.ndarray, gradients: Sequence[np.ndarray], alike: float) -> np.ndarray | None:
  """The constant m [D] for which each ``x_i - m`` is what a layer sees of x_i [K, D], from its gradients [D, F]."""
  directions = []
  for gradient in gradients:
    column = gradient[:, np.argmax(np.sum(np.square(gradient), axis=0))]
    rest = gradient - np.outer(column, column @ gradient) / max(float(column @ column), 1e-300)
    if not np.any(column) or np.linalg.norm(rest) > alike * np.linalg.norm(gradient):
      return None
    directions.append(column / np.linalg.norm(column))
  count, size = x.shape
  equations = np.zeros((count - 1, size, count))
  equations[:, :, 0] = directions[0]
  equations[np.arange(count - 1), :, np.arange(1, count)] = -np.stack(directions[1:])
  c = np.linalg.lstsq(equations.reshape(-1, count), (x[0] - x[1:]).reshape(-1))[0]
  constants = x - c[:, None] * np.stack(directions)
  return constants[0] if np.abs(constants - constants[0]).max() <= alike * np.abs(x).max() else None


def _change(kernel: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, float]:
  """``W - c W_0`` with the c that leaves nothing in directions without data, and c.

  Weight decay shrinks the start: there ``W = c W_0``. A singular value with vectors u and v falls with c at the rate
  ``d = u^T W_0 v``, and becomes 0 where s = d times a step, for all directions without data at once. The step is the
  least squares solution of these equations, each divided by s, so that those of data do not count.
  """
  final, initial = np.asarray(kernel, np.float64), np.asarray(first, np.float64)
  change, left = final - initial, 1.0
  for _ in range(_TURNS):
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    size = np.maximum(s, _DEFAULT.rounding * max(s[0], 1e-30))  # where the step ends changes no finding
    rates = np.sum((u.T @ initial) * vt, axis=1) / size
    step = float(np.vdot(rates, s / size) / np.vdot(rates, rates))
    left += step
    change = final - left * initial
    if abs(step) < _DEFAULT.rounding:
      break
  return change.astype(kernel.dtype), left


def _span(
  kernel: np.ndarray, *, noise: bool = True, num_classes: int = 0, criteria: AnalysisCriteria = _DEFAULT
) -> tuple[int, Directions | None]:
  """The rank at which the singular values fall, and those directions if they are those of the data.

  The kernel ``sum_i x_i s_i^T`` has the rank of the signals s_i where these are fewer than the samples: samples of one
  class that open the same gates are fitted alike, and two classes leave two to a dozen directions, whatever the number
  of samples. So there must be more than two for each class before a sharp fall, or above noise, and many more else.
  """
  basis, values, _ = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
  rank, sharp = _fall(values, criteria)
  fitted_alike = 2 * num_classes + criteria.groups if num_classes else 0
  if rank:
    enough = rank > (fitted_alike if sharp else criteria.many * num_classes)
    return rank, Directions(basis[:, :rank], values[:rank]) if enough else None
  above = directions_above_noise(kernel, criteria) if noise else None
  return 0, above if above is not None and len(above.singular_values) > fitted_alike else None


def _fall(singular_values: np.ndarray, criteria: AnalysisCriteria = _DEFAULT) -> tuple[int, bool]:
  """The number of singular values before they fall to almost nothing, 0 if they do not, and whether the fall is sharp.

  It is if it is deep, or ends in rounding errors, below which nothing can be seen to fall.
  """
  values = np.maximum(singular_values / max(singular_values[0], 1e-300), criteria.rounding)
  falls = np.where(values[1:] < criteria.nothing, values[:-1] / values[1:], 0.0)
  # A normalisation takes directions away, which says nothing of data.
  falls = falls[: int(criteria.filled * len(falls))]
  at = int(np.argmax(falls)) if len(falls) else 0
  if len(falls) and falls[at] > criteria.fall:
    return at + 1, bool(falls[at] > criteria.sharp or values[at + 1] <= criteria.rounding)
  # Without a sharp fall, what lies below the rounding errors of the training is no direction of the data.
  count = int(np.sum(values > 2 * criteria.rounding))
  return (count if 0 < count < criteria.filled * len(values) else 0), False
