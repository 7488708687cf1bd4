"""In the coordinates of the subspace a step is the same, whatever the function; elsewhere samples are evaluated."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_networks

import kkt_jax
from kkt_jax import reconstruction
from kkt_jax.analysis import Subspace
from kkt_jax.kkt import losses
from kkt_jax.reconstruction import coordinates

CODES = 3
LAYERS = trained_networks.tuples_of


def function_of(change):
  """The classifier with weight decay as a function of a list of tuples, somehow changed; and the images [8, 8, 1]."""
  params = LAYERS(trained_networks.with_weight_decay(0)[1])
  return kkt_jax.make_classifier(change, params, (8, 8, 1), weight_decay=trained_networks.WEIGHT_DECAY)


def hidden(layers, h):
  (_, b), (last, shift) = layers
  return jax.nn.relu(h + b[None]) @ last.T + shift[None]


def kernel_on_the_left(layers, x):
  return hidden(layers, (layers[0][0] @ x.reshape(len(x), -1).T).T)


@jax.jit
def centred_and_jitted(layers, x):
  return jax.jit(hidden)(layers, 2 * (x.reshape(len(x), -1) - 0.25) @ layers[0][0].T)


def clipped(layers, x):
  return hidden(layers, jnp.clip(x, 0, 1).reshape(len(x), -1) @ layers[0][0].T)


def twice(layers, x):
  return hidden(layers, x.reshape(len(x), -1) @ layers[0][0].T + 0 * (x.reshape(len(x), -1) @ jnp.abs(layers[0][0]).T))


def examined(classifier):
  """What its weights say, and that samples lie in some subspace."""
  examination = kkt_jax.examine(classifier)
  basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (64, 9)))[0]
  return dataclasses.replace(examination, subspace=Subspace(examination.origin, basis, jnp.ones(9)))


def begins(classifiers, recipe=None):
  """The same start, with coordinates and without."""
  examinations = [examined(classifier) for classifier in classifiers]
  whole = reconstruction.recipes.complete(recipe or kkt_jax.Recipe(), examinations).with_stationarity(equalised=0.0)
  generators = (
    lambda examinations, make=kkt_jax.generators.table(CODES): make(examinations),
    lambda examinations, make=kkt_jax.generators.table(CODES): make(examinations)._replace(coordinates=None),
  )
  recipes = [dataclasses.replace(whole, generator=generator) for generator in generators]
  return [reconstruction.start(classifiers, recipe, examinations=examinations) for recipe in recipes]


def within(begin):
  return [equations.size is not None for equations in begin.trainer.equations]


@pytest.mark.parametrize(
  "make",
  [
    lambda: [trained_networks.flax_classifier(0)],
    lambda: [trained_networks.batch_norm_classifier(0)],
    lambda: [trained_networks.flax_classifier(0), trained_networks.flax_classifier(1)],
    lambda: [function_of(kernel_on_the_left)],
    lambda: [function_of(centred_and_jitted)],
  ],
  ids=["weight decay", "batch norm", "two", "kernel on the left", "centred, jitted"],
)
def test_a_step_is_the_same_step(make):
  inside, outside = begins(make())
  assert all(within(inside)) and not any(within(outside))
  chex.assert_trees_all_close(inside.state.params, outside.state.params, rtol=1e-4)
  state = outside.state._replace(step=jnp.asarray(1000))  # when stationarity counts
  results = [begin.trainer.step(state, None) for begin in (inside, outside)]
  for name, values in results[1][1].items():
    np.testing.assert_allclose(results[0][1][name], values, rtol=2e-4, atol=1e-6, err_msg=name)
  gradients = [jax.tree.leaves(result.opt_state) for result, _ in results]
  for a, b in zip(*gradients, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("change", [clipped, twice], ids=["clipped inputs", "a kernel that is used twice"])
def test_what_is_more_than_one_product_stays_a_function_of_samples(change):
  plain = examined(function_of(lambda layers, x: hidden(layers, x.reshape(len(x), -1) @ layers[0][0].T)))
  conditions = plain.conditions
  assert coordinates.in_coordinates(plain.classifier, conditions, plain) is not None
  assert coordinates.in_coordinates(function_of(change), conditions, plain) is None


def test_inputs_that_meet_another_parameter_first_stay_samples():
  params = {"layers": LAYERS(trained_networks.with_weight_decay(0)[1]), "mean": jnp.full(64, 0.2)}
  centred = lambda p, x: hidden(p["layers"], (x.reshape(len(x), -1) - p["mean"][None]) @ p["layers"][0][0].T)
  plain = examined(kkt_jax.make_classifier(centred, params, (8, 8, 1), weight_decay=trained_networks.WEIGHT_DECAY))
  assert plain.first is not None  # the values are those of a constant mean, but this one has a gradient
  assert coordinates.in_coordinates(plain.classifier, plain.conditions, plain) is None


def test_entries_of_the_first_kernel_that_do_not_count_are_left_out_of_samples_not_of_coordinates():
  plain = examined(trained_networks.flax_classifier(0))
  mask = jax.tree.map(lambda leaf: leaf.at[0].set(0.0), plain.conditions.mask)
  conditions = dataclasses.replace(plain.conditions, mask=mask)
  assert coordinates.in_coordinates(plain.classifier, conditions, plain) is None


def test_equalised_directions_count_by_a_power_of_their_singular_values():
  plain = examined(trained_networks.flax_classifier(0))
  u, s, _ = np.linalg.svd(plain.first.kernel, full_matrices=False)
  plain = dataclasses.replace(plain, subspace=Subspace(plain.origin, jnp.asarray(u[:, :9]), jnp.asarray(s[:9])))
  of_first = lambda tree: np.asarray(jax.tree.leaves(tree)[plain.first.place])
  alike, equalised = (
    coordinates.in_coordinates(plain.classifier, plain.conditions, plain, power).conditions for power in (0.0, 0.5)
  )
  sums = jax.tree.map(jnp.zeros_like, alike.target)
  ratio = of_first(equalised.mask)[:9, 0] / of_first(alike.mask)[:9, 0]
  np.testing.assert_allclose(ratio, np.sqrt(s[8] / s[:9]), rtol=1e-4)
  for part in (equalised, alike):  # the target's share that is missing is all of it, however directions are weighed
    np.testing.assert_allclose(losses.mean_relative_residual(part, sums), 1.0, rtol=1e-5)
  chex.assert_trees_all_equal(equalised.target, alike.target)


def test_a_measure_of_ones_own_may_see_single_entries_and_is_given_them():
  of_entries = lambda conditions, sums: losses.relative_residual(conditions, sums)
  recipe = reconstruction.recipes.default([trained_networks.examined(trained_networks.flax_classifier)])
  inside, _ = begins([trained_networks.flax_classifier(0)], recipe.with_stationarity(measure=of_entries))
  assert within(inside) == [False]
