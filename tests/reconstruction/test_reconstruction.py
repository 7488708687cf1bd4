"""One call from classifiers to a generator: it recovers training data; it resumes, chooses and refuses as promised."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trained_networks import examined, flax_classifier, nameless_classifier

import kkt_jax
from kkt_jax import examine, generators, networks, reconstruct, Reconstruction
from kkt_jax.checkpoint import Checkpointer, CheckpointError
from kkt_jax.criteria import Criteria
from kkt_jax.extraction import exact
from kkt_jax.kkt import pretrain, weight_decay_conditions
from kkt_jax.reconstruction import (
  distil,
  Observer,
  Recipe,
  recipes,
  Schedule,
  stages,
  start,
  Stationarity,
  step,
  Term,
  train,
)

still = lambda num_steps: optax.set_to_zero()


# A true experiment.


def cover(x, others):
  """How near the nearest of some drawings is to each training drawing, on average."""
  distances = np.linalg.norm(np.asarray(x)[:, None] - np.asarray(others)[None], axis=2)
  return float(np.mean(np.min(distances, axis=1)))


def bits(seed, per_class):
  """Drawings [M, 48], black and white, of eight classes: each class's own drawing, a quarter of it flipped."""
  own = np.random.default_rng(99).uniform(size=(8, 48)) < 0.5
  y = np.arange(8 * per_class) % 8
  flipped = np.random.default_rng(seed).uniform(size=(y.size, 48)) < 0.25
  return jnp.asarray(own[y] ^ flipped, jnp.float32), y


@pytest.mark.slow
def test_from_the_weights_alone_come_drawings_nearer_to_the_training_data_than_anything_that_never_saw_them():
  seed = 0
  x, y = bits(seed, 3)
  module = networks.MLPClassifier(num_classes=8, hidden=(96,))
  apply_fn = lambda params, x: module.apply({"params": params}, x)
  start = jax.jit(module.init)(jax.random.key(seed), x)["params"]
  settings = {"num_steps": 20000, "learning_rate": 0.1, "weight_decay": 0.005, "steps_per_call": 20000}
  params = pretrain.gradient_descent(apply_fn, start, x, y, pretrain.Descent.to_convergence(**settings)).params
  classifier = kkt_jax.from_linen(module, {"params": params}, input_shape=(48,), weight_decay=0.005)
  found = examine(classifier)
  assert found.first.rank == 24 and found.subspace is not None
  recipe = recipes.complete(Recipe(generators.table(codes=6)), [found])
  recipe = recipe.with_schedule(steps=1000, steps_per_call=100, theta=recipes.adam(0.1), polish_rounds=0)

  def drawn(recipe):
    return reconstruct([classifier], recipe, seed=seed, examinations=[found]).every_sample()[0]

  reached = cover(x, drawn(recipe))
  means = np.stack([np.asarray(x)[y == c].mean(axis=0) for c in range(8)])
  assert reached < 0.75 * cover(x, means)  # which were made from the data
  assert reached < 0.5 * cover(x, bits(1000 + seed, 6)[0])  # as many others of the same classes
  assert reached < 0.75 * cover(x, drawn(recipe.with_weights(stationarity=0.0)))  # the span and the range alone
  made = reconstruct([classifier], recipe.with_schedule(polish_rounds=12), seed=seed, examinations=[found])
  distances = np.linalg.norm(np.asarray(x)[:, None] - made.every_sample()[0][None], axis=2).min(axis=1)
  certified = np.linalg.norm(made.exact[0].unit[:, None] - np.asarray(x)[None], axis=2).min(axis=1)
  assert np.mean(distances) < 0.5 * reached
  assert np.mean(distances < 0.05) > 0.5  # most are exact then
  assert len(certified) > 12 and certified.max() < 0.05  # and nothing else is certified


@pytest.mark.slow
def test_names_and_layouts_do_not_matter():
  recipe = Recipe(generators.table(codes=2), schedule=Schedule(steps=5, theta=lambda steps: optax.sgd(1e-4)))
  named, nameless = (
    reconstruct([make(0)], recipe, examinations=[examined(make)]) for make in (flax_classifier, nameless_classifier)
  )
  (x, y), (other, labels) = named.every_sample(), nameless.every_sample()
  np.testing.assert_array_equal(y, labels)
  np.testing.assert_allclose(named.margins, nameless.margins, rtol=1e-4)
  np.testing.assert_allclose(x, other, atol=1e-3)


