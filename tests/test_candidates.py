"""Scores of given candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import candidates
from kkt_jax.classifier import make_classifier


def with_kinks_on(x, number=60, seed=0):
  """A classifier whose first layer's kinks go through one of the samples each, and a share of 1 / N through each."""
  random = np.random.default_rng(seed)
  kernel = random.normal(size=(x.shape[1], number)).astype(np.float32)
  bias = -np.sum(x[np.arange(number) % len(x)].T * kernel, axis=0)
  params = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias), "last": jnp.ones((number, 2))}

  def apply_fn(params, x):
    return jax.nn.relu(x @ params["kernel"] + params["bias"][None]) @ params["last"]

  return make_classifier(apply_fn, params, (x.shape[1],))


def test_those_on_kinks_are_told_from_others():
  random = np.random.default_rng(1)
  own, others = random.normal(size=(2, 20, 5)).astype(np.float32)
  shares = candidates.hinge_shares(with_kinks_on(own), np.concatenate([own, others]))
  np.testing.assert_allclose(shares[:20], 1 / 20, atol=0.04)
  assert shares[:20].min() > shares[20:].max()


def test_it_needs_gates_two_candidates_and_a_distance():
  x = np.zeros((3, 5), np.float32)
  linear = make_classifier(lambda w, x: x @ w, jnp.ones((5, 2)), (5,))
  with pytest.raises(ValueError, match="must have gates such as ReLU"):
    candidates.hinge_shares(linear, x)
  own = with_kinks_on(x[:1] + 1)
  with pytest.raises(ValueError, match="number of candidates must be at least 2; got 1"):
    candidates.hinge_shares(own, x[:1])
  with pytest.raises(ValueError, match="within must be"):
    candidates.hinge_shares(own, x, within=0.0)
  with pytest.raises(ValueError, match="input_shape"):
    candidates.hinge_shares(own, x[:, :4])
