"""The audit of anybody's classifier: what it refuses, what it says, and that it runs for every kind of module."""

import csv
import dataclasses
import hashlib
import html
import importlib
import io
import json
import os
import pathlib
import re
import tomllib
import zipfile

import chex
from flax import linen as nn
from flax import nnx, serialization
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
from sklearn.linear_model import LogisticRegression
from trained_networks import drawings, examined, flax_classifier

from experiments import example_classifiers as examples
import kkt_jax
from kkt_jax import auditing
from kkt_jax._errors import InputError
from kkt_jax.analysis import Subspace
from kkt_jax.auditing import data, description, files, membership, run, Samples, verdict
from kkt_jax.cli import audit, flags
from kkt_jax.cli.flags import UsageError
from kkt_jax.criteria import AuditCriteria
from kkt_jax.kkt import pretrain, weight_decay_conditions
from kkt_jax.membership import candidates
from kkt_jax.metrics import Trial

SHAPE = (8, 8, 1)


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.relu(nn.Dense(40)(x.reshape(x.shape[0], -1)))
    return nn.Dense(3)(h)


class Normalised(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    h = nn.Conv(4, (3, 3), strides=2)(x)
    h = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(h))
    return nn.Dense(3)(h.reshape(x.shape[0], -1))


def linen():
  return kkt_jax.Subject.from_linen(Network(), input_shape=SHAPE, value_range=(-1.0, 1.0))


def normalised():
  return kkt_jax.Subject.from_linen(Normalised(), input_shape=SHAPE)


def vectors():
  return kkt_jax.Subject.from_linen(Network(), input_shape=(5,), value_range=None)


def straight():
  """A linear classifier with random weights that add up to 0 over classes, and over pixels."""
  centred = lambda size: jnp.eye(size) - 1 / size
  start = lambda: centred(64) @ jax.random.normal(jax.random.key(0), (64, 3)) @ centred(3)
  return kkt_jax.Subject(lambda w, x: x.reshape(len(x), -1) @ w, start, SHAPE, weight_decay=0.001)


def probabilities():
  return dataclasses.replace(straight(), apply_fn=lambda w, x: jax.nn.softmax(x.reshape(len(x), -1) @ w))


def dead():
  return dataclasses.replace(straight(), apply_fn=lambda w, x: jnp.zeros((len(x), 3)) + 0 * w.sum())


def ready():
  """A classifier that has its parameters."""
  return classifier(straight())


def ready_by_name():
  return kkt_jax.make_classifier(lambda p, x: x.reshape(len(x), -1) @ p["w"], {"w": ready().params}, SHAPE)


def ready_with_batch_norm():
  return classifier(normalised())


def estimator():
  x, y = images(0)
  return LogisticRegression().fit(x.reshape(len(x), -1), y)


def module():
  return nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def broken():
  return 1 / 0


def asking(what):
  return what


def nothing():
  return {}


def broken_inside():
  return kkt_jax.Subject(lambda params, x: x, lambda: 1 / 0, SHAPE)


def images(seed, count=5):
  """Three kinds of blobs in [0, 1], and their classes."""
  random = np.random.default_rng(seed)
  y = np.arange(3 * count, dtype=np.int32) % 3
  centres = np.stack([np.outer(np.hanning(8), np.roll(np.hanning(8), shift)) for shift in (-2, 0, 2)])
  x = np.clip(centres[y] + 0.2 * random.normal(size=(len(y), 8, 8)), 0, 1)
  return x[..., None].astype(np.float32), y


def classifier(subject):
  return subject.classifier(subject.init_fn())


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """A folder with each subject's parameters, and the data: of blobs for images, of noise for vectors."""
  folder = tmp_path_factory.mktemp("stored")
  for build in (linen, normalised, vectors, straight):
    examples.store(folder / f"{build.__name__}.safetensors", build().init_fn())
  for name, seed, count in (("train", 0, 5), ("held_out", 1, 10)):
    x, y = images(seed, count)
    np.savez(folder / f"{name}.npz", x=(255 * x).astype(np.uint8), y=y)
    np.savez(folder / f"{name}_vectors.npz", x=np.random.default_rng(seed).normal(size=(len(y), 5)), y=y)
  return folder


def config(stored, build=linen, **settings):
  tiny = {"codes": 4, "steps": 4, "log_every": 2, "save_every": 2, "force": True}
  path = stored / f"{build.__name__}.safetensors"
  return audit.Config(classifier=f"test_audit:{build.__name__}", checkpoint=str(path), **tiny | settings)


def with_data(stored, suffix=""):
  return {f"{name}_data": str(stored / f"{name}{suffix}.npz") for name in ("train", "held_out")}


# What is refused, before there is a folder.


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"classifier": ""}, "--classifier must be given"),
    ({"classifier": "test_audit"}, "--classifier must be module:function, such as mine:classifier; got 'test_audit'."),
    ({"classifier": ":linen"}, "--classifier must be module:function"),
    ({"classifier": "../mine:linen"}, "--classifier must be module:function"),
    ({"classifier": "no_such:f"}, "--classifier=no_such:f raised ModuleNotFoundError: No module named 'no_such'"),
    ({"classifier": "test_audit:absent"}, "--classifier=test_audit:absent raised AttributeError: module 'test_audit'"),
    ({"classifier": "test_audit:broken"}, "--classifier=test_audit:broken raised ZeroDivisionError: division by zero"),
    ({"classifier": "test_audit:broken_inside"}, "broken_inside raised ZeroDivisionError: division by zero"),
    ({"classifier": "test_audit:asking"}, r"raised TypeError: asking\(\) missing 1 required positional argument"),
    ({"classifier": "test_audit:nothing"}, "=test_audit:nothing must return a kkt_jax.Subject or .*; got dict"),
    ({"classifier": "test_audit:module"}, r"must return kkt_jax.from_nnx\(model, .*, which says .*; got Linear"),
    ({"checkpoint": ""}, "--checkpoint must be given, for --classifier=test_audit:linen has no parameters"),
    ({"classifier": "test_audit:ready_with_batch_norm"}, "--checkpoint must not be given, .* running statistics"),
    ({"classifier": "test_audit:ready"}, "--checkpoint: .* its tensors are not the classifier's"),
    ({"checkpoint": "/no/where.msgpack"}, "--checkpoint: /no/where.msgpack: there is no such file"),
    ({"classifier": "test_audit:normalised"}, "its tensors are not the classifier's"),
    ({"form": "change"}, "--form=change needs --initial_checkpoint"),
    ({"initial_checkpoint": "/no/where.msgpack"}, "--initial_checkpoint: /no/where.msgpack: there is no such file"),
    ({"weights": "stationarity=many"}, "--weights must be name=number"),
    ({"train_data": "/no/where.npz"}, "--train_data=/no/where.npz: .* there is no such file"),
    ({"held_out_data": "same"}, "--held_out_data needs --train_data"),
    ({"candidates": "same"}, "--candidates needs --held_out_data"),
    ({"candidates": "/no/where", "held_out_data": "same"}, "--candidates=/no/where: .* there is no such file"),
  ],
)
def test_what_cannot_be_audited_is_named_and_leaves_no_folder(stored, tmp_path, settings, said):
  settings = {name: str(stored / "train.npz") if value == "same" else value for name, value in settings.items()}
  with pytest.raises(InputError, match=said) as error:
    audit.run(dataclasses.replace(config(stored), **settings), tmp_path / "new")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "new").exists()


