"""Memorisation: counts and binomial tails worked out by hand, and the false alarm rate of retrieval by simulation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import metrics


def line(*points):
  return jnp.array(points)[:, None]


def test_nearer_to_training_by_hand():
  # Training at 0 and 10, disjoint at 4 and 20. Distances 1 : 3, 3 : 1, 1 : 5 (of 9) and 2 : 8 (of 12).
  # Three of four nearer; ratios 1/3, 3, 1/5, 1/4, median (1/4 + 1/3) / 2 = 7/24.
  # Two-sided: (C(4, 3) + C(4, 4)) / 2^4 for each tail, 10/16.
  scores = metrics.nearer_to_training(line(1.0, 3.0, 9.0, 12.0), line(0.0, 10.0), line(4.0, 20.0))
  assert scores == pytest.approx({"share": 0.75, "median_ratio": 7 / 24, "p_value": 10 / 16}, rel=1e-6)
  assert all(type(value) is float for value in scores.values())


def test_copies_of_the_training_set_are_all_nearer():
  training = jnp.arange(6.0)[:, None]
  scores = metrics.nearer_to_training(training, training, training + 0.5)
  assert scores == pytest.approx({"share": 1.0, "median_ratio": 0.0, "p_value": 2 / 2**6})
  swapped = metrics.nearer_to_training(training, training + 0.5, training)
  assert swapped == pytest.approx({"share": 0.0, "median_ratio": np.inf, "p_value": 2 / 2**6})


def test_the_same_set_twice_is_a_tie():
  training = jax.random.normal(jax.random.key(0), (5, 4, 3))
  generated = jnp.concatenate([training[:1], training[:2] + 0.1])  # the first is at distance 0 of both
  scores = metrics.nearer_to_training(generated, training, training)
  assert scores == {"share": 0.5, "median_ratio": 1.0, "p_value": 1.0}


def test_ties_count_half_in_the_share_and_not_in_the_test():
  # Distances 1 : 1, 0 : 2 and 0 : 2: share (2 + 1/2) / 3, two-sided over two samples 2 / 2^2.
  scores = metrics.nearer_to_training(line(1.0, 0.0, 0.0), line(0.0), line(2.0))
  assert scores == pytest.approx({"share": 2.5 / 3, "median_ratio": 0.0, "p_value": 0.5})


def test_sets_of_different_sizes_are_named():
  with pytest.raises(ValueError, match=r"^disjoint must have shape that of training = \(2, 1\); got shape \(1, 1\)"):
    metrics.nearer_to_training(line(0.0), line(0.0, 1.0), line(0.0))
  with pytest.raises(ValueError, match="^disjoint must be finite"):
    metrics.nearer_to_training(line(0.0), line(0.0), line(jnp.inf))


def test_retrieving_every_image_has_a_chance_of_one_over_candidates_to_the_n():
  scores = metrics.retrieval(jnp.array([0.9, 0.8, 0.7]), jnp.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
  assert (scores["top1"], scores["hits"], scores["candidates"]) == (1.0, 3, 3)
  assert scores["chance"] == pytest.approx(1 / 3)
  assert scores["p_value"] == pytest.approx(1 / 3**3)


def test_groups_are_taken_in_order_and_what_is_left_over_is_not_used():
  # Groups (0.1, 0.2) and (0.95, 0.3); the 1.0 at the end belongs to neither. The first image is a hit, the second not.
  scores = metrics.retrieval(jnp.array([0.5, 0.9]), jnp.array([0.1, 0.2, 0.95, 0.3, 1.0]))
  assert (scores["hits"], scores["top1"]) == (1, 0.5)
  assert scores["p_value"] == pytest.approx(1 - (2 / 3) ** 2)  # one hit or two of two


def test_the_p_value_is_the_binomial_tail():
  training, distractors = np.arange(10) < 6, np.full(30, 0.5)  # 6 hits of 10 at 1/4
  scores = metrics.retrieval(training.astype(float), distractors)
  tail = sum(math.comb(10, hits) * 0.25**hits * 0.75 ** (10 - hits) for hits in range(6, 11))
  assert (scores["hits"], scores["p_value"]) == (6, pytest.approx(tail))


def test_ties_are_no_hits():
  scores = metrics.retrieval(jnp.ones(4), jnp.ones(8))
  assert scores == {"top1": 0.0, "chance": 1 / 3, "hits": 0, "candidates": 3, "p_value": 1.0}
  never_near = jnp.full(2, -jnp.inf)  # a class without generated samples
  assert metrics.retrieval(never_near, never_near)["hits"] == 0


def test_retrieval_seldom_raises_a_false_alarm():
  # Real images on a line, and one generated point that all scores of a run depend on.
  rng = np.random.default_rng(0)
  scores = -np.abs(rng.normal(size=(300, 48)) - rng.normal(size=(300, 1)))
  p_values = np.array([metrics.retrieval(run[:12], run[12:])["p_value"] for run in scores])
  for level in (0.05, 0.2):
    assert np.mean(p_values <= level) <= level + 3 * (level * (1 - level) / 300) ** 0.5


def test_scores_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match="^distractor_scores must hold at least one score per training score, 3; got 2"):
    metrics.retrieval(jnp.ones(3), jnp.ones(2))
  with pytest.raises(ValueError, match="^training_scores must hold at least one score"):
    metrics.retrieval(jnp.ones(0), jnp.ones(2))
  with pytest.raises(ValueError, match="^distractor_scores must not be NaN; got 1 of them"):
    metrics.retrieval(jnp.ones(1), jnp.array([0.0, jnp.nan]))
  with pytest.raises(ValueError, match=r"^training_scores must have shape \[n\]"):
    metrics.retrieval(jnp.ones((1, 1)), jnp.ones(2))
