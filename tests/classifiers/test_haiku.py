"""Functions that Haiku transformed are the classifiers that they are in Haiku."""

import chex
import flax_twin
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kkt_jax

X, Y = jnp.asarray(flax_twin.X), flax_twin.Y
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _as_haiku_computes():
  with jax.numpy_rank_promotion("allow"):
    yield


def dense(x):
  return hk.nets.MLP([12, 10])(hk.Flatten()(x))


def residual(x):
  h = hk.Linear(16)(hk.Flatten()(x))
  return hk.Linear(10)(h + jax.nn.gelu(hk.Linear(16)(hk.LayerNorm(-1, True, True)(h))))


def convolutional(x, is_training, dropout=True):
  h = hk.BatchNorm(True, True, 0.5)(hk.Conv2D(4, 3)(x), is_training)
  h = hk.Flatten()(hk.max_pool(jax.nn.relu(h), (2, 2, 1), (2, 2, 1), "VALID"))
  if is_training and dropout:
    h = hk.dropout(hk.next_rng_key(), 0.5, h)
  return hk.Linear(10)(h)


@pytest.mark.parametrize("rng", [True, False])
@pytest.mark.parametrize(("network", "first"), [(dense, "mlp/~/linear_0/b"), (residual, "layer_norm/offset")])
def test_a_function_without_state_is_what_it_is_in_haiku(network, first, rng):
  transformed = hk.transform(network)
  params = transformed.init(KEY, X)
  own = kkt_jax.from_haiku(transformed if rng else hk.without_apply_rng(transformed), params, input_shape=(8, 8, 1))
  theirs = lambda params, x: transformed.apply(params, None, x)
  np.testing.assert_allclose(own.predict(X), theirs(params, X), atol=1e-5)
  assert kkt_jax.tensor_names(own.params)[0] == first
  expected, found = (jax.jacrev(function)(params, X[:3]) for function in (theirs, own.predict_fn))
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)


def falling(steps=60, decay=1e-3):
  """Descent with weight decay whose steps shrink to nothing."""
  return optax.chain(
    optax.add_decayed_weights(decay), optax.sgd(optax.linear_schedule(0.2, 0, steps // 2), momentum=0.9)
  )


def trained(network, steps=60, optimizer=falling()):
  """By full-batch descent."""
  transformed = hk.transform_with_state(network)
  params, state = transformed.init(KEY, X, is_training=True)

  def loss(params, state):
    logits, after = transformed.apply(params, state, None, X, is_training=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean(), after

  def step(carry, _):
    params, state, memory = carry
    gradient, state = jax.grad(loss, has_aux=True)(params, state)
    updates, memory = optimizer.update(gradient, memory, params)
    return (optax.apply_updates(params, updates), state, memory), None

  (params, state, _), _ = jax.lax.scan(step, (params, state, optimizer.init(params)), None, steps)
  return params, state, loss


@pytest.mark.slow
def test_batch_norm_follows_the_batch_and_its_statistics_hold_where_haiku_has_trained():
  params, state, loss = trained(lambda x, is_training: convolutional(x, is_training, dropout=False))
  transformed = hk.transform_with_state(convolutional)
  own = kkt_jax.from_haiku(transformed, params, state, input_shape=(8, 8, 1))
  assert own.batch_coupled
  expected = transformed.apply(params, state, None, X, is_training=False)[0]
  np.testing.assert_allclose(own.predict(X), expected, atol=1e-5)
  np.testing.assert_array_equal(own.statistics["batch_norm"]["var"], state["batch_norm/~/var_ema"]["average"])
  chex.assert_trees_all_close(own.statistics_fn(own.params, X), own.statistics, rtol=1e-4, atol=1e-5)
  theirs = jax.grad(lambda p: loss(p, state)[0])(params)
  mean_loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(own.apply_fn(p, X), Y).mean()
  chex.assert_trees_all_close(jax.grad(mean_loss)(own.params), theirs, rtol=1e-3, atol=1e-6)


NORMALISED = (("linear", ("w", "b")), ("batch_norm", ("scale", "offset")), ("linear_1", ("w", "b")))


def normalised(x, is_training):
  h = hk.BatchNorm(True, True, flax_twin.KEPT)(hk.Linear(flax_twin.WIDTH)(hk.Flatten()(x)), is_training)
  return hk.Linear(10)(jax.nn.relu(h))


@pytest.mark.slow
def test_the_own_training_data_leave_as_much_as_in_flax():
  """100 digits, batch norm, full batch: trained by Haiku, and in flax from the same start with the same steps."""
  transformed = hk.transform_with_state(normalised)
  start = transformed.init(KEY, X, is_training=True)[0]
  layers = (tuple(start[name][own].squeeze() for own in order) for name, order in NORMALISED)
  twin = flax_twin.from_flax(*layers, 1e-5)
  params, state, _ = trained(normalised, flax_twin.STEPS, optax.sgd(flax_twin.RATE))
  flax_twin.check_residual(kkt_jax.from_haiku(transformed, params, state, input_shape=(8, 8, 1)), twin)


def test_another_name_of_the_switch_is_given():
  transformed = hk.transform_with_state(lambda x, mode: convolutional(x, mode))
  params, state = transformed.init(KEY, X, mode=True)
  own = kkt_jax.from_haiku(transformed, params, state, input_shape=(8, 8, 1), train_argument="mode")
  np.testing.assert_allclose(own.predict(X), transformed.apply(params, state, None, X, mode=False)[0], atol=1e-5)
  with pytest.raises(ValueError, match="missing 1 required positional argument: 'mode'"):
    kkt_jax.from_haiku(transformed, params, state, input_shape=(8, 8, 1))


@pytest.mark.parametrize(
  ("network", "said"),
  [
    (lambda x: (dense(x), x), "one array of logits; it gives a tuple"),
    (lambda x: jax.nn.softmax(dense(x)), "logits, not probabilities"),
    (lambda x: hk.Linear(3)(hk.Flatten()(hk.Embed(4, 2)(x))), "transformed must take a batch of inputs"),
  ],
  ids=["outputs", "probabilities", "integers"],
)
def test_what_is_no_such_classifier_is_refused(network, said):
  transformed = hk.transform(network)
  params = transformed.init(KEY, X.astype(int) if "batch" in said else X)
  with pytest.raises(ValueError, match=said):
    kkt_jax.from_haiku(transformed, params, input_shape=(8, 8, 1))


def test_state_belongs_to_transform_with_state():
  params = hk.transform(dense).init(KEY, X)
  with pytest.raises(ValueError, match="^state must be given with hk.transform_with_state"):
    kkt_jax.from_haiku(hk.transform_with_state(dense), params, input_shape=(8, 8, 1))
  with pytest.raises(ValueError, match="^state must be given with hk.transform_with_state"):
    kkt_jax.from_haiku(hk.transform(dense), params, {}, input_shape=(8, 8, 1))
  with pytest.raises(ValueError, match="^transformed must be the result of hk.transform; got function"):
    kkt_jax.from_haiku(dense, params, input_shape=(8, 8, 1))