# The rest needs no training data: networks of the plane with random weights.


def plane(labels, seed):
  draw = np.random.default_rng(seed).standard_normal
  params = {"w": draw((2, 6)), "v": draw((6, len(labels)))}
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
  apply_fn = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
  return kkt_jax.make_classifier(apply_fn, params, (2,), labels=labels, weight_decay=0.1)


@functools.cache
def two():
  """Two classifiers that share label 2, and their examinations; the second's says what is known of the first."""
  first, second = plane((0, 1, 2), 0), plane((5, 2), 1)
  known = examine(first)
  conditions = weight_decay_conditions(second.params, weight_decay=0.1)
  return [first, second], [known, dataclasses.replace(known, classifier=second, conditions=conditions)]


def tiny(codes=3, **schedule):
  exact = Stationarity(1.0, gate_sharpness=0.0)
  return Recipe(generators.table(codes=codes), stationarity=exact, schedule=Schedule(**{"steps": 6} | schedule))


def begin(recipe=None, **settings):
  classifiers, examinations = two()
  return start(classifiers, recipe or tiny(), examinations=examinations, **settings)


def run(recipe=None, **settings):
  classifiers, examinations = two()
  return reconstruct(classifiers, recipe or tiny(), examinations=examinations, **settings)


@functools.cache
def straight():
  """Six steps at once, and what was logged of them."""
  logged = {}
  return run(observer=Observer(log_every=2, on_log=logged.setdefault)), logged


def assert_same(a, b):
  """Bitwise, random keys included."""
  a, b = (own.state._replace(key=jax.random.key_data(own.state.key)) for own in (a, b))
  chex.assert_trees_all_equal(a, b)


def test_what_comes_back_knows_how_it_was_made():
  made, logged = straight()
  assert int(made.state.step) == 6
  assert list(logged) == [2, 4, 6]
  assert {"stationarity/0", "stationarity/1", "duality/0", "range/1", "total"} <= set(logged[2])
  np.testing.assert_allclose(made.margins, np.exp(-made.state.params["alpha"]))
  assert made.margins.shape == (2,)
  for condition, own in zip(made.conditions, two()[1], strict=True):
    assert condition is own.conditions
  assert all(getattr(made.recipe, name) is not None for name in ("multipliers", "terms"))


@pytest.mark.slow
def test_every_sample_is_every_one_that_a_table_can_draw():
  made, _ = straight()
  x, y = made.every_sample()
  # Three codes for each label of the classifier of three and of that of two.
  np.testing.assert_array_equal(y, np.repeat([0, 1, 2, 5, 2], 3))
  assert len(np.unique(np.asarray(x), axis=0)) == 15
  fresh = made.sample(jax.random.key(0), jnp.asarray([0, 1, 2] * 10), t=jnp.zeros(30, int))
  distances = jnp.linalg.norm(fresh[:, None] - x[None, :9], axis=2)
  np.testing.assert_allclose(jnp.min(distances, axis=1), 0.0, atol=1e-6)


def test_samples_are_drawn_from_the_classifiers_that_know_the_label():
  made, _ = straight()
  y = jnp.asarray([0, 1, 5] * 20 + [2] * 40)
  t = made.choose_classifiers(jax.random.key(1), y)
  np.testing.assert_array_equal(t[:60], [0, 0, 1] * 20)
  assert 8 < int(jnp.sum(t[60:])) < 32  # label 2 is known to both; 20, give or take nearly four deviations
  x = made.sample(jax.random.key(0), y)
  assert x.shape == (100, 2)
  assert bool(jnp.all((x >= 0) & (x <= 1)))
  codes = made.sample(jax.random.key(0), y[60:], t=t[60:])
  of_first, of_second = (np.unique(np.asarray(codes)[np.asarray(t[60:]) == own], axis=0) for own in (0, 1))
  assert (len(of_first), len(of_second)) == (3, 3)
  assert not {tuple(own) for own in of_first} & {tuple(own) for own in of_second}


