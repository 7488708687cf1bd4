"""Scores of given candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kkt_jax
from kkt_jax.classifiers import make_classifier
from kkt_jax.kkt import weight_decay_conditions
from kkt_jax.membership import candidates
from kkt_jax.metrics import roc


def with_kinks_on(x, number=60, seed=0):
  """A classifier whose first layer's kinks go through one of the samples each, and a share of 1 / N through each."""
  random = np.random.default_rng(seed)
  kernel = random.normal(size=(x.shape[1], number)).astype(np.float32)
  bias = -np.sum(x[np.arange(number) % len(x)].T * kernel, axis=0)
  params = {
    "kernel": jnp.asarray(kernel),
    "bias": jnp.asarray(bias),
    "last": jnp.asarray(random.normal(size=(number, 2)), jnp.float32),
  }

  def apply_fn(params, x):
    return jax.nn.relu(x @ params["kernel"] + params["bias"][None]) @ params["last"]

  return make_classifier(apply_fn, params, (x.shape[1],))


def test_those_on_kinks_are_told_from_others():
  random = np.random.default_rng(1)
  own, others = random.normal(size=(2, 20, 5)).astype(np.float32)
  shares = candidates.boundary_fractions(with_kinks_on(own), np.concatenate([own, others]))
  np.testing.assert_allclose(shares[:20], 1 / 20, atol=0.04)
  assert shares[:20].min() > shares[20:].max()


def test_boundaries_that_were_moved_count_and_those_of_other_layers_do_not():
  random = np.random.default_rng(3)
  own, others = random.normal(size=(30, 20)).astype(np.float32), random.normal(size=(120, 20)).astype(np.float32)
  moved, x = with_kinks_on(own, number=120), np.concatenate([own, others])
  many = jnp.asarray(random.normal(size=(20, 4000)), jnp.float32)  # a layer of boundaries that lie anywhere

  def apply_fn(params, x):
    return moved.predict_fn(params, x) + jnp.sum(jax.nn.relu(x @ many), axis=1, keepdims=True)

  beside = make_classifier(apply_fn, moved.params, (20,))
  alone, found = (candidates.boundary_scores(each, x) for each in (moved, beside))
  assert alone.shape == (150,) and min(alone[:30]) > max(alone[30:])
  assert roc(found[:30], found[30:]).auc > 0.99
  with pytest.raises(ValueError, match="must have gates such as ReLU"):
    candidates.boundary_scores(make_classifier(lambda w, x: x @ w, jnp.ones((20, 2)), (20,)), x)


def test_of_many_gates_some_are_counted_in_blocks_of_candidates(monkeypatch):
  random = np.random.default_rng(1)
  own, others = random.normal(size=(2, 20, 5)).astype(np.float32)
  classifier, both = with_kinks_on(own), np.concatenate([own, others])
  whole = candidates.boundary_fractions(classifier, both)
  monkeypatch.setattr(candidates, "_BLOCK", 16)
  monkeypatch.setattr(candidates, "_ARGUMENTS", whole.size * 30)
  half = candidates.boundary_fractions(classifier, both)  # of the gates 0, 2, 4, ..., which lie on samples 0, 2, 4, ...
  np.testing.assert_allclose(half[0:20:2], 1 / 10, atol=0.05)
  assert half[1:20:2].max() < half[0:20:2].min()


def test_boundaries_are_the_same_in_what_is_checkpointed_and_left_out_where_all_gates_are_in_a_loop():
  random = np.random.default_rng(2)
  plain, x = with_kinks_on(random.normal(size=(6, 5)).astype(np.float32)), random.normal(size=(9, 5))
  scores = lambda function: candidates.scores(kkt_jax.examine(make_classifier(function, plain.params, (5,))), x)
  expected = scores(plain.apply_fn)
  checkpointed = scores(jax.checkpoint(plain.apply_fn))
  assert list(checkpointed) == list(expected)
  np.testing.assert_allclose(checkpointed["boundaries"], expected["boundaries"], rtol=1e-6)
  one_by_one = scores(lambda p, x: jax.lax.map(lambda row: plain.apply_fn(p, row[None])[0], x))
  assert list(one_by_one) == [name for name in expected if name not in ("boundaries", "together")]
  np.testing.assert_allclose(one_by_one["multipliers"], expected["multipliers"], rtol=1e-4, atol=1e-6)


