"""The training loop: it goes down, resumes bitwise, compiles once, names its failures, and T = 1 is a case of T.

Compiling is what takes time here: tests with equal settings share one compiled step.
"""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kkt_jax import generators, priors
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifiers import make_classifier, relaxation
from kkt_jax.kkt import Conditions, losses, multipliers, weight_decay_conditions
from kkt_jax.reconstruction import loop, Observer, Problem, recipes, Term, terms, TrainingDiverged, TrainState
from kkt_jax.reconstruction.coordinates import Equations
from kkt_jax.reconstruction.loop import fit
from kkt_jax.reconstruction.step import batch_samples, class_sequence, init_state, make_train_step, TrainStep

CODES = 4


def linear_classifier(labels=(0, 1, 2), seed=0):
  w = jax.random.normal(jax.random.key(seed), (2, len(labels)))
  return make_classifier(lambda w, x: x @ w, w, (2,), labels=labels, value_range=None)


def examined(classifier):
  """What generators and multipliers ask of an examination."""
  return types.SimpleNamespace(
    classifier=classifier, origin=jnp.full(2, 0.5), tells_mean=False, subspace=None, share=1.0
  )


ONE, TWO = (linear_classifier(),), (linear_classifier(), linear_classifier((3, 4, 2), seed=7))
spread = lambda classifier, batch: priors.repulsion(batch.x, batch.y, bandwidth=1.0)


def network(batch_norm):
  def make(examinations):
    return generators.MLPGenerator(
      sample_shape=(2,), num_labels=5, num_classifiers=2, hidden=(8,), output_scale=1.0, batch_norm=batch_norm
    )

  return generators.network(make, noise=generators.normal_noise(3), noise_dim=3, batch_size=12)


def fixed_table(examinations):
  """Every step has the same noise: the first code of a class first, and so on."""
  noise = lambda key, progress, classes: generators.stratified_noise(1)(jax.random.key(0), progress, classes)
  return generators.table(codes=CODES)(examinations)._replace(noise=noise)


def equations_of(classifiers, conditions):
  return [Equations(*pair) for pair in zip(classifiers, conditions, strict=True)]


@dataclasses.dataclass(frozen=True)
class Setup:
  """A tiny problem: linear classifiers of the plane, their conditions, a start and a compiled step."""

  problem: Problem
  step: TrainStep
  state: TrainState
  classifiers: tuple
  conditions: tuple

  @property
  def equations(self):
    return equations_of(self.classifiers, self.conditions)

  def run(self, num_steps, state=None, *, saver=None, steps_per_call=1, **observed):
    step = lambda state, count: self.step(state, self.classifiers, self.equations, count)
    settings = {"saver": saver, "steps_per_call": steps_per_call, "observer": Observer(**observed)}
    return fit(step, self.state if state is None else state, num_steps=num_steps, **settings)

  def once(self, state=None):
    return self.step(self.state if state is None else state, self.classifiers, self.equations, None)


def setup(
  classifiers=ONE,
  *,
  generator=None,
  tied=True,
  own=None,
  stationarity=None,
  loss_terms=None,
  optimizer=None,
  num_steps=100,
  margin=None,
  **settings,
):
  """``tied``: softmax multipliers, or the network h; ``own``: other ones. A term that is not given is left out."""
  examinations = [examined(classifier) for classifier in classifiers]
  generator = (generator or generators.table(codes=CODES))(examinations)
  mu = own or (recipes.softmax_multipliers() if tied else recipes.network_multipliers(hidden=(8,), scaled=True))
  problem = Problem(
    generator=generator,
    multipliers=mu(examinations, generator),
    stationarity=stationarity or recipes.Stationarity(1.0, losses.relative_residual),
    terms=loss_terms or {},
    optimizer=optimizer or optax.adam(1e-2),
    classes=[class_sequence(classifier, generator.batch_size) for classifier in classifiers],
    num_steps=num_steps,
    **settings,
  )
  conditions = tuple(weight_decay_conditions(classifier.params, weight_decay=0.1) for classifier in classifiers)
  theta, statistics = problem.generator.init(jax.random.key(1))
  state = init_state(
    jax.random.key(2),
    problem,
    classifiers,
    equations_of(classifiers, conditions),
    theta=theta,
    statistics=statistics,
    eta=problem.multipliers.init(jax.random.key(3)),
    margins=[margin] * len(classifiers),
  )
  return Setup(problem, make_train_step(problem), state, classifiers, conditions)


