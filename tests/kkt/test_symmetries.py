"""The lower bound on the residual: 0 where data satisfy the conditions, else above 0, and never above the truth."""

import functools
import tracemalloc

from example_networks import random_mlp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.kkt import Conditions, losses, pretrain, symmetries, weight_decay_conditions


def two_layers(params, x):
  return jax.nn.relu(x @ params["in"] + params["bias"][None]) @ params["out"]


@functools.cache
def trained(weight_decay, num_steps=4000):
  """A small network, its data, and how it was left."""
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    "in": jax.random.normal(keys[0], (5, 16)) / 2,
    "bias": jnp.zeros(16),
    "out": jax.random.normal(keys[1], (16, 3)) / 2,
  }
  y = jnp.arange(30) % 3
  x = jnp.eye(5)[y] + 0.3 * jax.random.normal(keys[2], (30, 5))
  result = pretrain.gradient_descent(
    two_layers,
    params,
    x,
    y,
    pretrain.Descent(num_steps=num_steps, learning_rate=0.1, weight_decay=weight_decay, momentum=0.9),
  )
  return result.params, x, y


def best_residual(params, x, y):
  """The relative residual of the training data with their own multipliers, at the best scale of them."""
  conditions = weight_decay_conditions(params)
  sums = losses.stationarity_sum(two_layers, params, x, y, jax.nn.softmax(two_layers(params, x)))
  return float(losses.cosine_distance(conditions, sums))


def bound(params, conditions=None):
  probe = jax.random.normal(jax.random.key(9), (12, 5))
  return symmetries.least_residual(two_layers, params, conditions or weight_decay_conditions(params), probe)


@pytest.mark.slow
def test_a_minimum_with_weight_decay_has_nothing_out_of_reach():
  params, x, y = trained(0.01)
  assert best_residual(params, x, y) < 0.05  # in so few dimensions kinks settle on training points
  assert bound(params).value < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 200])
def test_the_bound_is_never_above_what_the_data_reach(num_steps):
  params, x, y = trained(0.0, num_steps)
  found = bound(params)
  assert 0.02 < found.value < best_residual(params, x, y)


@pytest.mark.slow
def test_units_out_of_balance_are_seen_one_by_one():
  params, _, _ = trained(0.01)
  unit = int(jnp.argmax(jnp.sum(params["in"] ** 2, axis=0)))
  scale = jnp.ones(16).at[unit].set(5.0)  # the same function: up in one unit, and down after it
  moved = {"in": params["in"] * scale[None], "bias": params["bias"] * scale, "out": params["out"] / scale[:, None]}
  np.testing.assert_allclose(two_layers(moved, jnp.ones((1, 5))), two_layers(params, jnp.ones((1, 5))), rtol=1e-4)
  found = bound(moved)
  # What is in excess along the scaling of this unit, by hand.
  into = float(jnp.sum(moved["in"][:, unit] ** 2) + moved["bias"][unit] ** 2)
  out = float(jnp.sum(moved["out"][unit] ** 2))
  total = sum(float(jnp.sum(leaf**2)) for leaf in moved.values())
  expected = (into - out) ** 2 / (into + out) / total
  assert found.by_symmetry["units of bias, in, out"] == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_a_common_shift_of_all_logits_is_out_of_reach():
  params, _, _ = trained(0.01)
  shifted = params | {"out": params["out"] + 1.0}
  found = bound(shifted).by_symmetry["shift of out"]
  expected = float(jnp.sum(jnp.mean(shifted["out"], axis=1) ** 2) * 3)
  assert found == pytest.approx(expected / sum(float(jnp.sum(leaf**2)) for leaf in shifted.values()), rel=1e-3)