def test_it_needs_gates_two_candidates_and_a_distance():
  x = np.zeros((3, 5), np.float32)
  linear = make_classifier(lambda w, x: x @ w, jnp.ones((5, 2)), (5,))
  with pytest.raises(ValueError, match="must have gates such as ReLU"):
    candidates.boundary_fractions(linear, x)
  own = with_kinks_on(x[:1] + 1)
  with pytest.raises(ValueError, match="number of candidates must be at least 2; got 1"):
    candidates.boundary_fractions(own, x[:1])
  with pytest.raises(ValueError, match="within must be"):
    candidates.boundary_fractions(own, x, within=0.0)
  with pytest.raises(ValueError, match="input_shape"):
    candidates.boundary_fractions(own, x[:, :4])


def a_sum_over(x, classes, number):
  """A linear classifier whose weights are what weight decay makes of the samples, at about equal probabilities."""
  kernel = x.T @ (np.eye(3)[classes] - 1 / 3) / len(x)
  kernel = np.concatenate([1e-3 * kernel, np.zeros((number - len(kernel), 3))]).astype(np.float32)
  return make_classifier(lambda w, x: x @ w, jnp.asarray(kernel), (number,))


@pytest.fixture(name="members")
def fixture_members():
  random = np.random.default_rng(2)
  x, classes = random.normal(size=(30, 40)).astype(np.float32), np.arange(30) % 3
  return a_sum_over(x[:12], classes[:12], 40), x, classes


def test_multipliers_are_those_of_the_samples_that_the_weights_are_made_of(members):
  classifier, x, classes = members
  conditions = weight_decay_conditions(classifier.params)
  found = candidates.multipliers(classifier, conditions, x, classes)
  length = np.linalg.norm(x, axis=1)  # of a gradient, but for a factor that all share
  assert np.ptp(found[:12] / length[:12]) < 1e-3 * found[:12].max()
  assert found[12:].max() < 1e-3 * found[:12].min()
  np.testing.assert_allclose(
    candidates.multipliers(classifier, conditions, x, classes, chunk_size=7), found, atol=1e-5 * found.max()
  )
  with pytest.raises(ValueError, match="labels must be among the classifier's"):
    candidates.multipliers(classifier, conditions, x, classes + 1)
  with pytest.raises(ValueError, match="chunk_size must be at least 1"):
    candidates.multipliers(classifier, conditions, x, classes, chunk_size=0)


def test_tensors_that_the_sum_does_not_explain_count_less_if_they_are_weighed(members):
  """A second kernel is 30 times as large, and nothing but noise."""
  classifier, x, classes = members
  noise = jnp.asarray(np.random.default_rng(4).normal(size=(40, 3)), jnp.float32)
  params = {"good": classifier.params, "bad": noise * 30 * jnp.abs(classifier.params).max()}
  both = make_classifier(lambda w, x: x @ w["good"] + 0.1 * x @ w["bad"], params, (40,))
  conditions = weight_decay_conditions(params)
  plain, weighed = (candidates.multipliers(both, conditions, x, classes, weighed=own) for own in (False, True))
  assert weighed[:12].min() > weighed[12:].max()
  assert plain[:12].min() < plain[12:].max()
  few = candidates.multipliers(both, conditions, x, classes, weighed=True, chunk_size=5)
  np.testing.assert_allclose(few, weighed, rtol=1e-3, atol=1e-5)


def test_all_scores_that_a_classifier_allows(members):
  classifier, x, classes = members
  examination = kkt_jax.examine(classifier, form="weight_decay")
  found = candidates.scores(examination, x, classes)
  assert list(found) == ["multipliers", "loss"]  # no gates, no margin that is common
  assert found["multipliers"][:12].min() > found["multipliers"][12:].max()
  guessed = candidates.scores(examination, x)  # labels as the classifier has them
  assert guessed["loss"].min() >= found["loss"].min()
  random = np.random.default_rng(1)
  relu = with_kinks_on(random.normal(size=(6, 5)).astype(np.float32))
  names = candidates.scores(kkt_jax.examine(relu, form="max_margin"), random.normal(size=(4, 5)).astype(np.float32))
  assert list(names) == ["multipliers", "boundaries", "margin", "together", "loss"]
