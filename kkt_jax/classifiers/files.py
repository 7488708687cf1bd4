"""Reading parameters that somebody else stored, without trusting them: nothing is unpickled or allocated unchecked.

What is expected is known before a file is opened: the classifier's own tree of shapes. A file that names other tensors,
or other shapes, or is larger than they can be, is refused before its numbers are read.
"""

from collections.abc import Collection, Mapping, Sequence
import json
import os
import pathlib
from typing import Any

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors

from kkt_jax._tree import tensor_names
from kkt_jax._typing import PyTree
from kkt_jax.classifiers._statistics import COUNTER

FORMATS = ".safetensors file or the .index.json of several, a flax .msgpack file, or an orbax checkpoint folder"
_OVERHEAD = 1 << 20  # bytes for names and shapes, beside the numbers themselves
_DTYPES = {"F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16")}
_DTYPES |= {"BF16": jnp.dtype("bfloat16"), "I64": np.dtype("int64"), "I32": np.dtype("int32")}
_PARENTS = ("params", "model", "state_dict", "model_state_dict", "net")  # of parameters in checkpoints of a training
_SHOWN = 5  # names in a message
_INDEX = ".safetensors.index.json"


class WeightsError(ValueError):
  """A file of weights cannot be read, or is not what the classifier needs; the message says what and why."""


def read_weights(path: str | os.PathLike[str], like: PyTree) -> PyTree:
  """The arrays that a file or folder holds, in the tree that the classifier needs.

  Args:
    path: a ``.safetensors`` file, whose tensors are named by their path in ``like`` joined by dots or slashes
      (``layers.0.kernel``), or the ``.safetensors.index.json`` of several; a flax ``.msgpack`` file
      (`flax.serialization.to_bytes`); or a folder written by `orbax.checkpoint.StandardCheckpointer`. A first part
      that all its names share (``module.``, ``_orig_mod.``, ``params.``) makes no difference, nor does the last part
      ``value`` of flax nnx states. PyTorch's ``num_batches_tracked`` is passed over.
    like: a pytree of nested dicts of arrays or `jax.ShapeDtypeStruct`, such as `jax.eval_shape` of an initialisation.

  Returns:
    A pytree like ``like`` of arrays of its shapes and dtypes. Numbers of another precision are converted.

  Raises:
    WeightsError: no such file, one that cannot be read, another format, other names or shapes than ``like``, a file
      larger than they can be, a damaged one, numbers that are not finite, or numbers that only stand for parameters
      (quantised to integers or to 8 bits).
    RuntimeError: JAX has no backend of the name that it is to use.

  >>> import tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), "weights.msgpack")
  >>> _ = path.write_bytes(serialization.to_bytes({"w": np.ones(2, np.float32)}))
  >>> print(read_weights(path, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})["w"])
  [1. 1.]
  """
  path = pathlib.Path(path)
  try:
    jax.devices()  # a backend that is not there is no fault of the file
  except Exception as error:  # for some JAX raises errors without a word
    raise RuntimeError(f"JAX has no device to run on ({type(error).__name__}: {error}); see JAX_PLATFORMS.") from error
  needed = dict(zip(tensor_names(like), jax.tree.leaves(like), strict=True))
  try:
    _check_files(path, needed)
    if path.is_dir():
      found = _read_orbax(path, needed)
    elif path.suffix == ".safetensors":
      found = _read_safetensors([path], needed)
    elif path.name.endswith(_INDEX):
      found = _read_safetensors(_shards(path, needed), needed)
    elif path.suffix == ".msgpack":
      found = _read_msgpack(path, needed)
    else:
      raise WeightsError(f"it must be a {FORMATS}; its name ends in {path.suffix or 'nothing'!r}")
    leaves = [_checked(name, found.get(name, 0), leaf) for name, leaf in needed.items()]  # a counter may be missing
  except WeightsError as error:
    raise WeightsError(f"{path}: {error}.") from error.__cause__
  except Exception as error:  # each library raises many kinds for a damaged file
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    raise WeightsError(f"{path}: it is damaged or of another format ({reason}).") from error
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _check_files(path: pathlib.Path, needed: Mapping[str, Any]) -> None:
  """Looks at what there is to read before anything is opened."""
  if not path.exists():
    raise WeightsError("there is no such file")
  size = 0
  for file in path.rglob("*") if path.is_dir() else [path]:
    if file.is_dir():
      continue
    if not file.is_file():
      raise WeightsError(f"{'it' if file == path else file.name} is not a regular file")
    try:
      file.open("rb").close()
    except OSError as error:
      raise WeightsError(f"it cannot be read: {error.strerror}") from error
    size += file.stat().st_size
  most = sum(8 * int(np.prod(leaf.shape)) for leaf in needed.values()) + _OVERHEAD  # at most in double precision
  if size > most:
    raise WeightsError(f"it has {size:,} bytes, more than the {most:,} that the classifier's parameters can need")