@pytest.mark.parametrize(
  ("y", "t", "message"),
  [
    ([0, 4], None, r"y must hold labels that a classifier knows; no classifier knows \[4\]"),
    ([7, 4, 0], None, r"no classifier knows \[4, 7\]"),
    ([5], [0], "t must hold indices of classifiers that know the label"),
    ([0], [2], "t must hold indices of classifiers that know the label"),
    ([0], [-1], "t must hold indices of classifiers that know the label"),
    ([0, 1], [0], "t must"),
  ],
)
def test_labels_that_nobody_or_not_the_given_classifier_knows_are_refused(y, t, message):
  with pytest.raises(ValueError, match=message):
    straight()[0].sample(jax.random.key(0), jnp.asarray(y), t=None if t is None else jnp.asarray(t))


@pytest.mark.slow
def test_one_label_is_a_list_of_one():
  with pytest.raises(ValueError, match=r"^y must have shape \[S\]; got shape \(\)"):
    begin().sample(jax.random.key(0), 1)
  assert begin().sample(jax.random.key(0), [1]).shape == (1, 2)


def test_sampling_can_be_compiled_and_unknown_labels_are_nan_there():
  made, key, y = begin(), jax.random.key(0), jnp.array([0, 5, 2, 2])
  expected = made.sample(key, y)
  np.testing.assert_allclose(jax.jit(lambda key: made.sample(key, np.asarray(y)))(key), expected, rtol=1e-6)
  np.testing.assert_allclose(jax.jit(made.sample)(key, y), expected, rtol=1e-6)
  x = jax.jit(made.sample)(
    key, jnp.array([0, 4, 2]), t=jnp.array([0, 0, 5])
  )  # nobody knows 4; there is no classifier 5
  np.testing.assert_array_equal(np.isnan(x), [[False] * 2, [True] * 2, [True] * 2])


def test_the_values_of_labels_do_not_matter():
  classifiers, examinations = two()
  names = {0: -3, 1: 0, 2: 10**6, 5: 10**9}
  named = [dataclasses.replace(own, labels=tuple(names[label] for label in own.labels)) for own in classifiers]
  plain = [dataclasses.replace(own, labels=tuple(min(label, 3) for label in own.labels)) for own in classifiers]
  made, same = (reconstruct(own, tiny(steps=2), examinations=examinations) for own in (named, plain))
  chex.assert_trees_all_equal(made.state.params, same.state.params)
  assert made.state.params["theta"][0].shape == (4, 3, 2)
  key = jax.random.key(1)
  np.testing.assert_array_equal(made.sample(key, list(names.values())), same.sample(key, [0, 1, 2, 3]))


def test_label_weights_shift_the_classes_of_every_batch():
  weights = {0: 4.0, 1: 2.0, 2: 0.0, 5: 2.0}
  made = begin(dataclasses.replace(tiny(codes=4), label_weights=weights))
  np.testing.assert_array_equal(np.bincount(made.problem.classes[0]), [8, 4])  # of 12 samples
  np.testing.assert_array_equal(made.problem.classes[1], np.zeros(12))  # label 5; label 2 has no weight
  np.testing.assert_array_equal(made.every_sample()[1], np.repeat([0, 1, 5], 4))
  with pytest.raises(ValueError, match="label_weights must hold a weight of at least 0 for each label"):
    begin(dataclasses.replace(tiny(), label_weights={0: 1.0, 1: 1.0, 2: 1.0}))


@pytest.mark.parametrize(("certified", "steps"), [(1.0, [4]), (0.9, [4, 7, 10]), (0.0, [4, 10])])
def test_training_ends_once_all_samples_are_certified(monkeypatch, certified, steps):
  """After two fifths of the steps, if polishing then proves every one; where it proves none, it is not asked again."""
  polished = []
  monkeypatch.setattr(stages, "polish", lambda own, rounds=12, **_: polished.append(own) or own)
  monkeypatch.setattr(Reconstruction, "certified_share", certified)
  assert int(run(tiny(steps=10)).state.step) == steps[-1]
  assert [int(own.state.step) for own in polished] == steps


