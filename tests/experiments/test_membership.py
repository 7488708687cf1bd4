"""Membership inference with and without shadow models, on drawn numbers and on tiny models."""

import chex
import numpy as np
import pytest

from experiments import membership
from kkt_jax.metrics import roc


def test_models_in_a_row_share_the_pool_out_among_them():
  rows = membership.memberships(np.random.default_rng(0), [12, 6], models=7, parts=3)
  chex.assert_shape(rows, (7, 18))
  np.testing.assert_array_equal(rows[:3].sum(axis=0), 1)
  np.testing.assert_array_equal(rows[3:6].sum(axis=0), 1)
  assert all((row[:12].sum(), row[12:].sum()) == (4, 2) for row in rows)


@pytest.mark.parametrize("gap", [0.0, 3.0])
def test_peers_tell_members_where_training_raises_odds_and_only_there(gap):
  random = np.random.default_rng(1)
  members = np.concatenate([membership.memberships(random, [3000], models, parts=6) for models in (1, 24)])
  hard = 2 * random.normal(size=3000)  # how hard a candidate is, which the loss alone cannot take away
  odds = hard + gap * members + random.normal(size=members.shape)
  scores = membership.peers(odds[0], odds[1:], members[1:])
  chex.assert_tree_shape_prefix(scores, (3000,))
  assert set(scores) == {f"{name} {how}" for name in ("LiRA", "RMIA") for how in ("online", "offline")}
  areas = {name: roc(own[members[0]], own[~members[0]]).auc for name, own in scores.items()}
  if not gap:
    assert all(abs(area - 0.5) < 0.05 for area in areas.values()), areas
    return
  naive = roc(odds[0][members[0]], odds[0][~members[0]]).auc
  assert all(area > naive for area in areas.values()) and min(areas["LiRA online"], areas["LiRA offline"]) > 0.95


@pytest.mark.slow
def test_a_tiny_comparison_has_a_row_for_every_score(tmp_path):
  settings = {"samples_per_class": 2, "parts": 3, "targets": 2, "shadows": 16, "steps": 60}
  rows = membership.run(membership.Config(**settings), tmp_path)["rows"]
  assert {"multipliers", "loss", "LiRA online, 16", "RMIA offline, 16"} <= set(rows)
  assert all(len(row["AUC"]) == 2 and all(0 <= count <= 20 for count in row["at 0 %"]) for row in rows.values())