def test_what_has_its_parameters_needs_no_checkpoint(stored):
  own = audit.load("test_audit:ready", "")
  chex.assert_trees_all_equal(own.params, ready().params)
  assert own.weight_decay == 0.001
  assert audit.load("test_audit:ready_with_batch_norm", "").batch_coupled
  found = audit.load("test_audit:estimator", "")
  assert (found.input_shape, found.labels) == ((64,), (0, 1, 2))
  np.testing.assert_allclose(found.params["coef_"], estimator().coef_, rtol=1e-5)


def test_a_file_replaces_the_parameters_of_a_classifier_and_another_is_its_start(tmp_path):
  for name, factor in (("weights", 2), ("start", 3)):
    (tmp_path / f"{name}.msgpack").write_bytes(serialization.to_bytes({"w": factor * ready().params}))
  own = audit.load("test_audit:ready_by_name", *(str(tmp_path / f"{name}.msgpack") for name in ("weights", "start")))
  np.testing.assert_array_equal(own.params["w"], 2 * ready().params)
  np.testing.assert_array_equal(own.initial_params["w"], 3 * ready().params)


@pytest.mark.parametrize(
  ("build", "said"), [(probabilities, "must return logits; its outputs are in"), (dead, "must tell inputs apart")]
)
def test_what_cannot_be_examined_is_a_usage_error(stored, tmp_path, build, said):
  settings = dataclasses.replace(config(stored, straight), classifier=f"test_audit:{build.__name__}")
  with pytest.raises(UsageError, match=f"^--classifier=test_audit:{build.__name__}: classifier {said}") as error:
    audit.run(settings, tmp_path / "new")
  assert "--force" not in str(error.value)  # which would not help
  assert not (tmp_path / "new").exists()


def test_a_device_that_is_not_there_is_no_fault_of_the_classifier(stored, tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: (_ for _ in ()).throw(RuntimeError("no backend 'cuda'")))
  with pytest.raises(UsageError, match="^JAX has no device to run on .*no backend 'cuda'.*; see JAX_PLATFORMS"):
    audit.run(config(stored), tmp_path / "new")


def test_the_installed_program_refuses_a_mistyped_flag_and_leaves_no_folder(tmp_path, capsys):
  scripts = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["scripts"]
  module, function = scripts["kkt-audit"].split(":")
  assert getattr(importlib.import_module(module), function) is audit.main
  for wrong in ("--clasifier=a:b", "--steps=many", "--seed=18446744073709551616", f"--seed={2**32}", "surplus"):
    assert flags.command(audit.Config, audit.run, ["kkt-audit", wrong, f"--workdir={tmp_path / 'new'}"]) == 2
  assert flags.command(audit.Config, audit.run, ["kkt-audit", "--workdir="]) == 2
  assert "Did you mean: classifier ?" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_forms_of_the_command_line_are_those_of_the_library():
  (form,) = (field for field in dataclasses.fields(audit.Config) if field.name == "form")
  assert form.metadata["choices"] == ("auto", *kkt_jax.analysis.examination.FORMS)


# The owner's data.


def read(path, subject=normalised):
  own = classifier(subject())
  return data.compared(own, auditing.read_samples(str(path), own, name="--train_data"), None).train


def read_both(train, held_out, own):
  return data.compared(own, auditing.read_samples(train, own), auditing.read_samples(held_out, own))