def test_further_tables_are_trained_until_nearly_all_samples_are_certified(monkeypatch):
  """Each from a start of its own, and polished beside what was certified before."""
  certified, polished = [4, 6, 10, 11], []

  def polish(own, *_, known=(), **__):
    polished.append((own, [len(one.y) for one in known]))
    return dataclasses.replace(own, exact=(exact.Exact(*[np.zeros((certified[len(polished) - 1], 2))] * 5),))

  monkeypatch.setattr(stages, "polish", polish)
  monkeypatch.setattr(Reconstruction, "certified_share", property(lambda own: len(own.exact[0].y) / 10))
  made = run(tiny(steps=3).with_schedule(tables=5, looks=()))
  assert [known for _, known in polished] == [[], [4], [6]]
  assert len(made.exact[0].y) == 10
  assert int(made.state.step) == 3
  first, second, _ = (np.asarray(own.every_sample()[0]) for own, _ in polished)
  assert np.abs(first - second).max() > 0.01


def test_what_is_certified_is_held_while_a_further_table_is_trained(monkeypatch):
  """Each with the weight of one of six training samples, and the other places of its label with that of the rest."""
  begun = begin()
  assert stages._holding(begun.trainer, ())[0] is begun.trainer  # the equations of single samples do not apply
  monkeypatch.setattr(stages.certificates, "applicable", lambda own: True)
  monkeypatch.setattr(kkt_jax.Examination, "most_samples", 6)
  unit = np.array([[0.2, 0.9], [0.4, 0.1]], np.float32)
  rest = [np.zeros((2, 1))] * 3
  certified = [exact.Exact(unit, np.array([2, 0]), *rest), exact.Exact(unit[:1], np.array([5]), *rest)]
  holding, hold = stages._holding(begun.trainer, certified)
  trained = train(Reconstruction(holding, holding.init(0)))
  free = np.asarray(trained.every_sample()[0])
  np.testing.assert_allclose(free[[6, 0, 9]], [*unit, unit[0]], atol=1e-6)  # of labels 0, 1, 2, 5 and 2
  put = Reconstruction(begun.trainer, hold(trained.state))
  assert 2 * int(trained.state.step) == int(put.state.step) == begun.recipe.schedule.steps  # half of them will do
  np.testing.assert_allclose(put.every_sample()[0], free, atol=1e-6)
  batch = types.SimpleNamespace(t=0, y=jnp.array([0, 0, 0, 1]), logits=jnp.zeros((4, 3)))
  batch.code = jnp.array([0, 1, 2, 0])
  weighed, plain = (own.problem.multipliers.apply(None, None, batch) for own in (holding, begun.trainer))
  np.testing.assert_allclose(weighed / plain, np.array([[1.5], [0.75], [0.75], [1.0]]) * np.ones(3), rtol=1e-5)


@pytest.mark.slow
def test_saved_loaded_and_continued_it_is_bitwise_the_same(tmp_path):
  classifiers, examinations = two()
  partly = train(begin(), 4)
  partly.save(tmp_path)
  loaded = Reconstruction.load(tmp_path, classifiers, tiny(), examinations=examinations)
  assert_same(loaded, partly)
  assert_same(train(loaded), straight()[0])
  assert_same(train(loaded, 4), partly)  # it is there already
  with pytest.raises(CheckpointError, match=r"^recipe must be what the saved state was trained with"):
    Reconstruction.load(tmp_path, classifiers, tiny(steps=7), examinations=examinations)
  for other in (dataclasses.replace(classifiers[1], labels=(2, 5)), plane((5, 2), 9)):
    with pytest.raises(CheckpointError, match=r"^classifiers must be what the saved state was trained with"):
      own = [examinations[0], dataclasses.replace(examinations[1], classifier=other)]
      Reconstruction.load(tmp_path, [classifiers[0], other], tiny(), examinations=own)
  with pytest.raises(CheckpointError, match="step 4"):
    Reconstruction.load(tmp_path, classifiers, tiny(codes=2), examinations=examinations)
  with pytest.raises(FileNotFoundError, match="folder must hold a saved reconstruction"):
    Reconstruction.load(tmp_path / "empty", classifiers, tiny(), examinations=examinations)


