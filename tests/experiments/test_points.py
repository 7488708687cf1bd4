"""Training points of the plane, solved for from nothing but the weights."""

import numpy as np
import pytest

from experiments import circle
from experiments.attack import classifiers, points
import kkt_jax


def solved(tmp_path, **changes):
  config = circle.Config(**changes)
  x, y = circle.circle(config.labels)
  classifier = classifiers.of_the_plane(config, x, y, tmp_path, index=0)
  places, classes = points.solve(kkt_jax.examine(classifier, seed=0))
  distances = np.linalg.norm(places[:, None] - x[None], axis=2) + 9.0 * (classes[:, None] != y[None])
  return distances, classifier


@pytest.mark.slow
def test_batch_norm_statistics_give_all_points_and_no_other(tmp_path):
  distances, classifier = solved(tmp_path)
  assert distances.shape == (18, 18)
  assert distances.min(axis=0).max() < 0.05
  mean, factor = points.input_moments(classifier)
  np.testing.assert_allclose(mean, np.zeros(2), atol=1e-3)
  np.testing.assert_allclose(factor @ factor.T, np.eye(2) / 2, atol=5e-3)


@pytest.mark.slow
def test_without_batch_norm_points_are_found_on_hinges_and_nothing_is_claimed_where_they_are_not(tmp_path):
  distances, _ = solved(tmp_path / "on", batch_norm=False)
  assert distances.min(axis=0).max() < 0.15
  assert len(distances) < 21
  assert distances.min(axis=1).max() < 0.15
  contiguous, _ = solved(tmp_path / "off", batch_norm=False, labels="contiguous")
  assert not len(contiguous)


def test_places_that_belong_or_lie_together_are_one_point():
  places = np.array([[0.0, 0.0], [0.1, 0.0], [1.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
  merged, weights = points._merged(places, np.array([0, 1, 2, 2, 3]), np.array([3.0, 1.0, 1.0, 1.0, 0.0]))
  np.testing.assert_allclose(merged, [[0.025, 0.0], [1.5, 1.5]])
  np.testing.assert_allclose(weights, [4.0, 2.0])


def test_what_no_candidates_explain_is_left():
  atoms = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
  np.testing.assert_allclose(points._combination(atoms, np.array([2.0, 3.0, 0.1])), [2.0, 3.0])
  np.testing.assert_allclose(points._combination(atoms, np.array([-2.0, 1.0, 1.0])), [0.0, 0.0])
