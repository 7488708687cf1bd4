"""Relaxed gates in any network: the values stay, and the derivatives are those of the library's own relaxed modules."""

from example_networks import inputs, random_conv, random_like, random_mlp
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import networks
from kkt_jax.relaxation import relax_gates

SHARPNESS = 3.0


@pytest.mark.parametrize("build", [random_mlp, random_conv])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_derivatives_are_those_of_a_module_with_relaxed_gates(build, batch_norm):
  exact, x, _ = build(batch_norm=batch_norm)
  expected = build(batch_norm=batch_norm, gate_sharpness=SHARPNESS)[0].gradient_fn
  relaxed = relax_gates(exact.apply_fn, SHARPNESS)
  weights = jnp.arange(1.0, 4.0)
  gradients = [
    jax.jit(jax.grad(lambda p, fn=fn: jnp.sum(fn(p, x) @ weights)))(exact.params)
    for fn in (relaxed, expected, exact.apply_fn)
  ]
  np.testing.assert_allclose(relaxed(exact.params, x), exact.apply_fn(exact.params, x), rtol=1e-5, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients[0], gradients[1])
  largest = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradients[0], gradients[2])))
  assert largest > 1e-2  # it does something


def test_gates_have_a_second_derivative():
  relaxed = relax_gates(lambda w, x: nn.relu(w * x), SHARPNESS)
  second = jax.grad(jax.grad(lambda w: relaxed(w, jnp.ones(()))))(0.1)
  gate = jax.nn.sigmoid(SHARPNESS * 0.1)
  assert float(second) == pytest.approx(float(SHARPNESS * gate * (1 - gate)), rel=1e-5)


def test_other_custom_derivatives_are_left_alone():
  module = nn.Dense(3)
  x = inputs(4, 2)
  params = random_like(jax.eval_shape(module.init, jax.random.key(0), x)["params"], 0)
  for activation in (jax.nn.silu, jax.nn.gelu, jax.nn.relu6, jax.nn.logsumexp):
    apply = lambda p, x, activation=activation: activation(module.apply({"params": p}, x))
    for exact, relaxed in zip(
      *(
        jax.tree.leaves(jax.grad(lambda p, fn=fn: jnp.sum(fn(p, x)))(params)) for fn in (apply, relax_gates(apply, 1e4))
      ),
      strict=True,
    ):
      np.testing.assert_allclose(relaxed, exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.LayerNorm(), nn.BatchNorm(use_running_average=False), nn.GroupNorm(num_groups=1)])
def test_small_variances_of_normalisations_keep_their_derivative(norm):
  x = 1e-3 * inputs(5, 4)  # a gate of sharpness 20 would be half open
  variables = norm.init(jax.random.key(0), x)
  weights = inputs(5, 4, seed=1)
  total = lambda fn: jax.grad(lambda x: jnp.sum(fn(variables, x) * weights))(x)
  apply = lambda p, x: norm.apply(p, x, mutable=["batch_stats"])[0]
  expected = total(apply)
  assert float(jnp.abs(expected).max()) > 1
  np.testing.assert_allclose(total(relax_gates(apply, 20.0)), expected, rtol=1e-5, atol=1e-3)


def test_a_jitted_function_is_looked_into():
  inside = jax.jit(lambda w, x: jnp.maximum(0.0, w * x))
  assert float(jax.grad(lambda w: relax_gates(inside, 20.0)(w, jnp.ones(())))(0.0)) == 0.5


def test_sharpness_must_be_positive():
  with pytest.raises(ValueError, match="sharpness must be positive"):
    relax_gates(networks.relaxed_relu, 0.0)