@functools.cache
def usual():
  """Everything at once: two classifiers, a generator with batch norm, the network h, duality and a prior."""
  loss_terms = {"duality": Term(0.1, terms.duality(delta=0.1)), "spread": Term(0.1, spread)}
  return setup(TWO, generator=network(batch_norm=True), tied=False, loss_terms=loss_terms)


def assert_states_equal(a, b):
  """Bitwise, random keys included."""
  chex.assert_trees_all_equal(a._replace(key=jax.random.key_data(a.key)), b._replace(key=jax.random.key_data(b.key)))


class Kept:
  """A saver in memory."""

  def __init__(self):
    self.states = {}

  def steps(self):
    return sorted(self.states)

  def save(self, step, state):
    self.states[step] = state

  def restore(self, like):
    return max(self.states.items()) if self.states else None


# What a step does.


def test_all_unknowns_move_the_loss_falls_and_every_logged_step_is_reported_once_and_in_order():
  logged = {}
  own = usual()
  after = own.run(121, log_every=40, on_log=lambda step, metrics: logged.setdefault(step, metrics))
  assert list(logged) == [40, 80, 120, 121]
  first = loop._floats(own.once()[1])
  for t in (0, 1):
    assert logged[121][f"stationarity/{t}"] < 0.7 * first[f"stationarity/{t}"]
  for group in ("theta", "eta", "alpha"):
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), own.state.params[group], after.params[group])
    assert min(jax.tree.leaves(moved)) > 0, group
  assert float(jnp.abs(after.params["alpha"] - own.state.params["alpha"]).min()) > 0


def test_the_step_compiles_once():
  own = usual()
  own.run(3)
  assert own.step._cache_size() == 1


def test_step_reports_the_terms_that_make_up_the_total_over_all_classifiers():
  _, metrics = usual().once()
  assert all(metrics[name].shape == (2,) for name in ("stationarity", "residual", "duality", "spread", "margin"))
  expected = sum(
    weight * metrics[name].sum() for name, weight in {"stationarity": 1, "duality": 0.1, "spread": 0.1}.items()
  )
  np.testing.assert_allclose(metrics["total"], expected, rtol=1e-5)


@pytest.mark.slow
def test_one_classifier_is_the_case_t_equal_1():
  # Samples of their own, tied multipliers and plain gradient descent: two classifiers at once are each of them alone.
  settings = {
    "generator": fixed_table,
    "loss_terms": {"duality": Term(0.1, terms.duality(delta=0.1))},
    "optimizer": optax.sgd(1e-2),
  }
  together, alone = setup(TWO, **settings), setup(TWO[1:], **settings)
  after = together.run(5).params
  of_own_labels = lambda theta: theta[1][2:]  # 2, 3 and 4
  theta, alpha = [of_own_labels(together.state.params["theta"])], together.state.params["alpha"][1:]
  finished = alone.run(5, alone.state._replace(params={**alone.state.params, "theta": theta, "alpha": alpha})).params
  np.testing.assert_allclose(finished["theta"][0], of_own_labels(after["theta"]), rtol=1e-5)
  np.testing.assert_allclose(finished["alpha"][0], after["alpha"][1], rtol=1e-5)
  assert not np.any(np.isclose(theta[0], of_own_labels(after["theta"])))


@functools.cache
def of_measure(measure, **changes):
  return setup(stationarity=recipes.Stationarity(1.0, measure, **changes))


