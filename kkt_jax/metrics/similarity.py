"""Images against images: structural similarity, correlation and squared error, alone and class by class."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
from scipy import optimize  # type: ignore[import-untyped]

from kkt_jax import _checks
from kkt_jax.metrics.distances import check_batches, same_class, within_class

_Pair = tuple[np.ndarray, np.ndarray]  # of the samples, of the data
_WINDOW = 7

RECOVERED_SSIM = 0.4
"""Best SSIM above which a data image counts as recovered (Buzaglo et al. 2023)."""


@_checks.annotated
def ssim(a: ArrayLike, b: ArrayLike, *, data_range: float = 1.0) -> jax.Array:
  """Structural similarity of image pairs (Wang et al. 2004), the same definition as scikit-image's default.

  Uniform 7 x 7 window, sample covariances, K1 = 0.01, K2 = 0.03, mean over the positions where the window fits.

  Args:
    a: images [..., H, W, C], H and W at least 7.
    b: images of a shape that broadcasts against ``a``'s.
    data_range: greatest minus least possible pixel value.

  Returns:
    [...], each in [-1, 1]; 1 for equal images.

  Raises:
    ValueError: images smaller than the window, or no channel axis.

  >>> import jax.numpy as jnp
  >>> image = jnp.arange(64.0).reshape(8, 8, 1) / 64
  >>> print(ssim(image, image))
  1.0
  """
  a, b = jnp.asarray(a), jnp.asarray(b)
  for name, images in (("a", a), ("b", b)):
    if images.ndim < 3 or min(images.shape[-3:-1]) < _WINDOW:
      raise ValueError(f"{name} must be images [..., H, W, C] with H, W >= {_WINDOW}; got shape {images.shape}.")

  def window_mean(images: jax.Array) -> jax.Array:
    height, width = (_window_matrix(size) for size in images.shape[-3:-1])
    # Highest precision: the variances below are small differences, which the tensor cores of a GPU would round away.
    return jnp.einsum("ih,...hwc,jw->...ijc", height, images, width, precision="highest")

  size = _WINDOW**2
  mean_a, mean_b = window_mean(a), window_mean(b)
  unbiased = size / (size - 1)
  var_a = unbiased * (window_mean(a * a) - mean_a**2)
  var_b = unbiased * (window_mean(b * b) - mean_b**2)
  covariance = unbiased * (window_mean(a * b) - mean_a * mean_b)
  c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
  similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
    (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
  )
  return jnp.mean(similarity, axis=(-3, -2, -1))


def _window_matrix(size: int) -> jax.Array:
  """[size - 6, size]: row i averages the window that starts at i."""
  start, position = np.arange(size - _WINDOW + 1)[:, None], np.arange(size)[None, :]
  return jnp.asarray(((position >= start) & (position < start + _WINDOW)) / _WINDOW, jnp.result_type(float))


@_checks.annotated
@jax.jit
def pairwise_ssim(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """SSIM of every image of ``a`` with every image of ``b``, pixel values in [0, 1].

  Args:
    a: [A, H, W, C].
    b: [B, H, W, C].

  Returns:
    [A, B]; memory B x H x W x C.

  Raises:
    ValueError: the batches are empty, not floating point, of different shapes or smaller than the window.

  >>> import jax.numpy as jnp
  >>> pairwise_ssim(jnp.zeros((2, 8, 8, 1)), jnp.ones((3, 8, 8, 1))).shape
  (2, 3)
  """
  check_batches("a", a, "b", b)
  return jax.lax.map(lambda image: ssim(image[None], jnp.asarray(b)), jnp.asarray(a))


@_checks.annotated
@jax.jit
def pairwise_ncc(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """Zero-mean normalised cross-correlation of every image of ``a`` with every image of ``b``.

  Pearson's correlation of the pixels of two whole images. Unlike SSIM it sees neither brightness nor contrast.

  Args:
    a: [A, ...], floating point.
    b: [B, ...], images of the same shape.

  Returns:
    [A, B], each in [-1, 1] but for rounding; 0 where an image is constant.

  Raises:
    ValueError: the batches are empty, not floating point or of different shapes.

  >>> import jax.numpy as jnp
  >>> print(pairwise_ncc(jnp.array([[0.0, 1.0]]), jnp.array([[0.2, 0.3], [1.0, 0.0], [0.5, 0.5]])).round(3))
  [[ 1. -1.  0.]]
  """
  check_batches("a", a, "b", b)
  return jnp.matmul(_standardised(a), _standardised(b).T, precision="highest")


def _standardised(images: ArrayLike) -> jax.Array:
  """Rows [A, pixels] of mean 0 and length 1; 0 where the image is constant."""
  x = jnp.asarray(images).reshape(jnp.shape(images)[0], -1)
  constant = jnp.min(x, axis=1, keepdims=True) == jnp.max(x, axis=1, keepdims=True)  # a rounded mean would leave noise
  centred = jnp.where(constant, 0.0, x - jnp.mean(x, axis=1, keepdims=True))
  centred /= jnp.where(constant, 1.0, jnp.max(jnp.abs(centred), axis=1, keepdims=True))  # no square underflows
  return centred / jnp.where(constant, 1.0, jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True)))


@_checks.annotated
@jax.jit
def pairwise_mse(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """Mean squared pixel difference of every image of ``a`` and every image of ``b``.

  Args:
    a: [A, ...], floating point.
    b: [B, ...], images of the same shape.

  Returns:
    [A, B], in squared units of the pixels; exactly 0 for equal images.

  Raises:
    ValueError: the batches are empty, not floating point or of different shapes.

  >>> import jax.numpy as jnp
  >>> print(pairwise_mse(jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 1.0], [1.0, 1.0]])))
  [[0.  0.5]]
  """
  check_batches("a", a, "b", b)
  a, b = (jnp.asarray(value).reshape(jnp.shape(value)[0], -1) for value in (a, b))
  return jax.lax.map(lambda row: jnp.mean(jnp.square(row[None] - b), axis=1), a)


@_checks.annotated
def faithfulness(
  samples: ArrayLike, sample_labels: ArrayLike, data: ArrayLike, data_labels: ArrayLike
) -> dict[str, float]:
  """How near image samples come to the data, how many of the data, and with the right label.

  An image whose class is empty on the other side, samples or data, counts 0 in SSIM and NCC, and in MSE the mean square
  of the image itself, which is its MSE to a black one.

  Args:
    samples: images [S, H, W, C] in [0, 1].
    sample_labels: [S].
    data: images [N, H, W, C] in [0, 1].
    data_labels: [N].

  Returns:
    For each X of ``ssim``, ``ncc`` and ``mse``: ``X_nearest``, mean over samples of the best X to a data image of the
    class; ``X_cover``, mean over data images of the best X to a sample of the class; ``X_matched``, mean X over the
    pairs of the best one-to-one matching within each class, where the smaller of the two numbers is matched
    (``X_cover`` where there is no pair at all). The best is the greatest SSIM or NCC and the least MSE.

    ``recovered`` and ``recovered_share``: number and share of data images whose best SSIM to a sample of the class is
    above 0.4 (Buzaglo et al. 2023). ``distinct_nearest``: number of distinct data images that are some sample's
    SSIM-nearest of its class. ``label_agreement``: share of samples whose nearest data image of *any* class (Euclidean)
    has their label.

  Raises:
    ValueError: images or labels that do not fit, or an image that is not finite.

  >>> import jax
  >>> import jax.numpy as jnp
  >>> x, y = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1)), jnp.array([0, 0, 1, 1])
  >>> scores = faithfulness(x, y, x[:3], y[:3])
  >>> round(scores["ssim_matched"], 3), scores["mse_cover"], scores["recovered"], scores["distinct_nearest"]
  (1.0, 0.0, 3, 3)
  """
  check_batches("samples", samples, "data", data)
  _checks.check_finite("samples", samples)
  _checks.check_finite("data", data)
  pairs = np.asarray(same_class(sample_labels, jnp.shape(samples)[0], data_labels, jnp.shape(data)[0]))
  ssims, nccs, mses = (
    np.asarray(pairwise(samples, data), np.float64) for pairwise in (pairwise_ssim, pairwise_ncc, pairwise_mse)
  )
  squares = _mean_square(samples), _mean_square(data)
  zeros = np.zeros_like(squares[0]), np.zeros_like(squares[1])
  labels = np.asarray(sample_labels), np.asarray(data_labels)
  similarity = np.where(pairs, ssims, -np.inf)
  recovered = int(np.sum(similarity.max(axis=0) > RECOVERED_SSIM))
  return {
    **_summary("ssim", ssims, labels, black=zeros, maximize=True),
    **_summary("ncc", nccs, labels, black=zeros, maximize=True),
    **_summary("mse", mses, labels, black=squares, maximize=False),
    "recovered": recovered,
    "recovered_share": recovered / pairs.shape[1],
    "distinct_nearest": len(np.unique(similarity.argmax(axis=1)[pairs.any(axis=1)])),
    "label_agreement": float(np.mean(labels[1][mses.argmin(axis=1)] == labels[0])),
  }


def _summary(name: str, matrix: np.ndarray, labels: _Pair, *, black: _Pair, maximize: bool) -> dict[str, float]:
  """Nearest, cover and matched of one [S, N] matrix; ``black`` [S], [N] is for images whose class is empty opposite."""
  pairs = labels[0][:, None] == labels[1][None, :]
  possible = np.where(pairs, matrix, -np.inf if maximize else np.inf)
  of_sample, of_data = (possible.max(axis) if maximize else possible.min(axis) for axis in (1, 0))
  cover = float(np.mean(np.where(pairs.any(axis=0), of_data, black[1])))
  matched = _matched(matrix, labels, maximize)
  return {
    f"{name}_nearest": float(np.mean(np.where(pairs.any(axis=1), of_sample, black[0]))),
    f"{name}_cover": cover,
    f"{name}_matched": float(np.mean(matched)) if len(matched) else cover,
  }


def _matched(matrix: np.ndarray, labels: _Pair, maximize: bool) -> np.ndarray:
  """Entries of the pairs of the best one-to-one matching within each class."""
  entries = [np.zeros(0)]
  for label in np.intersect1d(labels[0], labels[1]):
    of_class = matrix[np.ix_(labels[0] == label, labels[1] == label)]
    entries.append(of_class[optimize.linear_sum_assignment(of_class, maximize=maximize)])
  return np.concatenate(entries)


def _mean_square(images: ArrayLike) -> np.ndarray:
  """[A]: mean squared pixel of each image, its MSE to a black one."""
  x = np.asarray(images, np.float64)
  return np.mean(np.square(x.reshape(len(x), -1)), axis=1)


@_checks.annotated
def ssim_nearest_indices(
  samples: ArrayLike, sample_labels: ArrayLike, data: ArrayLike, data_labels: ArrayLike
) -> jax.Array:
  """Each sample's SSIM-nearest data image of its class, for the even rows of Figs. 6 to 8.

  Args:
    samples: images [S, H, W, C] in [0, 1].
    sample_labels: [S].
    data: images [N, H, W, C] in [0, 1].
    data_labels: [N].

  Returns:
    Indices [S] into the data; 0 where the class has no data image.

  Raises:
    ValueError: images or labels that do not fit.

  >>> import jax.numpy as jnp
  >>> images = jnp.stack([jnp.zeros((8, 8, 1)), jnp.ones((8, 8, 1))])
  >>> print(ssim_nearest_indices(images[::-1], jnp.array([1, 0]), images, jnp.array([0, 1])))
  [1 0]
  """
  check_batches("samples", samples, "data", data)
  similarity = within_class(pairwise_ssim(samples, data), sample_labels, data_labels, -jnp.inf)
  return jnp.argmax(similarity, axis=1)
