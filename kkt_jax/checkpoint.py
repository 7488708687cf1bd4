"""Saving and resuming: every orbax call of the project.

A checkpoint holds a pytree of arrays (PRNG keys too) and a digest of it. Nothing is pickled. A checkpoint that was
damaged or only half written is recognised by its digest and passed over in favour of the one before.

With several processes (`jax.distributed`) only process 0 reads and writes; what it read is broadcast.
"""

import base64
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import io
import logging
import os
import types
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kkt_jax import _checks, sharding
from kkt_jax._typing import PyTree


class CheckpointError(RuntimeError):
  """A checkpoint cannot be saved, or none of a directory restored; the message says what was tried, and why not."""


class Checkpointer:
  """Saves states under their step number and restores the newest that is whole.

  >>> import tempfile
  >>> import jax.numpy as jnp
  >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
  ...   checkpointer.save(7, {"w": jnp.ones(2)})
  ...   step, state = checkpointer.restore({"w": jnp.zeros(2)})
  >>> step, state["w"].tolist()
  (7, [1.0, 1.0])
  """

  def __init__(self, directory: str | os.PathLike[str], *, max_to_keep: int = 2):
    """Opens or creates a directory of checkpoints.

    Args:
      directory: where the checkpoints lie.
      max_to_keep: older checkpoints beyond this number are deleted; at least 1.

    Raises:
      ValueError: ``max_to_keep`` below 1.
    """
    _checks.check_at_least("max_to_keep", max_to_keep, 1)
    self._directory = os.path.abspath(directory)
    os.makedirs(self._directory, exist_ok=True)
    # Saves are synchronous: states are small here, and a save that returned is a save that is on disk.
    options = ocp.CheckpointManagerOptions(
      create=False,
      max_to_keep=max_to_keep,
      enable_async_checkpointing=False,
      multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
    )
    self._manager = ocp.CheckpointManager(self._directory, options=options) if sharding.is_first_process() else None

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *error: object) -> None:
    if self._manager is not None:
      self._manager.close()

  def steps(self) -> Sequence[int]:
    """The steps that have a checkpoint, oldest first; damaged ones included. Only the first process sees any."""
    return sorted(self._manager.all_steps()) if self._manager is not None else ()

  def save(self, step: int, state: PyTree, *, beside: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes ``state``, a pytree of arrays, under ``step``; returns once it is on disk, in place of an earlier one.

    Args:
      step: under which.
      state: the state.
      beside: small arrays of any shapes, which `beside` gives back.

    Raises:
      CheckpointError: it cannot be written, as on a full disk. Older checkpoints are kept.
    """
    if self._manager is None:
      return
    host = jax.tree.map(np.asarray, sharding.to_data(state))
    packed = _packed(beside or {})
    notes = {"sha256": _digest(host, packed), "beside": base64.b64encode(packed).decode()}
    items = ocp.args.Composite(state=ocp.args.StandardSave(host), digest=ocp.args.JsonSave(notes))
    try:
      if step in self._manager.all_steps():
        self._manager.delete(step)
      self._manager.save(step, args=items, force=True)
    except Exception as error:  # orbax and tensorstore raise many kinds
      raise CheckpointError(
        f"step {step} could not be saved in {self._directory} ({_first_line(error)}). Checkpoints before it are kept;"
        " the same command goes on from them once there is room and permission to write."
      ) from error

  def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
    """The newest whole checkpoint.

    Args:
      like: a state of the same structure, shapes and dtypes; its values do not matter.

    Returns:
      (step, state), or None where there is no checkpoint at all. Damaged ones are logged and passed over.

    Raises:
      CheckpointError: there are checkpoints, but none is whole and of this structure.
    """
    step, data, failures = self._newest(sharding.to_data(like))
    # Whether there is one, and which, every process must know before any takes part in sending it around.
    step, failed = (int(number) for number in sharding.from_first_process((step, len(failures))))
    if step < 0 and failed:
      raise CheckpointError(
        f"no checkpoint in {self._directory} can be restored ({'; '.join(failures)}). Delete the directory to start"
        " afresh, or give another one."
      )
    if step < 0:
      return None
    return step, sharding.from_data(jax.tree.map(jnp.asarray, sharding.from_first_process(data)), like)

  def beside(self, step: int) -> dict[str, np.ndarray]:
    """The small arrays that were saved beside a state that `restore` gave."""
    packed = b""
    if self._manager is not None:
      notes = self._manager.restore(step, args=ocp.args.Composite(digest=ocp.args.JsonRestore()))["digest"]
      packed = base64.b64decode(notes.get("beside", ""))
    size = int(sharding.from_first_process(len(packed)))
    if not size:
      return {}
    content = np.frombuffer(packed, np.uint8) if packed else np.zeros(size, np.uint8)
    with np.load(io.BytesIO(np.asarray(sharding.from_first_process(content)).tobytes()), allow_pickle=False) as arrays:
      return dict(arrays)

  def _newest(self, like: PyTree) -> tuple[int, PyTree, list[str]]:
    """The step of the newest whole checkpoint, or -1; its state; why newer ones cannot be used."""
    failures: list[str] = []
    for step in reversed(self.steps()):
      try:
        return step, self._restore_step(step, like), failures
      except Exception as error:  # orbax and tensorstore raise many kinds; each means that this step is unusable
        reason = _first_line(error)
        logging.warning("Checkpoint %d in %s cannot be used: %s", step, self._directory, reason)
        failures.append(f"step {step}: {reason}")
    return -1, like, failures

  def _restore_step(self, step: int, like: PyTree) -> PyTree:
    assert self._manager is not None  # it has steps
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), like)
    stored = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), digest=ocp.args.JsonRestore())
    )
    packed = base64.b64decode(stored["digest"].get("beside", ""))
    if stored["digest"].get("sha256") != _digest(stored["state"], packed):
      raise CheckpointError("its content does not match its digest")
    return stored["state"]


def fingerprint(value: Any) -> bytes:
  """SHA-256 of settings, the same in every process: of the names of classes and functions, and of what these hold.

  Arrays count with their bytes, but inside a function only with their shapes, and numbers with six digits: such are
  often computed, and rounded as the machine does. What a function does is not looked at.

  >>> first, second = ((lambda x, size=size: size * x) for size in (1, 2))
  >>> fingerprint({"a": first}) == fingerprint({"a": first}), fingerprint(first) == fingerprint(second)
  (True, False)
  """
  digest, path = hashlib.sha256(), set()

  def add(value: Any, inside: bool) -> None:
    digest.update(b"(")
    if isinstance(value, bool | int | str | bytes | None):
      digest.update(repr(value).encode())
    elif isinstance(value, float):
      digest.update(f"{value:.6g}".encode())
    elif isinstance(value, jax.Array | np.ndarray | np.generic):
      here = not inside and getattr(value, "is_fully_addressable", True)
      digest.update(_digest(value).encode() if here else f"{value.shape}{value.dtype}".encode())
    elif id(value) not in path:  # functions may hold one another
      path.add(id(value))
      parts, name = _parts(value)
      digest.update(name.encode())
      for part in parts:
        add(part, inside or isinstance(value, types.FunctionType))
      path.remove(id(value))
    digest.update(b")")

  add(value, False)
  return digest.digest()


def _parts(value: Any) -> tuple[Sequence[Any], str]:
  """What an object is made of, and its name."""
  if isinstance(value, Mapping):
    return [part for key in sorted(value, key=repr) for part in (key, value[key])], ""
  if isinstance(value, list | tuple):
    return value, ""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return [getattr(value, field.name) for field in dataclasses.fields(value)], type(value).__qualname__
  if isinstance(value, functools.partial):
    return [value.func, value.args, value.keywords], ""
  if isinstance(value, types.MethodType):
    return [value.__self__, value.__func__], ""
  name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
  if not isinstance(value, types.FunctionType):
    return [], name
  held = [cell.cell_contents for cell in value.__closure__ or ()]
  constants = [c for c in value.__code__.co_consts if isinstance(c, float)]  # others depend on Python's version
  return [held, constants, value.__defaults__, value.__kwdefaults__], name


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
  file = io.BytesIO()
  if arrays:
    np.savez(file, **arrays)  # type: ignore[arg-type]
  return file.getvalue()


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _digest(state: PyTree, beside: bytes = b"") -> str:
  """SHA-256 over the shapes, dtypes and bytes of all leaves, and over what is saved beside them."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(state):
    array = np.asarray(leaf)
    digest.update(f"{array.shape}{array.dtype}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  digest.update(beside)
  return digest.hexdigest()
