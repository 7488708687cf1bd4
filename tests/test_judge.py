"""The judge: it learns what there is to learn, comes back from its folder, and tells useful images from others."""

import numpy as np
import pytest

from experiments import comparison, judge
from experiments.data import Images, Split


def shades(count, seed, *, flipped=False):
  """Dark images of class 0 and bright ones of class 1, in the order of the classes."""
  generator = np.random.default_rng(seed)
  y = np.repeat([0, 1], count).astype(np.int32)
  x = generator.uniform(0, 0.3, (2 * count, 8, 8, 1)) + 0.6 * y[:, None, None, None]
  return Images(x.astype(np.float32), 1 - y if flipped else y)


def test_images_are_useful_if_a_classifier_learns_from_them_what_holds_for_real_ones():
  real = shades(20, 0)
  assert judge.usefulness(shades(10, 1), real, seed=0, epochs=30) == 1.0
  assert judge.usefulness(shades(10, 1, flipped=True), real, seed=0, epochs=30) == 0.0


def test_the_judge_is_trained_once(tmp_path):
  images = shades(20, 0)
  first = judge.train_judge(images, seed=0, directory=tmp_path, epochs=20)
  assert first.accuracy(images.x, images.y) == 1.0
  again = judge.train_judge(shades(20, 5, flipped=True), seed=0, directory=tmp_path, epochs=20)
  np.testing.assert_array_equal(again.logits(images.x), first.logits(images.x))


def test_training_images_are_told_from_distractors_and_others_are_not(tmp_path):
  data = Split(*(shades(6, seed) for seed in range(4)))
  own = judge.train_judge(data.evaluation, seed=0, directory=tmp_path, epochs=5)
  measured = {
    name: comparison.measure_further(own, data, images, seed=0, epochs=1)
    for name, images in (("training", data.train), ("other", shades(6, 9)))
  }
  assert measured["training"]["retrieval_top1"] == 1.0
  assert measured["training"]["retrieval_p_value"] == pytest.approx(0.5**12)  # 12 images, each against one other
  assert measured["training"]["nearer_share"] == 1.0
  assert measured["training"]["coverage_pixels_k5"] == 1.0
  assert measured["training"]["kernel_distance"] < 0  # unbiased, and a set against itself
  assert measured["other"]["retrieval_p_value"] > 1e-3
