"""Relaxed gates in any network: the values stay, and the derivative at x is the sigmoid's mix of both slopes."""

from example_networks import inputs, random_conv, random_mlp
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from kkt_jax.classifiers import make_classifier, Subject
from kkt_jax.classifiers.relaxation import (
  computed_in,
  gates,
  given_gates,
  pre_activations,
  relax_gates,
  relaxed,
  relaxed_relu,
)

SHARPNESS = 3.0
X = np.array([-1.0, -0.1, 0.0, 0.2, 7.0], np.float32)
GATE = 1 / (1 + np.exp(-SHARPNESS * X))
UNDER_SIX = 1 / (1 + np.exp(SHARPNESS * (np.maximum(X, 0) - 6)))  # the gate of min(y, 6)


def leaky(slope):
  return slope + (1 - slope) * GATE


GATES = {
  "relu": (jax.nn.relu, GATE),
  "maximum": (lambda x: jnp.maximum(0, x), GATE),
  "maximum of an array of zeros": (lambda x: jnp.maximum(x, jnp.zeros_like(x)), GATE),
  "clip": (lambda x: jnp.clip(x, 0), GATE),
  "where": (lambda x: jnp.where(x > 0, x, 0), GATE),
  "where, the other way": (lambda x: jnp.where(x <= 0.0, 0.0, x), GATE),
  "times its sign": (lambda x: (x > 0) * x, GATE),
  "leaky": (jax.nn.leaky_relu, leaky(0.01)),
  "leaky maximum": (lambda x: jnp.maximum(0.1 * x, x), leaky(0.1)),
  "negative part": (lambda x: jnp.minimum(x, 0), 1 - GATE),
  "relu6": (jax.nn.relu6, GATE * UNDER_SIX),
  "clip to 6": (lambda x: jnp.clip(x, 0, 6), GATE * UNDER_SIX),
  "clamp": (lambda x: jax.lax.clamp(0.0, x, 6.0), GATE * UNDER_SIX),
  "jit": (jax.jit(lambda x: jax.jit(jax.nn.relu)(x)), GATE),
  "checkpoint": (jax.checkpoint(jax.nn.relu), GATE),
  "where in a jitted checkpoint": (jax.jit(jax.checkpoint(lambda x: jnp.where(x > 0, x, 0))), GATE),
  "cond": (lambda x: jax.lax.cond(x[0] < 0, jax.nn.relu, jnp.tanh, x), GATE),
  "scan": (lambda x: jax.lax.scan(lambda carry, row: (carry, jax.nn.relu(row)), 0.0, x)[1], GATE),
  "loop": (lambda x: jax.lax.fori_loop(0, 1, lambda i, x: jnp.where(x > 0, x, 0), x), GATE),
  "vmap": (jax.vmap(jax.nn.relu), GATE),
}


def as_network(function):
  """A function of params and inputs."""
  return lambda params, x: function(params + x)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_keeps_its_value_and_mixes_its_slopes(name):
  function, slope = GATES[name]
  smooth = relax_gates(as_network(function), sharpness=SHARPNESS)
  values, slopes = jax.jit(lambda x: jax.jvp(lambda x: smooth(0.0, x), (x,), (jnp.ones_like(x),)))(X)
  np.testing.assert_array_equal(values, function(X))
  np.testing.assert_allclose(slopes, slope, rtol=1e-4, atol=1e-6)
  assert gates(as_network(function), 0.0, X)


def test_a_learned_slope_keeps_its_own_derivative():
  upper = relax_gates(lambda a, x: jnp.where(x > 0, a * x, x), sharpness=SHARPNESS)
  np.testing.assert_allclose(jax.grad(lambda a: jnp.sum(upper(a, jnp.asarray(X))))(2.0), np.sum(GATE * X), rtol=1e-4)
  module = nn.PReLU()
  variables = {"params": {"negative_slope": jnp.asarray(0.25)}}
  smooth = relax_gates(module.apply, sharpness=SHARPNESS)
  by_slope, by_x = jax.grad(lambda v, x: jnp.sum(smooth(v, x)), argnums=(0, 1))(variables, jnp.asarray(X))
  np.testing.assert_allclose(by_slope["params"]["negative_slope"], np.sum((1 - GATE) * X), rtol=1e-4)
  np.testing.assert_allclose(by_x, leaky(0.25), rtol=1e-4)


SMOOTH = ("tanh", "gelu", "softplus", "silu", "elu", "selu", "mish", "softmax", "log_softmax", "sigmoid", "standardize")


@pytest.mark.parametrize("name", SMOOTH)
def test_a_smooth_function_passes_unchanged(name):
  function = getattr(jax.nn, name)
  smooth = relax_gates(as_network(function), sharpness=SHARPNESS)
  gradient = lambda fn: jax.jit(jax.grad(lambda x: jnp.sum(fn(0.0, x) * X[::-1])))(X)
  np.testing.assert_allclose(gradient(smooth), gradient(as_network(function)), rtol=1e-6, atol=1e-7)
  assert not gates(as_network(function), 0.0, X)


