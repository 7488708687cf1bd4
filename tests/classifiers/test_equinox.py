"""Equinox modules are the classifiers that they are in Equinox, with either batch norm."""

import chex
import equinox as eqx
import flax_twin
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kkt_jax

X, Y = jnp.asarray(flax_twin.X), flax_twin.Y
KEY = jax.random.key(0)


class Convolutional(eqx.Module):
  conv: eqx.nn.Conv2d
  norm: eqx.nn.BatchNorm
  pool: eqx.nn.MaxPool2d
  dropout: eqx.nn.Dropout
  last: eqx.nn.Linear

  def __init__(self, key, mode="batch", axis="batch"):
    a, b = jax.random.split(key)
    self.conv = eqx.nn.Conv2d(1, 4, 3, key=a)
    self.norm = eqx.nn.BatchNorm(4, axis, momentum=0.5, mode=mode)
    self.pool = eqx.nn.MaxPool2d(2, 2)
    self.dropout = eqx.nn.Dropout(0.5)
    self.last = eqx.nn.Linear(36, 10, key=b)

  def __call__(self, x, state, key):
    h, state = self.norm(self.conv(x), state)
    return self.last(self.dropout(self.pool(jax.nn.relu(h)).ravel(), key=key)), state


class Residual(eqx.Module):
  first: eqx.nn.Linear
  norm: eqx.nn.LayerNorm
  inner: eqx.nn.MLP
  last: eqx.nn.Linear

  def __init__(self, key):
    a, b, c = jax.random.split(key, 3)
    self.first, self.norm = eqx.nn.Linear(64, 16, key=a), eqx.nn.LayerNorm(16)
    self.inner, self.last = eqx.nn.MLP(16, 16, 8, 1, key=b), eqx.nn.Linear(16, 10, key=c)

  def __call__(self, x):
    h = self.first(x.ravel())
    return self.last(h + self.inner(self.norm(h)))


def without_dropout(module):
  return eqx.tree_at(lambda m: m.dropout, module, eqx.nn.Dropout(0.5, inference=True))


def batch(module, state, x):
  """As Equinox has it in training, channels first."""
  return jax.vmap(lambda x: module(x, state, None), out_axes=(0, None), axis_name="batch")(x)


def clone(state):
  return jax.tree.map(lambda leaf: leaf, state)


