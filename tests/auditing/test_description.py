"""A wrong description of a classifier that leaks is refused, with what fits; a correct one of a poor one is not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import example_classifiers as examples
import kkt_jax
from kkt_jax.auditing import description, neighbours, verdict
from kkt_jax.auditing.samples import Samples
from kkt_jax.cli import audit
from kkt_jax.cli.flags import UsageError
from kkt_jax.kkt import pretrain

SIDE, CLASSES = 6, 4
SHAPE = (SIDE, SIDE, 3)


def samples(seed, count=15):
  """Colour images of sparse noise in [0, 1] and labels that they do not tell: whoever knows them has seen them."""
  random, y = np.random.default_rng(seed), np.arange(CLASSES * count, dtype=np.int32) % CLASSES
  return Samples((random.random((len(y), *SHAPE)) < 0.3).astype(np.float32), y)


def convolved(w, x, *, padding="SAME"):
  h = jax.lax.conv_general_dilated(x, w["conv"], (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
  return jax.nn.relu(h).reshape(len(x), -1) @ w["last"] + w["bias"][None]


def connected(w, x):
  return jax.nn.relu(x.reshape(len(x), -1) @ w["first"] + w["shift"][None]) @ w["last"] + w["bias"][None]


def normalised(w, x, *, epsilon=1e-5):
  """Batch norm with the statistics of the training data, as constants; features of a small variance."""
  h = 0.01 * (x.reshape(len(x), -1) @ w["first"])
  h = (h - w["constant"][0][None]) / jnp.sqrt(w["constant"][1][None] + epsilon) + w["shift"][None]
  return jax.nn.relu(h) @ w["last"] + w["bias"][None]


@functools.cache
def trained(network, steps=400, shift=0.0, channels_first=False):
  """The parameters of a network that learned its training data by heart."""
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape) / np.prod(shape[:-1]) ** 0.5, jnp.float32)
  images = samples(0)
  x = jnp.asarray(images.x)
  if network is convolved:
    w = {"conv": draw(3, 3, 3, 16), "last": draw(9 * 16, CLASSES), "bias": jnp.zeros(CLASSES)}
  else:
    w = {"first": draw(108, 40), "shift": jnp.zeros(40), "last": draw(40, CLASSES), "bias": jnp.zeros(CLASSES)}
  if network is normalised:
    h = 0.01 * (x.reshape(len(x), -1) @ w["first"])
    fixed = {"constant": jnp.stack([h.mean(0), h.var(0)])}
  else:
    fixed = {}
  if channels_first:
    x = x.transpose(0, 3, 1, 2)
  function = lambda w, x: network({**w, **jax.lax.stop_gradient(fixed)}, x + shift)
  settings = {"learning_rate": 0.1, "momentum": 0.9, "steps_per_call": steps}
  found = pretrain.gradient_descent(
    function, w, x, jnp.asarray(images.y), pretrain.Descent(num_steps=steps, **settings)
  )
  return {**found.params, **fixed}


def check(network, w, given=lambda x: x, *, relabelled=lambda y: y, value_range=(0.0, 1.0), held_out=True):
  classifier = kkt_jax.make_classifier(lambda w, x: network(w, given(x)), w, SHAPE, value_range=value_range)
  train, other = (Samples(own.x, relabelled(own.y).astype(np.int32)) for own in (samples(0), samples(1)))
  return description.check(classifier, train, other if held_out else None)


SLIPS = {
  "right": (connected, {}, {}, ""),
  "pixel order": (connected, {"channels_first": True}, {}, "channel-first"),
  "pixel order of convolutions": (convolved, {}, {"given": lambda x: x.swapaxes(1, 2)}, "rows and columns exchanged"),
  "inverted": (connected, {}, {"given": lambda x: 1 - x}, "black for white"),
  "shifted labels": (connected, {}, {"relabelled": lambda y: (y + 1) % CLASSES}, "labels shifted by -1"),
  "two labels exchanged": (
    connected,
    {},
    {"relabelled": lambda y: np.array([1, 0, 2, 3])[y]},
    "class 1 for 0, 0 for 1",
  ),
  "range": (connected, {}, {"given": lambda x: x / 255}, "inputs from 0 to 255"),
  "mean": (
    connected,
    {},
    {"given": lambda x: x - 1},
    "inputs raised by 1 .*Likely causes: .*a mean or deviation left out",
  ),
  "padding": (convolved, {}, {"padding": ((1, 1), (1, 1))}, "Likely causes: .*padding"),
  "epsilon": (normalised, {}, {"epsilon": 1e-2}, "Likely causes: .*epsilon"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_wrong_description_of_a_classifier_that_leaks_is_refused_with_what_fits(slip):
  network, learned, described, said = SLIPS[slip]
  inner = {name: described[name] for name in ("padding", "epsilon") if name in described}
  others = {name: own for name, own in described.items() if name not in inner}
  found = check(functools.partial(network, **inner), trained(network, **learned), **others)
  if not said:
    assert not found.refusal and not found.doubts and found.known["training data"]["accuracy"] == 1
    return
  assert found.refusal.startswith("the classifier, as it is described, does not know its training data")
  assert re.search(said, found.refusal) and "Likely causes" in found.refusal and "\n" not in found.refusal


def test_without_held_out_data_a_slip_is_found_all_the_same_and_without_training_data_only_what_fits_better():
  w, invert = trained(connected), lambda x: 1 - x
  assert "black for white" in check(connected, w, invert, held_out=False).refusal
  own = lambda given: kkt_jax.make_classifier(lambda w, x: connected(w, given(x)), w, SHAPE)
  only = lambda given, images: description.check(own(given), None, images)
  assert not only(lambda x: x, samples(1)).refusal  # at chance, as held-out data may be
  assert "does not know its held-out data" in only(invert, samples(0)).refusal
  assert description.check(own(invert), None, None) is None


@pytest.mark.parametrize(
  ("given", "said"),
  [
    (lambda x: x - 0.4, "inputs .*raised by 0.4 "),
    (lambda x: x + 0.2, "inputs .*lowered by 0.2 "),
    (lambda x: (x - 0.1307) / 0.3081, r"inputs multiplied by 0.3\d? and raised by 0.13 "),
    (lambda x: 2 * x - 1, "inputs halved and raised by a half"),
    (lambda x: 255 * x, "inputs a 255th as great"),
  ],
)
def test_a_slip_that_accuracy_does_not_see_is_refused_by_the_gradient_and_named_with_its_size(given, said):
  classifier = kkt_jax.make_classifier(lambda w, x: connected(w, given(x)), trained(connected), SHAPE)
  assert np.mean(np.argmax(classifier.predict(samples(0).x), axis=1) == samples(0).y) > 0.6
  assert re.search(said, str(neighbours.nearest(classifier, samples(0).x, samples(0).y)))
  assert re.search(said, check(connected, trained(connected), given).refusal)


def test_inputs_far_beyond_their_range_are_a_doubt_without_training_data():
  classifier = kkt_jax.make_classifier(lambda w, x: connected(w, 2000 * x), trained(connected), SHAPE)
  (doubt,) = description.check(classifier, None, samples(1)).doubts
  assert "beyond where cross-entropy has a gradient: the range of the inputs may be wrong" in doubt


def test_a_weight_decay_of_another_name_is_a_doubt_if_training_has_converged():
  random, images = np.random.default_rng(0), samples(0)
  w = {"first": random.normal(size=(108, 40)) / 108**0.5, "shift": np.zeros(40)}
  w |= {"last": random.normal(size=(40, CLASSES)) / 40**0.5, "bias": np.zeros(CLASSES)}
  w = jax.tree.map(lambda own: jnp.asarray(own, jnp.float32), w)
  settings = {"num_steps": 2000, "learning_rate": 0.1, "weight_decay": 0.01, "steps_per_call": 500}
  w = pretrain.gradient_descent(
    connected, w, jnp.asarray(images.x), jnp.asarray(images.y), pretrain.Descent(**settings)
  ).params
  own = lambda decay: kkt_jax.make_classifier(connected, w, SHAPE, weight_decay=decay)
  assert not description.check(own(0.01), images, None).doubts and not description.check(own(None), images, None).doubts
  for decay in (0.005, lambda name: 0.02 if name in ("first", "last") else 0.0):
    (doubt,) = description.check(own(decay), images, None).doubts
    (times,) = re.findall("where ([0-9.]+) times the weight_decay that was described", doubt)
    assert float(times) == pytest.approx(2 if decay == 0.005 else 0.5, rel=0.1)


def batch_normalised(given, epsilon=1e-5):
  """A subject of two batch norms, and its variables, whose statistics are those of the training data for no slip."""

  def network(variables, x, train, epsilon=epsilon):
    h, stored, averages = given(x).reshape(len(x), -1) @ variables["first"], variables["batch_stats"], {}
    for name, kernel in (("one", "second"), ("two", "last")):
      own = {"mean": h.mean(0), "var": h.var(0)} if train else stored[name]
      averages[name] = own
      h = jax.nn.relu((h - own["mean"][None]) / jnp.sqrt(own["var"] + epsilon)[None]) @ variables[kernel]
    return h, averages

  split = lambda variables: {**variables["params"], "batch_stats": variables["batch_stats"]}
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  params = {"first": 0.003 * draw(108, 30), "second": draw(30, 20), "last": draw(20, CLASSES)}
  zeros = {name: {"mean": jnp.zeros(size), "var": jnp.ones(size)} for name, size in (("one", 30), ("two", 20))}
  variables = {"params": params, "batch_stats": zeros}
  plain = lambda x: network({**params, "batch_stats": zeros}, x, True, 1e-5)[1]
  if given(1.0) == 1.0:
    variables["batch_stats"] = plain(jnp.asarray(samples(0).x))
  subject = kkt_jax.Subject(
    lambda v, x: network(split(v), x, False)[0],
    lambda: variables,
    SHAPE,
    train_fn=lambda v, x: network(split(v), x, True),
  )
  return subject, variables


@pytest.mark.parametrize(
  ("given", "said"),
  [(lambda x: x, ""), (lambda x: x + 0.2, "inputs lowered by 0.2 "), (lambda x: 0.5 * x, "inputs multiplied by 2 ")],
)
def test_stored_statistics_tell_a_slip_before_batch_norm(given, said):
  _, variables = batch_normalised(lambda x: x)
  classifier = batch_normalised(given)[0].classifier(variables)
  found = neighbours.nearest(classifier, samples(0).x, samples(0).y)
  assert found.confirmed == (not said) and re.search(said, str(found)) and bool(str(found)) == bool(said)


def test_of_a_large_network_some_samples_are_drawn_with_which_a_slip_is_found_all_the_same(monkeypatch):
  monkeypatch.setattr(neighbours, "_WORK", 1)
  monkeypatch.setattr(neighbours, "_LEAST", 40)
  _, variables = batch_normalised(lambda x: x)
  right, wrong = (batch_normalised(given)[0].classifier(variables) for given in (lambda x: x, lambda x: x + 0.5))
  assert len(neighbours._affordable(right, 60)) == 40
  assert not str(neighbours.nearest(right, samples(0).x, samples(0).y))
  assert re.search(r"inputs lowered by 0\.(49|5) ", str(neighbours.nearest(wrong, samples(0).x, samples(0).y)))


def test_stored_statistics_tell_a_wrong_epsilon_if_they_are_exact():
  x = samples(0).x
  subject, variables = batch_normalised(lambda x: x)
  assert not neighbours.between_norms(subject.classifier(variables), x)
  wrong = batch_normalised(lambda x: x, epsilon=1e-3)[0].classifier(variables)
  assert re.match(
    "The stored statistics of one are .* those of two are not: .* epsilon", neighbours.between_norms(wrong, x)
  )


def test_a_start_that_the_weights_hold_nothing_of_or_that_fits_better_is_refused():
  w, random = trained(connected), np.random.default_rng(9)
  by = lambda params, initial: kkt_jax.make_classifier(connected, params, SHAPE, initial_params=initial)
  near = jax.tree.map(lambda own: own + 0.1 * random.normal(size=own.shape).astype(np.float32) * jnp.std(own), w)
  other = jax.tree.map(lambda own: jnp.asarray(random.normal(size=own.shape), jnp.float32), w)
  worse = {**w, "last": 0.3 * w["last"]}
  train = samples(0)
  assert description.check_start(by(w, None), train) == description.check_start(by(w, worse), train) == ""
  assert description.check_start(by(w, near), None) == ""
  assert "the weights hold nothing of this start" in description.check_start(by(w, other), None)
  assert "exchanged?" in description.check_start(by(worse, w), train)


@pytest.mark.parametrize(
  "case", ["few steps", "more steps", "strong weight decay", "wrong labels", "imbalanced", "linear"]
)
def test_a_correct_description_of_a_poor_classifier_is_not_refused(case):
  images, random = samples(0, 40), np.random.default_rng(5)
  x = images.x + 0.4 * (images.y / CLASSES)[:, None, None, None]  # the labels can be learned in part
  y = images.y
  if case == "wrong labels":
    y = np.where(random.random(len(y)) < 0.4, random.integers(0, CLASSES, len(y)), y).astype(np.int32)
  if case == "imbalanced":
    kept = (y == 0) | (np.arange(len(y)) < 24)
    x, y = x[kept], y[kept]
  draw = lambda *shape: jnp.asarray(random.normal(size=shape) / shape[0] ** 0.5, jnp.float32)
  w = {"first": draw(108, 40), "shift": jnp.zeros(40), "last": draw(40, CLASSES), "bias": jnp.zeros(CLASSES)}
  network = connected
  if case == "linear":
    network, w = (lambda w, x: x.reshape(len(x), -1) @ w), jnp.zeros((108, CLASSES))
  steps = {"few steps": 60, "imbalanced": 200}.get(case, 150)
  decay = 0.15 if case == "strong weight decay" else 0.0
  settings = {"num_steps": steps, "learning_rate": 0.02, "weight_decay": decay, "steps_per_call": steps}
  found = pretrain.gradient_descent(network, w, jnp.asarray(x), jnp.asarray(y), pretrain.Descent(**settings))
  own = kkt_jax.make_classifier(network, found.params, SHAPE, value_range=None)
  other = samples(1, 40)
  held_out = Samples(other.x + 0.4 * (other.y / CLASSES)[:, None, None, None], other.y)
  fit = description.check(own, Samples(x, y), held_out)
  assert fit.known["training data"]["accuracy"] < 0.97, "a poor one"
  assert not fit.refusal


def test_another_mixture_of_classes_among_held_out_data_is_no_sign_of_a_wrong_description():
  """A shift of the inputs raises the margins of class 0, of which one set has more, and lowers those of class 1."""
  own, random = kkt_jax.make_classifier(lambda w, x: x @ w, jnp.array([[1.0, -1.0]]), (1,), value_range=None), {}
  for name, counts in (("train", (150, 10)), ("held out", (10, 150))):
    y = np.repeat([0, 1], counts).astype(np.int32)
    x = np.random.default_rng(len(name)).normal(size=(160, 1)).astype(np.float32) + 2 - 4 * y[:, None]
    random[name] = Samples(x.astype(np.float32), y)
  answers = lambda shift: tuple(description._Answers(own, each, each.x + shift) for each in random.values())
  assert description._p_value_of_areas(answers(0.0), answers(1.0)) == pytest.approx(0.5, abs=0.1)
  better = answers(0.0)[0], description._Answers(own, random["held out"], -random["held out"].x)
  assert description._p_value_of_areas(answers(0.0), better) < 1e-3


# The audit.


def described(given):
  start = jax.tree.map(jnp.zeros_like, trained(connected))
  return kkt_jax.Subject(lambda w, x: connected(w, given(x)), lambda: start, SHAPE)


def inverted():
  return described(lambda x: 1 - x)


@pytest.fixture(name="settings")
def fixture_settings(tmp_path):
  examples.store(tmp_path / "weights.safetensors", trained(connected))
  for name, images in (("train", samples(0)), ("held_out", samples(1))):
    np.savez(tmp_path / f"{name}.npz", x=images.x, y=images.y)
  given = {f"{name}_data": str(tmp_path / f"{name}.npz") for name in ("train", "held_out")}
  return {"classifier": "test_description:inverted", "checkpoint": str(tmp_path / "weights.safetensors"), **given}


def test_the_audit_stops_before_anything_is_examined_or_trained(tmp_path, settings, monkeypatch):
  monkeypatch.setattr(kkt_jax, "examine", None)
  with pytest.raises(
    UsageError,
    match="^--classifier=test_description:inverted: .* With black for white the weights are more than 10,000",
  ):
    audit.run(audit.Config(**settings), tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_forced_it_gives_no_verdict_from_nothing_found():
  doubts = check(connected, trained(connected), lambda x: 1 - x).doubts
  for level, answer in (("none", "No evidence"), ("open", "The theory does not cover")):
    found = verdict.with_doubts(verdict.Verdict(level, answer, ["Why.", *doubts]), doubts)
    assert found.level == "open" and found.answer.startswith(
      "No verdict: the classifier may not be what its description"
    )
    assert found.reasons == [*doubts, "Why."] and "does not know its training data" in str(found)
  leak = verdict.Verdict("leak", "These weights reveal", [])
  assert verdict.with_doubts(leak, doubts) == leak