def test_what_is_certified_is_saved_and_loaded(tmp_path):
  classifiers, examinations = two()
  criteria = Criteria(distance=0.0125, levels=15)
  proofs = [exact.Exact(*(np.full((k, 2), n) for n in range(5)), criteria) for k in (3, 0)]
  dataclasses.replace(begin(), exact=tuple(proofs)).save(tmp_path)
  loaded = Reconstruction.load(tmp_path, classifiers, tiny(), examinations=examinations)
  assert [own.criteria for own in loaded.exact] == [criteria, criteria]
  chex.assert_trees_all_equal([own[:-1] for own in loaded.exact], [own[:-1] for own in proofs])
  begin().save(tmp_path)
  assert Reconstruction.load(tmp_path, classifiers, tiny(), examinations=examinations).exact == ()


@pytest.mark.slow
def test_free_gates_are_saved_trained_in_parts_and_left_behind_by_a_network(tmp_path):
  recipe = dataclasses.replace(
    tiny(steps=2, match_steps=2, joint_steps=1), stationarity=Stationarity(1.0, free_gates=True)
  )
  classifiers, examinations = two()
  made = train(begin(recipe))
  assert [[own.shape for own in gates] for gates in made.state.params["gates"]] == [[(3, 3, 6)], [(2, 3, 6)]]
  moved = made.state.params["gates"][1][0]
  assert 1e-3 < float(jnp.abs(moved).max()) <= 0.11  # two steps of Adam
  made.save(tmp_path)
  assert_same(Reconstruction.load(tmp_path, classifiers, recipe, examinations=examinations), made)
  parts = train(begin(recipe, microbatch_size=3))
  np.testing.assert_allclose(parts.state.params["gates"][1][0], moved, atol=1e-3)
  assert set(distil(made).state.params) == {"theta", "eta", "alpha"}


def test_a_saver_of_other_classifiers_is_refused(tmp_path):
  with Checkpointer(tmp_path) as saver:
    run(saver=saver, observer=Observer(save_every=3))
    other = [plane((0, 1, 2), 7), two()[0][1]]
    told = [dataclasses.replace(own, classifier=new) for own, new in zip(two()[1], other, strict=True)]
    with pytest.raises(CheckpointError, match=r"^classifiers must be what the saved state was trained with"):
      reconstruct(other, tiny(), examinations=told, saver=saver)


@pytest.mark.slow
def test_a_saver_resumes_an_interrupted_run_and_sees_what_can_already_draw(tmp_path):
  class Stop(Exception):
    pass

  drawn = []

  def on_save(own):
    drawn.append((int(own.state.step), own.sample(jax.random.key(0), jnp.asarray([2])).shape))
    if len(drawn) == 2:
      raise Stop

  with Checkpointer(tmp_path) as saver:
    with pytest.raises(Stop):
      run(saver=saver, observer=Observer(save_every=2, on_save=on_save))
    assert saver.steps() == [2, 4]
    resumed = []
    on_log = lambda step, metrics: resumed.append(step)
    made = run(saver=saver, observer=Observer(save_every=2, log_every=1, on_log=on_log))
  assert drawn == [(2, (1, 2)), (4, (1, 2))]
  assert resumed == [5, 6]
  assert_same(made, straight()[0])


