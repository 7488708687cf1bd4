"""Metrics: closed forms, and scikit-image as an independent SSIM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from kkt_jax import metrics


def images(seed, count, channels=1):
  return jax.random.uniform(jax.random.key(seed), (count, 12, 10, channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_agrees_with_scikit_image(channels):
  a, b = images(0, 4, channels), images(1, 4, channels)
  expected = [
    structural_similarity(np.asarray(p), np.asarray(q), channel_axis=-1, data_range=1.0)
    for p, q in zip(a, b, strict=True)
  ]
  np.testing.assert_allclose(metrics.ssim(a, b), expected, rtol=1e-4, atol=1e-5)


def test_ssim_of_constant_images_is_the_luminance_term():
  # No variance: (2 * 0.2 * 0.6 + c1) / (0.04 + 0.36 + c1) with c1 = 1e-4, times c2 / c2.
  a, b = jnp.full((8, 8, 1), 0.2), jnp.full((8, 8, 1), 0.6)
  np.testing.assert_allclose(metrics.ssim(a, b), (0.24 + 1e-4) / (0.40 + 1e-4), rtol=1e-3)


def test_pairwise_ssim_is_ssim_of_every_pair():
  a, b = images(0, 3), images(1, 5)
  pairs = metrics.pairwise_ssim(a, b)
  assert pairs.shape == (3, 5)
  np.testing.assert_allclose(pairs[2, 4], metrics.ssim(a[2], b[4]), rtol=1e-5)


def test_images_smaller_than_the_window_are_named():
  with pytest.raises(ValueError, match="b must be images"):
    metrics.ssim(jnp.zeros((8, 8, 1)), jnp.zeros((6, 8, 1)))


def test_true_data_score_perfectly_and_cover_everything():
  x, y = images(0, 6), jnp.array([0, 0, 1, 1, 2, 2])
  scores = metrics.similarity_metrics(x, y, x, y)
  np.testing.assert_allclose([scores["ssim_nearest"], scores["ssim_cover"]], 1.0, rtol=1e-4)
  assert scores["distinct_nearest"] == 6
  assert scores["label_agreement"] == 1.0


def test_one_image_for_all_has_few_distinct_nearest_and_the_wrong_label():
  x, y = images(0, 6), jnp.array([0, 0, 1, 1, 2, 2])
  copies = jnp.repeat(x[:1], 6, axis=0)  # an image of class 0, offered as every class
  scores = metrics.similarity_metrics(copies, y, x, y)
  assert scores["distinct_nearest"] == 3  # one in each class
  np.testing.assert_allclose(scores["label_agreement"], 2 / 6, rtol=1e-6)


def test_a_class_without_samples_counts_as_uncovered():
  x, y = images(0, 4), jnp.array([0, 0, 1, 1])
  scores = metrics.similarity_metrics(x[:2], y[:2], x, y)
  np.testing.assert_allclose(scores["ssim_cover"], 0.5, rtol=1e-4)


def test_precision_and_coverage_count_only_the_same_class():
  data, labels = jnp.array([[0.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])
  samples, sample_labels = jnp.array([[0.1, 0.0], [0.9, 0.0]]), jnp.array([0, 0])  # the second is near the wrong class
  scores = metrics.precision_coverage(samples, sample_labels, data, labels, radius=0.15)
  assert scores["precision"] == 0.5
  assert scores["coverage"] == 0.5
  np.testing.assert_allclose(scores["median_distance"], (0.1 + 0.9) / 2, rtol=1e-5)


def test_within_class_distance_averages_classes_not_pairs():
  # Class 0: one pair at 4. Class 1: three points 0, 3, 6 with pairs 3, 3, 6, mean 4. Class 2 has one point only.
  features = jnp.array([[0.0], [4.0], [0.0], [3.0], [6.0], [9.0]])
  labels = jnp.array([0, 0, 1, 1, 1, 2])
  assert metrics.within_class_distance(features, labels) == 4.0


def test_within_class_distance_is_zero_for_a_collapsed_class_and_without_pairs():
  assert metrics.within_class_distance(jnp.ones((3, 2)), jnp.zeros(3, int)) == 0.0
  assert metrics.within_class_distance(jnp.ones((2, 2)), jnp.array([0, 1])) == 0.0


def test_nearest_indices_point_into_the_whole_data_set():
  x, y = images(0, 4), jnp.array([0, 0, 1, 1])
  np.testing.assert_array_equal(metrics.ssim_nearest_indices(x[::-1], y[::-1], x, y), [3, 2, 1, 0])


def test_labels_that_do_not_fit_are_named():
  x = images(0, 4)
  with pytest.raises(ValueError, match="sample_labels must have shape"):
    metrics.similarity_metrics(x, jnp.zeros(3, int), x, jnp.zeros(4, int))
  with pytest.raises(ValueError, match="data_labels must be integers"):
    metrics.similarity_metrics(x, jnp.zeros(4, int), x, jnp.zeros(4))
