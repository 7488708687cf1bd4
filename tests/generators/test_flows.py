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
from kkt_jax.extraction import Exact
from kkt_jax.generators import flows
from kkt_jax.reconstruction import distil, Observer, recipes, stages

FLOW = flows.Flow(width=32, blocks=1, steps=4, batch_size=20)
QUICK = recipes.Schedule(steps=3, match_steps=2, joint_steps=2, polish_rounds=0)


@functools.cache
def reconstruction(batch_norm=False):
  classifier = batch_norm_classifier(0) if batch_norm else flax_classifier(0)
  return kkt_jax.reconstruct([classifier], kkt_jax.Recipe(schedule=QUICK))


def with_recipe(made, recipe):
  return dataclasses.replace(made, trainer=dataclasses.replace(made.trainer, recipe=recipe))


def test_a_flow_fitted_to_few_samples_draws_them_from_fresh_noise():
  examination = reconstruction().examinations[0]
  chosen = np.array([0, 1, 3, 4])  # two drawings of each of two classes
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
  unit, y = jnp.array([[2.0, 0.0], [1.0, 1.0], [-3.0, -1.0], [0.0, 0.0]]), jnp.array([0, 0, 0, 1])
  leaning = lambda *proven, **given: flows.Flow(lean=0.5, **given).leaning_on_others(unit, y, *proven)
  towards = (
    np.array([1.5, 0.5]) * 2 / np.sqrt(2.5)
  )  # half of the way to the nearest, and as far from the mean as before
  np.testing.assert_allclose(leaning(nearest=1)[0], towards, rtol=1e-6)
  np.testing.assert_allclose(leaning(nearest=1, contrast=1.5)[0], 1.5 * towards, rtol=1e-6)
  np.testing.assert_allclose(leaning(nearest=2)[0], unit[0], atol=1e-6)  # the mean of the two others is (-1, 0)
  np.testing.assert_allclose(leaning(np.array([[2.0, 0.04]]), nearest=1)[0], unit[0])
  np.testing.assert_array_equal(leaning(contrast=2.0)[3], unit[3])
  np.testing.assert_allclose(flows.Flow(lean=0.0).leaning_on_others(unit, y), unit, atol=1e-6)
  with pytest.raises(ValueError, match=r"lean must be in \[0, 1\]; got 2"):
    flows.Flow(lean=2)
  with pytest.raises(ValueError, match="contrast must be positive and finite; got 0"):
    flows.Flow(contrast=0)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_network_takes_the_place_of_the_table_and_moves_with_the_equations(batch_norm):
  made = reconstruction(batch_norm)
  assert made.table is not None
  assert made.table.problem.generator.codes and not made.problem.generator.codes
  assert isinstance(made.recipe.generator, flows.Flow)
  assert int(made.state.step) == QUICK.joint_steps
  untrained = distil(made.table)
  for ours, again in zip(jax.tree.leaves(made.state.params), jax.tree.leaves(untrained.state.params), strict=True):
    np.testing.assert_allclose(ours, again, rtol=1e-4, atol=1e-6)  # the same seed
  fitted = distil(with_recipe(made.table, made.table.recipe.with_schedule(joint_steps=0)))
  moved = [
    float(jnp.max(jnp.abs(a - b)))
    for a, b in zip(jax.tree.leaves(made.state.params), jax.tree.leaves(fitted.state.params), strict=True)
  ]
  assert max(moved) > 1e-5
  x = made.sample(jax.random.key(0), jnp.array([0, 1, 1]))
  assert x.shape == (3, *made.classifiers[0].input_shape)
  assert jnp.any(x[1] != x[2])


