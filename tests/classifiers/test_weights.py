"""Weights from files that nobody vouches for: what is right comes in, everything else is refused by name."""

import errno
import json
import os
import pathlib
import pickle
import struct

from flax import nnx, serialization
from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from kkt_jax.classifiers import read_weights, Subject, WeightsError

TREE = {"params": {"Dense_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}}}
LIKE = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE))
FORMATS = ("safetensors", "safetensors_slashes", "msgpack", "orbax")


def write(kind, folder, tree):
  """A file of a kind that holds a tree; its path."""
  if kind == "orbax":
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save((folder / "orbax").resolve(), tree)
    return folder / "orbax"
  path = folder / f"weights.{kind.partition('_')[0]}"
  if kind == "msgpack":
    path.write_bytes(serialization.to_bytes(tree))
    return path
  flat = jax.tree_util.tree_leaves_with_path(tree)
  separator = "/" if kind.endswith("slashes") else "."
  save_file({jax.tree_util.keystr(at, simple=True, separator=separator): np.asarray(v) for at, v in flat}, path)
  return path


def changed(**own):
  return {"params": {"Dense_0": TREE["params"]["Dense_0"] | own}}


@pytest.mark.parametrize("kind", FORMATS)
def test_what_was_written_is_read(tmp_path, kind):
  found = read_weights(write(kind, tmp_path, TREE), LIKE)
  assert jax.tree.structure(found) == jax.tree.structure(TREE)
  jax.tree.map(np.testing.assert_array_equal, found, TREE)


@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "orbax"])
@pytest.mark.parametrize(
  ("tree", "said"),
  [
    (changed(kernel=np.zeros((3, 2), np.float32)), r"params/Dense_0/kernel has shape \(3, 2\); the classifier needs"),
    (changed(extra=np.zeros(1, np.float32)), "too much: 'params/Dense_0/extra'"),
    ({"params": {"Dense_0": {"bias": np.ones(3, np.float32)}}}, "it lacks 'params/Dense_0/kernel'"),
    (changed(bias=np.array([1.0, np.nan, 0.0], np.float32)), "params/Dense_0/bias holds a NaN"),
    (changed(bias=np.array([1, 2, 3], np.int8)), r"params/Dense_0/bias holds (I8|int8); .* floats .* Quantised"),
  ],
)
def test_what_does_not_fit_is_named(tmp_path, kind, tree, said):
  with pytest.raises(WeightsError, match=said):
    read_weights(write(kind, tmp_path, tree), LIKE)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_other_precisions_are_converted(tmp_path, dtype):
  found = read_weights(write("safetensors", tmp_path, jax.tree.map(lambda leaf: leaf.astype(dtype), TREE)), LIKE)
  jax.tree.map(np.testing.assert_array_equal, found, TREE)
  assert found["params"]["Dense_0"]["bias"].dtype == jnp.float32


@pytest.mark.parametrize("kind", ["safetensors", "msgpack"])
def test_numbers_that_single_precision_cannot_hold_are_refused(tmp_path, kind):
  path = write(kind, tmp_path, changed(bias=np.array([1.0, 1e300, 0.0])))
  with pytest.raises(WeightsError, match="params/Dense_0/bias holds a number beyond float32"):
    read_weights(path, LIKE)


