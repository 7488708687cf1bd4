"""Curves of membership scores, and the trial of every member, worked out by hand."""

import numpy as np
import pytest

from kkt_jax.metrics import epsilon_lower_bound, roc, Trial


def test_perfect_scores_have_an_interval_all_the_same():
  curve = roc(np.arange(10.0) + 1, -np.arange(20.0))
  assert curve.auc == curve.high == 1 and 0.7 < curve.low < 0.95
  point = curve.points[0]
  # Clopper-Pearson of 10 of 10: .025^(1/10) = .6915
  assert (point.others, point.members, point.share, point.high) == (0, 10, 1, 1)
  assert point.low == pytest.approx(0.025**0.1)


def test_the_interval_of_the_area_is_newcombe_s_fifth():
  # auc 3/4 of 2 x 2: the ends solve (a - .75)^2 = 1.96^2 a (1 - a) (1 + (1 - a) / (2 - a) + a / (1 + a)) / 4
  curve = roc([1, 3], [0, 2])
  assert curve.auc == 0.75
  for end in (curve.low, curve.high):
    variance = end * (1 - end) * (1 + (1 - end) / (2 - end) + end / (1 + end)) / 4
    assert (end - 0.75) ** 2 == pytest.approx(1.96**2 * variance, abs=1e-6)
  assert curve.low < 0.75 < curve.high < 1


def test_scores_that_say_nothing_and_worse_ones():
  assert roc([0, 0], [0, 0, 0]).auc == 0.5  # ties
  assert roc([0, 0], [0, 0, 0]).points[0].members == 0
  reversed_ = roc([0, 1], [2, 3])
  assert (reversed_.auc, reversed_.low) == (0, 0) and reversed_.high > 0.5


def test_false_positives_are_never_more_than_allowed():
  others = np.arange(1000.0)
  members = np.array([1000.0, 998.5, 989.5, 0.0])
  points = roc(members, others).points  # 0, 1 and 10 of 1000
  assert [(point.others, point.members) for point in points] == [(0, 1), (1, 2), (10, 3)]
  assert [point.members for point in roc(members, others[-500:]).points] == [1, 1, 2]  # .1 % of 500 is none
  (tied,) = roc([2.0], [1, 1, 1, 0], allowed=(0.5,)).points
  assert (tied.others, tied.members) == (0, 1)
  infinite = roc([np.inf, -np.inf], [-np.inf, 0.0])
  assert infinite.auc == 0.625 and infinite.points[0].members == 1  # of 4 pairs 2 won, 1 tied


@pytest.mark.parametrize(("members", "others"), [([], [1.0]), ([1.0], []), ([np.nan], [1.0]), ([[1.0]], [1.0])])
def test_scores_that_are_none_are_refused(members, others):
  with pytest.raises(ValueError, match="must be a vector of at least one score without NaN"):
    roc(members, others)


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


def test_epsilon_is_bounded_by_the_binomial_of_the_first_guesses_and_not_by_chance():
  many = epsilon_lower_bound(np.arange(100, 164), np.arange(100))
  share = (0.05 / 7) ** (1 / 64)  # guesses are the first 1, 2, 4, ..., 64; all are right
  assert many == pytest.approx(np.log(share / (1 - share)) + np.log(100 / 64))
  assert epsilon_lower_bound(np.ones(64), np.ones(100)) == 0  # ties are no evidence
  random = np.random.default_rng(0)
  false = [epsilon_lower_bound(random.normal(size=50), random.normal(size=250)) > 0 for _ in range(400)]
  assert np.mean(false) < 0.05