def test_several_tables_are_trained_where_nothing_is_proven(monkeypatch):
  """Each from a start of its own; the network is fitted to the samples of all."""
  own, fitted, match = reconstruction().examinations, [], flows.Flow.match

  def matched(self, key, theta, examinations, samples, **settings):
    fitted.append(samples)
    return match(self, key, theta, examinations, samples, **settings)

  monkeypatch.setattr(flows.Flow, "match", matched)
  schedule, steps = dataclasses.replace(QUICK, tables=3), []
  recipe = kkt_jax.Recipe(schedule=schedule, flow=dataclasses.replace(FLOW, lean=0.0))
  classifiers = [known.classifier for known in own]
  on_log = lambda step, metrics: steps.append(step)
  made = kkt_jax.reconstruct(classifiers, recipe, examinations=own, observer=Observer(on_log=on_log, log_every=1))
  assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # three tables, and two joint steps
  ((unit, labels),) = fitted[0]
  tables = np.split(np.asarray(unit), 3)
  first, y = made.table.every_sample()
  np.testing.assert_array_equal(labels, np.tile(y, 3))
  np.testing.assert_allclose(tables[0], first, atol=1e-5)
  alone = kkt_jax.reconstruct(classifiers, recipe.with_schedule(match_steps=0), seed=2, examinations=own)
  np.testing.assert_allclose(tables[2], alone.every_sample()[0], atol=1e-5)
  rest = [np.zeros(1, own) for own in (int, int, bool, int)]
  one = Exact(np.ones((1, *first.shape[1:])), *rest)
  monkeypatch.setattr(stages, "polish", lambda made, *_, **settings: dataclasses.replace(made, exact=(one,)))
  kkt_jax.reconstruct(classifiers, recipe, examinations=own)
  assert len(fitted[1][0][1]) == len(y)  # as soon as a sample is proven, one table will do


def test_terms_weigh_something_else_while_the_network_is_trained():
  """Those that have a factor; one for a term that the recipe lacks changes nothing."""
  table = reconstruction().table
  recipe = table.recipe.with_schedule(joint_factors={"stationarity": 5.0, "range": 0.5, "nothing": 2.0})
  before, made = recipe, distil(with_recipe(table, recipe)).recipe
  assert made.stationarity.weight == 5 * before.stationarity.weight
  assert made.terms["range"].weight == before.terms["range"].weight / 2
  assert made.terms["duality"] == before.terms["duality"]


def test_what_the_equations_make_worse_is_taken_back():
  table = reconstruction().table
  with_schedule = lambda **changes: with_recipe(table, table.recipe.with_schedule(**changes))
  kept = distil(with_schedule(joint=recipes.adam(1.0)))
  assert int(kept.state.step) == 0
  fitted = distil(with_schedule(joint_steps=0))
  chex.assert_trees_all_close(kept.state.params, fitted.state.params)


def test_it_is_saved_and_loaded_like_any_generator(tmp_path):
  made = reconstruction()
  made.save(tmp_path)
  recipe = recipes.complete(kkt_jax.Recipe(schedule=QUICK), made.examinations)
  recipe = recipe.joint(flows.Flow(batch_size=made.table.problem.generator.batch_size))
  loaded = kkt_jax.Reconstruction.load(tmp_path, [own.classifier for own in made.examinations], recipe)
  y = jnp.array([0, 1])
  np.testing.assert_allclose(made.sample(jax.random.key(1), y), loaded.sample(jax.random.key(1), y), rtol=1e-5)


def test_the_temperature_stretches_the_noise_and_the_range_is_kept():
  made = reconstruction()
  theta, y, t = made.state.params["theta"], jnp.zeros(20, jnp.int32), jnp.zeros(20, jnp.int32)
  hot = dataclasses.replace(made.recipe.generator, temperature=2.0)(made.examinations)
  noise = 3 * jax.random.normal(jax.random.key(0), (20, hot.noise_dim))
  (x, _), (same, _) = (
    hot.generate(theta, {}, noise, y, t, True),
    made.problem.generator.generate(theta, {}, 2 * noise, y, t, False),
  )
  np.testing.assert_allclose(x, same, atol=1e-6)
  unit = made.classifiers[0].to_unit(x)
  assert float(unit.min()) == 0.0  # where it would be below, in training, too


def test_sizes_are_checked():
  with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
    flows.Flow(steps=0)
