"""Samples that somebody makes: every one has a name, and labels and names are one for each."""

import jax.numpy as jnp
import numpy as np
import pytest

import kkt_jax
from kkt_jax.auditing import data, membership, Samples
from kkt_jax.auditing.samples import given_samples

X, Y = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), np.arange(6, dtype=np.int32) % 2


def test_samples_without_names_are_named_by_their_places():
  own = Samples(X, Y)
  assert own.names == tuple(f"sample {place}" for place in range(6))
  assert own.only(np.array([4, 1])).names == ("sample 4", "sample 1")
  assert Samples(X, Y, tuple("abcdef")).only(np.array([2])).names == ("c",)


@pytest.mark.parametrize(
  ("y", "names", "said"), [(Y[:5], (), "y must be one for each of 6"), (Y, ("a",), "names must")]
)
def test_labels_and_names_that_are_not_one_for_each_are_refused(y, names, said):
  with pytest.raises(ValueError, match=said):
    Samples(X, y, names)


def linear(labels=None):
  return kkt_jax.make_classifier(lambda w, x: x @ w, jnp.ones((4, 2)), (4,), labels=labels)


def test_labels_are_the_classifier_s_own():
  own = linear(labels=(8, 3))
  np.testing.assert_array_equal(
    Samples.of("train", own, np.abs(X) / 4, np.array([3, 8, 8, 3, 3, 8])).y, [1, 0, 0, 1, 1, 0]
  )
  with pytest.raises(ValueError, match=r"^train: labels must be among the classifier's, \(8, 3\); got 0 to 1"):
    Samples.of("train", own, np.abs(X) / 4, Y)


@pytest.mark.parametrize(
  ("x", "y", "said"),
  [
    (255 * np.ones((6, 4), np.float32), Y, "^train: x of Samples must be finite and lie in"),
    (np.full((6, 4), np.nan, np.float32), Y, "^train: x of Samples must be finite"),
    (np.ones((6, 4), np.uint8), Y, "^train: x must be floating point, .* got uint8"),
    (np.ones((6, 5), np.float32), Y, r"^train: x must be floating point, .* got float32 of shape \(6, 5\)"),
    (np.ones((6, 4), np.float32), Y + 1, "^train: y of Samples must be classes, from 0 to 1"),
  ],
)
def test_samples_that_somebody_made_otherwise_are_refused(x, y, said):
  with pytest.raises(ValueError, match=said):
    kkt_jax.audit(random_linear(), Samples(x, y))


@pytest.mark.parametrize("given", [(X, Y, Y), [X, Y], {"x": X, "y": Y}, X])
def test_what_is_no_pair_is_refused(given):
  with pytest.raises(ValueError, match="^train must be Samples or a pair of x and y"):
    kkt_jax.audit(random_linear(), given)


def test_lists_of_other_lengths_are_refused_and_bfloat16_is_taken():
  with pytest.raises(ValueError, match="^train: x must be one array"):
    Samples.of("train", linear(), [[1.0, 2.0], [3.0]], [0, 1])
  taken = Samples.of("train", linear(), jnp.full((6, 4), 0.5, jnp.bfloat16), Y)
  np.testing.assert_array_equal(taken.x, np.full((6, 4), 0.5, np.float32))


def random_linear():
  return kkt_jax.make_classifier(lambda w, x: x @ w, jnp.asarray(X[:4, :2]), (4,))


def test_repeated_samples_without_names_are_told_by_their_places():
  own = kkt_jax.make_classifier(lambda w, x: x @ w, jnp.ones((4, 2)), (4,), value_range=None)
  twice = Samples(np.concatenate([X, X[:1]]), np.concatenate([Y, Y[:1]]))
  assert "(sample 6 repeats sample 0)" in data.compared(own, twice, None).remarks[0]


def test_candidates_without_names_are_not_passed_over():
  random = np.random.default_rng(0)
  x, y = random.normal(size=(90, 60)).astype(np.float32), np.arange(90, dtype=np.int32) % 3
  kernel = 1e-3 * x[:30].T @ (np.eye(3)[y[:30]] - 1 / 3)  # a sum over the first 30
  own = kkt_jax.make_classifier(lambda w, x: x @ w, jnp.asarray(kernel, jnp.float32), (60,), value_range=None)
  asked = Samples(x[:40], y[:40])
  risks = membership.suspects(kkt_jax.examine(own, form="weight_decay"), asked, Samples(x[40:], y[40:]))
  members = {f"sample {place}" for place in range(30)}
  assert len(members & {own.name for own in risks if own.q_value < 0.06}) >= 25


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_false_discoveries_stay_below_the_stated_rate(share):
  """200 audits of 200 candidates by two scores, one of which says nothing; members' other score is higher by 3."""
  random, false, found = np.random.default_rng(0), [], []
  members = np.arange(200) < 200 * share
  for _ in range(200):
    asked, others = random.normal(size=(2, 200)), random.normal(size=(2, 500))
    asked[0] += 3 * members
    values = {name: (asked[place], others[place]) for place, name in enumerate(("multipliers", "loss"))}
    risks = membership.risks(Samples(np.zeros((200, 1)), np.zeros(200, int)), values)
    named = np.array([int(own.name.split()[1]) for own in risks if own.q_value <= 0.05], int)
    false.append(np.mean(~members[named]) if named.size else 0)
    found.append(np.mean(np.isin(np.flatnonzero(members), named)))
  assert np.mean(false) <= 0.05 and np.mean(found) > (0.15 if share < 0.2 else 0.6)


def test_no_samples_and_numbers_beyond_float32_are_refused_and_lists_are_taken():
  own = kkt_jax.make_classifier(lambda w, x: x @ w, jnp.ones((4, 2)), (4,), value_range=None)
  for given in (np.zeros((0, 4)), (np.zeros((0, 4)), np.zeros(0, int))):
    with pytest.raises(ValueError, match=r"^candidates: x must hold at least one sample; got shape \(0, 4\)"):
      given_samples("candidates", own, given)
  with pytest.raises(ValueError, match="^train: x must be floating point and finite"):
    given_samples("train", own, (np.full((1, 4), 1e300), [0]))
  assert given_samples("train", own, Samples([[0.5] * 4], [1])).x.shape == (1, 4)