def test_a_derivative_of_one_s_own_is_left_alone():
  reversal = jax.custom_jvp(lambda x: x)
  reversal.defjvp(lambda primals, tangents: (primals[0], -tangents[0]))
  smooth = relax_gates(as_network(reversal), sharpness=SHARPNESS)
  assert float(jax.grad(lambda x: smooth(0.0, x))(1.0)) == -1


@pytest.mark.parametrize(
  "function",
  [jax.nn.hard_tanh, lambda x: jnp.clip(x, -1, 1), lambda x: jnp.maximum(x, x[::-1])],
  ids=["hard_tanh", "clip", "maxout"],
)
def test_kinks_without_a_gate_that_is_known_are_refused(function):
  smooth = relax_gates(as_network(function), sharpness=SHARPNESS)
  with pytest.raises(ValueError, match="apply_fn must be smooth or have gates that can be relaxed; it has"):
    smooth(0.0, X)
  classifier = make_classifier(lambda p, x: function(x[:, 0])[:, None] + jnp.zeros((1, 3)), jnp.ones(1), (2,))
  with pytest.raises(ValueError, match="apply_fn must be smooth"):  # at once, not in the middle of the training
    relaxed(classifier, SHARPNESS)
  assert relaxed(classifier, None) == relaxed(classifier, 0.0) == classifier


@pytest.mark.parametrize(
  "norm",
  [
    nn.LayerNorm().apply,
    nn.GroupNorm(num_groups=1).apply,
    lambda p, x: nn.BatchNorm(use_running_average=False).apply(p, x, mutable=["batch_stats"])[0],
    lambda p, x: x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-6),
  ],
  ids=["layer norm", "group norm", "batch norm", "unit length"],
)
def test_guards_of_a_variance_or_a_norm_are_no_gates(norm):
  x = 1e-3 * inputs(5, 4)  # a gate of sharpness 20 would be half open
  scale = {
    "params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
    "batch_stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)},
  }
  weights = inputs(5, 4, seed=1)
  total = lambda fn: jax.jit(jax.grad(lambda x: jnp.sum(fn(scale, x) * weights)))(x)
  expected = total(norm)
  assert float(jnp.abs(expected).max()) > 1
  np.testing.assert_allclose(total(relax_gates(norm, sharpness=20.0)), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
  "build", [pytest.param(random_mlp, id="mlp"), pytest.param(random_conv, id="conv", marks=pytest.mark.slow)]
)
def test_a_whole_network_has_the_derivatives_of_one_that_is_written_with_relaxed_gates(build, monkeypatch):
  classifier, x, _ = build(batch_norm=True)
  weights = jnp.arange(1.0, 4.0)
  gradient = lambda function: jax.jit(jax.grad(lambda p: jnp.sum(function(p, x) @ weights)))(classifier.params)
  exact, found = gradient(classifier.apply_fn), relaxed(classifier, SHARPNESS)
  trained = lambda params, x: found.forward(params, x, True).logits
  np.testing.assert_allclose(
    trained(classifier.params, x), classifier.apply_fn(classifier.params, x), rtol=1e-5, atol=1e-6
  )
  assert found.apply_fn == classifier.apply_fn and found.predict_fn == classifier.predict_fn
  now = gradient(trained)
  monkeypatch.setattr(nn, "relu", lambda x: relaxed_relu(x, SHARPNESS))
  build_again = jax.jit(
    lambda p, x: classifier.forward.__wrapped__(p, x, True).logits
  )  # traced anew, with the other ReLU
  expected = gradient(build_again)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), now, expected)
  assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), now, exact))) > 1e-2


def test_a_free_gate_is_what_it_is_told_at_the_kink_and_the_sign_of_its_argument_far_from_it():
  free = relax_gates(lambda w, x: nn.relu(w * x), sharpness=SHARPNESS)
  logits = jnp.array([-1.0, 2.0, 2.0, 2.0])
  x = jnp.ones(4)
  slopes = jax.vmap(jax.grad(lambda w, own: free(w, x, [jnp.full(4, own)])[0]))
  far = 10 / SHARPNESS
  np.testing.assert_allclose(
    slopes(jnp.array([0.0, 0.0, far, -far]), logits), [*jax.nn.sigmoid(logits[:2]), 1.0, 0.0], atol=2e-3
  )
  for others in ([], [jnp.zeros(3)]):  # of no gate of this shape
    slope = jax.grad(lambda w, others=others: free(w, x, others)[0])(0.1)
    assert float(slope) == pytest.approx(float(jax.nn.sigmoid(SHARPNESS * 0.1)), rel=1e-6)


