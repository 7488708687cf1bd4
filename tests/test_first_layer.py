"""Moments of the data read off a first batch norm, against the moments themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.first_layer import input_moments


def layer(width=64, seed=0):
  x = jax.random.normal(jax.random.key(seed), (50, 3)) @ jnp.array([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 0.3]])
  x = x + jnp.array([[1.0, -2.0, 5.0]])
  kernel = jax.random.normal(jax.random.key(seed + 1), (3, width))
  bias = jax.random.normal(jax.random.key(seed + 2), (width,))
  return x, kernel, bias, x @ kernel + bias[None]


def test_moments_are_those_of_the_data():
  x, kernel, bias, outputs = layer()
  mean, covariance = input_moments(kernel, bias, outputs.mean(0), outputs.var(0))
  np.testing.assert_allclose(mean, x.mean(0), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(covariance, np.cov(np.asarray(x).T, bias=True), rtol=1e-2, atol=1e-2)


def test_data_on_a_line_give_a_covariance_that_still_has_a_cholesky_factor():
  x = jnp.linspace(-1.0, 1.0, 9)[:, None] * jnp.array([[1.0, 2.0]])
  kernel = jax.random.normal(jax.random.key(0), (2, 10))
  outputs = x @ kernel
  _, covariance = input_moments(kernel, jnp.zeros(10), outputs.mean(0), outputs.var(0))
  assert bool(jnp.all(jnp.isfinite(jnp.linalg.cholesky(covariance))))


def test_a_layer_too_narrow_for_the_covariance_is_named():
  _, kernel, bias, outputs = layer(width=5)
  with pytest.raises(ValueError, match="kernel must have at least .* 6 outputs for D = 3; got 5"):
    input_moments(kernel, bias, outputs.mean(0), outputs.var(0))


def test_statistics_of_another_layer_are_named():
  _, kernel, bias, outputs = layer()
  with pytest.raises(ValueError, match="var must have shape"):
    input_moments(kernel, bias, outputs.mean(0), jnp.ones(3))