def test_data_in_the_classifier_s_own_units_and_bytes_mean_the_same(tmp_path):
  x, y = images(0)
  x = np.round(255 * x) / 255
  np.savez(tmp_path / "own.npz", x=2 * x.astype(np.float64) - 1, y=y.astype(np.int64))
  np.savez(tmp_path / "bytes.npz", x=np.round(255 * x).astype(np.uint8), y=y)
  for name in ("own", "bytes"):
    found = read(tmp_path / f"{name}.npz", linen)  # inputs from -1 to 1
    np.testing.assert_allclose(found.x, x, atol=1e-6)
    np.testing.assert_array_equal(found.y, y)
    assert (found.x.dtype, found.y.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(
  ("arrays", "said"),
  [
    ({"x": np.zeros((2, 4, 4, 1), np.float32), "y": np.zeros(2, int)}, r"x must have shape \[N, 8, 8, 1\]"),
    ({"x": np.zeros((3, *SHAPE), np.float32), "y": np.array([0, 1, 3])}, "labels must lie in 0 to 2; got 0 to 3"),
    ({"x": np.zeros((1, *SHAPE), np.float32), "y": np.array([2**32])}, "labels must lie in 0 to 2; got 4294967296"),
    ({"x": np.zeros((1, *SHAPE), np.float32), "y": np.array([2**63], np.uint64)}, "labels must lie in 0 to 2"),
    ({"x": np.zeros((2, *SHAPE), np.float32), "y": np.array([0, 1])}, "every class; it has none of class 2"),
    ({"x": np.zeros((0, *SHAPE), np.float32), "y": np.zeros(0, int)}, "cannot be read|at least one sample"),
    ({"x": np.full((3, *SHAPE), 2.0), "y": np.arange(3)}, "x must lie in the classifier's range, 0.0 to 1.0; got 2.0"),
    ({"x": np.full((3, *SHAPE), np.nan), "y": np.arange(3)}, "x must lie in the classifier's range"),
    ({"x": np.zeros((2, *SHAPE), np.uint16), "y": np.zeros(2, int)}, "x must be uint8 or floating point"),
    ({"x": np.ones((2, *SHAPE), np.uint8), "y": np.zeros(2, int)}, "x holds nothing above 1, and 255 stands for"),
    ({"x": np.zeros((2, *SHAPE), np.float32)}, "y missing"),
    ({"x": np.zeros((2, *SHAPE), np.float32), "y": np.array(["a", "b"])}, "y integers"),
    ({"x": np.array([{}, {}]), "y": np.zeros(2, int)}, "x.npy is damaged"),  # would have to be unpickled
  ],
)
def test_data_that_do_not_fit_are_named(tmp_path, arrays, said):
  np.savez(tmp_path / "data.npz", **arrays)
  with pytest.raises(InputError, match=said):
    read(tmp_path / "data.npz")


def archive(path, **members):
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    for name, content in members.items():
      file.writestr(f"{name}.npy", content)
  return path


def header(shape, dtype="<f4"):
  content = io.BytesIO()
  np.lib.format.write_array_header_1_0(content, {"descr": dtype, "fortran_order": False, "shape": shape})
  return content.getvalue()


def test_an_archive_is_judged_by_its_headers_before_anything_is_allocated(tmp_path, monkeypatch):
  labels = header((10**9,), "<i8")
  lies = archive(tmp_path / "lies.npz", x=header((10**9, *SHAPE)), y=labels)  # 256 GB, of which nothing is there
  with pytest.raises(InputError, match="x.npy is damaged: its header says .*, and 0 bytes follow"):
    read(lies)
  unlike = archive(tmp_path / "unlike.npz", x=header((4, 100)) + bytes(1600), y=header((4,), "<i8") + bytes(32))
  monkeypatch.setattr(np.lib.format, "read_array", None)  # must not be called
  with pytest.raises(InputError, match=r"x must have shape \[N, 8, 8, 1\]"):
    read(unlike)
  monkeypatch.setattr(files, "_LARGEST", 1 << 10)
  large = archive(tmp_path / "large.npz", x=header((8, *SHAPE)) + bytes(2048), y=header((8,), "<i8") + bytes(64))
  with pytest.raises(InputError, match="x.npy has 2,048 bytes; at most 1,024 are read"):
    read(large)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_is_refused(tmp_path, content):
  (tmp_path / "data.npz").write_bytes(content)
  with pytest.raises(InputError, match="neither an .npz file nor a folder|x and y missing"):
    read(tmp_path / "data.npz")


def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "data.npz")
  with pytest.raises(InputError, match="neither an .npz file nor a folder"):
    read(tmp_path / "data.npz")


def in_folders(folder):
  x, y = images(0, count=1)
  for image, label in zip(x, y, strict=True):
    (folder / str(label)).mkdir()
    Image.fromarray((255 * image[..., 0]).astype(np.uint8)).save(folder / str(label) / "one.png")
  return x, y


def test_images_come_from_a_folder_for_each_class(tmp_path):
  x, y = in_folders(tmp_path)
  os.mkfifo(tmp_path / "0" / "pipe.png")  # is passed over
  (tmp_path / ".hidden").mkdir()
  found = read(tmp_path)
  np.testing.assert_allclose(found.x, x, atol=1 / 255)
  np.testing.assert_array_equal(found.y, y)


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("0/large.png", Image.new("L", (9, 8)), "large.png has 9 x 8 pixels; the classifier takes 8 x 8"),
    ("0/deep.png", Image.new("I;16", (8, 8), 40000), "deep.png has pixels of the kind I;16; .* 8-bit L"),
    ("0/colour.png", Image.new("RGB", (8, 8)), "colour.png has pixels of the kind RGB; with 1 channel"),
    ("0/no.png", b"no image", "cannot be read"),
    ("3/one.png", Image.new("L", (8, 8)), "a folder of images for each class, 0 to 2; '3' is no class"),
    ("²/one.png", Image.new("L", (8, 8)), "'²' is no class"),
    ("99999999999999999999/one.png", Image.new("L", (8, 8)), "'99999999999999999999' is no class"),
  ],
)
def test_images_that_do_not_fit_are_named(tmp_path, name, content, said):
  in_folders(tmp_path)
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(content) if isinstance(content, bytes) else content.save(path)
  with pytest.raises(InputError, match=said):
    read(tmp_path)


def test_folders_are_named_by_the_labels_that_a_classifier_has(tmp_path):
  in_folders(tmp_path)
  apply_fn = lambda w, x: x.reshape(len(x), -1) @ w
  others = kkt_jax.make_classifier(apply_fn, jnp.ones((64, 3)), (8, 8, 1), labels=(2, 0, 1))
  found = auditing.read_samples(str(tmp_path), others)
  assert found.names == ("2/one.png", "0/one.png", "1/one.png") and found.y.tolist() == [0, 1, 2]
  further = kkt_jax.make_classifier(apply_fn, jnp.ones((64, 3)), (8, 8, 1), labels=(5, 1, 2))
  with pytest.raises(InputError, match="for each class, 5, 1, 2; '0' is no class"):
    auditing.read_samples(str(tmp_path), further)


