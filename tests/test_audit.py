"""The audit of anybody's classifier: it runs for every kind of module and file, and knows what is hopeless."""

import dataclasses
import json
import zipfile

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from experiments import audit, audit_examples, audit_report, common
from experiments.audit_data import read_images
from experiments.audit_findings import examine
from kkt_jax import pretrain
from kkt_jax.subject import from_linen, from_nnx, Subject

SHAPE = (8, 8, 1)
DESCRIBED = {"input_shape": SHAPE, "num_classes": 3}


class Linen(nn.Module):
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


class Smooth(nnx.Module):
  def __init__(self, rngs):
    self.first, self.norm, self.last = (
      nnx.Linear(64, 16, rngs=rngs),
      nnx.LayerNorm(16, rngs=rngs),
      nnx.Linear(16, 3, rngs=rngs),
    )

  def __call__(self, x):
    return self.last(nnx.gelu(self.norm(self.first(x.reshape(x.shape[0], -1)))))


def linen():
  return from_linen(Linen(), **DESCRIBED)


def normalised():
  return from_linen(Normalised(), **DESCRIBED)


def smooth():
  return from_nnx(Smooth, **DESCRIBED)


def function():
  """A plain function on inputs from -1 to 1, from which it subtracts an image."""

  def apply_fn(params, x):
    h = (x - jnp.linspace(-0.5, 0.5, 64).reshape(1, *SHAPE)).reshape(x.shape[0], -1)
    return jax.nn.relu(h @ params["a.weight"].T + params["a.bias"][None]) @ params["b.weight"].T

  def init_fn():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
      "a.weight": 0.2 * jax.random.normal(keys[0], (40, 64)),
      "a.bias": jnp.zeros(40),
      "b.weight": 0.2 * jax.random.normal(keys[1], (3, 40)),
    }

  return Subject(apply_fn, init_fn, value_range=(-1.0, 1.0), **DESCRIBED)


def images(seed, count=5):
  """Three kinds of blobs, and their labels."""
  random = np.random.default_rng(seed)
  y = np.arange(3 * count, dtype=np.int32) % 3
  centres = np.stack([np.outer(np.hanning(8), np.roll(np.hanning(8), shift)) for shift in (-2, 0, 2)])
  x = np.clip(centres[y] + 0.2 * random.normal(size=(len(y), 8, 8)), 0, 1)
  return x[..., None].astype(np.float32), y


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """A folder with each subject's parameters after some training, and the data."""
  folder = tmp_path_factory.mktemp("stored")
  x, y = images(0)
  for build, kind in ((linen, "msgpack"), (smooth, "orbax"), (function, "safetensors"), (normalised, "msgpack")):
    subject = build()
    variables = subject.init_fn()
    if build is not normalised:
      scaled = jnp.asarray(subject.value_range[0] + (subject.value_range[1] - subject.value_range[0]) * x)
      result = pretrain.gradient_descent(
        subject.apply_fn, variables, scaled, y, num_steps=1500, learning_rate=0.1, weight_decay=0.03, momentum=0.9
      )
      variables = result.params
    target = folder / build.__name__
    target.mkdir()
    audit_examples.store(target, variables, kind)
  np.savez(folder / "train.npz", x=x, y=y)
  other, labels = images(1, count=10)
  np.savez(folder / "held_out.npz", x=(255 * other).astype(np.uint8), y=labels)
  return folder


def config(stored, build, kind, **settings):
  name = "weights" if kind == "orbax" else f"weights.{kind}"
  tiny = {"codes": 4, "steps": 4, "warmup": 2, "log_every": 2, "checkpoint_every": 2, "anyway": True}
  return audit.Config(
    classifier=f"test_audit:{build.__name__}",
    checkpoint=str(stored / build.__name__ / name),
    **tiny | settings,
  )