def trained(mode, steps=60, decay=1e-3):
  """By full-batch descent in Equinox, whose steps shrink to nothing."""
  module, state = eqx.nn.make_with_state(Convolutional)(KEY, mode)
  module, x = without_dropout(module), X.transpose(0, 3, 1, 2)
  optimizer = optax.chain(
    optax.add_decayed_weights(decay), optax.sgd(optax.linear_schedule(0.2, 0, steps // 2), momentum=0.9)
  )
  tensors, rest = eqx.partition(module, eqx.is_inexact_array)

  def loss(tensors, state):
    logits, after = batch(eqx.combine(tensors, rest), state, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean(), after

  @jax.jit
  def step(carry, _):
    tensors, state, memory = carry
    gradient, state = jax.grad(loss, has_aux=True)(tensors, state)
    updates, memory = optimizer.update(gradient, memory, tensors)
    return (optax.apply_updates(tensors, updates), state, memory), None

  # Mode "ema" looks at no average in its first step.
  (tensors, state, _), _ = jax.lax.scan(step, (tensors, state, optimizer.init(tensors)), None, steps)
  return eqx.combine(tensors, rest), state, loss


def test_a_module_without_state_is_what_it_is_in_equinox():
  for module, names in ((Residual(KEY), "first/bias"), (eqx.nn.MLP(64, 10, 8, 1, key=KEY), "layers/0/bias")):
    shape = (1, 8, 8) if isinstance(module, Residual) else (64,)
    x = X.reshape(-1, 64) if shape == (64,) else X
    own = kkt_jax.from_equinox(module, input_shape=shape)
    expected = jax.vmap(module)(X.reshape(-1, *shape))
    np.testing.assert_allclose(own.predict(x), expected, atol=1e-5)
    found = kkt_jax.tensor_names(own.params)
    assert found[0] == names and len(found) == len(jax.tree.leaves(eqx.filter(module, eqx.is_inexact_array)))
    theirs = eqx.filter_jacrev(lambda m: jax.vmap(m)(X.reshape(-1, *shape)[:3]))(module)
    ours = jax.jacrev(own.predict_fn)(own.params, x[:3])
    by_name = dict(zip(found, jax.tree.leaves(ours), strict=True))
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(theirs, eqx.is_array)):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      np.testing.assert_allclose(by_name[name], leaf, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_batch_norm_is_that_of_equinox_in_both_modes(mode):
  module, state, loss = trained(mode)
  own = kkt_jax.from_equinox(module, state, input_shape=(1, 8, 8))
  assert own.batch_coupled and own.input_shape == (8, 8, 1)
  resting = eqx.nn.inference_mode(module)
  expected = jnp.stack([resting(x, state, None)[0] for x in X[:5].transpose(0, 3, 1, 2)])
  np.testing.assert_allclose(own.predict(X[:5]), expected, atol=1e-5)
  chex.assert_trees_all_close(own.statistics_fn(own.params, X), own.statistics, rtol=1e-4, atol=1e-5)
  with jax.numpy_rank_promotion("allow"):
    logits, _ = batch(module, clone(state), X.transpose(0, 3, 1, 2))
    np.testing.assert_allclose(own.apply_fn(own.params, X), logits, atol=1e-4)
    tensors = eqx.filter(module, eqx.is_inexact_array)
    theirs = jax.grad(lambda t: loss(t, clone(state))[0])(tensors)
  mean_loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(own.apply_fn(p, X), Y).mean()
  found = jax.grad(mean_loss)(own.params)
  for layer in ("conv", "norm", "last"):
    for name in ("weight", "bias"):
      expected = getattr(getattr(theirs, layer), name)
      np.testing.assert_allclose(found[layer][name], expected, rtol=2e-3, atol=1e-6)


class Normalised(eqx.Module):
  first: eqx.nn.Linear
  norm: eqx.nn.BatchNorm
  last: eqx.nn.Linear

  def __init__(self, key):
    a, b = jax.random.split(key)
    self.first, self.last = eqx.nn.Linear(64, flax_twin.WIDTH, key=a), eqx.nn.Linear(flax_twin.WIDTH, 10, key=b)
    self.norm = eqx.nn.BatchNorm(flax_twin.WIDTH, "batch", momentum=flax_twin.KEPT, mode="batch")

  def __call__(self, x, state):
    h, state = self.norm(self.first(x.ravel()), state)
    return self.last(jax.nn.relu(h)), state


@pytest.mark.slow
def test_the_own_training_data_leave_as_much_as_in_flax():
  """100 digits, batch norm, full batch: trained by Equinox, and in flax from the same start with the same steps."""
  module, state = eqx.nn.make_with_state(Normalised)(KEY)
  pair = lambda layer: (layer.weight.T, layer.bias)
  twin = flax_twin.from_flax(pair(module.first), pair(module.norm), pair(module.last), 1e-5)
  tensors, rest = eqx.partition(module, eqx.is_inexact_array)

  def loss(tensors, state):
    forward = jax.vmap(eqx.combine(tensors, rest), (0, None), (0, None), axis_name="batch")
    logits, state = forward(X.transpose(0, 3, 1, 2), state)
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean(), state

  def step(carry, _):
    gradient, state = jax.grad(loss, has_aux=True)(*carry)
    return (jax.tree.map(lambda own, slope: own - flax_twin.RATE * slope, carry[0], gradient), state), None

  with jax.numpy_rank_promotion("allow"):
    (tensors, state), _ = jax.lax.scan(step, (tensors, state), None, flax_twin.STEPS)
  own = kkt_jax.from_equinox(eqx.combine(tensors, rest), state, input_shape=(1, 8, 8))
  flax_twin.check_residual(own, twin)


def test_derivatives_by_inputs_see_the_averages_move_with_them():
  """In mode "ema" the value for every batch is that of batch norm on the batch, and so is its derivative by inputs."""
  module, state = eqx.nn.make_with_state(Convolutional)(KEY, "ema")
  _, state = batch(without_dropout(module), state, X.transpose(0, 3, 1, 2))
  ema = kkt_jax.from_equinox(module, state, input_shape=(1, 8, 8))
  module, state = eqx.nn.make_with_state(Convolutional)(KEY, "batch")
  plain = kkt_jax.from_equinox(module, state, input_shape=(1, 8, 8))
  by_input = lambda own: jax.grad(lambda x: own.apply_fn(own.params, x)[:, 0].sum())(X[:6])
  chex.assert_trees_all_close(by_input(ema), by_input(plain), rtol=1e-4, atol=1e-5)


def test_first_variances_of_ones_are_taken_out_of_statistics():
  module, state = eqx.nn.make_with_state(Convolutional)(KEY)
  _, state = batch(without_dropout(module), state, X.transpose(0, 3, 1, 2))
  own = kkt_jax.from_equinox(module, state, input_shape=(1, 8, 8))
  chex.assert_trees_all_close(own.statistics_fn(own.params, X), own.statistics, rtol=1e-4, atol=1e-5)


def test_a_known_start():
  start, module = (eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(seed)) for seed in (1, 2))
  own = kkt_jax.from_equinox(module, input_shape=(4,), initial=start)
  chex.assert_trees_all_equal(own.initial_params, kkt_jax.from_equinox(start, input_shape=(4,)).params)


class Strange(eqx.Module):
  last: eqx.nn.Linear
  two: bool

  def __call__(self, x, *, key=None):
    return (self.last(x), x) if self.two else jax.nn.softmax(self.last(x))


@pytest.mark.parametrize(
  ("module", "said"),
  [
    (lambda: eqx.nn.make_with_state(Convolutional)(KEY)[0], "state must be given, .* None for .'norm'"),
    (lambda: Strange(eqx.nn.Linear(4, 3, key=KEY), True), "one array of logits; it gives a tuple"),
    (lambda: Strange(eqx.nn.Linear(4, 3, key=KEY), False), "logits, not probabilities"),
    (lambda: eqx.nn.Embedding(5, 3, key=KEY), "module must take a batch of inputs of input_shape"),
    (lambda: jnp.zeros(3), "module must be an equinox.Module"),
  ],
  ids=["state", "outputs", "probabilities", "integers", "array"],
)
def test_what_is_no_such_classifier_is_refused(module, said):
  with pytest.raises(ValueError, match=said):
    kkt_jax.from_equinox(module(), input_shape=(4,))


def test_batch_norm_on_several_axes_is_refused():
  module, state = eqx.nn.make_with_state(Convolutional)(KEY, "batch", ("a", "b"))
  with pytest.raises(ValueError, match="on one axis name"):
    kkt_jax.from_equinox(module, state, input_shape=(1, 8, 8))
