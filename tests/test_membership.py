"""The trial of every training sample, worked out by hand."""

import numpy as np
import pytest

from experiments.audit import membership
from experiments.audit.membership import Trial
from experiments.data import Images
from kkt_jax import metrics


def scores(members, others, y=None):
  members = np.asarray(members, float)
  places = np.arange(len(members))
  return Trial(np.zeros(len(members), int) if y is None else y, members, np.asarray(others, float), 1.0, places)


def test_hits_ratios_and_leading_samples():
  own = scores([0.9, 0.5, 1.0, 0.2], [[0.8, 0.1], [0.5, 0.2], [0.6, 0.6], [0.0, 0.4]])
  assert own.hits.tolist() == [True, False, True, False]
  np.testing.assert_allclose(own.ratios, [2, 1, np.inf, 0.75])
  assert own.chance == pytest.approx(1 / 3) and own.leading == 2
  # Two hits or more of four at a third: 1 - (16 + 32) / 81 = .407; two leading: 1/9, and twice that
  assert own.p_value == pytest.approx(2 / 9)


def test_three_exact_copies_among_many_are_found():
  """The mean knows nothing of them: 19 hits of 100 where chance is 17."""
  random = np.random.default_rng(0)
  members, others = random.uniform(size=100), random.uniform(size=(100, 5))
  members[:5] = 2.0
  assert scores(members, others).p_value <= 2 * (1 / 6) ** 5


def test_shuffled_memberships_are_picked_out_by_chance():
  y = np.arange(60) % 3
  random = np.random.default_rng(0)
  assert scores(10 + random.uniform(size=60), random.uniform(size=(60, 5)), y).hits.all()
  hits = scores(10 + random.uniform(size=60), random.uniform(size=(60, 5)), y).shuffled(200)
  assert hits.mean() == pytest.approx(10, abs=1) and hits.max() < 30


def test_the_trial_picks_out_as_the_metric_does_and_knows_which():
  random = np.random.default_rng(0)
  draw = lambda y: Images(random.normal(size=(len(y), 5)).astype(np.float32), y)
  train, held_out = draw(np.array([1, 0, 1, 0, 0])), draw(np.array([0, 1, 1, 0, 0, 1, 1]))
  samples = Images(train.x[[2, 1]], train.y[[2, 1]])
  own = membership.trial(samples, train, held_out)
  assert own.places.tolist() == [1, 3, 0, 2] and own.y.tolist() == [0, 0, 1, 1] and own.best == 0
  assert own.others.shape == (4, 1)  # three and four others: one for each of two
  assert own.hits[[0, 3]].all() and np.isinf(own.ratios[[0, 3]]).all()
  expected = metrics.retrieval(own.members, own.others.ravel())
  assert (own.hits.sum(), own.chance) == (expected["hits"], expected["chance"])
