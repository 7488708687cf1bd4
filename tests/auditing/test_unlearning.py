"""Samples that were removed from a classifier, and samples that only should have been."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import kkt_jax
from kkt_jax.auditing import membership
from kkt_jax.cli import audit
from kkt_jax.cli.flags import UsageError
from kkt_jax.kkt import pretrain
from kkt_jax.membership import change_scores
from kkt_jax.metrics import roc

DIMENSIONS, CLASSES, MEMBERS, REMOVED = 60, 3, 40, 8


def trained(x, y):
  """A softmax regression at its minimum, as good as."""
  start = {"kernel": jnp.zeros((DIMENSIONS, CLASSES)), "bias": jnp.zeros(CLASSES)}
  head = lambda params, x: x @ params["kernel"] + params["bias"][None]
  descent = pretrain.Descent(num_steps=3000, learning_rate=0.2, momentum=0.9, weight_decay=0.02)
  params = pretrain.gradient_descent(head, start, jnp.asarray(x), jnp.asarray(y), descent).params
  return kkt_jax.make_classifier(head, params, (DIMENSIONS,), value_range=None, weight_decay=0.02)


@pytest.fixture(name="data", scope="module")
def fixture_data():
  random = np.random.default_rng(0)
  x, y = random.normal(size=(240, DIMENSIONS)).astype(np.float32), random.integers(0, CLASSES, 240).astype(np.int32)
  return {
    "members": (x[:MEMBERS], y[:MEMBERS]),
    "forgotten": (x[:REMOVED], y[:REMOVED]),
    "retained": (x[REMOVED:MEMBERS], y[REMOVED:MEMBERS]),
    "held_out": (x[MEMBERS:], y[MEMBERS:]),
  }


@pytest.fixture(name="before", scope="module")
def fixture_before(data):
  return trained(*data["members"])


def test_an_honest_removal_leaves_nothing_but_the_change_reveals_it(data, before, tmp_path):
  after = trained(*data["retained"])
  report = kkt_jax.audit_unlearning(before, after, data["forgotten"], data["held_out"], retained=data["retained"])
  assert report.remains.level == "none" and "found before" in report.remains.answer
  assert report.before.p_value < 1e-4 < report.after.p_value and report.retained.p_value < 1e-4
  assert report.change.level == "member" and "reveals which samples were removed" in str(report)
  assert report.difference.curves[report.difference.best].points[0].members >= 6
  assert report.save(tmp_path) == ["unlearning.json"]
  stored = json.loads((tmp_path / "unlearning.json").read_text())
  assert stored["remains"]["level"] == "none" and len(stored["difference"]["risks"]) == REMOVED


def test_one_sample_stands_first_by_the_change(data, before):
  x, y = data["members"]
  for place in range(5):
    after = trained(np.delete(x, place, axis=0), np.delete(y, place))
    others, labels = data["held_out"]
    scores = change_scores(before, after, np.concatenate([x[[place]], others]), np.concatenate([y[[place]], labels]))
    assert all(np.argmax(own) == 0 for own in scores.values())


def test_a_single_sample_can_be_asked_about(data, before):
  x, y = data["members"]
  report = kkt_jax.audit_unlearning(before, trained(x[1:], y[1:]), (x[:1], y[:1]), data["held_out"])
  alike = int(np.sum(data["held_out"][1] == y[0]))  # held-out samples of its class
  assert report.difference.risks[0].p_value == pytest.approx(1 / (alike + 1))  # both scores
  assert report.change.level == "none"
  assert report.difference.curves["change"].points[0].members == 1


def test_samples_are_compared_with_those_of_their_own_classes_and_count_once():
  random = np.random.default_rng(0)
  y = random.integers(0, CLASSES, 360)
  x = (random.normal(size=(360, DIMENSIONS)) + 6 * np.eye(CLASSES, DIMENSIONS)[y]).astype(np.float32)
  members, held_out = np.arange(60), np.arange(60, 360)
  of_class = lambda places: places[y[places] == 1]
  stay, never = np.setdiff1d(members, of_class(members)[:10]), of_class(held_out)[:12]
  rest = np.setdiff1d(held_out, never)
  before, after = trained(x[members], y[members]), trained(x[stay], y[stay])
  both = np.concatenate([never, rest])
  change = change_scores(before, after, x[both], y[both])["change"]
  assert roc(change[:12], change[12:]).auc > 0.8  # by their class, for class 1 has lost samples
  repeated = np.append(never, [never[0]] * 3)
  report = kkt_jax.audit_unlearning(before, after, (x[repeated], y[repeated]), (x[rest], y[rest]))
  assert report.change.level == "none" and report.difference.p_value > 0.05
  assert report.difference.members == 12 and report.difference.others == len(of_class(rest))
  others = rest[y[rest] != 1]
  with pytest.raises(kkt_jax._errors.InputError, match="held_out must hold samples of every class .* none of class 1"):
    kkt_jax.audit_unlearning(before, after, (x[never], y[never]), (x[others], y[others]))


def test_what_was_not_removed_is_still_there(data, before):
  x, y = data["members"]
  other = dataclasses.replace(before, params=trained(x[:-1], y[:-1]).params)  # another sample was removed
  report = kkt_jax.audit_unlearning(before, other, data["forgotten"], data["held_out"])
  assert report.remains.level == "member" and "were not forgotten" in report.remains.answer
  assert report.retained is None and report.change.level == "none"


def test_what_was_never_found_is_no_verdict(data, before):
  x, y = data["held_out"]
  never, others = (x[:20], y[:20]), (x[20:], y[20:])
  report = kkt_jax.audit_unlearning(before, trained(*data["retained"]), never, others)
  assert report.remains.level == "open" and report.change.level == "none"


def test_classifiers_and_data_that_do_not_fit_are_refused(data, before):
  with pytest.raises(kkt_jax._errors.InputError, match="after must have other parameters than before"):
    kkt_jax.audit_unlearning(before, before, data["forgotten"], data["held_out"])
  smaller = kkt_jax.make_classifier(
    lambda w, x: x @ w, jnp.ones((DIMENSIONS, CLASSES)), (DIMENSIONS,), value_range=None
  )
  with pytest.raises(kkt_jax._errors.InputError, match="after.params must have the"):
    kkt_jax.audit_unlearning(before, smaller, data["forgotten"], data["held_out"])
  with pytest.raises(kkt_jax._errors.InputError, match="held_out must hold none of the forgotten samples; 8 of its 40"):
    kkt_jax.audit_unlearning(before, trained(*data["retained"]), data["forgotten"], data["members"])
  x, y = data["held_out"]
  with pytest.raises(kkt_jax._errors.InputError, match="held_out must be of the source of forgotten"):
    kkt_jax.audit_unlearning(before, trained(*data["retained"]), (x[:60] + 2, y[:60]), (x[60:], y[60:]))


def untrained():
  """What the command line describes: the network without parameters."""
  like = {"kernel": jnp.zeros((DIMENSIONS, CLASSES)), "bias": jnp.zeros(CLASSES)}
  head = lambda params, x: x @ params["kernel"] + params["bias"][None]
  return kkt_jax.Subject(head, lambda: like, (DIMENSIONS,), value_range=None, weight_decay=0.02)


def test_the_command_line_asks_the_same(data, before, tmp_path):
  for name, own in {"before": before, "after": trained(*data["retained"])}.items():
    save_file({key: np.asarray(leaf) for key, leaf in own.params.items()}, tmp_path / f"{name}.safetensors")
  for name in ("forgotten", "held_out", "retained"):
    np.savez(tmp_path / f"{name}.npz", x=data[name][0], y=data[name][1])
  config = audit.Config(
    classifier=f"{__name__}:untrained",
    checkpoint=str(tmp_path / "after.safetensors"),
    before=str(tmp_path / "before.safetensors"),
    forgotten=str(tmp_path / "forgotten.npz"),
    held_out_data=str(tmp_path / "held_out.npz"),
  )
  results = audit.run(config, tmp_path / "run")
  assert results["remains"]["level"] == "none" and results["change"]["level"] == "member"
  assert "The change of the weights reveals" in results["summary"] and (tmp_path / "run" / "unlearning.json").exists()
  with pytest.raises(UsageError, match="--before, --forgotten and --held_out_data must be given together"):
    audit.run(dataclasses.replace(config, held_out_data=""), tmp_path / "other")
  with pytest.raises(UsageError, match="after must have other parameters than before"):
    audit.run(dataclasses.replace(config, before=config.checkpoint), tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_every_score_of_a_change_has_a_name_in_words(data, before):
  x, y = data["held_out"]
  scores = change_scores(before, trained(*data["retained"]), x[:5], y[:5])
  assert set(scores) <= set(membership.SCORES)
