"""Reading parameters that somebody else stored, without trusting them: nothing is unpickled or allocated unchecked.

What is expected is known before a file is opened: the classifier's own tree of shapes. A file that names other tensors,
or other shapes, or is larger than they can be, is refused before its numbers are read.
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors

from kkt_jax.classifier import PyTree
from kkt_jax.homogeneity import tensor_names

FORMATS = ".safetensors file, a flax .msgpack file, or an orbax checkpoint folder"
_OVERHEAD = 1 << 20  # bytes for names and shapes, beside the numbers themselves
_DTYPES = {"F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16")}
_DTYPES |= {"BF16": jnp.dtype("bfloat16"), "I64": np.dtype("int64"), "I32": np.dtype("int32")}
_SHOWN = 5  # names in a message


class WeightsError(ValueError):
  """A file of weights cannot be read, or is not what the classifier needs; the message says what and why."""


def read_weights(path: str | os.PathLike[str], like: PyTree) -> PyTree:
  """The arrays that a file or folder holds, in the tree that the classifier needs.

  Args:
    path: a ``.safetensors`` file, whose tensors are named by their path in ``like`` joined by dots or slashes
      (``layers.0.kernel``); a flax ``.msgpack`` file (`flax.serialization.to_bytes`); or a folder written by
      `orbax.checkpoint.StandardCheckpointer`.
    like: a pytree of nested dicts of arrays or `jax.ShapeDtypeStruct`, such as `jax.eval_shape` of an initialisation.

  Returns:
    A pytree like ``like`` of arrays of its shapes and dtypes. Numbers of another precision are converted.

  Raises:
    WeightsError: no such file, one that cannot be read, another format, other names or shapes than ``like``, a file
      larger than they can be, a damaged one, numbers that are not finite, or numbers that only stand for parameters
      (quantised to integers or to 8 bits).

  >>> import tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), "weights.msgpack")
  >>> _ = path.write_bytes(serialization.to_bytes({"w": np.ones(2, np.float32)}))
  >>> print(read_weights(path, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})["w"])
  [1. 1.]
  """
  path = pathlib.Path(path)
  needed = dict(zip(tensor_names(like), jax.tree.leaves(like), strict=True))
  try:
    _check_files(path, needed)
    if path.is_dir():
      found = _read_orbax(path, like, needed)
    elif path.suffix == ".safetensors":
      found = _read_safetensors(path, needed)
    elif path.suffix == ".msgpack":
      found = _read_msgpack(path, needed)
    else:
      raise WeightsError(f"it must be a {FORMATS}; its name ends in {path.suffix or 'nothing'!r}")
    leaves = [_checked(name, found[name], leaf) for name, leaf in needed.items()]
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


def _read_safetensors(path: pathlib.Path, needed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  alike = lambda name: name.replace(".", "/")
  with safetensors.safe_open(path, framework="numpy") as file:
    stored: dict[str, str] = {}
    for own in file.keys():  # noqa: SIM118 (it is no mapping)
      if (other := stored.setdefault(alike(own), own)) != own:
        raise WeightsError(f"it has two tensors of one name, {own[:60]!r} and {other[:60]!r}")
    wanted = {alike(name): leaf for name, leaf in needed.items()}
    if len(wanted) < len(needed):
      raise WeightsError("two of the classifier's own names differ in dots and slashes only: use another format")
    parts = {name: file.get_slice(own) for name, own in stored.items()}
    found = {name: (part.get_shape(), _DTYPES.get(part.get_dtype(), part.get_dtype())) for name, part in parts.items()}
    _check_tensors(found, wanted)
    return {name: file.get_tensor(stored[alike(name)]) for name in needed}


def _read_msgpack(path: pathlib.Path, needed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  tree = serialization.msgpack_restore(path.read_bytes())
  if not isinstance(tree, Mapping):
    raise WeightsError(f"it holds a {type(tree).__name__}, not a tree of arrays")
  found = {name: np.asarray(leaf) for name, leaf in zip(tensor_names(tree), jax.tree.leaves(tree), strict=True)}
  _check_tensors({name: (array.shape, array.dtype) for name, array in found.items()}, needed)
  return found


def _read_orbax(path: pathlib.Path, like: PyTree, needed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  with ocp.StandardCheckpointer() as checkpointer:
    stored: Any = checkpointer.metadata(path.resolve())
    tree = getattr(stored, "item_metadata", stored)
    tree = getattr(tree, "tree", tree)
    if not isinstance(tree, Mapping):
      raise WeightsError("it holds no tree of arrays")
    is_leaf = lambda node: hasattr(node, "shape")
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    names = [jax.tree_util.keystr(where, simple=True, separator="/") for where, _ in leaves]
    _check_tensors({name: (leaf.shape, leaf.dtype) for name, (_, leaf) in zip(names, leaves, strict=True)}, needed)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    return dict(zip(needed, jax.tree.leaves(checkpointer.restore(path.resolve(), abstract)), strict=True))


def _check_tensors(found: Mapping[str, tuple[Sequence[int], Any]], needed: Mapping[str, Any]) -> None:
  """Compares names, shapes and kinds of numbers, (shape, dtype), with what is needed."""
  missing, unknown = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
  if missing or unknown:
    parts = [
      f"{what} {_some(names)}" for what, names in (("it lacks", missing), ("it has too much:", unknown)) if names
    ]
    raise WeightsError(f"its tensors are not the classifier's: {'; '.join(parts)}")
  for name, leaf in needed.items():
    shape, dtype = found[name]
    if tuple(shape) != tuple(leaf.shape):
      raise WeightsError(f"{name} has shape {tuple(shape)}; the classifier needs {tuple(leaf.shape)}")
    kind = jnp.floating if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.integer
    if isinstance(dtype, str) or not jnp.issubdtype(dtype, kind) or (kind is jnp.floating and dtype.itemsize < 2):
      raise WeightsError(
        f"{name} holds {dtype}; the classifier needs {leaf.dtype}, from floats of 16, 32 or 64 bits. Quantised numbers"
        " only stand for its parameters: store scale * (number - zero point)"
      )


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
