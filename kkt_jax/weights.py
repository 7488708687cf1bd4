"""Reading parameters that somebody else stored, without trusting them: nothing is unpickled or allocated unchecked.

What is expected is known before a file is opened: the classifier's own tree of shapes. A file that names other tensors,
or other shapes, or is larger than they can be, is refused before its numbers are read.
"""

from collections.abc import Mapping
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
    WeightsError: no such file, another format, other names or shapes than ``like``, a file larger than they can be, a
      damaged one, or numbers that are not finite.

  >>> import tempfile
  >>> path = pathlib.Path(tempfile.mkdtemp(), "weights.msgpack")
  >>> _ = path.write_bytes(serialization.to_bytes({"w": np.ones(2, np.float32)}))
  >>> print(read_weights(path, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)})["w"])
  [1. 1.]
  """
  path = pathlib.Path(path)
  needed = dict(zip(tensor_names(like), jax.tree.leaves(like), strict=True))
  try:
    if path.is_dir():
      found = _read_orbax(path, like, needed)
    elif path.suffix == ".safetensors":
      found = _read_safetensors(path, needed)
    elif path.suffix == ".msgpack":
      found = _read_msgpack(path, needed)
    elif path.exists():
      raise WeightsError(f"it must be a {FORMATS}; its name ends in {path.suffix or 'nothing'!r}")
    else:
      raise WeightsError("there is no such file")
    leaves = [_checked(name, found[name], leaf) for name, leaf in needed.items()]
  except WeightsError as error:
    raise WeightsError(f"{path}: {error}.") from error.__cause__
  except Exception as error:  # each library raises many kinds for a damaged file
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    raise WeightsError(f"{path}: it is damaged or of another format ({reason}).") from error
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _read_safetensors(path: pathlib.Path, needed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  _check_size(path, needed)
  alike = lambda name: name.replace(".", "/")
  with safetensors.safe_open(path, framework="numpy") as file:
    stored = {alike(name): name for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    shapes = {name: tuple(file.get_slice(own).get_shape()) for name, own in stored.items()}
    _check_shapes(shapes, {alike(name): leaf for name, leaf in needed.items()})
    return {name: file.get_tensor(stored[alike(name)]) for name in needed}


def _read_msgpack(path: pathlib.Path, needed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  _check_size(path, needed)
  tree = serialization.msgpack_restore(path.read_bytes())
  if not isinstance(tree, Mapping):
    raise WeightsError(f"it holds a {type(tree).__name__}, not a tree of arrays")
  found = dict(zip(tensor_names(tree), jax.tree.leaves(tree), strict=True))
  _check_shapes({name: np.shape(leaf) for name, leaf in found.items()}, needed)
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
    _check_shapes({name: tuple(leaf.shape) for name, (_, leaf) in zip(names, leaves, strict=True)}, needed)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    return dict(zip(needed, jax.tree.leaves(checkpointer.restore(path.resolve(), abstract)), strict=True))


def _check_size(path: pathlib.Path, needed: Mapping[str, Any]) -> None:
  if not path.is_file():
    raise WeightsError("there is no such file")
  most = sum(8 * int(np.prod(leaf.shape)) for leaf in needed.values()) + _OVERHEAD  # at most in double precision
  if (size := path.stat().st_size) > most:
    raise WeightsError(f"it has {size:,} bytes, more than the {most:,} that the classifier's parameters can need")


def _check_shapes(found: Mapping[str, tuple[int, ...]], needed: Mapping[str, Any]) -> None:
  missing, unknown = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
  if missing or unknown:
    parts = [
      f"{what} {_some(names)}" for what, names in (("it lacks", missing), ("it has too much:", unknown)) if names
    ]
    raise WeightsError(f"its tensors are not the classifier's: {'; '.join(parts)}")
  for name, leaf in needed.items():
    if found[name] != tuple(leaf.shape):
      raise WeightsError(f"{name} has shape {found[name]}; the classifier needs {tuple(leaf.shape)}")


def _some(names: list[str]) -> str:
  """The first names of a list, each cut to a length that a message can bear."""
  shown = ", ".join(repr(name[:60]) for name in names[:_SHOWN])
  return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _checked(name: str, value: Any, leaf: Any) -> jax.Array:
  array = np.asarray(value)
  if not (np.issubdtype(array.dtype, np.number) or array.dtype == jnp.bfloat16) or np.iscomplexobj(array):
    raise WeightsError(f"{name} holds {array.dtype}, not real numbers")
  if not np.all(np.isfinite(array.astype(np.float64))):
    raise WeightsError(f"{name} holds a NaN or an infinity")
  return jnp.asarray(array, leaf.dtype)