@pytest.mark.slow
def test_parameters_without_a_condition_bound_nothing():
  params, _, _ = trained(0.0, 200)
  everything = weight_decay_conditions(params)
  tensors = lambda found: {name for key in found.by_symmetry for name in key.split(" of ")[1].split(", ")}
  assert tensors(bound(params, everything)) == {"bias", "in", "out", "whole tensors"}
  without = Conditions(everything.target, everything.mask | {"in": jnp.zeros_like(params["in"])})
  assert tensors(bound(params, without)) == {
    "out"
  }  # the shift of all logits remains; units cannot be scaled without "in"


def three_layers(params, x):
  return jax.nn.relu(jax.nn.relu(x @ params["a"]) @ params["c"]) @ params["b"]


def test_a_square_tensor_is_scaled_by_the_units_before_and_after_it():
  # The directions written out, one per unit of either hidden layer, and the target projected on them by least squares.
  random = np.random.default_rng(0)
  shapes = {"a": (3, 4), "b": (4, 2), "c": (4, 4)}
  params = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
  flat = lambda tree: np.concatenate([np.ravel(tree[name]) for name in sorted(shapes)]).astype(np.float64)
  zero = {name: np.zeros(shape) for name, shape in shapes.items()}
  directions = []
  for unit in np.eye(4):
    directions.append(flat(zero | {"a": params["a"] * unit, "c": -params["c"] * unit[:, None]}))
    directions.append(flat(zero | {"c": params["c"] * unit, "b": -params["b"] * unit[:, None]}))
  directions, target = np.stack(directions, axis=1), flat(params)
  projection = directions @ np.linalg.lstsq(directions, target, rcond=None)[0]
  probe = jnp.asarray(random.normal(size=(20, 3)), jnp.float32)
  found = symmetries.least_residual(three_layers, params, weight_decay_conditions(params), probe)
  assert found.by_symmetry["units of a, c, b"] == pytest.approx(np.sum(projection**2) / np.sum(target**2), rel=1e-3)
  ends = np.cumsum([np.prod(shapes[name]) for name in sorted(shapes)])
  shares = [np.sum(part**2) / np.sum(target**2) for part in np.split(projection, ends[:-1])]
  for name, share in zip(sorted(shapes), shares, strict=True):  # of all families the greatest counts
    assert found.by_tensor[name] >= share * (1 - 1e-3)
  assert max(found.by_tensor.values()) <= found.value <= sum(found.by_tensor.values())


def test_weights_before_a_normalisation_cannot_be_a_target():
  classifier, x, _ = random_mlp(batch_norm=True)
  # Batch norm undoes every scale before it, but for its epsilon: such weights have no gradient along themselves.
  kernel = 10 * classifier.params["Dense_0"]["kernel"]
  params = classifier.params | {"Dense_0": classifier.params["Dense_0"] | {"kernel": kernel}}
  found = symmetries.least_residual(classifier.apply_fn, params, weight_decay_conditions(params), x)
  total = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(params))
  assert found.value >= 0.8 * float(jnp.sum(kernel**2)) / total


def test_memory_does_not_grow_with_the_square_of_the_classes():
  keys = jax.random.split(jax.random.key(0))
  params = {"in": jax.random.normal(keys[0], (4, 8)), "out": jax.random.normal(keys[1], (8, 300))}
  net = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
  probes = jax.random.normal(jax.random.key(1), (24, 4))
  tracemalloc.start()
  try:
    found = symmetries.least_residual(net, params, weight_decay_conditions(params), probes)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert "units of in, out" in found.by_symmetry
  assert peak < 2**25  # bytes; (24 x 300)^2 doubles are 400 MB


def test_a_null_space_of_a_thousand_classes_needs_no_full_factor():
  """Of 24 probes and 1,000 classes the left factor would hold 24,000 x 24,000 numbers, 4.6 GB, which nobody reads."""
  tall = np.random.default_rng(0).standard_normal((24_000, 2))
  tracemalloc.start()
  null = symmetries._null_space([tall[:, 0], tall[:, 1], tall.sum(axis=1)], [1.0, 1.0, 1.0], 1e-4)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  np.testing.assert_allclose(np.abs(null[:, 0]), 3**-0.5, rtol=1e-6)
  assert peak < 1e7