@pytest.mark.parametrize(
  ("build", "kind", "form"),
  [(smooth, "orbax", "weight_decay"), (normalised, "msgpack", "max_margin")],
)
def test_every_kind_of_module_and_file_is_audited(stored, tmp_path, build, kind, form):
  metrics = audit.run(config(stored, build, kind), tmp_path)
  assert metrics["form"] == form
  assert 0 <= metrics["generated"]["agreement"] <= 1
  assert "No verdict" in metrics["verdict"]
  assert (tmp_path / "samples.png").exists()


def test_with_the_owner_s_data_there_is_a_verdict(stored, tmp_path):
  data = {"train_data": str(stored / "train.npz"), "held_out_data": str(stored / "held_out.npz")}
  metrics = audit.run(config(stored, linen, "msgpack", **data), tmp_path)
  assert metrics["training_data"]["cover"] == 1
  assert 0 < metrics["generated"]["p_value"] <= 1
  assert metrics["generated"]["chance"] == pytest.approx(1 / 3)  # two others to each
  assert json.loads((tmp_path / "metrics.json").read_text())["verdict"] == metrics["verdict"]
  page = (tmp_path / "report.html").read_text()
  assert metrics["verdict"].split(":")[0] in page
  assert (tmp_path / "pairs.png").exists()


def test_a_plain_function_tells_its_mean_and_the_data_s_span(stored):
  subject = function()
  classifier = audit.load_classifier(subject, str(stored / "function" / "weights.safetensors"))
  findings = examine(classifier)
  assert findings.form == "weight_decay"
  # On inputs in [0, 1], of which its own are twice less 1.
  expected = (np.linspace(-0.5, 0.5, 64).reshape(SHAPE) + 1) / 2
  np.testing.assert_allclose(findings.start, expected, atol=1e-3)
  assert findings.span is not None
  assert findings.span.strengths.size <= 15  # as many as there are training samples


@pytest.mark.parametrize("network", audit_examples.NETWORKS)
def test_every_example_is_trained_and_stored_with_its_data(tmp_path, network):
  settings = audit_examples.Config(network=network, steps=2, samples_per_class=2, held_out_per_class=2)
  command = audit_examples.run(settings, tmp_path)["audit"].split()
  given = dict(argument.removeprefix("--").split("=") for argument in command if argument.startswith("--"))
  subject = audit.load_subject(given["classifier"])
  classifier = audit.load_classifier(subject, given["checkpoint"])
  first = jax.tree.leaves(subject.init_fn())
  stored = jax.tree.leaves(classifier.params)
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in stored)
  assert not np.array_equal(stored[0], first[-len(stored)])  # it has been trained
  for name in ("train_data", "held_out_data"):
    data = read_images(given[name], flag=name, input_shape=(28, 28, 1), num_classes=10, value_range=subject.value_range)
    assert data.x.shape == (20, 28, 28, 1)


def test_weights_without_a_kkt_point_are_recognised_before_any_training(tmp_path, stored):
  subject = linen()
  audit_examples.store(tmp_path, jax.tree.map(lambda leaf: leaf + 0.3, subject.init_fn()), "msgpack")
  settings = config(stored, linen, "msgpack", anyway=False, form="weight_decay")
  metrics = audit.run(dataclasses.replace(settings, checkpoint=str(tmp_path / "weights.msgpack")), tmp_path / "run")
  assert metrics["least_residual"]["weight_decay"] > 0.25
  assert "No data can account for" in metrics["verdict"]
  assert not (tmp_path / "run" / "generator").exists()


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    ({"classifier": ""}, "--classifier must be given"),
    ({"classifier": "test_audit"}, "--classifier must be module:function"),
    ({"classifier": "no_such_module:f"}, "--classifier=no_such_module:f cannot be loaded"),
    ({"classifier": "test_audit:nothing"}, "--classifier=test_audit:nothing cannot be loaded"),
    ({"classifier": "test_audit:images_of_nothing"}, "must return a kkt_jax.subject.Subject; got dict"),
    ({"checkpoint": "/no/where.msgpack"}, "--checkpoint: /no/where.msgpack: there is no such file"),
    ({"classifier": "test_audit:function"}, "its tensors are not the classifier's"),
    ({"warmup": 4}, "--warmup must be less than --steps = 4; got 4"),
    ({"train_data": "/no/where.npz"}, "--train_data=/no/where.npz cannot be read"),
  ],
)
def test_what_cannot_be_audited_is_named(stored, tmp_path, settings, said):
  with pytest.raises(common.UsageError, match=said):
    audit.run(dataclasses.replace(config(stored, linen, "msgpack"), **settings), tmp_path)


