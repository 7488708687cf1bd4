"""The training loop: it goes down, resumes bitwise, compiles once, names its failures, and T = 1 is a case of T."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kkt_jax import generators, losses, networks, priors, training
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifier import make_classifier
from kkt_jax.conditions import weight_decay_conditions


def linear_classifier(labels, seed=0):
  w = jax.random.normal(jax.random.key(seed), (2, len(labels)))
  return make_classifier(lambda w, x: x @ w, w, (2,), labels=labels)


def setup(classifiers=None, *, optimizer=None, generator_batch_norm=True, **settings):
  """A tiny problem: linear classifiers of the plane, a small generator, tied multipliers unless told otherwise."""
  classifiers = classifiers or [linear_classifier((0, 1, 2))]
  generator = generators.MLPGenerator(
    sample_shape=(2,),
    num_labels=5,
    num_classifiers=len(classifiers),
    hidden=(8,),
    output_scale=1.0,
    batch_norm=generator_batch_norm,
  )
  init, generate = generators.generator_functions(generator, noise_dim=3)
  eta = None
  if settings.get("multiplier_form", "softmax") != "softmax":
    network = networks.MultiplierNetwork(num_outputs=3, num_labels=5, num_classifiers=len(classifiers), hidden=(8,))
    eta = network.init(jax.random.key(3), jnp.zeros((1, 2)), jnp.zeros(1, int), jnp.zeros(1, int))
    settings["raw_multipliers"] = network.apply
  method = training.Method(
    **{
      "generate": generate,
      "optimizer": optimizer or training.partitioned(*(optax.adam(1e-2) for _ in range(3))),
      "noise_dim": 3,
      "batch_size": 12,
      "weights": {"stationarity": 1.0, "duality": 0.1, "fresh_duality": 0.1, "spread": 0.1},
      "multiplier_form": "softmax",
      "priors": {"spread": lambda classifier, batch: priors.repulsion(batch.x, batch.y, bandwidth=1.0)},
    }
    | settings
  )
  conditions = [weight_decay_conditions(classifier.params, weight_decay=0.1) for classifier in classifiers]
  theta, statistics = init(jax.random.key(1))
  state = training.init_state(
    jax.random.key(2), method, classifiers, conditions, theta=theta, statistics=statistics, eta=eta
  )
  return method, state, classifiers, conditions


def run(method, state, classifiers, conditions, num_steps, **settings):
  step = training.make_train_step(method)
  return training.fit(step, state, classifiers, conditions, num_steps=num_steps, **settings)


def assert_states_equal(a, b):
  """Bitwise, random keys included."""
  chex.assert_trees_all_equal(a._replace(key=jax.random.key_data(a.key)), b._replace(key=jax.random.key_data(b.key)))


@pytest.mark.parametrize("form", ["softmax", "softplus"])
@pytest.mark.parametrize("residual", ["relative", "cosine", "absolute", "squared"])
def test_training_lowers_the_stationarity(form, residual):
  method, state, classifiers, conditions = setup(multiplier_form=form, residual=residual)
  logged = []
  run(method, state, classifiers, conditions, 150, log_every=1, on_log=lambda step, metrics: logged.append(metrics))
  assert logged[-1]["stationarity"] < 0.7 * logged[0]["stationarity"]


def test_the_squared_residual_is_the_square_of_the_absolute_one():
  values = {}
  for residual in ("absolute", "squared"):
    method, state, classifiers, conditions = setup(residual=residual)
    values[residual] = float(
      training.make_train_step(method).call(state, classifiers, conditions)[1]["stationarity"][0]
    )
  np.testing.assert_allclose(values["squared"], values["absolute"] ** 2, rtol=1e-5)


def test_free_multipliers_are_pulled_to_the_least_one():
  # One number for each of 12 samples, in a table; without stationarity only what is missing to 0.5 counts.
  w = {"stationarity": 0.0, "duality": 0.0, "spread": 0.0, "least_multiplier": 1.0}
  table = lambda eta, x, y, t: eta[t[0]]
  method, state, classifiers, conditions = setup(weights=w, least_multiplier=0.5)
  method = dataclasses.replace(method, multiplier_form="runner_up", raw_multipliers=table, learn_scale=False)
  start = jnp.linspace(-1.0, 1.0, 12).reshape(1, 12, 1)
  state = training.init_state(
    jax.random.key(2),
    method,
    classifiers,
    conditions,
    theta=state.params["theta"],
    statistics=state.statistics,
    eta=start,
  )
  logged = []
  after = run(method, state, classifiers, conditions, 300, log_every=1, on_log=lambda step, m: logged.append(m))
  # Mean of the squares of 0.5 - raw where raw is below 0.5.
  expected = float(jnp.mean(jnp.square(jax.nn.relu(0.5 - start))))
  np.testing.assert_allclose(logged[0]["least_multiplier"], expected, rtol=1e-5)
  moved = after.params["eta"]["network"]
  np.testing.assert_allclose(jnp.where(start < 0.5, moved, 0.5), 0.5, atol=0.1)  # Adam overshoots a little
  np.testing.assert_array_equal(moved[start > 0.5], start[start > 0.5])  # enough is enough


def test_free_multipliers_are_drawn_to_the_softmax():
  weights = {"stationarity": 0.0, "duality": 0.0, "spread": 0.0, "softmax_distance": 1.0}
  method, state, classifiers, conditions = setup(weights=weights, multiplier_form="softplus")
  logged = []
  run(method, state, classifiers, conditions, 200, log_every=10, on_log=lambda step, m: logged.append(m))
  assert logged[0]["softmax_distance"] > 0.01
  assert logged[-1]["softmax_distance"] < 0.5 * logged[0]["softmax_distance"]


def test_the_target_can_follow_alpha():
  values, slopes = {}, {}
  for exponent in (0.0, 1.0):
    method, state, classifiers, conditions = setup(residual="absolute", target_exponent=exponent)
    scaled = [dataclasses.replace(c, target=jax.tree.map(lambda t: 3.0 * t, c.target)) for c in conditions]
    state.params["alpha"] = jnp.log(jnp.array([3.0]))
    conditions = conditions if exponent else scaled
    step = training.make_train_step(
      dataclasses.replace(method, weights={**method.weights, "duality": 0.0, "fresh_duality": 0.0})
    )
    after, metrics = step.call(state, classifiers, conditions)
    values[exponent] = float(metrics["stationarity"][0])
    slopes[exponent] = float(jnp.abs(after.params["alpha"] - state.params["alpha"])[0])
  np.testing.assert_allclose(values[1.0], values[0.0], rtol=1e-5)  # e^log 3 times the target, or 3 times by hand
  assert slopes[0.0] == 0  # a constant target gives alpha no gradient
  assert slopes[1.0] > 0


def test_all_three_groups_of_unknowns_move_and_the_classifier_does_not():
  method, state, classifiers, conditions = setup(multiplier_form="softplus")
  after = run(method, state, classifiers, conditions, 3)
  for group in ("theta", "eta", "alpha"):
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params[group], after.params[group])
    assert max(jax.tree.leaves(moved)) > 0, group


def test_each_group_has_its_own_optimizer():
  frozen = training.partitioned(optax.adam(1e-2), optax.set_to_zero(), optax.set_to_zero())
  method, state, classifiers, conditions = setup(optimizer=frozen)
  after = run(method, state, classifiers, conditions, 3)
  chex.assert_trees_all_equal(state.params["alpha"], after.params["alpha"])
  chex.assert_trees_all_equal(state.params["eta"], after.params["eta"])
  assert (
    float(jnp.abs(state.params["theta"]["Dense_0"]["kernel"] - after.params["theta"]["Dense_0"]["kernel"]).max()) > 0
  )


def test_start_has_sums_as_long_as_their_targets_and_the_given_margin():
  method, state, classifiers, conditions = setup()
  theta, statistics = state.params["theta"], state.statistics
  state = training.init_state(
    jax.random.key(2), method, classifiers, conditions, theta=theta, statistics=statistics, margin=2.5
  )
  np.testing.assert_allclose(jnp.exp(-state.params["alpha"]), 2.5, rtol=1e-6)
  # |sum| = |target| bounds the relative residual by (1 + 1)^2 at the first step; without the scale it would be 10^2.
  _, metrics = training.make_train_step(method).call(state, classifiers, conditions)
  assert float(metrics["residual"][0]) < 4.5


def test_each_classifier_can_start_from_a_margin_of_its_own():
  method, state, classifiers, conditions = setup([linear_classifier((0, 1, 2)), linear_classifier((1, 3, 4))])
  start = {"theta": state.params["theta"], "statistics": state.statistics}
  state = training.init_state(jax.random.key(2), method, classifiers, conditions, margin=[2.0, 5.0], **start)
  np.testing.assert_allclose(jnp.exp(-state.params["alpha"]), [2.0, 5.0], rtol=1e-6)
  with pytest.raises(ValueError, match="margin must be positive"):
    training.init_state(jax.random.key(2), method, classifiers, conditions, margin=[2.0, -1.0], **start)


def test_cosine_residual_weighs_its_tensors():
  params = {"kernel": jax.random.normal(jax.random.key(0), (2, 3)), "bias": jnp.array([0.5, 0.0, -1.0])}
  affine = make_classifier(lambda p, x: x @ p["kernel"] + p["bias"][None], params, (2,), labels=(0, 1, 2))
  terms = []
  for tensor_weights in (None, {"kernel": 9.0}):
    method, state, classifiers, conditions = setup([affine], residual="cosine", tensor_weights=tensor_weights)
    _, metrics = training.make_train_step(method).call(state, classifiers, conditions)
    terms.append((float(metrics["stationarity"][0]), float(metrics["residual"][0])))
  (plain, logged), (weighed, logged_too) = terms
  assert plain == pytest.approx(logged, rel=1e-5)
  assert logged_too == pytest.approx(logged, rel=1e-5)  # the log is free of the weights
  assert abs(weighed - plain) > 1e-3


def test_step_reports_the_terms_that_make_up_the_total():
  method, state, classifiers, conditions = setup(num_fresh=4)
  _, metrics = training.make_train_step(method).call(state, classifiers, conditions)
  expected = sum(weight * float(metrics[name].sum()) for name, weight in method.weights.items())
  np.testing.assert_allclose(metrics["total"], expected, rtol=1e-5)


def test_weights_may_be_schedules_of_the_step():
  weights = {"stationarity": lambda step: jnp.where(step < 1, 0.0, 1.0), "duality": 0.0, "spread": 0.0}
  method, state, classifiers, conditions = setup(weights=weights)
  step = training.make_train_step(method)
  state, first = step.call(state, classifiers, conditions)
  _, second = step.call(state, classifiers, conditions)
  assert float(first["total"]) == 0.0
  np.testing.assert_allclose(second["total"], second["stationarity"][0], rtol=1e-6)


def test_total_is_the_sum_over_classifiers():
  classifiers = [linear_classifier((0, 1, 2), 0), linear_classifier((2, 3), 7)]
  method, state, classifiers, conditions = setup(classifiers)
  _, metrics = training.make_train_step(method).call(state, classifiers, conditions)
  assert metrics["stationarity"].shape == (2,)
  np.testing.assert_allclose(
    metrics["total"],
    metrics["stationarity"].sum() + 0.1 * metrics["duality"].sum() + 0.1 * metrics["spread"].sum(),
    rtol=1e-5,
  )


def test_each_classifier_has_its_own_alpha():
  classifiers = [linear_classifier((0, 1, 2), 0), linear_classifier((2, 3), 7)]
  method, state, classifiers, conditions = setup(
    classifiers, weights={"stationarity": 0.0, "duality": 1.0, "spread": 0.0}
  )
  after = run(method, state, classifiers, conditions, 5)
  assert state.params["alpha"].shape == (2,)
  assert bool(jnp.all(state.params["alpha"] != after.params["alpha"]))


def test_the_step_compiles_once():
  method, state, classifiers, conditions = setup()
  step = training.make_train_step(method)
  for _ in range(4):
    state, _ = step.call(state, classifiers, conditions)
  assert step.call._cache_size() == 1


@pytest.mark.parametrize("fixed_noise", [True, False])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, fixed_noise):
  method, state, classifiers, conditions = setup(multiplier_form="softplus", num_fresh=4, fixed_noise=fixed_noise)
  straight = run(method, state, classifiers, conditions, 9)
  with Checkpointer(tmp_path) as checkpointer:
    run(method, state, classifiers, conditions, 4, checkpointer=checkpointer, checkpoint_every=2)
    step, restored = checkpointer.restore(state)
  assert step == 4
  assert_states_equal(run(method, restored, classifiers, conditions, 9), straight)


def test_logging_and_checkpoints_do_not_change_the_result(tmp_path):
  method, state, classifiers, conditions = setup()
  with Checkpointer(tmp_path) as checkpointer:
    logged = run(method, state, classifiers, conditions, 5, log_every=1, checkpointer=checkpointer, checkpoint_every=1)
  assert_states_equal(logged, run(method, state, classifiers, conditions, 5))


def test_steps_in_one_call_are_the_same_steps():
  method, state, classifiers, conditions = setup(num_fresh=4)
  single = run(method, state, classifiers, conditions, 6)
  step = training.make_train_step(method, steps_per_call=3)
  together = training.fit(step, state, classifiers, conditions, num_steps=6, log_every=3, checkpoint_every=3)
  assert int(together.step) == 6
  chex.assert_trees_all_close(single.params, together.params, rtol=1e-4, atol=1e-6)


def test_intervals_must_be_multiples_of_the_steps_in_one_call():
  method, state, classifiers, conditions = setup()
  step = training.make_train_step(method, steps_per_call=3)
  with pytest.raises(ValueError, match="log_every must be a multiple of steps_per_call = 3; got 4"):
    training.fit(step, state, classifiers, conditions, num_steps=6, log_every=4, checkpoint_every=3)


def test_stratified_noise_is_normal_and_falls_once_into_each_interval():
  method, state, classifiers, conditions = setup(stratified_noise=True, fixed_noise=True, batch_size=3000)
  first = np.asarray(state.noise[0, :, 0])
  for label in range(3):
    own = np.sort(np.asarray(jax.scipy.stats.norm.cdf(first[label::3])))
    np.testing.assert_array_equal(np.floor(own * 1000 - 1e-3), np.arange(1000) - (own * 1000 - 1e-3 < np.arange(1000)))
  np.testing.assert_allclose([first.mean(), first.std()], [0.0, 1.0], atol=0.02)


def test_every_logged_step_is_reported_once_and_in_order():
  method, state, classifiers, conditions = setup()
  steps = []
  run(method, state, classifiers, conditions, 7, log_every=3, on_log=lambda step, metrics: steps.append(step))
  assert steps == [3, 6, 7]


def test_nan_in_a_prior_stops_the_run_names_the_term_and_keeps_the_last_good_checkpoint(tmp_path):
  def poisoned(classifier, batch):
    return jnp.where(batch.y[0] >= 0, jnp.nan, 0.0)

  method, state, classifiers, conditions = setup()
  good, *_ = setup()
  weights = {"stationarity": 1.0, "duality": 0.1, "poison": 1.0}
  bad, *_ = setup(priors={"poison": poisoned}, weights=weights)
  with Checkpointer(tmp_path) as checkpointer:
    run(good, state, classifiers, conditions, 2, checkpointer=checkpointer, checkpoint_every=2)
    _, restored = checkpointer.restore(state)
    with pytest.raises(training.TrainingDiverged, match="poison became nan"):
      run(bad, restored, classifiers, conditions, 4, checkpointer=checkpointer, checkpoint_every=2)
    assert checkpointer.steps() == [2]


def test_a_nan_that_only_the_gradient_has_is_caught_before_it_is_saved(tmp_path):
  def kinked(classifier, batch):
    return jnp.linalg.norm(0.0 * batch.x)  # value 0, gradient NaN

  method, state, classifiers, conditions = setup(
    priors={"kinked": kinked}, weights={"stationarity": 1.0, "duality": 0.1, "kinked": 1.0}
  )
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(training.TrainingDiverged, match="gradient_norm became nan"):
      run(method, state, classifiers, conditions, 1, checkpointer=checkpointer, checkpoint_every=1)
    assert checkpointer.steps() == []


def test_fixed_noise_is_used_in_every_step_and_new_noise_is_not():
  seen = []

  def spy(classifier, batch):
    jax.debug.callback(lambda noise: seen.append(np.asarray(noise)), batch.noise)
    return jnp.zeros(())

  for fixed_noise in (True, False):
    seen.clear()
    weights = {"stationarity": 1.0, "duality": 0.1, "spy": 1.0}
    method, state, classifiers, conditions = setup(priors={"spy": spy}, weights=weights, fixed_noise=fixed_noise)
    run(method, state, classifiers, conditions, 2)
    jax.effects_barrier()
    assert np.array_equal(seen[0], seen[-1]) == fixed_noise


def test_sampling_draws_only_classifiers_that_know_the_label():
  classifiers = [linear_classifier((0, 1, 2), 0), linear_classifier((2, 3), 7)]
  method, state, *_ = setup(classifiers)
  y = jnp.array([0, 1, 3] * 20 + [2] * 40)
  x, t = training.sample(method, state, classifiers, jax.random.key(0), y)
  assert x.shape == (100, 2)
  np.testing.assert_array_equal(t[:60], [0, 0, 1] * 20)
  assert set(t[60:].tolist()) == {0, 1}  # label 2 is known to both


def test_sampling_refuses_labels_that_no_classifier_or_not_the_given_one_knows():
  classifiers = [linear_classifier((0, 1, 2), 0), linear_classifier((2, 3), 7)]
  method, state, *_ = setup(classifiers)
  with pytest.raises(ValueError, match=r"y must hold labels.*\[4\]"):
    training.sample(method, state, classifiers, jax.random.key(0), jnp.array([0, 4]))
  with pytest.raises(ValueError, match="t must hold classifiers that know the label"):
    training.sample(method, state, classifiers, jax.random.key(0), jnp.array([3]), t=jnp.array([0]))


def test_a_batch_holds_every_class_equally_often():
  classifier = linear_classifier((4, 1, 3))
  np.testing.assert_array_equal(training.balanced_labels(classifier, 7), [4, 1, 3, 4, 1, 3, 4])


def test_stationarity_alone_recovers_the_weights_of_the_classifier_it_is_given():
  # The relative residual of the finished generator, computed anew from samples, is what the log said.
  method, state, classifiers, conditions = setup(
    fixed_noise=True, weights={"stationarity": 1.0, "duality": 0.0, "spread": 0.0}
  )
  state = run(method, state, classifiers, conditions, 100)
  y = training.balanced_labels(classifiers[0], method.batch_size)
  t = jnp.zeros_like(y)
  x, _ = method.generate(state.params["theta"], state.statistics, state.noise[0], y, t, True)
  mu = jnp.exp(state.params["eta"]["log_scale"][0]) * jax.nn.softmax(x @ classifiers[0].params)
  sums = losses.stationarity_sum(classifiers[0].apply_fn, classifiers[0].params, x, y, mu)
  _, metrics = training.make_train_step(method).call(state, classifiers, conditions)
  np.testing.assert_allclose(
    losses.stationarity_residual(conditions[0], sums).relative, metrics["residual"][0], rtol=1e-4
  )


@pytest.mark.parametrize(
  ("settings", "named"),
  [
    ({"residual": "cubed"}, "residual must be one of"),
    ({"multiplier_form": "tanh"}, "multiplier_form must be one of"),
    ({"batch_size": 0}, "batch_size"),
    ({"noise_dim": 0}, "noise_dim"),
    ({"delta": -1.0}, "delta"),
    ({"num_fresh": -1}, "num_fresh"),
    ({"multiplier_form": "softmax", "raw_multipliers": lambda *a: None}, "raw_multipliers"),
    ({"multiplier_form": "relu", "raw_multipliers": None}, "raw_multipliers"),
  ],
)
def test_bad_settings_are_named(settings, named):
  complete = {
    "generate": lambda *a: None,
    "optimizer": optax.sgd(0.1),
    "noise_dim": 1,
    "batch_size": 1,
    "weights": {},
    "multiplier_form": "softmax",
  }
  with pytest.raises(ValueError, match=named):
    training.Method(**complete | settings)


def test_bad_starts_are_named():
  method, state, classifiers, conditions = setup()
  start = {"theta": state.params["theta"], "statistics": state.statistics}
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="classifiers must hold at least one"):
    training.init_state(key, method, [], [], **start)
  with pytest.raises(ValueError, match="conditions must hold one"):
    training.init_state(key, method, classifiers, [], **start)
  with pytest.raises(ValueError, match="margin must be positive"):
    training.init_state(key, method, classifiers, conditions, margin=0.0, **start)
  with pytest.raises(ValueError, match="theta must be finite"):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, start["theta"])
    training.init_state(key, method, classifiers, conditions, theta=broken, statistics=state.statistics)


SEPARABLE = {
  "generator_batch_norm": False,
  "priors": {"range": lambda classifier, batch: priors.out_of_range(batch.x)},
  "weights": {"stationarity": 1.0, "duality": 0.1, "range": 0.1},
}


@pytest.mark.parametrize("residual", ["relative", "cosine"])
def test_microbatches_give_the_step_of_the_whole_batch(residual):
  classifiers = [linear_classifier((0, 1, 2)), linear_classifier((3, 4), seed=1)]
  # Not Adam, which would make steps out of rounding errors where a gradient is 0: the cosine knows no scale.
  optimizer = training.partitioned(*(optax.sgd(1e-2) for _ in range(3)))
  settings = SEPARABLE | {"optimizer": optimizer, "multiplier_form": "softplus", "residual": residual}
  after = {}
  for size in (None, 4):
    parts = setup(classifiers, microbatch_size=size, **settings)
    # The same start, whatever the first multipliers' scale was measured on.
    start = after["start"] = after.get("start", parts[1])
    after[size] = run(parts[0], start, *parts[2:], 5)
  chex.assert_trees_all_close(after[4].params, after[None].params, rtol=1e-4, atol=1e-6)


def test_what_microbatches_would_change_is_refused():
  with pytest.raises(ValueError, match="microbatch_size must divide batch_size = 12; got 5"):
    setup(microbatch_size=5, **SEPARABLE)
  with pytest.raises(ValueError, match="microbatch_size must be None with the prior 'spread'"):
    run(*setup(microbatch_size=4, generator_batch_norm=False), 1)
  with pytest.raises(ValueError, match="microbatch_size must be None with batch norm"):
    setup(microbatch_size=4)
  with pytest.raises(ValueError, match="microbatch_size must be None with a weight of softmax_distance"):
    setup(microbatch_size=4, **SEPARABLE | {"weights": SEPARABLE["weights"] | {"softmax_distance": 1.0}})
  coupled = dataclasses.replace(linear_classifier((0, 1, 2)), batch_coupled=True)
  with pytest.raises(ValueError, match="microbatch_size must be None with batch norm"):
    setup([coupled], microbatch_size=4, **SEPARABLE)