@pytest.mark.parametrize(("dtype", "size"), [("F8_E4M3", 1), ("U8", 1), ("I64", 8), ("BOOL", 1)])
def test_numbers_that_only_stand_for_parameters_are_refused(tmp_path, dtype, size):
  path = tmp_path / "weights.safetensors"
  header = json.dumps({"w": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}).encode()
  path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2 * size))
  with pytest.raises(WeightsError, match="w holds .*; the classifier needs float32, from floats of 16, 32 or 64 bits"):
    read_weights(path, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_eight_bits_are_too_few(tmp_path):
  path = write("msgpack", tmp_path, changed(bias=np.ones(3, jnp.float8_e4m3fn)))
  with pytest.raises(WeightsError, match="params/Dense_0/bias holds float8_e4m3fn; the classifier needs float32"):
    read_weights(path, LIKE)


def test_integers_are_read_where_the_classifier_has_integers(tmp_path):
  path = tmp_path / "weights.safetensors"
  save_file({"count": np.array(3, np.int64)}, path)
  assert int(read_weights(path, {"count": jax.ShapeDtypeStruct((), jnp.int32)})["count"]) == 3


def test_two_tensors_of_one_name_are_refused(tmp_path):
  path = tmp_path / "weights.safetensors"
  save_file({"l.w": np.ones(2, np.float32), "l/w": np.zeros(2, np.float32)}, path)
  with pytest.raises(WeightsError, match="two tensors of one name, 'l[./]w' and 'l[./]w'"):
    read_weights(path, {"l": {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}})
  save_file({"l.w": np.ones(2, np.float32)}, path)
  both = {"l": {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, "l.w": jax.ShapeDtypeStruct((2,), jnp.float32)}
  with pytest.raises(WeightsError, match="two of the classifier's own names"):
    read_weights(path, both)


class Bomb:
  """What runs a command when it is unpickled."""

  def __reduce__(self):
    return (pathlib.Path.touch, (pathlib.Path("/tmp/unpickled"),))


@pytest.mark.parametrize("suffix", ["pkl", "pt", "npz", "msgpack", "safetensors"])
def test_nothing_is_unpickled(tmp_path, suffix):
  path = tmp_path / f"weights.{suffix}"
  path.write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(WeightsError, match=str(path)):
    read_weights(path, LIKE)
  assert not pathlib.Path("/tmp/unpickled").exists()


def test_a_header_that_promises_the_earth_is_refused(tmp_path):
  path = tmp_path / "weights.safetensors"
  huge = {"params.Dense_0.kernel": {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}
  header = json.dumps(huge).encode()
  path.write_bytes(struct.pack("<Q", len(header)) + header)
  with pytest.raises(WeightsError, match="weights.safetensors"):
    read_weights(path, LIKE)
  path.write_bytes(struct.pack("<Q", 1 << 60))
  with pytest.raises(WeightsError, match="weights.safetensors"):
    read_weights(path, LIKE)


def test_names_that_climb_out_of_the_tree_are_names_that_do_not_fit(tmp_path):
  path = tmp_path / "weights.safetensors"
  save_file({"../../etc/passwd": np.ones(3, np.float32)}, path)
  with pytest.raises(WeightsError, match="too much"):
    read_weights(path, LIKE)


def test_a_file_larger_than_the_parameters_is_not_read(tmp_path):
  path = tmp_path / "weights.msgpack"
  path.write_bytes(b"\0" * (2 << 20))
  with pytest.raises(WeightsError, match="more than the"):
    read_weights(path, LIKE)


def test_what_is_no_file_or_cannot_be_read_is_said(tmp_path, monkeypatch):
  os.mkfifo(tmp_path / "fifo.msgpack")
  (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
  for name in ("fifo.msgpack", "zero.safetensors"):
    with pytest.raises(WeightsError, match=f"{name}: it is not a regular file"):
      read_weights(tmp_path / name, LIKE)
  folder = write("orbax", tmp_path, TREE)
  (folder / "_METADATA").unlink()
  (folder / "_METADATA").symlink_to("/dev/zero")
  with pytest.raises(WeightsError, match="_METADATA is not a regular file"):
    read_weights(folder, LIKE)
  path = write("msgpack", tmp_path, TREE)
  denied = PermissionError(errno.EACCES, "Permission denied")
  monkeypatch.setattr(pathlib.Path, "open", lambda *_: (_ for _ in ()).throw(denied))  # who is root may read all
  with pytest.raises(WeightsError, match="weights.msgpack: it cannot be read: Permission denied"):
    read_weights(path, LIKE)


def test_no_file_and_no_format_are_said(tmp_path):
  with pytest.raises(WeightsError, match="there is no such file"):
    read_weights(tmp_path / "none.msgpack", LIKE)
  (tmp_path / "weights.bin").touch()
  with pytest.raises(WeightsError, match=r"must be a \.safetensors file"):
    read_weights(tmp_path / "weights.bin", LIKE)


@pytest.mark.parametrize("kind", ["safetensors", "msgpack"])
def test_damage_of_any_byte_is_refused_or_changes_numbers_only(tmp_path_factory, kind):
  folder = tmp_path_factory.mktemp("fuzz")
  whole = write(kind, folder, TREE).read_bytes()
  path = folder / f"damaged.{kind}"

  @settings(suppress_health_check=list(HealthCheck))
  @given(
    cut=st.integers(0, len(whole)),
    place=st.integers(0, len(whole) - 1),
    byte=st.integers(0, 255),
    tail=st.binary(max_size=20),
  )
  def attack(cut, place, byte, tail):
    damaged = bytearray(whole)
    damaged[place] = byte
    path.write_bytes(bytes(damaged[: max(cut, place + 1)]) + tail)
    try:
      found = read_weights(path, LIKE)
    except WeightsError:
      return
    assert [leaf.shape for leaf in jax.tree.leaves(found)] == [leaf.shape for leaf in jax.tree.leaves(LIKE)]
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found))

  attack()


@pytest.mark.parametrize("suffix", ["safetensors", "msgpack"])
def test_random_bytes_are_refused(tmp_path_factory, suffix):
  path = tmp_path_factory.mktemp("fuzz") / f"random.{suffix}"

  @settings(suppress_health_check=list(HealthCheck))
  @given(content=st.binary(max_size=300))
  def attack(content):
    path.write_bytes(content)
    with pytest.raises(WeightsError):
      read_weights(path, LIKE)

  attack()


# Names and folders as people have them.

FLAT = {"0/weight": np.arange(6, dtype=np.float32).reshape(2, 3), "1/bias": np.ones(3, np.float32)}


def nested(flat, separator="/"):
  tree = {}
  for name, leaf in flat.items():
    node = tree
    *path, last = name.split(separator)
    for part in path:
      node = node.setdefault(part, {})
    node[last] = leaf
  return tree


@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "orbax"])
@pytest.mark.parametrize(
  "rename",
  [
    lambda name: f"module/{name}",
    lambda name: f"_orig_mod/module/{name}",
    lambda name: f"params/{name}",
    lambda name: f"{name}/value",
    lambda name: f"params/{name}/value",
  ],
  ids=["module", "compiled", "params", "nnx", "nnx in params"],
)
def test_what_all_names_share_makes_no_difference(tmp_path, kind, rename):
  path = write(kind, tmp_path, nested({rename(name): leaf for name, leaf in FLAT.items()}))
  found = read_weights(path, jax.eval_shape(lambda: nested(FLAT)))
  jax.tree.map(np.testing.assert_array_equal, found, nested(FLAT))