def _shards(index: pathlib.Path, needed: Mapping[str, Any]) -> list[pathlib.Path]:
  """The files that an index names, which lie beside it."""
  names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  if strange := [name for name in names if pathlib.Path(name).name != name or not name.endswith(".safetensors")]:
    raise WeightsError(f"it names {_some(strange)}; it must name .safetensors files in its own folder")
  paths = [index.with_name(name) for name in names]
  for path in paths:
    try:
      _check_files(path, needed)
    except WeightsError as error:
      raise WeightsError(f"{path.name}, which it names: {error}") from error.__cause__
  return paths


def _read_safetensors(paths: Sequence[pathlib.Path], needed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  alike = lambda name: name.replace(".", "/")
  wanted = {alike(name): leaf for name, leaf in needed.items()}
  if len(wanted) < len(needed):
    raise WeightsError("two of the classifier's own names differ in dots and slashes only: use another format")
  stored: dict[str, tuple[str, pathlib.Path]] = {}
  kinds: dict[str, tuple[Sequence[int], Any]] = {}
  for path in paths:
    with safetensors.safe_open(path, framework="numpy") as file:
      for key in file.keys():  # noqa: SIM118 (it is no mapping)
        if (other := stored.setdefault(alike(key), (key, path))) != (key, path):
          raise WeightsError(f"it has two tensors of one name, {key[:60]!r} and {other[0][:60]!r}")
        tensor = file.get_slice(key)
        kinds[alike(key)] = tensor.get_shape(), _DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
  places = _check_tensors(kinds, wanted)
  found = {}
  for path in paths:
    with safetensors.safe_open(path, framework="numpy") as file:
      for name in needed:
        key, where = stored.get(places[alike(name)], ("", None))
        if where == path:
          found[name] = file.get_tensor(key)
  return found


def _read_msgpack(path: pathlib.Path, needed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  tree = serialization.msgpack_restore(path.read_bytes())
  if not isinstance(tree, Mapping):
    raise WeightsError(f"it holds a {type(tree).__name__}, not a tree of arrays")
  found = {name: np.asarray(leaf) for name, leaf in zip(tensor_names(tree), jax.tree.leaves(tree), strict=True)}
  places = _check_tensors({name: (array.shape, array.dtype) for name, array in found.items()}, needed)
  return {name: found[place] for name, place in places.items() if place}


def _read_orbax(path: pathlib.Path, needed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  _check_folder(path)
  with ocp.StandardCheckpointer() as checkpointer:
    stored: Any = checkpointer.metadata(path.resolve())
    tree = getattr(stored, "item_metadata", stored)
    tree = getattr(tree, "tree", tree)
    if not isinstance(tree, Mapping):
      raise WeightsError("it holds no tree of arrays")
    is_leaf = lambda node: hasattr(node, "shape")
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    names = [jax.tree_util.keystr(where, simple=True, separator="/") for where, _ in leaves]
    kinds = {name: (leaf.shape, leaf.dtype) for name, (_, leaf) in zip(names, leaves, strict=True)}
    places = _check_tensors(kinds, needed)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree, is_leaf=is_leaf
    )
    found = dict(zip(names, jax.tree.leaves(checkpointer.restore(path.resolve(), abstract)), strict=True))
    return {name: found[place] for name, place in places.items() if place}


def _check_folder(path: pathlib.Path) -> None:
  """Raises WeightsError for a folder that is no checkpoint but holds some; it names them."""
  if (path / "_METADATA").exists():
    return
  inside = sorted(file.relative_to(path).as_posix() for file in path.glob(f"*{_INDEX}"))
  inside += sorted(file.relative_to(path).as_posix() for file in path.glob("*.safetensors"))
  for depth in ("*", "*/*"):  # a step of a CheckpointManager, or all of them
    inside += sorted(metadata.parent.relative_to(path).as_posix() for metadata in path.glob(f"{depth}/_METADATA"))
  if inside:
    raise WeightsError(f"it is a folder of such, no checkpoint itself: name {_some(inside)} in it")


def _places(found: Collection[str], needed: Collection[str]) -> dict[str, str] | None:
  """The place of each needed tensor, by name: empty for a counter that is missing; None if the names do not fit.

  Names fit if they are equal, without the last part of flax nnx (``value``), without first parts that all names share,
  or, if none of the file's has them, without the names of flax's collections.
  """
  counts = lambda name: name.rpartition("/")[2] == COUNTER
  stored = {name: name for name in found if not counts(name)}
  wanted = {name: name for name in needed if not counts(name)}
  nothing = {name: name if name in found else "" for name in needed if counts(name)}
  forms = [stored]
  if stored and all(name.endswith("/value") for name in stored):
    forms.append({name.removesuffix("/value"): place for name, place in stored.items()})
  for form in forms:
    if form and all("/" in name for name in form) and len({name.partition("/")[0] for name in form}) == 1:
      forms.append({name.partition("/")[2]: place for name, place in form.items()})
  bare = {name.partition("/")[2]: name for name in wanted if name.partition("/")[0] in ("params", "batch_stats")}
  for form in forms:
    for names in (wanted, bare):
      if len(names) == len(wanted) and set(names) == set(form):
        return {name: form[short] for short, name in names.items()} | nothing
  return None


def _check_tensors(found: Mapping[str, tuple[Sequence[int], Any]], needed: Mapping[str, Any]) -> dict[str, str]:
  """Compares names, shapes and kinds of numbers, (shape, dtype), with what is needed; returns where each is found."""
  places = _places(found, needed)
  if places is None:
    missing, unknown = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
    parts = [
      f"{what} {_some(names)}" for what, names in (("it lacks", missing), ("it has too much:", unknown)) if names
    ]
    below = lambda first: [name.partition("/")[2] for name in found if name.partition("/")[0] == first]
    fitting = [first for first in sorted({name.partition("/")[0] for name in found}) if _places(below(first), needed)]
    named = [first for first in fitting if first in _PARENTS] or fitting  # an optimizer's state, or averages, may fit
    shown = " or ".join(repr(first[:60]) for first in named[:_SHOWN])
    hint = f"; those below {shown} are: store these alone" if shown else ""
    raise WeightsError(f"its tensors are not the classifier's: {'; '.join(parts)}{hint}")
  for name, leaf in needed.items():
    if not places[name]:
      continue
    shape, dtype = found[places[name]]
    if tuple(shape) != tuple(leaf.shape):
      raise WeightsError(f"{name} has shape {tuple(shape)}; the classifier needs {tuple(leaf.shape)}")
    kind = jnp.floating if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.integer
    if isinstance(dtype, str) or not jnp.issubdtype(dtype, kind) or (kind is jnp.floating and dtype.itemsize < 2):
      raise WeightsError(
        f"{name} holds {dtype}; the classifier needs {leaf.dtype}, from floats of 16, 32 or 64 bits. Quantised numbers"
        " only stand for its parameters: store scale * (number - zero point)"
      )
  return places


def _some(names: list[str]) -> str:
  """The first names of a list, each cut to a length that a message can bear."""
  shown = ", ".join(repr(name[:60]) for name in names[:_SHOWN])
  return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _checked(name: str, value: Any, leaf: Any) -> jax.Array:
  array = np.asarray(value)
  with np.errstate(over="ignore"):
    converted = array.astype(leaf.dtype)
  for numbers, what in ((array, "a NaN or an infinity"), (converted, f"a number beyond {leaf.dtype}")):
    if not np.all(np.isfinite(numbers)):
      raise WeightsError(f"{name} holds {what}")
  return jnp.asarray(converted)
