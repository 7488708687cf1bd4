"""Saving and resuming: every orbax call of the project.

A checkpoint holds a pytree of arrays (PRNG keys too) and a digest of it. Nothing is pickled. A checkpoint that was
damaged or only half written is recognised by its digest and passed over in favour of the one before.
"""

from collections.abc import Sequence
import hashlib
import logging
import os
from types import TracebackType

import jax
import numpy as np
import orbax.checkpoint as ocp

from kkt_jax import _checks
from kkt_jax.classifier import PyTree


class CheckpointError(RuntimeError):
  """No checkpoint of a directory can be restored; the message says which were tried and why each failed."""


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
    # Saves are synchronous: states are small here, and a save that returned is a save that is on disk.
    options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, enable_async_checkpointing=False)
    self._manager = ocp.CheckpointManager(self._directory, options=options)

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    self._manager.close()

  def steps(self) -> Sequence[int]:
    """The steps that have a checkpoint, oldest first; damaged ones included."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: PyTree) -> None:
    """Writes ``state``, a pytree of arrays, under ``step``; returns once it is on disk. A saved step stays as it is."""
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), digest=ocp.args.JsonSave({"sha256": _digest(state)})),
      force=True,
    )

  def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
    """The newest whole checkpoint.

    Args:
      like: a state of the same structure, shapes and dtypes; its values do not matter.

    Returns:
      (step, state), or None where there is no checkpoint at all. Damaged ones are logged and passed over.

    Raises:
      CheckpointError: there are checkpoints, but none is whole and of this structure.
    """
    failures = []
    for step in reversed(self.steps()):
      try:
        return step, self._restore_step(step, like)
      except Exception as error:  # orbax and tensorstore raise many kinds; each means that this step is unusable
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        logging.warning("Checkpoint %d in %s cannot be used: %s", step, self._directory, reason)
        failures.append(f"step {step}: {reason}")
    if failures:
      raise CheckpointError(
        f"no checkpoint in {self._directory} can be restored ({'; '.join(failures)}). Delete the directory to start"
        " afresh, or give another one."
      )
    return None

  def _restore_step(self, step: int, like: PyTree) -> PyTree:
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    found = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), digest=ocp.args.JsonRestore())
    )
    if found["digest"].get("sha256") != _digest(found["state"]):
      raise CheckpointError("its content does not match its digest")
    return found["state"]


def _digest(state: PyTree) -> str:
  """SHA-256 over the shapes, dtypes and bytes of all leaves."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(state):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    digest.update(f"{array.shape}{array.dtype}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()