@pytest.mark.slow
class TestRestarts:
  """Nothing moves, so that the chosen start is seen at the end."""

  recipe = dataclasses.replace(
    tiny(steps=5, restarts=3, restart_steps=2, theta=still, eta=still, alpha=still),
    terms={
      "size": Term(2.0, lambda classifier, batch: jnp.mean(jnp.square(batch.x), axis=1)),
      "late": Term(1e3, lambda classifier, batch: -jnp.mean(batch.x, axis=1), lambda progress: 0.0),
    },
  )

  def test_the_start_with_the_least_loss_goes_on(self):
    (classifier, _), (own, _) = two()
    seen = {}
    made = reconstruct(
      [classifier],
      self.recipe,
      seed=5,
      examinations=[own],
      observer=Observer(on_restart=lambda restart, step, metrics: seen.setdefault((restart, step), metrics)),
    )
    assert sorted(seen) == [(restart, step) for restart in range(3) for step in (1, 2)]
    assert all("stationarity" not in metrics for metrics in seen.values())
    best = int(np.argmin([seen[restart, 1]["size"] + seen[restart, 2]["size"] for restart in range(3)]))
    starts = [start([classifier], self.recipe, seed=5 + n, examinations=[own]) for n in range(3)]
    same = [np.array_equal(start.state.params["theta"][0], made.state.params["theta"][0]) for start in starts]
    assert same == [restart == best for restart in range(3)]
    assert int(made.state.step) == 5

  def test_a_resumed_run_tries_none(self):
    class Kept:
      steps, save = (lambda self: [3]), (lambda self, step, state: None)

      def restore(self, like):
        return 3, like._replace(step=jnp.asarray(3, jnp.int32))

    def refuse(*_):
      raise AssertionError

    made = run(self.recipe, saver=Kept(), observer=Observer(on_restart=refuse))
    chex.assert_trees_all_equal(made.state.params, begin(self.recipe).state.params)


def ranged(value_range, **schedule):
  """A reconstruction whose first samples lie far out, of a classifier with inputs of this range."""
  classifier, own = (parts[0] for parts in two())
  classifier = dataclasses.replace(classifier, value_range=value_range)
  recipe = Recipe(generators.table(deviation=9.0), schedule=Schedule(**schedule))
  made = reconstruct([classifier], recipe, examinations=[dataclasses.replace(own, start=None)])
  return made, made.sample(jax.random.key(0), jnp.arange(90) % 3)


@pytest.mark.slow
@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 255.0)])
def test_samples_lie_in_the_range_of_the_classifier(value_range):
  made, x = ranged(value_range, steps=0)
  assert "range" in made.recipe.terms
  assert (float(x.min()), float(x.max())) == value_range


@pytest.mark.slow
def test_without_a_range_samples_are_free():
  made, x = ranged(None, steps=1)
  assert set(made.recipe.terms) == {"duality"}
  assert float(x.min()) < -1 and float(x.max()) > 2


@pytest.mark.slow
def test_without_steps_it_stays_at_the_random_start_which_the_seed_decides():
  assert_same(run(tiny(steps=0), seed=3), begin(tiny(steps=0), seed=3))
  theta = lambda own: own.state.params["theta"][0]
  assert not np.any(np.isclose(theta(begin(seed=3)), theta(begin(seed=4))))


def test_the_margin_starts_where_the_recipe_or_the_weights_say():
  np.testing.assert_allclose(begin(tiny(margin=2.5)).margins, 2.5, rtol=1e-6)
  classifiers, examinations = two()
  said = [dataclasses.replace(own, margin=margin) for own, margin in zip(examinations, (3.0, 4.0), strict=True)]
  started = start(classifiers, tiny(), examinations=said)
  np.testing.assert_allclose(started.margins, [3.0, 4.0], rtol=1e-6)


@pytest.mark.slow
def test_stationarity_decides_on_derivatives_and_conditions_and_nothing_else():
  doubled = lambda own: dataclasses.replace(own.conditions, target=jax.tree.map(lambda t: 2 * t, own.conditions.target))
  exact = Stationarity(1.0, gate_sharpness=0.0, conditions=doubled)
  classifier, own = (parts[0] for parts in two())
  x = jnp.asarray([[0.3, 0.9], [0.5, 0.1]])

  def slope(stationarity):
    made = begin(dataclasses.replace(tiny(), stationarity=stationarity))
    assert made.conditions[0] is own.conditions
    np.testing.assert_array_equal(made.classifiers[0].predict(x), classifier.predict(x))
    _, pull_back = step._evaluate(made.classifiers[0], x, stationarity.compute_dtype)
    return pull_back(jnp.zeros((2, 3)).at[:, 0].set(1.0))[0]["w"]

  expected = jax.grad(lambda p: jnp.sum(classifier.apply_fn(p, x)[:, 0]))(classifier.params)["w"]
  np.testing.assert_allclose(slope(exact), expected, rtol=1e-6)
  for changed in ({"gate_sharpness": 20.0}, {"compute_dtype": "bfloat16"}):
    other = slope(dataclasses.replace(exact, **changed))
    assert 1e-5 < float(jnp.linalg.norm(other - expected) / jnp.linalg.norm(expected)) < 0.3