def sums_of(own):
  """The stationarity sum of the next step's batch, written out."""
  (x, y), *_ = batch_samples(
    own.problem, own.state._replace(key=jax.random.split(own.state.key, 3)[0]), own.classifiers
  )
  w = own.classifiers[0].params
  probabilities = jax.nn.softmax(x @ w)
  # grad of sum_c p_c (Phi_y - Phi_c) by W, for Phi = x W: x times (one-hot of y, less p, as p sums to 1).
  return jnp.mean(jnp.einsum("mi,mc->mic", x, jax.nn.one_hot(y, 3) - probabilities), axis=0)


@pytest.mark.parametrize(
  "measure", [losses.cosine_distance, lambda conditions, sums: 3.0 * jnp.sum(jnp.abs(conditions.target - sums))]
)
def test_stationarity_is_the_given_measure_of_the_mean_over_the_batch(measure):
  own = of_measure(measure)
  _, metrics = own.once()
  sums = sums_of(own)
  np.testing.assert_allclose(metrics["stationarity"][0], measure(own.conditions[0], sums), rtol=1e-4)
  np.testing.assert_allclose(metrics["total"], metrics["stationarity"][0], rtol=1e-6)
  target = own.conditions[0].target
  relative = float(jnp.sum((target - sums) ** 2) / jnp.sum(target**2))
  cosine = float(jnp.sum(target * sums) / jnp.sqrt(jnp.sum(target**2) * jnp.sum(sums**2)))
  logged = 1 - cosine * abs(cosine) if measure is losses.cosine_distance else relative
  np.testing.assert_allclose(metrics["residual"][0], logged, rtol=1e-4)


@pytest.mark.parametrize("free_gates", [False, True])
def test_gates_at_kinks_are_learned_if_they_are_free(free_gates):
  """All units rest on their kink at all samples, which are kept; their gates shall be .2 and .9 instead of .5."""
  params = {"w": jnp.zeros((2, 6)).at[1].set(1.0), "v": jax.random.normal(jax.random.key(0), (6, 3))}
  apply_fn = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
  network = relaxation.relaxed(make_classifier(apply_fn, params, (2,), value_range=None), 20.0)
  labels = lambda params: {name: name if name == "gates" else "others" for name in params}
  own = setup(
    (network,),
    generator=fixed_table,
    stationarity=recipes.Stationarity(1.0, losses.relative_residual, free_gates=free_gates),
    optimizer=optax.partition({"gates": optax.adam(0.1), "others": optax.set_to_zero()}, labels),
    margin=1.0,
  )
  own.state.params["theta"][0] = own.state.params["theta"][0].at[..., 1].set(-0.5)  # samples start around .5
  ((x, y),) = batch_samples(own.problem, own.state, own.classifiers)
  given = [jnp.tile(jnp.array([0.2, 0.9]), (len(x), 3))]
  sums = losses.stationarity_sum(
    lambda p, x: relaxation.given_gates(apply_fn)(p, x, given),
    params,
    x,
    y,
    multipliers.from_softmax(jnp.zeros((len(x), 3))),
  )
  mask = jax.tree.map(jnp.ones_like, params)
  residuals = []
  own = dataclasses.replace(own, conditions=(Conditions(sums, mask),))
  own.run(100, log_every=1, on_log=lambda step, metrics: residuals.append(metrics["residual"]))
  assert residuals[0] > 0.05
  assert (residuals[-1] < 1e-4) == free_gates
  assert ("gates" in own.state.params) == free_gates


def test_the_target_can_follow_alpha():
  plain, following = of_measure(losses.absolute_residual), of_measure(losses.absolute_residual, target_exponent=2.0)
  start = plain.state._replace(params={**plain.state.params, "alpha": jnp.log(jnp.array([3.0]))})
  after, metrics = following.once(start)
  # e^(2 log 3) = 9 times the target, by alpha or by hand.
  scaled = [dataclasses.replace(plain.conditions[0], target=9.0 * plain.conditions[0].target)]
  by_hand, expected = plain.step(start, plain.classifiers, equations_of(plain.classifiers, scaled), None)
  np.testing.assert_allclose(metrics["stationarity"], expected["stationarity"], rtol=1e-5)
  assert float(by_hand.params["alpha"][0]) == float(start.params["alpha"][0])  # a constant gives alpha no gradient
  assert float(after.params["alpha"][0]) != float(start.params["alpha"][0])