def test_a_part_that_is_the_classifier_s_own_is_not_taken_off(tmp_path):
  path = write("safetensors", tmp_path, nested({f"layers/{name}": leaf for name, leaf in FLAT.items()}))
  like = jax.eval_shape(lambda: {"layers": nested(FLAT)})
  assert set(read_weights(path, like)) == {"layers"}
  with pytest.raises(WeightsError, match="it lacks 'head/0/weight', 'head/1/bias', 'other'; it has too much"):
    read_weights(path, {"head": like["layers"], "other": jax.ShapeDtypeStruct((1,), jnp.float32)})


def test_collections_of_flax_are_filled_from_names_without_them(tmp_path):
  tree = {"params": nested(FLAT), "batch_stats": {"1": {"running_mean": np.zeros(3, np.float32)}}}
  own = FLAT | {"1/running_mean": np.zeros(3, np.float32), "1/num_batches_tracked": np.array(5)}
  found = read_weights(write("safetensors", tmp_path, nested(own)), jax.eval_shape(lambda: tree))
  jax.tree.map(np.testing.assert_array_equal, found, tree)


@pytest.mark.parametrize("kind", ["safetensors", "msgpack", "orbax"])
@pytest.mark.parametrize(("stored", "wanted"), [(True, False), (False, True), (True, True)])
def test_the_counter_of_pytorch_is_passed_over(tmp_path, kind, stored, wanted):
  counter = {"1/num_batches_tracked": np.array(7, np.int32)}
  like = jax.eval_shape(lambda: nested(FLAT | counter if wanted else FLAT))
  found = read_weights(write(kind, tmp_path, nested(FLAT | counter if stored else FLAT)), like)
  jax.tree.map(
    np.testing.assert_array_equal, found, nested(FLAT | ({"1/num_batches_tracked": 7 * stored} if wanted else {}))
  )


