"""Several processes, on one machine or on many, that train one generator together.

Each runs the same command, with its own ``--process_id``. All of them compute; the first alone reads, writes and talks.
The others work in folders that are thrown away.
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import tempfile

from absl import flags
import jax

from kkt_jax import parallel

FLAGS = ("coordinator", "num_processes", "process_id")
_AUTO = "auto"
_A_DAY = 86400  # of patience with the first process, which still measures when the others have done their part


def define_flags() -> None:
  """Defines the flags of this file."""
  flags.DEFINE_string(
    "coordinator",
    None,
    "Train with several processes: address:port of the first, or auto to ask the cluster (SLURM, Open MPI, Cloud TPU).",
  )
  flags.DEFINE_integer("num_processes", None, "Their number.", lower_bound=1)
  flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
  flags.register_multi_flags_validator(
    FLAGS,
    _fit_together,
    "--coordinator=address:port, --num_processes and --process_id (below it) must be given together; with"
    " --coordinator=auto neither is needed.",
  )


def _fit_together(values: dict[str, object]) -> bool:
  """Whether the flags can be meant.

  >>> _fit_together({"coordinator": "localhost:1234", "num_processes": 2, "process_id": 2})
  False
  """
  coordinator, number, own = (values[name] for name in FLAGS)
  if coordinator is None or coordinator == _AUTO:
    return number is None and own is None
  return isinstance(number, int) and isinstance(own, int) and own < number


def join() -> None:
  """Meets the other processes, if the flags say that there are any; must come before anything is computed.

  Raises:
    ConnectionError: they could not be met.
  """
  values = {name: flags.FLAGS[name].value for name in FLAGS}
  coordinator = values["coordinator"]
  if coordinator is None:
    return
  given = {} if coordinator == _AUTO else {"coordinator_address": coordinator, **{n: values[n] for n in FLAGS[1:]}}
  try:
    jax.distributed.initialize(**given, shutdown_timeout_seconds=_A_DAY)
  except (RuntimeError, ValueError) as error:
    raise ConnectionError(f"--coordinator={coordinator}: the other processes could not be met ({error}).") from error


@contextlib.contextmanager
def own_folder(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
  """The folder that a process writes to: the first one's is ``workdir``; the others are silent, in scratch folders."""
  if parallel.is_first_process():
    yield workdir
    return
  with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
    yield pathlib.Path(scratch)
