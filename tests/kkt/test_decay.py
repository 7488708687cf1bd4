"""Weight decay as optimizers name it: which strength the condition sees, row by row of docs/frameworks.md."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kkt_jax.classifiers import make_classifier, WeightDecay
from kkt_jax.kkt import stationarity_residual, stationarity_sum, weight_decay_conditions
from kkt_jax.kkt.multipliers import from_softmax

X = jnp.asarray(np.random.default_rng(0).normal(size=(24, 4)), jnp.float32)
Y = jnp.asarray(np.arange(24) % 3)
W, MOMENTUM = 0.1, 0.9
kernels = lambda name: W if name.endswith("kernel") else 0.0


def network(params, x):
  first, last = params["first"], params["last"]
  return jax.nn.tanh(x @ first["kernel"] + first["bias"][None]) @ last["kernel"] + last["bias"][None]


def loss(params):
  return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(network(params, X), Y))


def start():
  draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
  return {"first": {"kernel": draw(1, 4, 5), "bias": draw(2, 5)}, "last": {"kernel": draw(3, 5, 3), "bias": draw(4, 3)}}


def trained(optimizer, function=loss, steps=4000):
  def step(_, carried):
    params, state = carried
    updates, state = optimizer.update(jax.grad(function)(params), state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, (p, optimizer.init(p))))(start())[0]


def residual(params, weight_decay):
  """What the own data leave of the condition, relative to its target."""
  conditions = weight_decay_conditions(params, weight_decay=weight_decay)
  sums = stationarity_sum(network, params, X, Y, from_softmax(network(params, X)))
  return float(stationarity_residual(conditions, sums).relative)


def keras_sgd(rate, *, momentum, weight_decay):
  """keras.optimizers.SGD: weights decay by rate * weight_decay before a step, whose momentum does not see it."""

  def update(gradient, velocity, params):
    velocity = jax.tree.map(lambda v, g: momentum * v - rate * g, velocity, gradient)
    return jax.tree.map(lambda v, p: v - rate * weight_decay * p, velocity, params), velocity

  return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def penalised(strength):
  """keras.regularizers.L2: strength times the sum of squares, of kernels."""
  squares = lambda params: sum(jnp.sum(jnp.square(own["kernel"])) for own in params.values())
  return lambda params: loss(params) + strength * squares(params)


masked = lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
RECIPES = {
  "PyTorch SGD, optax.add_decayed_weights before sgd": (
    optax.chain(optax.add_decayed_weights(W), optax.sgd(0.05, MOMENTUM)),
    loss,
    W,
  ),
  "the same, not on biases": (
    optax.chain(optax.add_decayed_weights(W, masked), optax.sgd(0.05, MOMENTUM)),
    loss,
    kernels,
  ),
  "PyTorch Adam, decay in the gradient": (
    optax.chain(optax.add_decayed_weights(W), optax.adam(optax.cosine_decay_schedule(0.02, 4000))),
    loss,
    W,
  ),
  "optax decay after the momentum": (
    optax.chain(optax.trace(MOMENTUM), optax.add_decayed_weights(W), optax.scale(-0.02)),
    loss,
    (1 - MOMENTUM) * W,
  ),
  "Keras SGD with weight_decay": (keras_sgd(0.02, momentum=MOMENTUM, weight_decay=W), loss, (1 - MOMENTUM) * W),
  "Keras regularizers.L2 on kernels": (optax.sgd(0.05, MOMENTUM), penalised(W / 2), kernels),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_own_data_satisfy_the_condition_with_the_strength_of_the_table(recipe):
  optimizer, function, weight_decay = RECIPES[recipe]
  weak = not callable(weight_decay) and weight_decay < W  # takes longer
  params = trained(optimizer, function, steps=15_000 if weak else 4000)
  assert residual(params, weight_decay) < 1e-3
  if weight_decay != W:
    assert residual(params, W) > 0.05  # what its name says


def test_decoupled_decay_of_adam_satisfies_none():
  params = trained(optax.adamw(optax.cosine_decay_schedule(0.02, 4000), weight_decay=W))
  best = min(residual(params, strength) for strength in np.geomspace(1e-4, 10, 60))
  assert best > 0.1  # outside the theory


def test_scikit_learn_s_alpha_and_c_are_per_batch():
  linear_model, neural = pytest.importorskip("sklearn.linear_model"), pytest.importorskip("sklearn.neural_network")
  x, y = np.asarray(X, np.float64), np.asarray(Y)
  found = neural.MLPClassifier((5,), activation="tanh", solver="lbfgs", alpha=len(x) * W, max_iter=5000, tol=1e-10).fit(
    x, y
  )
  layers = zip(("first", "last"), found.coefs_, found.intercepts_, strict=True)
  params = {name: {"kernel": jnp.asarray(w, jnp.float32), "bias": jnp.asarray(b, jnp.float32)} for name, w, b in layers}
  assert residual(params, kernels) < 1e-3  # alpha / n
  logistic = linear_model.LogisticRegression(C=1 / (len(x) * W), tol=1e-10, max_iter=5000).fit(x, y)
  params = {"kernel": jnp.asarray(logistic.coef_.T, jnp.float32), "bias": jnp.asarray(logistic.intercept_, jnp.float32)}
  linear = lambda params, x: x @ params["kernel"] + params["bias"][None]
  conditions = weight_decay_conditions(params, weight_decay=kernels)  # 1 / (C n)
  sums = stationarity_sum(linear, params, X, Y, from_softmax(linear(params, X)))
  assert float(stationarity_residual(conditions, sums).relative) < 1e-3


def test_a_strength_for_each_tensor_is_a_tree_or_a_function_of_names():
  params = start()
  tree = {name: {"kernel": W, "bias": 0.0} for name in params}
  made = [weight_decay_conditions(params, weight_decay=own) for own in (tree, kernels)]
  for conditions in made:
    np.testing.assert_allclose(conditions.target["last"]["kernel"], W * params["last"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(conditions.target["last"]["bias"], 0.0)
    assert all(bool(jnp.all(mask == 1)) for mask in jax.tree.leaves(conditions.mask))  # the gradient is 0 there
  own, equal = (make_classifier(network, params, (4,), weight_decay=d) for d in (tree, lambda name: 0.3))
  assert own.weight_decay == WeightDecay((0.0, W, 0.0, W)) and float(own.weight_decay) == W
  assert equal.weight_decay == 0.3 and type(equal.weight_decay) is float
  again = weight_decay_conditions(params, weight_decay=own.weight_decay)
  np.testing.assert_array_equal(again.target["first"]["bias"], 0.0)
  assert jax.jit(lambda c: c)(own).weight_decay == own.weight_decay
  assert dataclasses.replace(own, params=params).weight_decay.strengths == (0.0, W, 0.0, W)
  traced = jax.jit(lambda w: weight_decay_conditions(params, weight_decay=w).target["last"]["bias"])
  np.testing.assert_allclose(traced(0.5), 0.5 * params["last"]["bias"])


@pytest.mark.parametrize(
  ("weight_decay", "said"),
  [
    ({"last": 0.1}, "a number, a tree of numbers like params, or a function of the names of .*, such as 'first/bias'"),
    ((0.1, 0.2), "a number, a tree of numbers like params"),
    (lambda name: -1.0, "or 0 where there is none; got -1.0 for 'first/bias'"),
    (lambda name: 0.0, "at least of one tensor"),
    (0.0, "^weight_decay must be positive and finite; got 0.0"),
    (True, "^weight_decay must be a number, .* got True"),
    ("0.01", "^weight_decay must be a number, .* got '0.01'"),
    (lambda name: None, "^weight_decay must be a number, .* got None"),
    (lambda name: "0.01", "^weight_decay must be a number, .* got '0.01'"),
  ],
)
def test_what_is_no_weight_decay_is_named(weight_decay, said):
  for function in (
    functools.partial(weight_decay_conditions, start()),
    functools.partial(make_classifier, network, start(), (4,)),
  ):
    with pytest.raises(ValueError, match=said):
      function(weight_decay=weight_decay)
