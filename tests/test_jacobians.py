"""Per-sample Jacobians: closed form, one gradient at a time, chunking, and what is refused."""

import chex
from example_networks import random_conv, random_like, random_mlp, to_float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.jacobians import per_sample_jacobians


def linear(w, x):
  return x @ w


class ClosedFormTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_two_layer_relu_network_by_hand(self):
    # h = ReLU([2, -1] * 3) = [6, 0]; logits = h @ [[1, 4], [2, 5]] = [6, 24].
    params = {"w1": jnp.array([[2.0, -1.0]]), "w2": jnp.array([[1.0, 4.0], [2.0, 5.0]])}
    network = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
    jacobians = self.variant(lambda p, x: per_sample_jacobians(network, p, x))(params, jnp.array([[3.0]]))
    # d logit_c / d w1_k = x * gate_k * w2_kc: 3 * 1 * [1, 4] for k = 0, closed gate for k = 1.
    np.testing.assert_allclose(jacobians["w1"], [[[[3.0, 0.0]], [[12.0, 0.0]]]])
    # d logit_c / d w2_kd = h_k [c = d].
    np.testing.assert_allclose(jacobians["w2"], [[[[6.0, 0.0], [0.0, 0.0]], [[0.0, 6.0], [0.0, 0.0]]]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_leaves_are_sample_by_class_by_parameter(self):
    classifier, x, _ = random_mlp(num_samples=4)
    jacobians = self.variant(lambda p, x: per_sample_jacobians(classifier.apply_fn, p, x))(classifier.params, x)
    chex.assert_trees_all_equal_structs(jacobians, classifier.params)
    expected = jax.tree.map(lambda p: (4, 3, *p.shape), classifier.params)
    shapes = jax.tree.map(jnp.shape, jacobians)
    assert shapes == expected

  @chex.variants(with_jit=True, without_jit=True)
  def test_each_entry_is_the_gradient_of_one_logit_of_one_sample(self):
    classifier, x, _ = random_conv(num_samples=3)
    jacobians = self.variant(lambda p, x: per_sample_jacobians(classifier.apply_fn, p, x))(classifier.params, x)
    for i, c in ((0, 0), (1, 2), (2, 1)):
      # The whole batch goes in: samples do not interact, so its i-th row must not notice.
      gradient = jax.grad(lambda p, i=i, c=c: classifier.apply_fn(p, x)[i, c])(classifier.params)
      chex.assert_trees_all_close(jax.tree.map(lambda j, i=i, c=c: j[i, c], jacobians), gradient, rtol=1e-4, atol=1e-5)


def test_agrees_with_finite_differences_along_a_direction():
  with jax.enable_x64(True):
    classifier, x, _ = random_mlp(num_samples=2)
    params, x = to_float64(classifier.params), to_float64(x)
    direction = random_like(params, seed=5)
    jacobians = per_sample_jacobians(classifier.apply_fn, params, x)
    along = sum(
      jnp.tensordot(j, v, axes=v.ndim)
      for j, v in zip(jax.tree.leaves(jacobians), jax.tree.leaves(direction), strict=True)
    )
    moved = lambda step: classifier.apply_fn(jax.tree.map(lambda p, v: p + step * v, params, direction), x)
    difference = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert float(jnp.min(jnp.abs(difference))) > 1e-3
    np.testing.assert_allclose(along, difference, rtol=1e-6, atol=1e-8)


def test_chunk_size_changes_nothing():
  classifier, x, _ = random_mlp(num_samples=7)

  @jax.jit
  def jacobians(p, x):
    sizes = (None, 1, 2, 3, 7, 100)  # 7 samples: divisors, non-divisors, more than there are
    return [per_sample_jacobians(classifier.apply_fn, p, x, chunk_size=size) for size in sizes]

  whole, *chunked = jacobians(classifier.params, x)
  for other in chunked:
    chex.assert_trees_all_close(other, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_below_one_is_refused(chunk_size):
  with pytest.raises(ValueError, match=r"^chunk_size must be at least 1"):
    per_sample_jacobians(linear, jnp.ones((2, 3)), jnp.ones((4, 2)), chunk_size=chunk_size)


def test_batch_of_one():
  jacobians = per_sample_jacobians(linear, jnp.ones((2, 2)), jnp.array([[5.0, 7.0]]), chunk_size=3)
  np.testing.assert_allclose(jacobians, [[[[5.0, 0.0], [7.0, 0.0]], [[0.0, 5.0], [0.0, 7.0]]]])


def test_duplicate_rows_have_equal_jacobians():
  classifier, x, _ = random_mlp(num_samples=2)
  jacobians = per_sample_jacobians(classifier.apply_fn, classifier.params, jnp.stack([x[0], x[1], x[0]]))
  chex.assert_trees_all_close(jax.tree.map(lambda j: j[0], jacobians), jax.tree.map(lambda j: j[2], jacobians))
  assert not np.allclose(jacobians["Dense_2"]["kernel"][0], jacobians["Dense_2"]["kernel"][1])


@pytest.mark.parametrize("relaxed", [None, 30.0])
def test_relaxed_gates_reach_the_jacobians(relaxed):
  classifier, x, _ = random_mlp(gate_sharpness=relaxed)
  exact, _, _ = random_mlp()
  jacobians = per_sample_jacobians(classifier.gradient_fn, classifier.params, x)["Dense_0"]["kernel"]
  reference = per_sample_jacobians(exact.apply_fn, exact.params, x)["Dense_0"]["kernel"]
  assert np.allclose(jacobians, reference, atol=1e-6) == (relaxed is None)


def test_batch_norm_on_batch_statistics_is_refused_and_the_route_is_named():
  coupled, x, _ = random_mlp(batch_norm=True)
  with pytest.raises(ValueError, match=r"^apply_fn must treat .*stationarity_sum\(\.\.\., route='vjp'\)"):
    per_sample_jacobians(coupled.apply_fn, coupled.params, x)


def test_batch_norm_on_batch_statistics_is_refused_for_one_sample():
  coupled, x, _ = random_mlp(batch_norm=True)
  with pytest.raises(ValueError, match=r"^apply_fn must treat"):
    per_sample_jacobians(coupled.apply_fn, coupled.params, x[:1], chunk_size=1)


def test_batch_norm_on_stored_statistics_is_welcome():
  coupled, x, _ = random_mlp(batch_norm=True)
  jacobians = per_sample_jacobians(coupled.predict_fn, coupled.params, x)
  gradient = jax.grad(lambda p: coupled.predict_fn(p, x)[4, 1])(coupled.params)
  chex.assert_trees_all_close(jax.tree.map(lambda j: j[4, 1], jacobians), gradient, rtol=1e-4, atol=1e-5)


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
