"""Distances between samples: closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import metrics


def test_distance_by_hand_over_all_axes_of_a_sample():
  a = jnp.array([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
  # (1 + 4 + 4 + 16)^.5 and (0 + 1 + 1 + 9)^.5
  distance = metrics.pairwise_distance(a, jnp.array([[[1.0, 2.0], [2.0, 4.0]]]))
  np.testing.assert_allclose(distance, [[5.0], [11**0.5]], rtol=1e-6)


def test_samples_of_different_shapes_are_named():
  with pytest.raises(ValueError, match=r"^b must hold samples like a, shape \[..., 2\]; got shape \(3, 1\)"):
    metrics.pairwise_distance(jnp.zeros((3, 2)), jnp.zeros((3, 1)))


def test_precision_and_coverage_count_only_the_same_class():
  data, labels = jnp.array([[0.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])
  samples, sample_labels = jnp.array([[0.1, 0.0], [0.9, 0.0]]), jnp.array([0, 0])  # the second is near the wrong class
  scores = metrics.precision_coverage(samples, sample_labels, data, labels, radius=0.15)
  assert scores["precision"] == 0.5
  assert scores["coverage"] == 0.5
  np.testing.assert_allclose(scores["median_distance"], (0.1 + 0.9) / 2, rtol=1e-5)
  near = metrics.precision_coverage(data[:1] + 1e-8, labels[:1], data[:1], labels[:1], radius=1.0)
  np.testing.assert_allclose(near["median_distance"], 2**0.5 * 1e-8, rtol=1e-5)  # not rounded


def test_within_class_distance_averages_classes_not_pairs():
  # Class 0: one pair at 4. Class 1: three points 0, 3, 6 with pairs 3, 3, 6, mean 4. Class 2 has one point only.
  features = jnp.array([[0.0], [4.0], [0.0], [3.0], [6.0], [9.0]])
  labels = jnp.array([0, 0, 1, 1, 1, 2])
  assert metrics.within_class_distance(features, labels) == 4.0


def test_within_class_distance_is_zero_for_a_collapsed_class_and_without_pairs():
  assert metrics.within_class_distance(jnp.ones((3, 2)), jnp.zeros(3, int)) == 0.0
  assert metrics.within_class_distance(jnp.ones((2, 2)), jnp.array([0, 1])) == 0.0


def test_within_class_distance_names_labels_that_do_not_fit():
  with pytest.raises(ValueError, match="^labels must have shape"):
    metrics.within_class_distance(jnp.ones((3, 2)), jnp.zeros(2, int))
