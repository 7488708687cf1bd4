"""How near, how diverse and how recognisable generated samples are, against data known for the comparison only.

None of these functions is seen by the training. Each figure means something only beside its controls: the same figure
for the true data, other real data, the mean image and noise.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks

_WINDOW = 7


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
    return jnp.einsum("ih,...hwc,jw->...ijc", height, images, width)

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


@jax.jit
def pairwise_ssim(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """SSIM of every image of ``a`` with every image of ``b``, pixel values in [0, 1].

  Args:
    a: [A, H, W, C].
    b: [B, H, W, C].

  Returns:
    [A, B]; memory B x H x W x C.

  >>> import jax.numpy as jnp
  >>> pairwise_ssim(jnp.zeros((2, 8, 8, 1)), jnp.ones((3, 8, 8, 1))).shape
  (2, 3)
  """
  return jax.lax.map(lambda image: ssim(image[None], jnp.asarray(b)), jnp.asarray(a))


@jax.jit
def pairwise_distance(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """Euclidean distance of every row of ``a`` [A, ...] from every row of ``b`` [B, ...]; [A, B].

  >>> import jax.numpy as jnp
  >>> print(pairwise_distance(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0], [0.0, 1.0]])))
  [[5. 1.]]
  """
  a, b = (jnp.asarray(value).reshape(jnp.shape(value)[0], -1) for value in (a, b))
  return jax.lax.map(lambda row: jnp.sqrt(jnp.sum(jnp.square(row[None] - b), axis=1)), a)


def precision_coverage(
  samples: ArrayLike, sample_labels: ArrayLike, data: ArrayLike, data_labels: ArrayLike, *, radius: float
) -> dict[str, float]:
  """How many samples lie near data of their class, and how many data points have such a sample.

  Args:
    samples: [S, ...].
    sample_labels: [S].
    data: [N, ...].
    data_labels: [N].
    radius: what counts as near, in units of the data.

  Returns:
    ``precision``: share of samples within ``radius`` of a data point of their class; ``coverage``: share of data points
    with a sample of their class within ``radius``; ``median_distance``: median over samples of the distance to the
    nearest data point of their class.

  Raises:
    ValueError: labels that do not fit.

  >>> import jax.numpy as jnp
  >>> precision_coverage(jnp.array([[0.0], [5.0]]), jnp.array([0, 0]), jnp.array([[0.1]]), jnp.array([0]), radius=0.2)
  {'precision': 0.5, 'coverage': 1.0, 'median_distance': 2.5}
  """
  distance = _within_class(pairwise_distance(samples, data), sample_labels, data_labels, jnp.inf)
  nearest = jnp.min(distance, axis=1)
  return {
    "precision": float(jnp.mean(nearest <= radius)),
    "coverage": float(jnp.mean(jnp.min(distance, axis=0) <= radius)),
    "median_distance": round(float(jnp.median(nearest)), 6),
  }


def similarity_metrics(
  samples: ArrayLike, sample_labels: ArrayLike, data: ArrayLike, data_labels: ArrayLike
) -> dict[str, float]:
  """How near image samples come to the data, how many of the data, and with the right label.

  Args:
    samples: images [S, H, W, C] in [0, 1].
    sample_labels: [S].
    data: images [N, H, W, C] in [0, 1].
    data_labels: [N].

  Returns:
    ``ssim_nearest``: mean over samples of the best SSIM to a data image of the class; ``ssim_cover``: mean over data
    images of the best SSIM to a sample of the class; ``distinct_nearest``: number of distinct data images that are some
    sample's SSIM-nearest of its class; ``label_agreement``: share of samples whose nearest data image of *any* class
    (Euclidean) has their label.

  Raises:
    ValueError: images or labels that do not fit.
  """
  similarity = _within_class(pairwise_ssim(samples, data), sample_labels, data_labels, -jnp.inf)
  nearest_of_any_class = jnp.argmin(pairwise_distance(samples, data), axis=1)
  cover = jnp.max(similarity, axis=0)
  return {
    "ssim_nearest": float(jnp.mean(jnp.max(similarity, axis=1))),
    "ssim_cover": float(jnp.mean(jnp.where(jnp.isfinite(cover), cover, 0.0))),  # a class without samples covers nothing
    "distinct_nearest": len(np.unique(jnp.argmax(similarity, axis=1))),
    "label_agreement": float(jnp.mean(jnp.asarray(data_labels)[nearest_of_any_class] == jnp.asarray(sample_labels))),
  }


def best_similarity(samples: ArrayLike, sample_labels: ArrayLike, data: ArrayLike, data_labels: ArrayLike) -> jax.Array:
  """The best SSIM [N] of each data image to a sample of its class; -inf where the class has no sample."""
  return jnp.max(_within_class(pairwise_ssim(samples, data), sample_labels, data_labels, -jnp.inf), axis=0)


def ssim_nearest_indices(
  samples: ArrayLike, sample_labels: ArrayLike, data: ArrayLike, data_labels: ArrayLike
) -> jax.Array:
  """Index [S] of each sample's SSIM-nearest data image of its class, for the even rows of Figs. 6 to 8."""
  similarity = _within_class(pairwise_ssim(samples, data), sample_labels, data_labels, -jnp.inf)
  return jnp.argmax(similarity, axis=1)


def within_class_distance(features: ArrayLike, labels: ArrayLike) -> float:
  """Mean distance of two different samples of one class, averaged over the classes that have at least two samples.

  The ``spread`` of the experiments is this over the same of real data: 0 where a class has collapsed to one image.

  Args:
    features: [S, ...].
    labels: [S].

  Returns:
    A float, in units of the features; 0 where no class has two samples.

  >>> import jax.numpy as jnp
  >>> within_class_distance(jnp.array([[0.0], [4.0], [9.0]]), jnp.array([0, 0, 1]))
  4.0
  """
  features, labels = np.asarray(features), np.asarray(labels)
  means = []
  for label in np.unique(labels):
    own = features[labels == label]
    if len(own) > 1:
      means.append(float(jnp.sum(pairwise_distance(own, own))) / (len(own) * (len(own) - 1)))
  return float(np.mean(means)) if means else 0.0


def _within_class(matrix: jax.Array, row_labels: ArrayLike, column_labels: ArrayLike, other: float) -> jax.Array:
  """The matrix with ``other`` where the labels of row and column differ."""
  _checks.check_labels("sample_labels", row_labels, matrix.shape[0])
  _checks.check_labels("data_labels", column_labels, matrix.shape[1])
  return jnp.where(jnp.asarray(row_labels)[:, None] == jnp.asarray(column_labels)[None, :], matrix, other)
