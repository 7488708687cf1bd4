"""A wrong description of a classifier that leaks is refused, with what fits; a correct one of a poor one is not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import example_classifiers as examples
import kkt_jax
from kkt_jax.auditing import description, verdict
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
  found = pretrain.gradient_descent(function, w, x, jnp.asarray(images.y), num_steps=steps, **settings)
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
  "mean": (connected, {}, {"given": lambda x: x - 1}, "Likely causes: .*a mean or deviation left out or applied twice"),
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


def test_inputs_far_beyond_their_range_are_a_doubt():
  (doubt,) = check(connected, trained(connected), lambda x: 255 * x).doubts
  assert "beyond where cross-entropy has a gradient: the range of the inputs may be wrong" in doubt


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
  found = pretrain.gradient_descent(network, w, jnp.asarray(x), jnp.asarray(y), **settings)
  own = kkt_jax.make_classifier(network, found.params, SHAPE, value_range=None)
  other = samples(1, 40)
  held_out = Samples(other.x + 0.4 * (other.y / CLASSES)[:, None, None, None], other.y)
  fit = description.check(own, Samples(x, y), held_out)
  assert fit.known["training data"]["accuracy"] < 0.97, "a poor one"
  assert not fit.refusal


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
  with pytest.raises(UsageError, match="^--classifier=test_description:inverted: .* With black for white 100.0%"):
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