def test_held_out_data_that_hold_training_samples_are_refused(tmp_path):
  (x, y), (other, labels) = images(0), images(1)
  np.savez(tmp_path / "train.npz", x=np.round(255 * x).astype(np.uint8), y=y)
  mixed = np.concatenate([other, np.round(255 * x[:2]) / 255])  # the same, stored as floats
  np.savez(tmp_path / "held_out.npz", x=mixed, y=np.concatenate([labels, y[:2]]))
  own = classifier(normalised())
  with pytest.raises(InputError, match="2 of its 17 are identical to one of train, the first at place 15"):
    read_both(str(tmp_path / "train.npz"), str(tmp_path / "held_out.npz"), own)


def test_held_out_data_that_lack_a_class_are_refused(tmp_path):
  for name, seed, count in (("train", 0, 15), ("held_out", 1, 2)):
    x, y = images(seed)
    np.savez(tmp_path / f"{name}.npz", x=x[:count], y=y[:count])
  with pytest.raises(InputError, match="held_out must hold samples of every class; it has none of class 2"):
    read_both(str(tmp_path / "train.npz"), str(tmp_path / "held_out.npz"), classifier(normalised()))


def test_repetitions_and_too_few_data_are_found_before_anything_is_trained(tmp_path):
  own = classifier(normalised())
  (x, y), (other, labels) = images(0), images(1, count=7)
  np.savez(tmp_path / "train.npz", x=np.concatenate([x, x[3:5]]), y=np.concatenate([y, y[3:5]]))
  np.savez(tmp_path / "held_out.npz", x=other[:9], y=labels[:9])
  train, held_out, remarks = read_both(str(tmp_path / "train.npz"), str(tmp_path / "held_out.npz"), own)
  assert len(train.y) == 15 and train.names == tuple(f"sample {i}" for i in range(15)) and len(held_out.y) == 9
  # Three of each class, one other to each: all 9 by chance with probability 2^-9, twice that is below .01
  assert remarks == [
    "2 of the 17 samples of train repeat an earlier one (sample 15 repeats sample 3); each counts once.",
    "Only 9 of the 15 training samples can be tested, 3 of each class: so many has the rarest class of the training"
    " data or of those held out.",
  ]
  np.savez(tmp_path / "held_out.npz", x=other[:6], y=labels[:6])
  assert "too few for a verdict: even if all 6" in read_both(*given(tmp_path), own)[2][-1]
  np.savez(tmp_path / "held_out.npz", x=other, y=labels)
  np.savez(tmp_path / "train.npz", x=x, y=y)
  assert read_both(*given(tmp_path), own)[2] == []


def test_held_out_copies_that_were_stored_again_are_told(tmp_path):
  (x, y), (other, labels) = images(0), images(1)
  again = np.clip(np.concatenate([other, x[:2] + 0.004]), 0, 1)  # identical to none
  np.savez(tmp_path / "train.npz", x=x, y=y)
  np.savez(tmp_path / "held_out.npz", x=again, y=np.concatenate([labels, y[:2]]))
  (remark,) = read_both(*given(tmp_path), classifier(normalised()))[2]
  assert remark.startswith("2 held-out samples are all but equal to a training sample")


def given(folder):
  return [str(folder / f"{name}.npz") for name in ("train", "held_out")]


def test_samples_of_folders_are_named_by_their_files(tmp_path):
  in_folders(tmp_path)
  assert read(tmp_path).names == ("0/one.png", "1/one.png", "2/one.png")


def test_candidates_have_no_labels_but_those_that_the_classifier_gives_them(tmp_path):
  (tmp_path / "known").mkdir()
  in_folders(tmp_path / "known")
  (tmp_path / "asked" / "some" / "where").mkdir(parents=True)
  for own in ("1/one.png", "2/one.png"):
    (tmp_path / "asked" / "some" / f"{own[0]}.png").write_bytes((tmp_path / "known" / own).read_bytes())
  own, known = classifier(normalised()), read(tmp_path / "known")
  asked = auditing.read_samples(str(tmp_path / "asked"), own, labelled=False)
  assert asked.names == ("some/1.png", "some/2.png")
  np.testing.assert_array_equal(asked.x, known.x[1:])
  np.testing.assert_array_equal(asked.y, np.argmax(own.predict(own.from_unit(asked.x)), axis=1))
  np.savez(tmp_path / "asked.npz", x=asked.x)
  np.testing.assert_array_equal(auditing.read_samples(str(tmp_path / "asked.npz"), own, labelled=False).x, asked.x)
  with pytest.raises(InputError, match="it must hold an array x; x missing"):
    np.savez(tmp_path / "none.npz", y=asked.y)
    auditing.read_samples(str(tmp_path / "none.npz"), own, labelled=False)


# Scores of single samples.


@pytest.fixture(name="known_members")
def fixture_known_members():
  """A linear classifier of vectors whose weights are a sum over the first 30 of 90 samples, and their data."""
  random = np.random.default_rng(0)
  x, y = random.normal(size=(90, 60)).astype(np.float32), np.arange(90, dtype=np.int32) % 3
  kernel = 1e-3 * x[:30].T @ (np.eye(3)[y[:30]] - 1 / 3)
  own = kkt_jax.make_classifier(lambda w, x: x @ w, jnp.asarray(kernel, jnp.float32), (60,), value_range=None)
  members, others = Samples(x[:30], y[:30]), Samples(x[30:], y[30:])
  return kkt_jax.examine(own, form="weight_decay"), members, others


@pytest.fixture(name="images_at_risk")
def fixture_images_at_risk():
  """A report of the same kind, of images, without a reconstruction to judge."""
  random = np.random.default_rng(0)
  x, y = random.uniform(size=(90, 8, 8, 1)).astype(np.float32), np.arange(90, dtype=np.int32) % 3
  kernel = 1e-3 * x[:30].reshape(30, -1).T @ (np.eye(3)[y[:30]] - 1 / 3)
  apply_fn = lambda w, x: x.reshape(len(x), -1) @ w
  own = kkt_jax.make_classifier(apply_fn, jnp.asarray(kernel, jnp.float32), (8, 8, 1))
  examination = kkt_jax.examine(own, form="weight_decay")
  train, others = Samples(x[:30], y[:30]), Samples(x[30:], y[30:])
  scored = membership.score(examination, train, others)
  return run._concluded(
    auditing.AuditReport(
      verdict=verdict.Verdict("open", "No verdict.", ()),
      examination=examination,
      labels=range(3),
      train=train,
      scored=scored,
    ),
    others,
    None,
  )


