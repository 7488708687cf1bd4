"""Microbatches change memory, not results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import losses
from kkt_jax.accumulation import microbatch_mean
from kkt_jax.conditions import weight_decay_conditions

WIDTH = 64


def network(params, x):
  return jnp.tanh(x @ params["hidden"]) @ params["out"]


def problem(num_samples):
  """Weights of a network, and a generator's noise and labels."""
  keys = jax.random.split(jax.random.key(0), 4)
  params = {"hidden": jax.random.normal(keys[0], (WIDTH, WIDTH)) / 8, "out": jax.random.normal(keys[1], (WIDTH, 3)) / 8}
  theta = jax.random.normal(keys[2], (2, WIDTH))
  return params, theta, (jax.random.normal(keys[3], (num_samples, 2)), jnp.arange(num_samples) % 3)


def residual(theta, params, batch, size):
  """The stationarity residual of samples that are generated microbatch by microbatch: not linear in their sum."""

  def mean(part):
    noise, y = part
    x = jnp.sin(noise @ theta)
    return losses.stationarity_sum(network, params, x, y, jax.nn.softmax(network(params, x)))

  sums = microbatch_mean(mean, batch, size=size)
  return losses.stationarity_residual(weight_decay_conditions(params), sums).relative


@pytest.mark.parametrize("size", [1, 4, 12])
def test_value_and_gradient_are_those_of_the_whole_batch(size):
  params, theta, batch = problem(12)
  whole = jax.value_and_grad(residual)(theta, params, batch, None)
  parts = jax.value_and_grad(residual)(theta, params, batch, size)
  np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
  np.testing.assert_allclose(parts[1], whole[1], rtol=1e-3, atol=1e-5 * float(jnp.abs(whole[1]).max()))


def test_memory_does_not_grow_with_the_batch():
  def working_memory(num_samples, size):
    params, theta, batch = problem(num_samples)
    step = jax.jit(jax.grad(residual), static_argnames="size")
    return step.lower(theta, params, batch, size=size).compile().memory_analysis().temp_size_in_bytes

  assert working_memory(4096, 64) < 1.1 * working_memory(256, 64)
  assert working_memory(4096, None) > 8 * working_memory(4096, 64)  # what it saves


def test_every_leaf_of_what_the_function_returns_is_a_mean():
  x = jnp.arange(6.0).reshape(6, 1)
  means = microbatch_mean(lambda part: {"mean": jnp.mean(part), "square": jnp.mean(part**2)}, x, size=2)
  assert float(means["mean"]) == pytest.approx(2.5)
  assert float(means["square"]) == pytest.approx(55 / 6)


@pytest.mark.parametrize("size", [0, 5])
def test_a_size_that_does_not_fit_is_named(size):
  with pytest.raises(ValueError, match=f"size must .*got {size}"):
    microbatch_mean(jnp.mean, jnp.ones((12, 1)), size=size)