def images_of_nothing():
  return {}


def read(path, **settings):
  return read_images(
    str(path), flag="train_data", **{"input_shape": SHAPE, "num_classes": 3, "value_range": (0.0, 1.0)} | settings
  )


@pytest.mark.parametrize(
  ("arrays", "said"),
  [
    ({"x": np.zeros((2, 4, 4, 1), np.float32), "y": np.zeros(2, int)}, r"x must have shape \[N, 8, 8, 1\]"),
    ({"x": np.zeros((2, *SHAPE), np.float32), "y": np.array([0, 3])}, r"labels must lie in 0..2; got 0..3"),
    ({"x": np.full((2, *SHAPE), 2.0), "y": np.zeros(2, int)}, "x must lie in the classifier's range"),
    ({"x": np.full((2, *SHAPE), np.nan), "y": np.zeros(2, int)}, "x must lie in the classifier's range"),
    ({"x": np.zeros((2, *SHAPE), np.float32)}, "y missing"),
    ({"x": np.zeros((2, *SHAPE), np.float32), "y": np.array(["a", "b"])}, "y integers"),
    ({"x": np.array([{}, {}]), "y": np.zeros(2, int)}, "cannot be read"),  # would have to be unpickled
  ],
)
def test_data_that_do_not_fit_are_named(tmp_path, arrays, said):
  np.savez(tmp_path / "data.npz", **arrays)
  with pytest.raises(common.UsageError, match=said):
    read(tmp_path / "data.npz")


def test_an_archive_that_would_fill_the_memory_is_not_opened(tmp_path, monkeypatch):
  monkeypatch.setattr("experiments.audit_data._LARGEST", 1 << 20)
  path = tmp_path / "data.npz"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("x.npy", bytes(2 << 20))  # next to nothing, until it is opened
  with pytest.raises(common.UsageError, match="x.npy would have 2,097,152 bytes; at most 1,048,576"):
    read(path)


def test_images_come_from_a_folder_for_each_class(tmp_path):
  x, y = images(0, count=1)
  for number, (image, label) in enumerate(zip(x, y, strict=True)):
    folder = tmp_path / str(label)
    folder.mkdir(exist_ok=True)
    Image.fromarray((255 * image[..., 0]).astype(np.uint8)).save(folder / f"{number}.png")
  found = read(tmp_path)
  np.testing.assert_allclose(found.x, x, atol=1 / 255)
  np.testing.assert_array_equal(found.y, y)
  Image.new("L", (9, 8)).save(tmp_path / "0" / "large.png")
  with pytest.raises(common.UsageError, match="large.png has 9 x 8 pixels; the classifier takes 8 x 8"):
    read(tmp_path)
  (tmp_path / "0" / "large.png").write_bytes(b"no image")
  with pytest.raises(common.UsageError, match="cannot be read"):
    read(tmp_path)


def test_the_verdict_says_what_the_numbers_say():
  known = {"cover": 0.5, "trained": 100, "group": 4, "chance": 0.2, "nearer": 0.6}
  assert "No verdict" in audit_report._verdict({"cover": 0.5})
  yes = audit_report._verdict(known | {"retrieved": 0.6, "p_value": 1e-9})
  assert "give training samples away" in yes
  assert "60 could be picked out of 5" in yes and "by chance it would be 20" in yes and "About 40%" in yes
  no = audit_report._verdict(known | {"retrieved": 0.22, "p_value": 0.34})
  assert "No evidence" in no and "no proof" in no
