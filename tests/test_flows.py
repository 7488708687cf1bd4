"""A network of continuous noise: fitted to samples, and trained by the equations."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained_networks import batch_norm_classifier, flax_classifier, with_weight_decay

import kkt_jax
from kkt_jax import flows, recipes

FLOW = flows.Flow(width=32, blocks=1, steps=4, batch_size=20)
QUICK = recipes.Schedule(steps=3, match_steps=2, joint_steps=2, polish_rounds=0)


@functools.cache
def reconstruction(batch_norm=False):
  classifier = batch_norm_classifier(0) if batch_norm else flax_classifier(0)
  return kkt_jax.reconstruct([classifier], kkt_jax.Recipe(schedule=QUICK))


def test_a_flow_fitted_to_few_samples_draws_them_from_fresh_noise():
  examination = reconstruction().examinations[0]
  chosen = np.array([0, 1, 3, 4])  # two drawings of each of two classes, which lie in the span
  _, _, x, y = with_weight_decay(0)
  x, y = x[chosen], y[chosen]
  flow = dataclasses.replace(FLOW, width=64, steps=16, batch_size=100)
  generator = flow([examination])
  theta, statistics = generator.init(jax.random.key(1))
  errors = []
  theta = flow.match(
    jax.random.key(2),
    theta,
    [examination],
    [(x, y)],
    num_steps=600,
    on_progress=lambda step, e: errors.append((step, e)),
  )
  assert [step for step, _ in errors] == [100, 200, 300, 400, 500, 600]
  assert errors[-1][1] < errors[0][1]
  noise = jax.random.normal(jax.random.key(3), (40, generator.noise_dim))
  labels = jnp.repeat(jnp.arange(2), 20)
  drawn, _ = generator.generate(theta, statistics, noise, labels, jnp.zeros(40, jnp.int32), False)
  unit = examination.classifier.to_unit(drawn).reshape(40, -1)
  distances = jnp.linalg.norm(unit[:, None] - x.reshape(1, 4, -1), axis=2)
  nearest = np.asarray(distances.argmin(axis=1))
  typical = float(jnp.linalg.norm(x[0] - x[1]))
  assert np.median(distances.min(axis=1)) < 0.2 * typical
  assert np.mean(y[nearest] == np.asarray(labels)) == 1.0
  assert len(set(nearest)) == 4  # none is forgotten


def test_samples_lean_on_the_nearest_of_their_label_unless_they_are_proven_or_alone():
  unit = jnp.array([[0.0], [1.0], [2.0], [3.0], [4.0], [9.0], [5.0]])
  y = jnp.array([0, 0, 0, 0, 0, 0, 1])
  leaning = flows.Flow(lean=0.5).leaning_on_others
  # The nearest four of 0 are 1, 2, 3, 4; of 9 they are 1 to 4, too.
  np.testing.assert_allclose(leaning(unit, y)[:, 0], [1.25, 1.625, 2.0, 2.375, 2.75, 5.75, 5.0])
  np.testing.assert_allclose(leaning(unit, y, np.array([[9.04], [7.0]]))[5], 9.0)
  np.testing.assert_array_equal(flows.Flow(lean=0.0).leaning_on_others(unit, y), unit)
  with pytest.raises(ValueError, match=r"lean must be in \[0, 1\]; got 2"):
    flows.Flow(lean=2)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_network_takes_the_place_of_the_table_and_moves_with_the_equations(batch_norm):
  made = reconstruction(batch_norm)
  assert made.table is not None
  assert made.table.problem.generator.codes and not made.problem.generator.codes
  assert isinstance(made.recipe.generator, flows.Flow)
  assert int(made.state.step) == QUICK.joint_steps
  untrained = made.table.continuous(seed=0)
  for ours, again in zip(jax.tree.leaves(made.state.params), jax.tree.leaves(untrained.state.params), strict=True):
    np.testing.assert_allclose(ours, again, rtol=1e-4, atol=1e-6)  # the same seed
  fitted = dataclasses.replace(made.table, recipe=made.table.recipe.with_schedule(joint_steps=0)).continuous(seed=0)
  moved = [
    float(jnp.max(jnp.abs(a - b)))
    for a, b in zip(jax.tree.leaves(made.state.params), jax.tree.leaves(fitted.state.params), strict=True)
  ]
  assert max(moved) > 1e-5
  x = made.sample(jax.random.key(0), jnp.array([0, 1, 1]))
  assert x.shape == (3, *made.classifiers[0].input_shape)
  assert jnp.any(x[1] != x[2])


def test_what_the_equations_make_worse_is_taken_back():
  table = reconstruction().table
  with_schedule = lambda **changes: dataclasses.replace(table, recipe=table.recipe.with_schedule(**changes))
  kept = with_schedule(joint=recipes.adam(1.0)).continuous(seed=0)
  assert int(kept.state.step) == 0
  fitted = with_schedule(joint_steps=0).continuous(seed=0)
  chex.assert_trees_all_close(kept.state.params, fitted.state.params)


def test_it_is_saved_and_loaded_like_any_generator(tmp_path):
  made = reconstruction()
  made.save(tmp_path)
  recipe = dataclasses.replace(made.recipe, generator=flows.Flow())
  loaded = kkt_jax.Reconstruction.load(tmp_path, [own.classifier for own in made.examinations], recipe)
  y = jnp.array([0, 1])
  np.testing.assert_allclose(made.sample(jax.random.key(1), y), loaded.sample(jax.random.key(1), y), rtol=1e-5)


def test_sizes_are_checked():
  with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
    flows.Flow(steps=0)