def test_weights_may_follow_the_progress_of_the_training():
  own = setup(
    stationarity=recipes.Stationarity(2.0, losses.relative_residual, begin=0.25, ramp=0.5),
    loss_terms={"range": Term(3.0, lambda classifier, batch: jnp.ones(()), lambda progress: progress**2)},
    num_steps=8,
  )
  totals = []
  state = own.state
  for step in range(8):
    state, metrics = own.once(state)
    progress = step / 8
    ramp = min(max((progress - 0.25) / 0.5, 0.0), 1.0)
    expected = 2.0 * ramp * float(metrics["stationarity"][0]) + 3.0 * progress**2
    np.testing.assert_allclose(metrics["total"], expected, rtol=1e-5)
    totals.append(float(metrics["total"]))
  assert totals[0] == 0.0


def test_a_term_without_weight_is_not_computed():
  def fails(classifier, batch):
    raise AssertionError

  _, metrics = setup(
    stationarity=recipes.Stationarity(0.0), loss_terms={"off": Term(0.0, fails), "range": Term(1.0, terms.in_range)}
  ).once()
  assert set(metrics) == {"range", "total", "margin", "gradient_norm"}


@pytest.mark.slow
def test_free_multipliers_are_pulled_to_the_least_one():
  # One number for each of 12 samples, in a table; without stationarity only what is missing to 0.5 counts.
  own = setup(
    own=recipes.runner_up_multipliers(),
    stationarity=recipes.Stationarity(0.0),
    loss_terms={"least_multiplier": Term(1.0, terms.least_multiplier(0.5))},
    optimizer=optax.adam(1e-2),
  )
  start = own.state.params["eta"]["multipliers"]
  after, metrics = own.step(own.state, own.classifiers, own.equations, 300)
  before = own.once()[1]["least_multiplier"][0]
  # Mean of the squares of 0.5 - raw where raw is below 0.5.
  np.testing.assert_allclose(before, jnp.mean(jnp.square(jax.nn.relu(0.5 - start))), rtol=1e-5)
  moved = after.params["eta"]["multipliers"]
  np.testing.assert_allclose(jnp.where(start < 0.5, moved, 0.5), 0.5, atol=0.1)  # Adam overshoots a little
  np.testing.assert_array_equal(moved[start > 0.5], start[start > 0.5])  # enough is enough
  assert 0 < int(jnp.sum(start > 0.5)) < 12


@pytest.mark.slow
def test_free_multipliers_are_drawn_to_the_softmax():
  own = setup(
    own=recipes.free_multipliers(),
    generator=fixed_table,
    stationarity=recipes.Stationarity(0.0),
    loss_terms={"softmax_distance": Term(1.0, terms.softmax_distance)},
    optimizer=optax.partition(
      {"on": optax.adam(5e-2), "off": optax.set_to_zero()}, {"theta": "off", "eta": "on", "alpha": "off"}
    ),
  )
  first = float(own.once()[1]["softmax_distance"][0])
  after, metrics = own.step(own.state, own.classifiers, own.equations, 300)
  assert first > 0.01
  assert float(metrics["softmax_distance"][0]) < 1e-3
  (x, y), *_ = batch_samples(own.problem, after, own.classifiers)
  code = np.arange(len(y)) // own.classifiers[0].num_classes  # classes are dealt in turn
  mu = jax.nn.softplus(after.params["eta"]["multipliers"][0, y, code])
  np.testing.assert_array_less(multipliers.softmax_distance(mu, x @ own.classifiers[0].params, y), 1e-3)


# The start.


