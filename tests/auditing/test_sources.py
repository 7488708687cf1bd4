"""Data of two sources are told apart without any weights, data of one are not, and no verdict comes of the former."""

import io

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from sklearn.datasets import load_digits

import kkt_jax
from kkt_jax.auditing import data, membership, sources, verdict
from kkt_jax.auditing.samples import Samples
from kkt_jax.criteria import AuditCriteria


def images(seed, count, shares=(1, 1, 1)):
  """Bright strokes on black, stored in bytes, of three classes."""
  random, y = np.random.default_rng(seed), np.arange(count, dtype=np.int32) % len(shares)
  x = np.zeros((count, 12, 12, 1), np.float32)
  for image, label in zip(x, y, strict=True):
    row, column = random.integers(2, 9, 2)
    image[row : row + 2, 2 : 6 + label * 2] = random.uniform(0.5, 1)
    image[2:10, column] = random.uniform(0.5, 1)
  return Samples(np.round(255 * x) / 255, y)


def compressed(x):
  again = []
  for image in x:
    content = io.BytesIO()
    Image.fromarray((255 * image[..., 0]).astype(np.uint8)).save(content, "JPEG", quality=90)
    again.append(np.asarray(Image.open(content), np.float32)[..., None] / 255)
  return np.stack(again)


CHANGES = {
  "moved by a pixel": lambda x: np.roll(x, 1, 1),
  "compressed again": compressed,
  "darker": lambda x: 0.95 * x,
  "noisy": lambda x: np.clip(x + 0.02 * np.random.default_rng(0).normal(size=x.shape), 0, 1).astype(np.float32),
  "inverted": lambda x: 1 - x,
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_of_another_source_are_told_and_named_as_a_limit(change):
  train, other = images(0, 60), images(1, 240)
  held_out = Samples(CHANGES[change](other.x), other.y)
  assert sources.p_value(train, held_out) < 0.01
  (said,) = (own for own in membership.limits(train, held_out) if isinstance(own, membership.Confounded))
  assert "without any weights (p = 0.00" in said


def test_data_of_one_source_are_told_no_more_often_than_the_p_value_says():
  few = AuditCriteria(shuffles=199)
  found = np.array([sources.p_value(images(2 * seed, 45), images(2 * seed + 1, 60), few) for seed in range(100, 125)])
  # Of 25 at most 1.25 below .05 in the mean, 5 or more by luck with probability .007
  assert np.sum(found < 0.05) <= 4 and np.sum(found < 0.01) == 0 and found.max() <= 1


def test_other_shares_of_the_classes_are_no_difference_within_them_but_a_limit_of_their_own():
  every = images(3, 300)
  kept = (every.y > 0) | (np.arange(300) < 60)
  other = Samples(every.x[kept], every.y[kept])
  assert sources.p_value(images(5, 90), other) > 0.01
  said = membership.limits(images(5, 90), other)
  assert said[-1] == "The classes have other proportions in the held-out data, by which scores may differ, too."
  assert not any(isinstance(own, membership.Confounded) for own in said)


def test_vectors_and_constant_values_are_compared_as_well():
  random, y = np.random.default_rng(0), np.arange(80, dtype=np.int32) % 2
  x = random.normal(size=(80, 5)).astype(np.float32)
  x[:, 0] = 1.0
  first, second = Samples(x[:40], y[:40]), Samples(x[40:], y[40:])
  assert sources.p_value(first, second) > 0.01
  assert sources.p_value(first, Samples(second.x + 1, second.y)) < 0.01


def test_digits_held_out_by_order_are_other_writers():
  """`sklearn.datasets.load_digits` has writers one after the other (findings/sklearn_digits_in_order.sh)."""
  x, y = load_digits(return_X_y=True)
  digits = Samples((x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y.astype(np.int32))
  parts = lambda order: [Samples(digits.x[rows], digits.y[rows]) for rows in (order[:100], order[100:600])]
  assert sources.p_value(*parts(np.arange(600))) < 0.01
  assert sources.p_value(*parts(np.random.default_rng(0).permutation(600))) > 0.05


def test_nobody_is_accused_by_data_that_differ_without_the_weights():
  limit = membership.Confounded("They differ.")
  for level in ("leak", "member", "class"):
    own = verdict.Verdict(level, "These weights tell.", ["Much.", limit])
    found = verdict.with_limits(own, ["Few.", limit])
    assert (found.level, found.reasons[0]) == ("open", limit) and found.answer.startswith(
      "No verdict: the held-out data"
    )
    assert (
      "Without this limit the verdict would be: These weights tell. Much." in str(found)
      and str(found).count(limit) == 1
    )
    assert verdict.with_limits(own, ["Few."]) == own
    proven = verdict.with_limits(own, [limit], certified=True)
    assert (proven.level, proven.answer, proven.reasons[0]) == (level, own.answer, limit)
  nothing = verdict.Verdict("none", "No evidence.", [])
  assert verdict.with_limits(nothing, [limit]) == nothing


def test_the_limit_comes_with_the_data():
  train, other = images(0, 60), images(1, 240)
  own = kkt_jax.make_classifier(lambda w, x: x.reshape(len(x), -1) @ w, jnp.ones((144, 3)), (12, 12, 1))
  sets = Samples.of("train", own, train.x, train.y), Samples.of("held_out", own, np.roll(other.x, 1, 2), other.y)
  remarks = data.compared(own, *sets).remarks
  assert any(isinstance(remark, membership.Confounded) for remark in remarks)
