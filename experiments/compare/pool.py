"""Many runs of experiments side by side, each in its own process; what is done already is not done again."""

from collections.abc import Iterable, Mapping
import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import time
from typing import Any

from kkt_jax.cli import flags
from kkt_jax.cli.progress import Progress
from kkt_jax.cli.workdir import write_json

_OWN = ("method", "seed", "generator_seed", "shared_dir")  # settings in which runs differ
_POLL = 2.0  # seconds between looks at what the runs say


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """One run of an experiment.

  Attributes:
    module: of the experiment; it has ``Config`` and ``run``.
    settings: fields of its ``Config`` by name; the others keep their defaults.
    workdir: its folder.
  """

  module: str
  settings: Mapping[str, Any]
  workdir: pathlib.Path

  def outcome(self) -> dict[str, Any] | None:
    """What `run_all` noted when the run ended: None before that.

    These are ``seconds`` (None if it was interrupted), ``peak_memory`` (bytes) and ``error``.
    """
    path = self.workdir / "done.json"
    return json.loads(path.read_text()) if path.exists() else None

  def metrics(self) -> dict[str, Any] | None:
    """Its final metrics; None if it failed or has not ended."""
    outcome = self.outcome()
    return None if outcome is None or outcome["error"] else json.loads((self.workdir / "metrics.json").read_text())


def fixed_settings(module: str, text: str) -> dict[str, Any]:
  """The settings of ``--set``, which all runs have.

  Args:
    module: of the experiment.
    text: ``name=value,name=value``.

  Returns:
    Values by name.

  Raises:
    UsageError: they are impossible, or among those in which the runs differ.
  """
  settings = flags.parse(importlib.import_module(module).Config, text)
  if taken := [name for name in _OWN if name in settings]:
    raise flags.UsageError(f"--set must leave {', '.join(_OWN)} alone; got {', '.join(taken)}.")
  return settings


def run_all(jobs: Iterable[Job], *, processes: int, what: str) -> None:
  """Runs every job that has not ended yet. A run that diverges is noted, and the others go on.

  Args:
    jobs: the runs.
    processes: how many at a time, each on one thread; 0 is one for each core.
    what: what is going on, a word or two, for the progress line.

  Raises:
    RunError: a run broke off; its ``log.txt`` says why. The same command goes on with the others.
  """
  left = [job for job in jobs if job.outcome() is None]
  progress = Progress(what, len(left))
  # Threads that wait for a process each: a ProcessPoolExecutor can overlook that one of its processes was killed.
  with concurrent.futures.ThreadPoolExecutor(processes or os.cpu_count()) as executor:
    pending = {executor.submit(_run_in_process, job): job for job in left}
    try:
      while pending:
        for future in concurrent.futures.wait(pending, _POLL, concurrent.futures.FIRST_COMPLETED).done:
          del pending[future]
          future.result()
        progress.update(len(left) - len(pending), _last_words(pending.values()))
    finally:
      while [future for future in pending if not (future.cancel() or future.done())]:
        for child in multiprocessing.active_children():
          child.terminate()
        time.sleep(0.1)


def _run_in_process(job: Job) -> None:
  process = multiprocessing.get_context("spawn").Process(target=_run, args=(job,))
  process.start()
  process.join()
  if job.outcome() is None:
    how = "was killed, perhaps for want of memory" if process.exitcode == -signal.SIGKILL else "broke off"
    raise flags.RunError(f"{job.workdir} {how} ({_last_line(job)}); see its log.txt.")


def _run(job: Job) -> None:
  """A job in a process of its own, in which nothing of JAX or NumPy is imported yet."""
  os.environ |= {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
  }
  job.workdir.mkdir(parents=True, exist_ok=True)
  resumed = (job.workdir / "config.json").exists()
  began, error = time.monotonic(), ""
  with (job.workdir / "log.txt").open("a") as log:
    for stream in (1, 2):
      os.dup2(log.fileno(), stream)
  module = importlib.import_module(job.module)
  try:
    module.run(module.Config(**job.settings), job.workdir)
  except FloatingPointError as failure:
    error = f"{type(failure).__name__}: {failure}"
  outcome = {
    # A run that was interrupted has no time of its own.
    "seconds": None if resumed else time.monotonic() - began,
    "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # kilobytes on Linux
    "error": error,
  }
  write_json(job.workdir / "done.json", outcome)


def _last_line(job: Job) -> str:
  """The last whole line that a run said."""
  log = job.workdir / "log.txt"
  return (log.read_text(errors="replace").split("\n")[-2:-1] or [""])[0] if log.exists() else ""


def _last_words(jobs: Iterable[Job]) -> str:
  """What the run that spoke last said last."""
  logs = {job: log.stat().st_mtime for job in jobs if (log := job.workdir / "log.txt").exists()}
  if not logs:
    return ""
  spoke = max(logs, key=lambda job: logs[job])
  return f"{spoke.workdir.parent.name}/{spoke.workdir.name}  {_last_line(spoke)}"