def test_scores_tell_members_from_others_and_others_from_nothing(known_members):
  examination, members, others = known_members
  found = membership.score(examination, members, others)
  assert (found.best, found.members, found.others) == ("multipliers", 30, 60)
  assert found.curves["multipliers"].points[0].members == 30 and found.p_value < 1e-9
  half = Samples(others.x[:30], others.y[:30]), Samples(others.x[30:], others.y[30:])
  assert membership.score(examination, *half).p_value > 0.01
  asked = Samples(np.concatenate([members.x, others.x[:10]]), np.zeros(40, np.int32), tuple(map(str, range(40))))
  risks = membership.suspects(examination, asked, Samples(others.x[10:], others.y[10:]))
  assert len(risks) == 40 and risks[0].p_value == pytest.approx(1 / 51)  # two scores together, fifty others
  named = {own.name for own in risks if own.q_value < 0.06}  # 40 / 30 of the least p-value, if all 30 have it
  assert len(named & {str(place) for place in range(30)}) >= 25 and len(named) <= 32
  assert np.all(np.diff([own.q_value for own in risks]) >= 0)


def test_samples_are_named_at_a_false_discovery_rate(known_members, tmp_path):
  examination, members, others = known_members
  scored = membership.score(examination, members, others)
  answer = verdict.of_scores(scored)
  found = auditing.AuditReport(
    verdict=answer, answers={"Membership inference": answer}, examination=examination, labels=range(3), scored=scored
  )
  assert {own.score for own in found.at_risk} == {"multipliers"} and len(found.members) == len(found.at_risk) == 30
  assert (
    dataclasses.replace(found, criteria=AuditCriteria(false_discovery_rate=0.01)).members == []
  )  # 2 / 61 is the least p-value
  assert [row["named"] for row in found.by_class] == [row["scored"] for row in found.by_class] == [10, 10, 10]
  own = run._labelled(dataclasses.replace(found, labels=(5, 7, 6)))
  assert [(row["class"], row["scored"], row["named"]) for row in own.by_class] == [(k, 10, 10) for k in (5, 7, 6)]
  assert [risk.label for risk in own.at_risk] == [(5, 7, 6)[risk.label] for risk in found.at_risk]
  assert found.states["Membership inference"] == ("found", answer) and found.to_dict()["epsilon_lower_bound"] > 1
  confounded = dataclasses.replace(found, remarks=[membership.Confounded("other source")], candidates=scored.risks)
  assert confounded.members == [] and "Of 30 candidates 0 stand out as members" in confounded.to_html()
  assert "report.html" in found.save(tmp_path)
  rows = list(csv.DictReader((tmp_path / "members.csv").open()))
  assert len(rows) == 30 and {row["named_as_member"] for row in rows} == {"True"} and rows[0]["given_as"]
  assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_score_has_a_name_in_words():
  found = examined(flax_classifier)
  subspace = Subspace(found.origin, jnp.eye(64)[:, :9], jnp.ones(9))
  scores = candidates.scores(dataclasses.replace(found, subspace=subspace), drawings(1, 3)[0])
  assert {"subspace", "signal", "boundaries"} <= set(scores) <= set(membership.SCORES)


def test_of_many_samples_some_are_scored(known_members):
  found = membership.score(*known_members, AuditCriteria(scored=20))
  assert (found.members, found.others) == (20, 20)


def test_what_became_of_a_question_is_one_of_four():
  levels = ("leak", "member", "class", "none", "open")
  own = [verdict.state(verdict.Verdict(level, "", ())) for level in levels]
  assert own == ["found", "found", "not found", "not found", "not evaluable"]
  assert verdict.state(verdict.refusal(0.3), applicable=False) == "not applicable"
  assert verdict.state(None) == "not evaluable"


def test_members_at_risk_are_shown_and_the_page_says_what_was_not_run(images_at_risk):
  page, names = images_at_risk.to_html(), [own.name for own in images_at_risk.at_risk]
  assert len(names) > 12 and page.count("<figure>") == min(len(names), 24)
  assert all(f"<small>{name}</small>" in page for name in names[:24])
  assert "not applicable" in page and "RMIA" in page and "EDPB opinion 28/2024" in page


def test_a_p_value_names_its_score_where_another_has_more_members_above_all_others():
  normal = np.random.default_rng(0).normal
  values = {
    "multipliers": (np.append(normal(size=199), 9.0), normal(size=200)),
    "loss": (normal(1.0, size=200), np.append(normal(size=199), 9.0)),
  }
  found = membership.compared(Samples(np.zeros((200, 1)), np.zeros(200, np.int32)), values)
  assert (found.best, found.surest) == ("multipliers", "loss") and found.p_value < 1e-6
  (said,) = verdict.of_scores(found).reasons
  assert re.search(r"^1 of 200 members .* by their multiplier .* by their loss \(AUC 0\.7\d\d\)\.$", said)


def test_scores_join_the_verdict(known_members):
  examination, members, others = known_members
  found = membership.score(examination, members, others)
  beyond = verdict.refusal(0.3)
  told = verdict.with_scores(beyond, found)
  assert told.level == "member" and told.answer.startswith("Membership can be inferred: members and non-members")
  assert "30 of 30 members score above all 60 non-members by their multiplier in the stationarity sum" in str(told)
  assert "by their loss, the baseline (AUC 0." in str(told) and f"Reconstruction: {beyond.answer}" in str(told)
  leak = verdict.of(trial(60), {"means": trial(20)}, {})
  both = verdict.with_scores(leak, found)
  assert both.answer == leak.answer and str(verdict.of_scores(found)) in str(both)
  stricter = AuditCriteria(significant=found.p_value / 2)
  assert verdict.of_scores(found, stricter).level == "none" != verdict.of_scores(found).level
  nothing = verdict.with_scores(beyond, found._replace(p_value=0.5))
  assert nothing.level == "open" and "No evidence that membership can be inferred" in str(nothing)
  assert "chance explains that (p = 0.5)." in str(nothing)
  assert verdict.with_scores(beyond, None) == beyond
  risks = [membership.Risk(str(q), 0, q, q, "loss") for q in (0.01, 0.2)]
  assert verdict.of_risks(risks, "candidates").startswith("1 of the 2 candidates can be named as members at a")
  assert "None of the 2 members can be named" in verdict.of_risks(
    risks, "members", AuditCriteria(false_discovery_rate=0.001)
  )


