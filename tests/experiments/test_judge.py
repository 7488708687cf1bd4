"""The judge: it learns what there is to learn, comes back from its folder, and tells useful images from others."""

import jax.flatten_util
import numpy as np
import optax
import pytest

from experiments.measure import judge
from kkt_jax.auditing.samples import Samples
from kkt_jax.classifiers import make_classifier


def shades(count, seed, *, flipped=False):
  """Dark images of class 0 and bright ones of class 1, in the order of the classes."""
  generator = np.random.default_rng(seed)
  y = np.repeat([0, 1], count).astype(np.int32)
  x = generator.uniform(0, 0.3, (2 * count, 8, 8, 1)) + 0.6 * (1 - y if flipped else y)[:, None, None, None]
  return Samples(x.astype(np.float32), y)


@pytest.mark.slow
def test_images_are_useful_if_a_classifier_learns_from_them_what_holds_for_real_ones():
  real = shades(20, 0)
  assert judge.usefulness(shades(10, 1), real, seed=0, epochs=30) == 1.0
  assert judge.usefulness(shades(10, 1, flipped=True), real, seed=0, epochs=30) == 0.0


@pytest.mark.slow
def test_a_student_learns_what_the_teacher_says_and_not_the_labels():
  real, own = shades(20, 0), shades(10, 1)
  sure = np.where(np.arange(2)[None] == own.y[:, None], 0.9, 0.1)
  assert judge.usefulness(own, real, seed=0, epochs=30, lessons=sure) == 1.0
  assert judge.usefulness(own, real, seed=0, epochs=30, lessons=1 - sure) == 0.0


def test_a_teacher_gives_a_runner_up_at_the_margin_little_and_one_at_the_boundary_half():
  classifier = make_classifier(lambda w, x: x @ w, np.array([[1.0, -1.0]], np.float32), (1,))
  x = np.array([[50.0], [0.0], [-50.0]], np.float32)  # logits are 100 apart, which the plain softmax makes 0 and 1
  taught = judge.soft_labels(classifier, 100.0, x)
  np.testing.assert_allclose(taught[:, 1] / taught[:, 0], [np.exp(-3), 1.0, np.exp(3)], rtol=1e-5)
  np.testing.assert_allclose(taught.sum(axis=1), 1.0, rtol=1e-6)


@pytest.mark.slow
def test_the_judge_is_trained_once_for_the_same_images(tmp_path, monkeypatch):
  images = shades(20, 0)
  first = judge.train_judge(images, seed=0, directory=tmp_path, epochs=20)
  assert first.accuracy(images.x, images.y) == 1.0
  other = judge.train_judge(shades(20, 5, flipped=True), seed=0, directory=tmp_path, epochs=20)
  assert other.accuracy(images.x, images.y) == 0.0  # other images, another judge
  monkeypatch.setattr(judge, "_fit", None)
  again = judge.train_judge(images, seed=0, directory=tmp_path, epochs=20)
  np.testing.assert_array_equal(again(images.x)[0], first(images.x)[0])


def test_gradients_of_parts_add_up_to_the_step_of_the_whole_batch(monkeypatch):
  monkeypatch.setattr(judge, "_OPTIMIZER", optax.sgd(0.1))
  images, steps = shades(6, 0), []
  for at_once in (12, 5):  # one part; parts of 4
    monkeypatch.setattr(judge, "_AT_ONCE", at_once)
    steps.append(judge._fit(judge._Network(2), images, seed=0, epochs=2, batch_size=12))
  first, second = (jax.flatten_util.ravel_pytree(step)[0] for step in steps)
  np.testing.assert_allclose(first, second, atol=1e-5)