@pytest.mark.parametrize("sharpness", [0.0, 20.0])
def test_the_derivatives_are_those_of_the_function_in_training(sharpness):
  """Three times as steep as at inference, with the same values."""
  classifier, own = (parts[0] for parts in two())

  def forward(p, x, train):
    logits = classifier.apply_fn(p, x)
    steep = 3 * logits - jax.lax.stop_gradient(2 * logits)
    return kkt_jax.classifiers.Evaluation(steep if train else logits, {})

  given = kkt_jax.make_classifier(forward, classifier.params, (2,), statistics={}, weight_decay=0.1)
  recipe = dataclasses.replace(tiny(), stationarity=Stationarity(1.0, gate_sharpness=sharpness))
  x = jnp.asarray([[0.3, 0.9], [0.5, 0.1]])

  def slope(classifier):
    (made,) = start([classifier], recipe, examinations=[own]).classifiers
    _, pull_back = step._evaluate(made, x, None)
    return pull_back(jnp.ones((2, 3)))[0]["w"]

  np.testing.assert_allclose(slope(given), 3 * slope(classifier), rtol=1e-5)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda c, e: reconstruct([]), "classifiers must hold at least one classifier"),
    (lambda c, e: reconstruct(c[0]), "classifiers must hold at least one classifier, in a sequence; got a Classifier"),
    (lambda c, e: reconstruct([e[0]]), "each of classifiers must be a kkt_jax.Classifier; got Examination"),
    (lambda c, e: reconstruct(c, {"steps": 2}), "recipe must be a kkt_jax.Recipe; got dict"),
    (lambda c, e: reconstruct(c, examinations=e[::-1]), "examinations must be those of the classifiers"),
    (
      lambda c, e: reconstruct([c[0], kkt_jax.make_classifier(lambda w, x: x @ w, jnp.ones((3, 2)), (3,))]),
      r"classifiers must have inputs of one shape; got \[\(2,\), \(3,\)\]",
    ),
    (lambda c, e: reconstruct(c, examinations=e[:1]), "examinations must hold one for each of 2 classifiers; got 1"),
    (lambda c, e: reconstruct(c, tiny(), examinations=e, microbatch_size=4), "microbatch_size must divide"),
    (lambda c, e: Observer(save_every=0), "save_every must be at least 1; got 0"),
  ],
)
def test_what_does_not_fit_is_named(make, message):
  with pytest.raises(ValueError, match=message):
    make(*two())


def test_of_a_sample_and_its_negative_the_one_on_the_side_of_the_guesses_is_kept():
  surer_of_bright = kkt_jax.make_classifier(
    lambda w, x: jnp.sum(x, axis=1)[:, None] * w, jnp.array([[1.0, -1.0]]), (4,)
  )
  dark = np.array([[0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])  # one on a dark ground, and its negative
  start = jnp.full(4, 0.5)
  kept = exact._right_way(surer_of_bright, dark, start, np.array([0.1, 0.1, 0.5, 0.1]), Criteria())
  np.testing.assert_allclose(kept, dark[[0, 0]])
  kept = exact._right_way(surer_of_bright, dark, start, np.full(4, 0.5), Criteria())  # on neither side
  np.testing.assert_allclose(kept, dark[[1, 1]])
  beyond = np.array([[-0.1, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])  # the mirror image of the first leaves the range
  kept = exact._right_way(surer_of_bright, beyond, start, np.full(4, 0.5), Criteria())
  np.testing.assert_allclose(kept, beyond)
  np.testing.assert_allclose(
    exact._right_way(surer_of_bright, beyond, start, np.full(4, 0.5), Criteria(overshoot=0.2))[0], 1 - beyond[0]
  )