@pytest.mark.parametrize("remarks", [[], [membership.Confounded("Another source.")]])
def test_nobody_is_named_where_the_data_differ_without_the_weights(known_members, remarks):
  examination, members, others = known_members
  scored = membership.score(examination, members, others)
  report = auditing.AuditReport(
    verdict=verdict.refusal(0.3),
    examination=examination,
    labels=range(3),
    scored=scored,
    candidates=scored.risks,
    remarks=remarks,
  )
  concluded = run._concluded(report, others, None)
  said = f"{concluded.verdict} {concluded.answers['Membership inference']}"
  assert ("can be named as members" in said) == (not remarks)
  assert ("30 of the 30 candidates" in said) == (not remarks)


def test_a_report_made_in_python_has_a_section_for_each_answer(known_members, tmp_path):
  examination, members, others = known_members
  scored = membership.score(examination, members, others)
  answers = {"Reconstruction": verdict.refusal(0.3), "Membership inference": verdict.of_scores(scored)}
  both = verdict.with_scores(answers["Reconstruction"], scored)
  report = auditing.AuditReport(verdict=both, answers=answers, examination=examination, labels=range(3), scored=scored)
  assert report.save(tmp_path) == ["report.html", "report.json", "members.csv", "scores.png"]
  page = (tmp_path / "report.html").read_text()
  for question, own in answers.items():
    section = page.split(f"<h2>{question}</h2>")[1].split("<h2>")[0]
    assert f"<b>{own.answer}</b> {html.escape(' '.join(own.reasons))}" in section
  stored = json.loads((tmp_path / "report.json").read_text())
  assert [own["level"] for own in stored["answers"].values()] == ["open", "member"]
  assert stored["audit_criteria"]["significant"] == 0.01 and stored["analysis_criteria"]["fall"] == 5.0


# Whether the weights obey the equations with their own data.


def test_weights_obey_the_equations_with_their_own_data_or_do_not(known_members):
  examination, members, others = known_members
  halves = Samples(others.x[:30], others.y[:30]), Samples(others.x[30:], others.y[30:])
  found = description.residuals(examination, members, halves[0])
  assert found.own < 0.01 and found.other > 0.3 and found.what == "held-out data" and not found.disobey
  assert description.residuals(examination, members, None)[1:3] == (1.0, "no data")  # inputs without a range
  kernel = jax.random.normal(jax.random.key(0), (60, 3)) @ (jnp.eye(3) - 1 / 3)
  random = dataclasses.replace(examination, conditions=weight_decay_conditions(kernel))
  found = description.residuals(random, *halves)
  assert found.own > 0.5 and found.disobey
  assert f"leave {found.own:.2%} of the weights unexplained, with held-out data {found.other:.0%}." in str(found)
  few = AuditCriteria(classified=20)
  assert description.residuals(examination, members, None, few) is None  # a part of them would explain a part


def test_a_low_residual_or_one_far_below_that_of_others_is_no_disobedience():
  of = lambda own, other: description.Residuals.of(own, other, "noise").disobey
  assert [of(0.49, 0.49), of(0.51, 0.9), of(0.51, 0.6), of(0.9, 0.95)] == [False, False, True, True]


# The verdict.


def trial(hits, leading=0, tested=100):
  """A trial of groups of five, in which the first samples are picked out, some of them before all others."""
  members = np.where(np.arange(tested) < hits, 0.5, 0.1)
  members[:leading] = 0.95
  others = np.where(np.arange(tested) < hits, 0.3, 0.6)[:, None] * np.ones(4)
  return Trial(np.zeros(tested, int), members, others, 1.0, np.arange(tested))


def test_the_verdict_says_what_the_numbers_say():
  assert verdict.of(None, {}, {}).answer.startswith("No verdict without data")
  yes = verdict.of(trial(60), {"means": trial(20)}, {})
  assert (yes.level, yes.answer) == ("leak", "These weights reveal individual training samples.")
  # Wilson, by hand: z = 1.96, (.6 + z^2/200 +- z sqrt(.24/100 + z^2/40000)) / (1 + z^2/100) = .502, .691
  assert "Of 100 members, 60 (95 %: 50 to 69) were identified among 5 real samples" in str(yes)
  assert "by chance 20" in str(yes) and "below one in a billion" in str(yes) and "fewer: means 20." in str(yes)
  # (.6 - .2) / (1 - .2) = .5, and the same of the bounds
  assert "50% of them (95 %: 38% to 61%)" in str(yes)
  no = verdict.of(trial(22), {"means": trial(20)}, {})
  assert no.level == "none" and no.answer.startswith("No evidence") and "the weights reveal nothing" in str(no)
  # P(at least 31 of 100 at a fifth) = .0061, at least 32 .0031: the first below .005
  assert "32 would have been evidence" in str(no)


def test_the_verdict_neither_rounds_to_certainty_nor_hides_what_was_not_tested():
  every = str(verdict.of(trial(100), {"means": trial(20)}, {}))
  assert "below one in a billion" in every and "100% of them (95 %: 95% to 100%)" in every
  assert str(verdict.of(trial(10, tested=10), {}, {}, remarks=["Only 10."])).endswith("Only 10.")
  few = verdict.of(trial(1, tested=3), {}, {}, remarks=["The data are too few."])
  assert (few.level, few.answer) == ("open", "No verdict from so few data.") and "too few" in str(few)