def test_scaled_multipliers_start_with_sums_as_long_as_their_targets_and_alpha_at_the_given_margin():
  length = lambda conditions, sums: jnp.linalg.norm(sums) / jnp.linalg.norm(conditions.target)
  own = setup(generator=fixed_table, tied=False, stationarity=recipes.Stationarity(1.0, length), margin=2.5)
  np.testing.assert_allclose(jnp.exp(-own.state.params["alpha"]), 2.5, rtol=1e-6)
  np.testing.assert_allclose(own.once()[1]["stationarity"], 1.0, rtol=1e-5)
  assert abs(float(own.state.params["eta"]["log_scale"][0])) > 0.05  # it was not as long before


def test_multipliers_that_are_not_scaled_have_no_scale():
  assert float(of_measure(losses.absolute_residual).state.params["eta"]["log_scale"][0]) == 0.0


def test_a_margin_that_is_not_given_is_the_median_of_the_first_samples():
  own = setup()
  _, key, _ = jax.random.split(jax.random.key(2), 3)
  (x, y), *_ = batch_samples(own.problem, own.state._replace(key=key), own.classifiers)
  median = jnp.median(jnp.abs(losses.runner_up_margin(x @ own.classifiers[0].params, y)))
  np.testing.assert_allclose(jnp.exp(-own.state.params["alpha"][0]), median, rtol=1e-5)


def test_bad_starts_are_named():
  with pytest.raises(
    ValueError, match=r"margin must be given: the first samples have none that is positive; got \[-1.0\]"
  ):
    setup(margin=-1.0)
  broken = lambda examinations: generators.table(codes=1)(examinations)._replace(
    init=lambda key: ([jnp.full((3, 1, 2), jnp.nan)], {})
  )
  with pytest.raises(ValueError, match="theta must be finite"):
    setup(generator=broken)


# The loop.


def test_a_resumed_run_is_bitwise_the_uninterrupted_one_whatever_is_logged_and_saved(tmp_path):
  own = usual()
  straight = own.run(9)
  saved = []
  with Checkpointer(tmp_path) as checkpointer:
    own.run(4, saver=checkpointer, save_every=3, log_every=1, on_save=lambda state: saved.append(int(state.step)))
    assert saved == checkpointer.steps() == [3, 4]
    step, restored = checkpointer.restore(own.state)
  assert step == 4
  assert_states_equal(own.run(9, restored), straight)


def test_steps_in_one_call_are_the_same_steps_and_need_no_common_grid():
  own = of_measure(losses.cosine_distance)
  single = own.run(7)
  steps = []
  together = own.run(7, steps_per_call=3, log_every=4, save_every=5, on_log=lambda step, _: steps.append(step))
  assert int(together.step) == 7
  assert steps == [4, 7]
  chex.assert_trees_all_close(single.params, together.params, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["log_every", "save_every", "steps_per_call"])
def test_intervals_below_one_are_refused(name):
  with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
    usual().run(1, **{name: 0})


def test_nan_in_a_prior_stops_the_run_names_the_term_and_keeps_the_last_good_state():
  poison = lambda classifier, batch: jnp.where(batch.alpha > 0.015, jnp.nan, batch.alpha)  # alpha rises by 0.01 a step
  own = setup(
    stationarity=recipes.Stationarity(0.0),
    loss_terms={"poison": Term(1.0, lambda classifier, batch: -poison(classifier, batch))},
    margin=1.0,
  )
  kept = Kept()
  with pytest.raises(TrainingDiverged, match="poison became nan at or before step 4"):
    own.run(8, saver=kept, save_every=2)
  assert kept.steps() == [2]


def test_a_nan_that_only_the_gradient_has_is_caught_before_it_is_saved():
  kinked = lambda classifier, batch: jnp.linalg.norm(0.0 * batch.x)  # value 0, gradient NaN
  own = setup(stationarity=recipes.Stationarity(0.0), loss_terms={"kinked": Term(1.0, kinked)})
  kept = Kept()
  with pytest.raises(TrainingDiverged, match="gradient_norm became nan"):
    own.run(1, saver=kept, save_every=1)
  assert kept.steps() == []


