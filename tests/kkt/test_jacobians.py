"""Per-sample Jacobians: closed form, one gradient at a time, chunking, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.kkt import per_sample_jacobians


def linear(w, x):
  return x @ w


def random(*shape):
  return jnp.asarray(np.random.default_rng(shape).standard_normal(shape))


def network(p, x):
  """A convolution, ReLU, and a linear layer."""
  h = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  return jax.nn.relu(h + p["bias"][None, None, None]).reshape(len(x), -1) @ p["last"]


def example(num_samples):
  params = {"conv": random(2, 2, 1, 2), "bias": random(2), "last": random(18, 3)}
  return params, random(num_samples, 3, 3, 1)


def coupled(w, x):
  """Batch norm on batch statistics."""
  h = x @ w
  return (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5)


def test_two_layer_relu_network_by_hand():
  # h = ReLU([2, -1] * 3) = [6, 0]; logits = h @ [[1, 4], [2, 5]] = [6, 24].
  params = {"w1": jnp.array([[2.0, -1.0]]), "w2": jnp.array([[1.0, 4.0], [2.0, 5.0]])}
  jacobians = per_sample_jacobians(lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"], params, jnp.array([[3.0]]))
  # d logit_c / d w1_k = x * gate_k * w2_kc: 3 * 1 * [1, 4] for k = 0, closed gate for k = 1.
  np.testing.assert_allclose(jacobians["w1"], [[[[3.0, 0.0]], [[12.0, 0.0]]]])
  # d logit_c / d w2_kd = h_k [c = d].
  np.testing.assert_allclose(jacobians["w2"], [[[[6.0, 0.0], [0.0, 0.0]], [[0.0, 6.0], [0.0, 0.0]]]])


def test_each_entry_is_the_gradient_of_one_logit_of_one_sample():
  params, x = example(4)
  jacobians = per_sample_jacobians(network, params, x)
  assert jax.tree.map(jnp.shape, jacobians) == jax.tree.map(lambda p: (4, 3, *p.shape), params)
  gradient = jax.jit(jax.grad(lambda p, x, i, c: network(p, x)[i, c]))
  for i, c in ((0, 0), (1, 2), (3, 1)):
    # The whole batch goes in: samples do not interact, so its i-th row must not notice.
    own = jax.tree.map(lambda j, i=i, c=c: j[i, c], jacobians)
    chex.assert_trees_all_close(own, gradient(params, x, i, c), rtol=1e-4, atol=1e-5)


def test_agrees_with_finite_differences_along_a_direction():
  with jax.enable_x64(True):
    params, x = example(2)
    direction = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=float)).reshape(p.shape), params)
    jacobians = per_sample_jacobians(network, params, x)
    along = sum(jax.tree.leaves(jax.tree.map(lambda j, v: jnp.tensordot(j, v, axes=v.ndim), jacobians, direction)))
    moved = lambda step: network(jax.tree.map(lambda p, v: p + step * v, params, direction), x)
    difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert float(jnp.min(jnp.abs(difference))) > 1e-3
    np.testing.assert_allclose(along, difference, rtol=1e-6, atol=1e-8)


def test_chunk_size_changes_nothing():
  params, x = example(7)

  @jax.jit
  def jacobians(p, x):
    sizes = (None, 1, 2, 7, 100)  # 7 samples: divisors, non-divisors, more than there are
    return [per_sample_jacobians(network, p, x, chunk_size=size) for size in sizes]

  whole, *chunked = jacobians(params, x)
  for other in chunked:
    chex.assert_trees_all_close(other, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_below_one_is_refused(chunk_size):
  with pytest.raises(ValueError, match=r"^chunk_size must be at least 1"):
    per_sample_jacobians(linear, jnp.ones((2, 3)), jnp.ones((4, 2)), chunk_size=chunk_size)


def test_batch_of_one():
  jacobians = per_sample_jacobians(linear, jnp.ones((2, 2)), jnp.array([[5.0, 7.0]]), chunk_size=3)
  np.testing.assert_allclose(jacobians, [[[[5.0, 0.0], [7.0, 0.0]], [[0.0, 5.0], [0.0, 7.0]]]])


def test_only_the_derivatives_of_the_given_function_count():
  double = jax.custom_jvp(lambda h: h)
  double.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))  # as relaxed gates have others
  jacobians = per_sample_jacobians(lambda w, x: double(x @ w), jnp.ones((1, 1)), jnp.array([[5.0]]))
  np.testing.assert_allclose(jacobians, [[[[10.0]]]])


@pytest.mark.parametrize("num_samples", [1, 5])
def test_batch_norm_on_batch_statistics_is_refused_and_the_route_is_named(num_samples):
  with pytest.raises(ValueError, match=r"^apply_fn must treat .*stationarity_sum, which"):
    per_sample_jacobians(coupled, random(2, 3), random(num_samples, 2), chunk_size=1)
  jax.jit(lambda w, x: per_sample_jacobians(coupled, w, x))(random(2, 3), random(num_samples, 2))  # cannot be noticed


@pytest.mark.parametrize(
  ("x", "needs"),
  [
    (jnp.ones(2), r"a batch of shape \[M, \.\.\.\]; got shape \(2,\)"),
    (jnp.ones((0, 2)), r"at least one sample; got shape \(0, 2\)"),
    (jnp.ones((3, 2), int), "floating point; got dtype int"),
  ],
  ids=["no_batch", "empty", "integers"],
)
def test_inputs_that_are_no_batch_of_floats_are_refused(x, needs):
  with pytest.raises(ValueError, match=f"^x must .*{needs}"):
    per_sample_jacobians(linear, jnp.ones((2, 3)), x)