def test_what_a_class_level_baseline_explains_is_no_single_sample():
  alike = verdict.of(trial(40), {"means": trial(39)}, {})
  assert alike.level == "class" and "no more of them than a class-level baseline does" in alike.answer
  assert "about as many: means 39. So" in str(alike) and "not shown, and not excluded" in str(alike)
  assert verdict.of(trial(40), {"likeness": trial(20), "means": trial(39)}, {}).level == "class"
  assert verdict.of(trial(40), {"means": trial(39)}, {"range": 3}).level == "leak"
  copied = trial(40)
  copied.members[0] = 0.995  # an exact image, where no other real one is
  assert verdict.of(copied, {"means": trial(39)}, {}).level == "leak"


def test_five_samples_before_all_others_are_evidence_whatever_the_mean():
  assert verdict.of(trial(22, leading=5), {"means": trial(10)}, {}).level == "leak"  # 2 x .2^5 = .0006


def test_certificates_are_contradicted_by_nothing_but_the_data():
  certified = {"equations": 1, "levels": 0, "range": 3}
  some = verdict.of(trial(22), {"means": trial(20)}, certified, 1)
  assert some.level == "leak" and "Among the training data that were given: 3 of 4; the others are false" in str(some)
  assert "That can be chance; the certificates do not rest on it." in str(some) and "No evidence" not in str(some)
  assert verdict.of(trial(22), {"means": trial(20)}, certified, 4).level == "none"
  assert verdict.of(None, {}, certified).answer == "These weights reveal individual training samples."


def test_the_verdict_says_by_which_evidence_how_many_are_certified_and_that_this_assumes_something():
  said = str(verdict.of(None, {}, {"equations": 60, "levels": 38, "range": 0}))
  assert (
    "Without any data, the weights certify 98 samples as training samples: 60 by the equations, 38 by 8-bit levels."
    f" That holds under the assumptions in docs/certificates.md; {verdict.MEASURED_FALSE}."
  ) in said
  assert "range of values" not in said and "given:" not in said
  one = str(verdict.of(None, {}, {"equations": 0, "levels": 0, "range": 1}, 0))
  assert "certify 1 sample as a training sample: 1 by the range of values." in one
  assert "Among the training data that were given: 1 of 1." in one
  assert list(verdict.EVIDENCE) == list(verdict.ASSUMED) == list(kkt_jax.extraction.EVIDENCE)


def test_files_and_folders_have_a_digest(tmp_path):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "c").write_bytes(b"abc")
  sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of abc, FIPS 180-2
  assert audit.digest(tmp_path / "a" / "b" / "c") == sha
  before = audit.digest(tmp_path / "a")
  (tmp_path / "a" / "b" / "c").rename(tmp_path / "a" / "b" / "d")
  assert audit.digest(tmp_path / "a") != before


# Whole audits.


@pytest.mark.slow
def test_a_classifier_beyond_the_theory_is_refused_with_a_report_and_can_be_tried_anyway(stored, tmp_path):
  settings = config(stored, force=False, form="weight_decay")
  metrics = audit.run(settings, tmp_path)
  assert metrics["bounds"]["weight_decay"] > 0.05
  assert metrics["verdict"].startswith("The theory of this audit does not cover these weights")
  assert metrics["pictures"] == ["report.html"] and not (tmp_path / "generator").exists()
  page = (tmp_path / "report.html").read_text()
  assert "<strong>The theory of this audit does not cover these weights" in page
  assert "<li>2,723 parameters, 3 classes, no batch norm.</li>" in page  # 64 x 40 + 40 + 40 x 3 + 3
  given = {"candidates": str(stored / "train.npz"), "held_out_data": str(stored / "held_out.npz")}
  metrics = audit.run(dataclasses.replace(settings, **given), tmp_path)  # is answered, all the same
  assert len(metrics["candidates"]) == 15 and "of the 15 candidates" in metrics["verdict"]
  audit.run(dataclasses.replace(settings, force=True), tmp_path)  # as the verdict suggests, in the same folder
  assert (tmp_path / "generator").exists()


def test_weights_that_disobey_with_their_own_data_are_not_rebuilt_and_scores_go_on(stored, tmp_path):
  subject, weights = straight(), straight().init_fn()
  for name, seed in (("train", 0), ("held_out", 1)):
    x = np.random.default_rng(seed).uniform(size=(24, *SHAPE)).astype(np.float32)
    np.savez(tmp_path / f"{name}.npz", x=x, y=np.argmax(subject.apply_fn(weights, x), axis=1))
  metrics = audit.run(config(stored, straight, force=False, **with_data(tmp_path)), tmp_path / "run")
  assert metrics["bounds"]["weight_decay"] < 0.05 and metrics["residuals"]["own"] > 0.5
  assert metrics["verdict"].startswith(
    "These weights do not satisfy the stationarity conditions: reconstruction was not attempted"
  )
  assert metrics["scores"] and not (tmp_path / "run" / "generator").exists()
  assert "of the weights unexplained" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_data_given_later_are_compared_without_training_again(stored, tmp_path):
  metrics = audit.run(config(stored), tmp_path)
  assert metrics["verdict"].startswith("No verdict")
  assert metrics["pictures"] == ["report.html", "samples.png"]
  logged = (tmp_path / "metrics.jsonl").read_text()
  metrics = audit.run(config(stored, **with_data(stored)), tmp_path)
  assert (tmp_path / "metrics.jsonl").read_text() == logged
  assert metrics["pictures"] == ["report.html", "scores.png", "pairs.png", "samples.png"]
  assert all((tmp_path / name).exists() for name in metrics["pictures"])
  assert metrics["against_data"]["chance"] == pytest.approx(1 / 3)  # two others to each
  assert metrics["against_data"]["tested"] == 15
  assert metrics["training_data"]["likeness"] > metrics["uniform_noise"]["likeness"]
  assert json.loads((tmp_path / "metrics.json").read_text())["verdict"] == metrics["verdict"]
  page = (tmp_path / "report.html").read_text()
  assert metrics["verdict"].split(".")[0] in page and "0.0000" not in page
  shown = metrics["leaks"][:8] if metrics["states"]["Reconstruction"] == "found" else []  # else they are no evidence
  assert page.count("<img ") == 3 + 3 * len(shown)
  identity = {f"Identity of {what}" for what in ("weights", "training data", "held-out data", "settings")} | {"Version"}
  assert set(metrics["identity"]) == identity and all(digest in page for digest in metrics["identity"].values())
  assert all(
    hashlib.sha256((stored / f"{name}.npz").read_bytes()).hexdigest() in page for name in ("train", "held_out")
  )
  with pytest.raises(UsageError, match="--steps was 4, now 5"):
    audit.run(config(stored, steps=5), tmp_path)


