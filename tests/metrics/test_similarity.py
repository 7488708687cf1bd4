"""Image similarity: closed forms, and scikit-image and numpy as independent implementations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from kkt_jax import metrics


def images(seed, count, channels=1):
  return jax.random.uniform(jax.random.key(seed), (count, 12, 10, channels))


def flat(*values):
  """Constant images, whose MSE to one another is the squared difference of the values."""
  return jnp.stack([jnp.full((8, 8, 1), value) for value in values])


def test_ssim_agrees_with_scikit_image():
  for channels in (1, 3):
    a, b = images(0, 4, channels), images(1, 4, channels)
    expected = [
      structural_similarity(np.asarray(p), np.asarray(q), channel_axis=-1, data_range=1.0)
      for p, q in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(metrics.ssim(a, b), expected, rtol=1e-4, atol=1e-5)


def test_ncc_agrees_with_numpy_corrcoef():
  a, b = images(0, 3, channels=3), images(1, 4, channels=3)
  expected = np.corrcoef(np.reshape(a, (3, -1)), np.reshape(b, (4, -1)))[:3, 3:]
  np.testing.assert_allclose(metrics.pairwise_ncc(a, b), expected, atol=1e-6)


def test_mse_by_hand():
  a, b = jnp.array([[0.0, 2.0], [1.0, 1.0]]), jnp.array([[0.0, 2.0], [3.0, 2.0], [1.0, 5.0]])
  # (0, 9 + 0, 1 + 9) / 2 and (1 + 1, 4 + 1, 0 + 16) / 2
  np.testing.assert_allclose(metrics.pairwise_mse(a, b), [[0.0, 4.5, 5.0], [1.0, 2.5, 8.0]])


def test_every_pairwise_matrix_is_transposed_with_its_arguments():
  a, b = images(0, 3), images(1, 5)
  for pairwise in (metrics.pairwise_ssim, metrics.pairwise_ncc, metrics.pairwise_mse, metrics.pairwise_distance):
    forward, backward = pairwise(a, b), pairwise(b, a)
    assert forward.shape == (3, 5)
    np.testing.assert_allclose(forward, backward.T, rtol=1e-5, atol=1e-6)


def test_ssim_of_constant_images_is_the_luminance_term():
  # No variance: (2 * 0.2 * 0.6 + c1) / (0.04 + 0.36 + c1) with c1 = 1e-4, times c2 / c2.
  a, b = jnp.full((8, 8, 1), 0.2), jnp.full((8, 8, 1), 0.6)
  np.testing.assert_allclose(metrics.ssim(a, b), (0.24 + 1e-4) / (0.40 + 1e-4), rtol=1e-3)


def test_pairwise_ssim_is_ssim_of_every_pair():
  a, b = images(0, 3), images(1, 5)
  pairs = metrics.pairwise_ssim(a, b)
  np.testing.assert_allclose(pairs[2, 4], metrics.ssim(a[2], b[4]), rtol=1e-5)


def test_images_smaller_than_the_window_are_named():
  with pytest.raises(ValueError, match="b must be images"):
    metrics.ssim(jnp.zeros((8, 8, 1)), jnp.zeros((6, 8, 1)))


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])  # 0.1 is not exact in binary, so its mean is rounded
def test_ncc_of_a_constant_image_is_zero_also_with_itself(value):
  np.testing.assert_array_equal(
    metrics.pairwise_ncc(flat(value), jnp.concatenate([flat(value), images(0, 1)[:, :8, :8]])), 0
  )


def test_ncc_sees_neither_brightness_nor_contrast_but_the_sign():
  a = images(0, 1)
  b = jnp.concatenate([0.3 * a + 0.5, 1 - a, 1e-25 * a])  # the squares of the last are no float32
  np.testing.assert_allclose(metrics.pairwise_ncc(a, b), [[1, -1, 1]], rtol=1e-5)


@pytest.mark.parametrize("pairwise", [metrics.pairwise_ssim, metrics.pairwise_ncc, metrics.pairwise_mse])
def test_batches_that_cannot_be_compared_are_named(pairwise):
  with pytest.raises(ValueError, match=r"^b must hold samples like a, shape \[..., 12, 10, 1\]; got shape"):
    pairwise(images(0, 2), images(0, 2, channels=3))
  with pytest.raises(ValueError, match="^a must hold at least one sample"):
    pairwise(images(0, 0), images(0, 2))
  with pytest.raises(ValueError, match="^b must be floating point; got dtype uint8"):
    pairwise(images(0, 2), jnp.zeros((2, 12, 10, 1), jnp.uint8))


def test_true_data_score_perfectly_and_cover_everything():
  x, y = images(0, 6), jnp.array([0, 0, 1, 1, 2, 2])
  scores = metrics.faithfulness(x, y, x, y)
  for part in ("nearest", "cover", "matched"):
    np.testing.assert_allclose([scores[f"ssim_{part}"], scores[f"ncc_{part}"]], 1.0, rtol=1e-4)
    assert scores[f"mse_{part}"] == 0.0
  assert scores["distinct_nearest"] == scores["recovered"] == 6
  assert scores["label_agreement"] == scores["recovered_share"] == 1.0
  assert all(type(value) in (int, float) for value in scores.values())


def test_the_order_of_samples_and_of_data_does_not_matter():
  x, y = images(0, 6), jnp.array([0, 0, 1, 1, 2, 2])
  samples, labels = images(1, 5), jnp.array([0, 1, 1, 1, 2])
  there, back = jnp.array([3, 1, 0, 4, 2]), jnp.array([5, 0, 3, 2, 4, 1])
  shuffled = metrics.faithfulness(samples[there], labels[there], x[back], y[back])
  chex.assert_trees_all_close(metrics.faithfulness(samples, labels, x, y), shuffled, rtol=1e-6)


def test_one_image_for_all_has_few_distinct_nearest_and_the_wrong_label():
  x, y = images(0, 6), jnp.array([0, 0, 1, 1, 2, 2])
  copies = jnp.repeat(x[:1], 6, axis=0)  # an image of class 0, offered as every class
  scores = metrics.faithfulness(copies, y, x, y)
  assert scores["distinct_nearest"] == 3  # one in each class
  np.testing.assert_allclose(scores["label_agreement"], 2 / 6, rtol=1e-6)
  assert scores["recovered"] == 1


def test_duplicates_are_near_but_only_one_of_them_is_matched():
  # Both samples are the first image: nearest 0, cover (0 + 0.25) / 2; the second copy has to take the other image.
  data, labels = flat(0.2, 0.7), jnp.array([0, 0])
  scores = metrics.faithfulness(flat(0.2, 0.2), labels, data, labels)
  np.testing.assert_allclose([scores[f"mse_{part}"] for part in ("nearest", "cover", "matched")], [0, 0.125, 0.125])
  assert scores["distinct_nearest"] == 1


def test_matching_is_the_best_one_and_not_the_greedy_one():
  # Samples 0.4, 0.1 and data 0.3, 0.9. Greedy takes 0.4 - 0.3 (0.01) and is left with 0.1 - 0.9 (0.64): mean 0.325.
  # The best takes 0.4 - 0.9 (0.25) and 0.1 - 0.3 (0.04): mean 0.145.
  labels = jnp.array([0, 0])
  scores = metrics.faithfulness(flat(0.4, 0.1), labels, flat(0.3, 0.9), labels)
  np.testing.assert_allclose(scores["mse_matched"], 0.145, rtol=1e-5)
  np.testing.assert_allclose(scores["mse_nearest"], (0.01 + 0.04) / 2, rtol=1e-5)
  np.testing.assert_allclose(scores["mse_cover"], (0.01 + 0.25) / 2, rtol=1e-5)


def test_the_smaller_number_of_a_class_is_matched_and_pairs_not_classes_are_averaged():
  # Class 0: one sample 0.5, data 0.1 and 0.4, pair at 0.01. Class 1: samples 0, 0.2, 0.9 and data 0.1, 0.4: the pairs
  # 0 - 0.1 and 0.2 - 0.4 at 0.01 and 0.04 are better than any with 0.9. Mean of three pairs: 0.02.
  samples, sample_labels = flat(0.5, 0.0, 0.2, 0.9), jnp.array([0, 1, 1, 1])
  data, data_labels = flat(0.1, 0.4, 0.1, 0.4), jnp.array([0, 0, 1, 1])
  scores = metrics.faithfulness(samples, sample_labels, data, data_labels)
  np.testing.assert_allclose(scores["mse_matched"], 0.02, rtol=1e-5)


def test_a_class_without_samples_counts_like_a_black_image():
  x, y = images(0, 4), jnp.array([0, 0, 1, 1])
  scores = metrics.faithfulness(x[:2], y[:2], x, y)
  np.testing.assert_allclose([scores["ssim_cover"], scores["ncc_cover"]], 0.5, rtol=1e-4)
  np.testing.assert_allclose(scores["mse_cover"], np.sum(np.square(x[2:])) / x.size, rtol=1e-5)
  np.testing.assert_allclose(scores["ssim_matched"], 1.0, rtol=1e-4)
  assert (scores["recovered"], scores["recovered_share"]) == (2, 0.5)


def test_samples_of_a_class_without_data_count_like_a_black_image():
  x, y = images(0, 4), jnp.array([0, 0, 1, 1])
  scores = metrics.faithfulness(x, y, x[2:], y[2:])
  np.testing.assert_allclose([scores["ssim_nearest"], scores["ncc_nearest"]], 0.5, rtol=1e-4)
  np.testing.assert_allclose(scores["mse_nearest"], np.sum(np.square(x[:2])) / x.size, rtol=1e-5)
  assert scores["distinct_nearest"] == 2  # a sample without data of its class has no nearest


def test_without_any_common_class_matched_is_cover():
  x = images(0, 2)
  scores = metrics.faithfulness(x, jnp.array([0, 0]), x, jnp.array([1, 1]))
  assert scores["ssim_matched"] == scores["ssim_cover"] == scores["ncc_matched"] == 0.0
  np.testing.assert_allclose([scores["mse_matched"], scores["mse_cover"]], np.mean(np.square(x)), rtol=1e-5)
  assert scores["recovered"] == scores["distinct_nearest"] == scores["label_agreement"] == 0


def test_constant_images_have_no_correlation_but_a_similarity():
  labels = jnp.array([0])
  scores = metrics.faithfulness(flat(0.2), labels, flat(0.6), labels)
  assert scores["ncc_nearest"] == scores["ncc_matched"] == 0.0
  np.testing.assert_allclose(scores["ssim_nearest"], (0.24 + 1e-4) / (0.40 + 1e-4), rtol=1e-3)  # as above: 0.6
  assert scores["recovered"] == 1


def test_an_image_below_the_threshold_is_not_recovered():
  # Constant images 0 and 1: SSIM c1 / (1 + c1), far below 0.4.
  labels = jnp.array([0, 0])
  assert metrics.RECOVERED_SSIM == 0.4
  assert metrics.faithfulness(flat(0.0, 0.0), labels, flat(0.0, 1.0), labels)["recovered"] == 1


def test_nearest_indices_point_into_the_whole_data_set():
  x, y = images(0, 4), jnp.array([0, 0, 1, 1])
  np.testing.assert_array_equal(metrics.ssim_nearest_indices(x[::-1], y[::-1], x, y), [3, 2, 1, 0])


def test_labels_that_do_not_fit_are_named():
  x = images(0, 4)
  with pytest.raises(ValueError, match="sample_labels must have shape"):
    metrics.faithfulness(x, jnp.zeros(3, int), x, jnp.zeros(4, int))
  with pytest.raises(ValueError, match="data_labels must be integers"):
    metrics.faithfulness(x, jnp.zeros(4, int), x, jnp.zeros(4))


def test_an_image_that_is_not_finite_is_named():
  x, y = images(0, 2), jnp.array([0, 1])
  with pytest.raises(ValueError, match="^samples must be finite"):
    metrics.faithfulness(x.at[0, 0, 0, 0].set(jnp.nan), y, x, y)