def test_what_lies_beside_the_parameters_is_said_to(tmp_path):
  state = {"step": np.array(3), "params": nested(FLAT), "opt_state": {"mu": nested(FLAT)}}
  like = jax.eval_shape(lambda: nested(FLAT))
  with pytest.raises(WeightsError, match="too much: .*; those below 'params' are: store these alone"):
    read_weights(write("msgpack", tmp_path, state), like)


def test_the_state_of_an_nnx_model_is_read_as_flax_says_to_store_it(tmp_path):
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(1))
  path = write("orbax", tmp_path, nnx.state(model))
  found = read_weights(
    path, Subject.from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs), input_shape=(4,)).variables_like()
  )
  np.testing.assert_array_equal(found["kernel"], model.kernel[...])


def shards(folder, **changed):
  """Two files with a tensor each, and their index."""
  files = {"a.safetensors": "0/weight", "b.safetensors": "1/bias"}
  for file, name in files.items():
    save_file({name.replace("/", "."): FLAT[name]}, folder / file)
  index = {"weight_map": {name.replace("/", "."): file for file, name in files.items()}} | changed
  path = folder / "model.safetensors.index.json"
  path.write_text(json.dumps(index))
  return path


def test_several_safetensors_are_read_by_their_index(tmp_path):
  like = jax.eval_shape(lambda: nested(FLAT))
  jax.tree.map(np.testing.assert_array_equal, read_weights(shards(tmp_path), like), nested(FLAT))
  for file, said in (
    ("../a.safetensors", r"names '\.\./a"),
    ("/etc/passwd", "names '/etc/passwd'"),
    ("c.safetensors", "c.safetensors, which it names: there is no"),
  ):
    with pytest.raises(WeightsError, match=said):
      read_weights(shards(tmp_path, weight_map={"0.weight": file}), like)
  with pytest.raises(WeightsError, match="it lacks '1/bias'"):
    read_weights(shards(tmp_path, weight_map={"0.weight": "a.safetensors"}), like)
  with pytest.raises(WeightsError, match="two tensors of one name"):
    save_file({"0.weight": FLAT["0/weight"]}, shards(tmp_path).with_name("b.safetensors"))
    read_weights(tmp_path / "model.safetensors.index.json", like)
  with pytest.raises(WeightsError, match="damaged or of another format"):
    read_weights(shards(tmp_path, weight_map=3), like)


def test_folders_that_are_no_checkpoint_say_what_to_name(tmp_path):
  like = jax.eval_shape(lambda: nested(FLAT))
  with ocp.CheckpointManager(tmp_path / "manager") as manager:
    manager.save(123, args=ocp.args.StandardSave(nested(FLAT)))
  with pytest.raises(WeightsError, match="name '123/default' in it"):
    read_weights(tmp_path / "manager", like)
  with pytest.raises(WeightsError, match="name 'default' in it"):
    read_weights(tmp_path / "manager" / "123", like)
  jax.tree.map(
    np.testing.assert_array_equal, read_weights(tmp_path / "manager" / "123" / "default", like), nested(FLAT)
  )
  (tmp_path / "hub").mkdir()
  shards(tmp_path / "hub")
  with pytest.raises(WeightsError, match="name 'model.safetensors.index.json', 'a.safetensors', 'b.safetensors' in it"):
    read_weights(tmp_path / "hub", like)


@pytest.mark.parametrize(
  ("first", "second", "said"), [("ema", "model", "'model' are"), ("student", "teacher", "'student' or 'teacher' are")]
)
def test_of_two_that_fit_the_parameters_or_both_are_named(tmp_path, first, second, said):
  path = write("safetensors", tmp_path, {first: nested(FLAT), second: nested(FLAT)})
  with pytest.raises(WeightsError, match=f"; those below {said}: store these alone"):
    read_weights(path, jax.eval_shape(lambda: nested(FLAT)))


def test_a_backend_that_is_not_there_is_no_fault_of_the_file(tmp_path, monkeypatch):
  def missing():
    raise AssertionError  # as JAX does for cuda without its plugin

  path = write("safetensors", tmp_path, nested(FLAT))
  monkeypatch.setattr(jax, "devices", missing)
  with pytest.raises(RuntimeError, match=r"^JAX has no device to run on \(AssertionError: \); see JAX_PLATFORMS"):
    read_weights(path, jax.eval_shape(lambda: nested(FLAT)))