@pytest.mark.slow
def test_another_classifier_under_the_same_name_is_not_taken_for_the_first(stored, tmp_path):
  examples.store(tmp_path / "weights.safetensors", linen().init_fn())
  settings = dataclasses.replace(config(stored, force=False), checkpoint=str(tmp_path / "weights.safetensors"))
  audit.run(settings, tmp_path / "run")
  examples.store(tmp_path / "weights.safetensors", jax.tree.map(lambda leaf: 2 * leaf, linen().init_fn()))
  with pytest.raises(UsageError, match="--checkpoint_digest was"):
    audit.run(settings, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("build", "suffix", "pictures"), [(normalised, "", 4), (vectors, "_vectors", 2)])
def test_batch_norm_and_inputs_that_are_no_images_are_audited(stored, tmp_path, build, suffix, pictures):
  metrics = audit.run(config(stored, build, **with_data(stored, suffix)), tmp_path)
  assert len(metrics["pictures"]) == pictures
  assert 0 <= metrics["generated"]["agreement"] <= 1
  assert 0 < metrics["against_data"]["p_value"] <= 1


@pytest.mark.slow
def test_training_data_are_told_from_others_and_data_never_seen_are_not(stored, tmp_path):
  """Weight decay, trained to its stationary point: what is generated knows the 15 blobs, and not another 15."""
  subject = linen()
  (x, y), (other, labels) = images(0), images(3, count=20)
  result = pretrain.gradient_descent(
    subject.apply_fn,
    subject.init_fn(),
    jnp.asarray(2 * x - 1),
    y,
    pretrain.Descent(num_steps=6000, learning_rate=0.1, weight_decay=0.03, momentum=0.9),
  )
  examples.store(tmp_path / "weights.safetensors", result.params)
  np.savez(tmp_path / "train.npz", x=2 * x - 1, y=y)
  np.savez(tmp_path / "never_seen.npz", x=2 * other[:15] - 1, y=labels[:15])
  np.savez(tmp_path / "held_out.npz", x=2 * other[15:] - 1, y=labels[15:])
  p_values = []
  for name in ("train", "never_seen"):
    given = {"train_data": str(tmp_path / f"{name}.npz"), "held_out_data": str(tmp_path / "held_out.npz")}
    settings = config(stored, codes=10, steps=600, log_every=100, save_every=600, force=False, **given)
    settings = dataclasses.replace(settings, checkpoint=str(tmp_path / "weights.safetensors"))
    metrics = audit.run(settings, tmp_path / "run")
    p_values.append(metrics["against_data"]["p_value"])
  assert metrics["form"] == "weight_decay"
  assert p_values[0] < 0.01 < p_values[1]


# The examples.


def test_transposed_arrays_are_stored_as_they_are(tmp_path):
  weight = np.arange(6, dtype=np.float32).reshape(2, 3).T  # safetensors 0.8.0 stores its memory, whatever its strides
  examples.store(tmp_path / "weights.safetensors", {"layer": {"kernel": weight}})
  found = kkt_jax.read_weights(tmp_path / "weights.safetensors", {"layer": {"kernel": jnp.zeros((3, 2))}})
  np.testing.assert_array_equal(found["layer"]["kernel"], weight)


@pytest.mark.parametrize(
  "network",
  [pytest.param(name, marks=[pytest.mark.slow] * (name in ("lenet", "resnet"))) for name in examples.NETWORKS],
)
def test_every_example_is_a_classifier_of_digits(tmp_path, network):
  examples.store(tmp_path / "weights.safetensors", examples.NETWORKS[network]().init_fn())
  own = audit.load(f"experiments.example_classifiers:{network}", str(tmp_path / "weights.safetensors"))
  assert own.num_classes == (2 if network == "haim" else 10)
  assert own.batch_coupled == (network in ("mlp_batch_norm", "resnet"))
  without = own.batch_coupled or network in ("haim", "buzaglo")
  assert ("weight_decay" in examples._TRAINING[network]) != without


@pytest.mark.slow
@pytest.mark.parametrize(
  ("network", "training"),
  [
    ("function", "theory"),
    ("resnet", "adam"),
    ("head", "minibatch"),
    ("haim", "theory"),
    ("buzaglo", "adam"),
    ("mlp", "finetune"),
  ],
)
def test_an_example_is_trained_and_stored_with_its_data_and_says_how_to_audit_it(tmp_path, network, training):
  settings = examples.Config(network=network, steps=2, held_out_per_class=2, training=training)
  command = examples.run(settings, tmp_path)["summary"].split()
  given = dict(argument.removeprefix("--").split("=") for argument in command if argument.startswith("--"))
  own = audit.load(given["classifier"], given["checkpoint"], given.get("initial_checkpoint", ""))
  first = examples.NETWORKS[network]().init_fn()
  first = jax.tree.leaves(first.get("params", first))
  if training == "finetune":
    first = jax.tree.leaves(own.initial_params)
  moved = [not np.array_equal(a, b) for a, b in zip(first, jax.tree.leaves(own.params), strict=True)]
  assert all(moved)
  for images, count in zip(read_both(given["train_data"], given["held_out_data"], own)[:2], (10, 2), strict=True):
    assert images.x.shape == (10 * count, *own.input_shape)
    assert network == "head" or (images.x.min(), images.x.max()) == (0, 1)


def test_the_command_trains_as_the_library_does_unless_it_is_told_otherwise(stored):
  examination = kkt_jax.examine(flax_classifier(0))
  default = kkt_jax.reconstruction.recipes.default([examination]).schedule.steps
  for steps, wanted in ((0, default), (7, 7)):
    assert audit.recipe_of(config(stored, codes=0, steps=steps), examination).schedule.steps == wanted
  assert audit.Config().steps == 0
