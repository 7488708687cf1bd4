"""Recipes: what is chosen from what the weights say, and what is refused."""

import dataclasses
import functools
import types

from example_networks import random_mlp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kkt_jax import generators
from kkt_jax.analysis import examine, Subspace
from kkt_jax.classifiers import make_classifier
from kkt_jax.generators import Generator
from kkt_jax.kkt import Conditions, losses, multipliers
from kkt_jax.reconstruction import Batch, Recipe, recipes, Schedule, Stationarity, Term, terms


@functools.cache
def examined():
  """A real examination; what it says is replaced as a test needs it."""
  return examine(random_mlp(hidden=(4,))[0], form="max_margin")


def said(*, form="max_margin", weight_decay=None, coupled=False, shape=(2,), value_range=(0.0, 1.0), **changes):
  classifier = dataclasses.replace(
    examined().classifier,
    weight_decay=weight_decay,
    statistics={} if coupled else None,
    input_shape=shape,
    value_range=value_range,
  )
  return dataclasses.replace(examined(), form=form, classifier=classifier, **changes)


KINDS = {
  "batch norm": {"coupled": True},
  "known weight decay": {"form": "weight_decay", "weight_decay": 0.1},
  "weight decay": {"form": "weight_decay"},
  "max margin": {},
  "change": {"form": "change"},
}


def chosen(*kinds, **what):
  return recipes.default([said(**KINDS[kind]) for kind in kinds] or [said(**what)])


@pytest.mark.parametrize(
  ("kind", "measure", "added"),
  [
    ("batch norm", losses.cosine_distance, {"statistics"}),
    ("known weight decay", losses.mean_relative_residual, set()),
    ("weight decay", losses.cosine_distance, {"softmax_distance"}),
    ("max margin", losses.cosine_distance, set()),
    ("change", losses.cosine_distance, set()),
  ],
)
def test_the_default_follows_the_kind_of_classifier(kind, measure, added):
  recipe = chosen(kind)
  assert recipe.stationarity.measure is measure
  assert set(recipe.terms) == {"duality", "range"} | added
  assert all(getattr(recipe, field.name) is not None for field in dataclasses.fields(recipe)[:5])
  # A learned size of the sum is of no use to the angle, and known with a known weight decay.
  assert not recipe.multipliers([said(**KINDS[kind])], FOUR_CODES).scaled


def test_classifiers_of_different_kinds_get_what_suits_all_of_them():
  assert "statistics" not in chosen("batch norm", "max margin").terms
  mixed = chosen("known weight decay", "weight decay")
  assert mixed.stationarity.measure is losses.cosine_distance
  assert "softmax_distance" in mixed.terms
  assert "softmax_distance" not in chosen("weight decay", "max margin").terms


def test_priors_are_for_inputs_that_have_them():
  assert set(chosen(value_range=None).terms) == {"duality"}
  images = chosen(shape=(8, 8, 1))
  assert images.terms["total_variation"].weight == 16.0
  assert "total_variation" not in chosen(shape=(8, 8)).terms
  assert "total_variation" not in chosen(shape=(1, 8, 1)).terms
  subspace = Subspace(jnp.full((8, 8, 1), 0.5), jnp.eye(64)[:, :16], jnp.ones(16))
  # A quarter of all 64 dimensions: the less it leaves open, the less a prior is needed.
  assert chosen(shape=(8, 8, 1), subspace=subspace).terms["total_variation"].weight == 4.0
  assert chosen(shape=(8, 8, 1), subspace=subspace, coupled=True).terms["total_variation"].weight == 6.25


