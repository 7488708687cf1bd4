"""Several processes, on one machine or on many, that train one generator together.

Each runs the same command, with its own ``--process_id``. All of them compute; the first alone reads, writes and talks.
The others work in folders that are thrown away.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import tempfile

_A_DAY = 86400  # of patience with the first process, which still measures when the others have done their part


def join(coordinator: str, num_processes: int, process_id: int) -> None:
  """Meets the other processes; must come before anything is computed.

  Args:
    coordinator: address:port of the first process, or "auto" to ask the cluster.
    num_processes: their number, unless "auto".
    process_id: which of them this is, unless "auto".

  Raises:
    ConnectionError: they could not be met.
  """
  import jax  # slow

  given = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
  try:
    jax.distributed.initialize(**({} if coordinator == "auto" else given), shutdown_timeout_seconds=_A_DAY)  # type: ignore[arg-type]
  except (RuntimeError, ValueError) as error:
    raise ConnectionError(f"--coordinator={coordinator}: the other processes could not be met ({error}).") from error


@contextlib.contextmanager
def own_folder(workdir: pathlib.Path, *, alone: bool) -> Iterator[tuple[pathlib.Path, bool]]:
  """The folder that a process writes to, and whether it talks.

  Args:
    workdir: the folder of the first process; the others are silent, in scratch folders.
    alone: whether there are no others.
  """
  if not alone:
    from kkt_jax import sharding  # slow
  if alone or sharding.is_first_process():
    yield workdir, True
    return
  with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
    yield pathlib.Path(scratch), False