def test_a_gate_that_is_run_again_for_its_derivative_is_given_like_any_other():
  w, x, gate = 0.5, jnp.linspace(-1, 1, 4), jnp.linspace(0.1, 0.7, 4)
  again = lambda w, x: jax.checkpoint(lambda h: nn.relu(h))(w * nn.relu(x + 2))
  assert [root.tolist() for root in pre_activations(again, w, x)] == [(x + 2).tolist(), (w * (x + 2)).tolist()]
  slope = jax.grad(lambda w: jnp.sum(given_gates(again)(w, x, [jnp.ones(4), gate])))(w)
  assert float(slope) == pytest.approx(float(gate @ (x + 2)), rel=1e-6)
  free = relax_gates(again, sharpness=SHARPNESS)
  at_kink = jax.grad(lambda w: jnp.sum(free(w, x, [jnp.zeros(4), jnp.full(4, 2.0)])))(0.0)
  assert float(at_kink) == pytest.approx(float(jax.nn.sigmoid(2.0) * jnp.sum(x + 2)), rel=1e-3)


def test_gates_have_a_second_derivative():
  smooth = relax_gates(lambda w, x: nn.relu(w * x), sharpness=SHARPNESS)
  second = jax.jit(jax.grad(jax.grad(lambda w: smooth(w, jnp.ones(())))))(0.1)
  gate = jax.nn.sigmoid(SHARPNESS * 0.1)
  assert float(second) == pytest.approx(float(SHARPNESS * gate * (1 - gate)), rel=1e-5)
  with jax.enable_x64(True):
    check_grads(jax.jit(jax.vmap(jax.grad(lambda x: relaxed_relu(x, 7.0)))), (jnp.array([-0.3, 0.1, 0.5]),), order=1)


def test_relaxed_relu_is_relu_with_the_sigmoid_for_a_derivative_also_far_out():
  x = jnp.array([-1e6, -3.0, 0.0, 0.05, 2.0, 1e6, jnp.inf, -jnp.inf])
  np.testing.assert_array_equal(relaxed_relu(x, 20.0), jax.nn.relu(x))
  slope = jax.vmap(jax.grad(relaxed_relu), in_axes=(0, None))(x[:6], 20.0)
  np.testing.assert_allclose(slope, [0, np.exp(-60), 0.5, 1 / (1 + np.exp(-1)), 1, 1], rtol=1e-4, atol=1e-7)
  _, forward = jax.jvp(lambda x: relaxed_relu(x, 20.0), (x[:6],), (jnp.full(6, 3.0),))
  np.testing.assert_allclose(forward, 3 * slope, rtol=1e-5)


def test_sharpness_must_be_positive():
  with pytest.raises(ValueError, match="sharpness must be positive"):
    relax_gates(relaxed_relu, sharpness=0.0)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_low_precision_is_within_its_rounding(batch_norm):
  classifier, x, _ = random_mlp(batch_norm=batch_norm)
  gradients = []
  for function in (computed_in(classifier.apply_fn, jnp.bfloat16), classifier.apply_fn):
    gradient = jax.jit(jax.grad(lambda params, fn=function: jnp.sum(fn(params, x) @ jnp.arange(1.0, 4.0))))
    assert jax.eval_shape(function, classifier.params, x).dtype == x.dtype
    gradients.append(jnp.concatenate([g.ravel() for g in jax.tree.leaves(gradient(classifier.params))]))
    assert gradients[-1].dtype == x.dtype
  error = float(jnp.linalg.norm(gradients[0] - gradients[1]) / jnp.linalg.norm(gradients[1]))
  assert 1e-4 < error < 0.05  # of 8 bits


def test_kinks_in_random_numbers_that_the_function_draws_are_no_kinks_of_it():
  # As of a module that is built anew inside the function: its initialisation clips what it draws.
  def smooth(w, x):
    drawn = jax.random.truncated_normal(jax.random.key(0), -2.0, 2.0, w.shape)
    return jax.nn.gelu(x @ (w + jnp.maximum(drawn, -1.0)))

  w, x = jnp.ones((3, 2)), jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
  assert gates(smooth, w, x) == []
  np.testing.assert_allclose(relax_gates(smooth, sharpness=20.0)(w, x), smooth(w, x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gelu_and_layer_norm_of_an_nnx_module_are_smooth():
  class Smooth(nnx.Module):
    def __init__(self, rngs):
      self.first, self.norm = nnx.Linear(4, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)
      self.last = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
      return self.last(nnx.gelu(self.norm(self.first(x))))

  own = Subject.from_nnx(Smooth, input_shape=(4,))
  classifier = own.classifier(own.init_fn())
  x = jax.random.normal(jax.random.key(1), (5, 4))
  logits = relaxed(classifier, 20.0).forward(classifier.params, x, True).logits
  np.testing.assert_allclose(logits, classifier.predict(x), rtol=1e-5, atol=1e-6)