def test_a_subspace_asks_for_as_many_samples_as_it_has_dimensions_and_a_fifth_more():
  of = lambda rank: Subspace(jnp.full((8, 8, 1), 0.5), jnp.eye(64)[:, :rank], jnp.ones(rank))
  codes = lambda rank: chosen(shape=(8, 8, 1), subspace=of(rank)).generator([said(shape=(8, 8, 1))]).codes
  classes = examined().classifier.num_classes
  assert codes(10) == 20  # the least
  assert codes(60) == -(-72 // classes)


def test_the_softmax_distance_rises_once_the_stationarity_counts():
  recipe = chosen("weight decay")
  rising = recipe.terms["softmax_distance"].schedule
  begin = recipe.stationarity.begin
  assert begin == 0.2
  np.testing.assert_allclose([rising(p) for p in (0.0, begin, 0.5, 0.8, 1.0)], [0.0, 0.0, 0.5, 1.0, 1.0], atol=1e-6)


def test_a_schedule_that_says_nothing_of_the_multipliers_leaves_theirs_to_the_classifier():
  for kind in KINDS.values():
    chosen = recipes.default([said(**kind)])
    recipe = recipes.complete(Recipe(schedule=Schedule(steps=7)), [said(**kind)])
    made = [own.schedule.eta(3) for own in (chosen, recipe)]
    first, second = (optimizer.update({"w": 1.0}, optimizer.init({"w": 0.0}))[0]["w"] for optimizer in made)
    assert first == second
    assert recipe.schedule.steps == 7
  assert Recipe().with_schedule(steps=3).schedule.steps == 3


def test_complete_keeps_what_is_given():
  mine = Stationarity(3.0)
  recipe = recipes.complete(Recipe(stationarity=mine, label_weights={0: 1.0}), [said()])
  assert recipe.stationarity is mine
  assert recipe.label_weights == {0: 1.0}
  assert set(recipe.terms) == {"duality", "range"}


def test_what_is_changed_is_changed_and_the_rest_stays():
  recipe = chosen("batch norm")
  other = recipe.with_weights(stationarity=0.0, statistics=2.0)
  assert other.stationarity == dataclasses.replace(recipe.stationarity, weight=0.0)
  assert other.terms["statistics"] == dataclasses.replace(recipe.terms["statistics"], weight=2.0)
  assert other.terms["duality"] is not recipe.terms["duality"] and other.terms["duality"] == recipe.terms["duality"]
  mine = Term(1.0, terms.binarisation)
  assert recipe.with_terms(mine=mine).terms == {**recipe.terms, "mine": mine}
  assert recipe.with_schedule(steps=7).schedule == dataclasses.replace(recipe.schedule, steps=7)
  assert recipe.with_stationarity(begin=0.5).stationarity.begin == 0.5
  scaled = recipe.with_factors(stationarity=3.0, duality=0.5, mine=2.0)  # which is none of its terms
  assert scaled.stationarity == dataclasses.replace(recipe.stationarity, weight=3 * recipe.stationarity.weight)
  assert scaled.terms["duality"].weight == recipe.terms["duality"].weight / 2
  assert scaled.terms["statistics"] == recipe.terms["statistics"] and "mine" not in scaled.terms


@pytest.mark.parametrize(
  ("name", "hint"),
  [("statistic", " Did you mean statistics?"), ("staionarity", " Did you mean stationarity?"), ("zzz", "")],
)
def test_weights_of_terms_that_do_not_exist_are_refused(name, hint):
  known = "weights must name terms of the recipe, stationarity, duality, range, statistics; got"
  with pytest.raises(ValueError) as caught:
    chosen("batch norm").with_weights(**{name: 1.0})
  assert str(caught.value) == f"{known} '{name}'.{hint}"


@pytest.mark.parametrize(
  ("change", "part"),
  [
    (lambda recipe: recipe.with_weights(duality=1.0), "stationarity"),
    (lambda recipe: recipe.with_factors(duality=1.0), "stationarity"),
    (lambda recipe: recipe.with_stationarity(begin=0.1), "stationarity"),
    (lambda recipe: recipe.with_terms(mine=Term(1.0, terms.in_range)), "terms"),
    (lambda recipe: dataclasses.replace(recipe, stationarity=Stationarity(1.0)).with_weights(duality=1.0), "terms"),
  ],
)
def test_a_part_that_is_left_to_the_classifiers_cannot_be_changed(change, part):
  message = rf"^{part} must be given before it can be changed; .*kkt_jax\.reconstruction\.recipes\.complete\("
  with pytest.raises(ValueError, match=message):
    change(Recipe())


@pytest.mark.parametrize("name", recipes.RESERVED)
def test_terms_named_like_other_metrics_are_refused(name):
  with pytest.raises(ValueError, match=f"terms must not be named like other metrics.*got {name}"):
    Recipe(terms={name: Term(1.0, terms.in_range)})
  with pytest.raises(ValueError, match=f"got {name}"):
    chosen("max margin").with_terms(**{name: Term(1.0, terms.in_range)})


@pytest.mark.parametrize("measure", [losses.cosine_distance, losses.relative_residual, losses.mean_relative_residual])
def test_a_target_that_follows_alpha_would_fool_relative_measures(measure):
  with pytest.raises(ValueError, match=r"target_exponent must be 0 with a relative measure.*got 2\.0"):
    Stationarity(1.0, measure, target_exponent=2.0)
  Stationarity(1.0, losses.absolute_residual, target_exponent=2.0)


@pytest.mark.parametrize(
  ("make", "named"),
  [
    (lambda: Stationarity(-1.0), "weight must be at least 0"),
    (lambda: Stationarity(float("nan")), "weight must be"),
    (lambda: Stationarity(float("inf")), "weight must be finite"),
    (lambda: Stationarity(1.0, begin=-1), "begin must be at least 0"),
    (lambda: Stationarity(1.0, ramp=-1), "ramp must be at least 0"),
    (lambda: Stationarity(1.0, gate_sharpness=-1), "gate_sharpness must be at least 0"),
    (lambda: Stationarity(1.0, gate_sharpness=0, free_gates=True), "gate_sharpness must be positive with free_gates"),
    (lambda: Term(-1.0, terms.in_range), "weight must be at least 0"),
    (lambda: Term(float("inf"), terms.in_range), "weight must be finite"),
    (lambda: Schedule(steps=-1), "steps must be at least 0"),
    (lambda: Schedule(restarts=0), "restarts must be at least 1"),
    (lambda: Schedule(restarts=2), "restart_steps must be at least 1 with restarts"),
    (lambda: Schedule(steps=10, restarts=2, restart_steps=10), "less than steps = 10; got 10"),
    (lambda: Schedule(steps_per_call=0), "steps_per_call must be at least 1"),
    (lambda: Schedule(margin=0.0), "margin must be positive"),
  ],
)
def test_bad_settings_are_named(make, named):
  with pytest.raises(ValueError, match=named):
    make()


def test_the_three_groups_of_unknowns_have_optimizers_of_their_own():
  rates = {}
  sgd = lambda name, rate: lambda steps: rates.setdefault(name, steps) and optax.sgd(rate)
  schedule = Schedule(steps=9, theta=sgd("theta", 1.0), eta=sgd("eta", 0.1), alpha=lambda steps: optax.set_to_zero())
  optimizer = schedule.optimizer()
  params = {
    "theta": {"w": jnp.ones(2)},
    "eta": {"multipliers": jnp.ones(2), "log_scale": jnp.ones(1)},
    "alpha": jnp.ones(1),
    "gates": [[jnp.ones(3)]],
  }
  updates, _ = optimizer.update(params, optimizer.init(params))
  np.testing.assert_allclose(updates["theta"]["w"], -1.0)
  np.testing.assert_allclose(updates["gates"][0][0], -1.0)
  np.testing.assert_allclose(updates["eta"]["log_scale"], -0.1)
  np.testing.assert_allclose(updates["alpha"], 0.0)
  assert rates == {"theta": 9, "eta": 9}


def test_adam_holds_its_rate_for_a_third_and_falls_to_a_fiftieth_of_it():
  # A constant gradient: Adam's steps are as long as the learning rate.
  optimizer = recipes.adam(0.3)(30)
  gradient, state = {"w": jnp.ones(1)}, None
  state = optimizer.init(gradient)
  update, rates = jax.jit(optimizer.update), []
  for _ in range(31):
    updates, state = update(gradient, state)
    rates.append(-float(updates["w"][0]))
  np.testing.assert_allclose(rates[:11], 0.3, rtol=1e-3)
  # Cosine over 20 steps: (1 - .02) (1 + cos(pi k / 20)) / 2 + .02.
  np.testing.assert_allclose(rates[20], 0.3 * (0.98 / 2 + 0.02), rtol=1e-3)
  np.testing.assert_allclose(rates[30], 0.3 * 0.02, rtol=1e-3)


CODES = (2, 0, 3, 2)  # which sample of its label each one of the batch is
FOUR_CODES = Generator(None, None, None, 1, 4, codes=4)


class TestMultipliers:
  """Two classifiers, of 2 and of 3 classes."""

  classifiers = [make_classifier(lambda w, x: x @ w, jnp.arange(2.0 * c).reshape(2, c), (2,)) for c in (2, 3)]
  examinations = [types.SimpleNamespace(classifier=classifier) for classifier in classifiers]

  def batch(self, t):
    x = jnp.array([[1.0, -1.0], [0.5, 2.0], [0.3, 0.1], [-1.0, 0.0]])
    y = jnp.array([0, 1, 0, 1])
    logits = x @ self.classifiers[t].params
    return Batch(x, x, y, y, jnp.array(CODES), t, jnp.zeros(()), logits)

  @pytest.mark.parametrize("t", [0, 1])
  def test_of_each_kind_there_is_one_for_each_class_of_the_own_classifier(self, t):
    batch, classifier = self.batch(t), self.classifiers[t]
    for make in (recipes.network_multipliers(hidden=(3,)), recipes.free_multipliers(), recipes.runner_up_multipliers()):
      made = make(self.examinations, FOUR_CODES)
      mu = made.apply(made.init(jax.random.key(0)), classifier, batch)
      assert mu.shape == (4, classifier.num_classes)
      assert bool(jnp.all(mu >= 0)) and not made.scaled

  @pytest.mark.parametrize(
    "make", [recipes.free_multipliers, recipes.runner_up_multipliers, recipes.network_multipliers]
  )
  def test_labels_of_any_value_have_multipliers_of_their_own(self, make):
    named = [dataclasses.replace(own, labels=(-7, 10**6, 10**7)[: own.num_classes]) for own in self.classifiers]
    other = [types.SimpleNamespace(classifier=classifier) for classifier in named]
    made, same = (make()(own, FOUR_CODES) for own in (self.examinations, other))
    eta, batch = made.init(jax.random.key(0)), self.batch(0)
    assert jax.tree.map(jnp.shape, same.init(jax.random.key(0))) == jax.tree.map(jnp.shape, eta)
    expected = made.apply(eta, self.classifiers[0], batch)
    found = same.apply(eta, named[0], batch._replace(y=jnp.array([-7, 10**6])[batch.y]))
    np.testing.assert_array_equal(found, expected)

  def test_softmax_multipliers_are_the_probabilities_and_have_nothing_to_learn(self):
    made = recipes.softmax_multipliers()(self.examinations, FOUR_CODES)
    assert made.init(jax.random.key(0)) is None
    np.testing.assert_allclose(
      made.apply(None, self.classifiers[1], self.batch(1)), jax.nn.softmax(self.batch(1).logits)
    )

  def test_free_multipliers_follow_their_sample_wherever_it_is_in_the_batch(self):
    made = recipes.free_multipliers(positive=jnp.abs)(self.examinations, FOUR_CODES)
    eta = jnp.arange(72.0).reshape(2, 3, 4, 3)
    y, code = self.batch(0).y, jnp.array(CODES)
    np.testing.assert_array_equal(made.apply(eta, self.classifiers[0], self.batch(0)), eta[0, y, code, :2])
    np.testing.assert_array_equal(made.apply(eta, self.classifiers[1], self.batch(1)), eta[1, y, code])

  def test_runner_up_multipliers_are_on_the_runner_up(self):
    made = recipes.runner_up_multipliers(scaled=True)(self.examinations, FOUR_CODES)
    assert made.scaled
    eta = jnp.arange(1.0, 25.0).reshape(2, 3, 4, 1)
    own = eta[1, self.batch(1).y, jnp.array(CODES)]
    mu = made.apply(eta, self.classifiers[1], self.batch(1))
    np.testing.assert_array_equal(mu, multipliers.on_runner_up(own, self.batch(1).logits, self.batch(1).classes))
    np.testing.assert_array_equal(jnp.sum(mu, axis=1), own[:, 0])

  @pytest.mark.parametrize("make", [recipes.free_multipliers, recipes.runner_up_multipliers])
  def test_multipliers_of_single_samples_need_samples_that_can_be_counted(self, make):
    with pytest.raises(ValueError, match="generator of finitely many"):
      make()(self.examinations, FOUR_CODES._replace(codes=0))


def test_stationarity_is_weighed_by_what_a_tensor_is_whatever_its_name():
  params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 2)), "d": jnp.ones(2)}
  roles = {"a": "first kernel", "b": "other", "c": "kernel", "d": "last bias"}
  own = dataclasses.replace(examined(), conditions=Conditions(params, params), roles=roles)
  weighed = recipes.weighed_conditions(own)
  # The weights of the squares, relative to one another: 8, 1, 4 and none.
  squares = {
    name: float(jnp.sum((weighed.mask[name] * weighed.target[name]) ** 2)) / params[name].size for name in params
  }
  np.testing.assert_allclose([squares[n] / squares["b"] for n in "abcd"], [8.0, 1.0, 4.0, 0.0], rtol=1e-5)


def test_a_table_has_two_guesses_for_each_sample_that_can_be_certified():
  def codes(dimension, classes):
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (784, dimension)))[0]
    subspace = Subspace(jax.random.uniform(jax.random.key(1), (28, 28, 1)), basis, jnp.ones(dimension))
    examination = said(shape=(28, 28, 1), subspace=subspace)
    classifier = dataclasses.replace(examination.classifier, labels=tuple(range(classes)))
    return generators.codes_for([dataclasses.replace(examination, classifier=classifier)])

  assert codes(249, 5) == 100  # 250 samples around their mean
  assert codes(249, 10) == codes(99, 10) == 50  # the least
  assert codes(700, 5) == 50  # with 701 samples nothing is certified
  assert generators.codes_for([said(shape=(28, 28, 1))]) == 50  # nor without a subspace