def test_an_interruption_saves_once_more_and_is_passed_on():
  def interrupt(step, metrics):
    if step == 2:
      raise KeyboardInterrupt

  own, kept = of_measure(losses.cosine_distance), Kept()
  with pytest.raises(KeyboardInterrupt):
    own.run(9, saver=kept, log_every=1, on_log=interrupt)
  (step,) = kept.steps()
  assert 2 <= step < 9
  assert_states_equal(own.run(9, kept.states[step]), own.run(9))


# Batches.


def test_a_batch_holds_every_class_equally_often_or_as_its_weights_say():
  classifier = linear_classifier((4, 1, 3))
  np.testing.assert_array_equal(class_sequence(classifier, 7), [0, 1, 2, 0, 1, 2, 0])
  weighed = class_sequence(classifier, 100, {4: 5.0, 1: 3.0, 3: 2.0, 9: 7.0})
  np.testing.assert_array_equal(np.bincount(weighed), [50, 30, 20])
  # In turn: every ten hold a tenth of each, give or take one.
  for start in range(0, 100, 10):
    assert np.all(np.abs(np.bincount(weighed[start : start + 10], minlength=3) - [5, 3, 2]) <= 1)
  np.testing.assert_array_equal(np.bincount(class_sequence(classifier, 4, {4: 1, 1: 0, 3: 1})), [2, 0, 2])
  # 1 / 3 of 10 each: the remainder goes to the first.
  np.testing.assert_array_equal(np.bincount(class_sequence(classifier, 10)), [4, 3, 3])


@pytest.mark.parametrize(
  "weights", [{4: 1.0, 1: 1.0}, {4: 1.0, 1: -1.0, 3: 1.0}, {4: 0.0, 1: 0.0, 3: 0.0}, {4: 1.0, 1: float("nan"), 3: 1.0}]
)
def test_label_weights_that_do_not_fit_are_refused(weights):
  with pytest.raises(ValueError, match="label_weights must hold a weight of at least 0 for each label"):
    class_sequence(linear_classifier((4, 1, 3)), 6, weights)


SEPARABLE = {
  "generator": network(batch_norm=False),
  "tied": False,
  "loss_terms": {"duality": Term(0.1, terms.duality(delta=0.1)), "range": Term(0.1, terms.in_range)},
}


@pytest.mark.slow
def test_microbatches_give_the_step_of_the_whole_batch():
  # Not Adam, which would make steps out of rounding errors where a gradient is 0: the cosine knows no scale.
  settings = {**SEPARABLE, "optimizer": optax.sgd(1e-2), "stationarity": recipes.Stationarity(1.0)}
  whole, parts = (setup(TWO, microbatch_size=size, **settings) for size in (None, 4))
  # The same start, whatever the first multipliers' scale was measured on.
  after, together = whole.run(5), parts.run(5, whole.state)
  chex.assert_trees_all_close(together.params, after.params, rtol=1e-4, atol=1e-6)


def test_what_microbatches_would_change_is_refused():
  with pytest.raises(ValueError, match="microbatch_size must divide the batch size, 12; got 5"):
    setup(microbatch_size=5, **SEPARABLE)
  with pytest.raises(ValueError, match="microbatch_size must be None with terms of the batch as a whole, spread"):
    setup(microbatch_size=4, **SEPARABLE | {"loss_terms": {"spread": Term(1.0, spread)}}).once()
  with pytest.raises(ValueError, match="microbatch_size must be None with batch norm"):
    setup(microbatch_size=4, **SEPARABLE | {"generator": network(batch_norm=True)})
  with pytest.raises(ValueError, match="microbatch_size must be None with terms of the batch as a whole, softmax"):
    setup(microbatch_size=4, **SEPARABLE | {"loss_terms": {"softmax": Term(1.0, terms.softmax_distance)}}).once()
  coupled = dataclasses.replace(linear_classifier(), statistics={})
  with pytest.raises(ValueError, match="microbatch_size must be None with batch norm"):
    setup((coupled,), microbatch_size=4, **SEPARABLE)
