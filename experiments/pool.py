"""Many runs of experiments side by side, each in its own process; what is done already is not done again."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import resource
import sys
import time
import traceback
from typing import Any

from experiments import common

_DONE = "done.json"


@dataclasses.dataclass(frozen=True)
class Job:
  """One run of an experiment.

  Attributes:
    experiment: its module in `experiments`.
    settings: fields of its ``Config`` by name; the others keep their defaults.
    workdir: its folder.
  """

  experiment: str
  settings: Mapping[str, Any]
  workdir: pathlib.Path

  def outcome(self) -> dict[str, Any] | None:
    """What `run_all` noted when the run ended: ``seconds``, ``peak_memory`` (bytes), ``error``; None before that."""
    path = self.workdir / _DONE
    return json.loads(path.read_text()) if path.exists() else None

  def metrics(self) -> dict[str, Any] | None:
    """Its final figures; None where it failed or has not ended."""
    outcome = self.outcome()
    if outcome is None or outcome["error"]:
      return None
    figures: dict[str, Any] = json.loads((self.workdir / "metrics.json").read_text())
    return figures


def config_class(experiment: str) -> type[Any]:
  """The class of an experiment's settings."""
  found: type[Any] = importlib.import_module(f"experiments.{experiment}").Config
  return found


def run_all(jobs: Sequence[Job], *, processes: int, what: str, cache: pathlib.Path) -> None:
  """Runs every job that has not ended yet. A job that fails is noted, and the others go on.

  Args:
    jobs: the runs.
    processes: how many at a time, each on one thread.
    what: what is going on, a word or two, for the progress line.
    cache: folder in which the runs share what they have compiled.

  Raises:
    RunError: a run ended by something else than a documented error; its ``log.txt`` says by what. The same command
      goes on with the others.
  """
  waiting = [job for job in jobs if job.outcome() is None]
  progress = common.Progress(what, len(jobs), start=len(jobs) - len(waiting))
  context = multiprocessing.get_context("spawn")
  running: dict[Any, tuple[Job, Any]] = {}  # by what `wait` returns when the process ends
  try:
    while waiting or running:
      while waiting and len(running) < processes:
        process = context.Process(target=_run, args=(waiting[0],))
        with _one_thread_each(cache):
          process.start()
        running[process.sentinel] = (waiting.pop(0), process)
      for sentinel in multiprocessing.connection.wait(list(running)):
        job, process = running.pop(sentinel)
        process.join()
        if job.outcome() is None:
          raise common.RunError(f"{job.workdir} ended with exit status {process.exitcode}; see its log.txt.")
        progress.update(len(jobs) - len(waiting) - len(running))
  finally:
    for _, process in running.values():
      process.terminate()
      process.join()


def _run(job: Job) -> None:
  job.workdir.mkdir(parents=True, exist_ok=True)
  resumed = (job.workdir / "config.json").exists()
  with (job.workdir / "log.txt").open("a") as log:
    os.dup2(log.fileno(), sys.stderr.fileno())
    began, error = time.monotonic(), ""
    try:
      run = importlib.import_module(f"experiments.{job.experiment}").run
      run(config_class(job.experiment)(**job.settings), job.workdir)
    except (common.UsageError, FloatingPointError) as failure:
      traceback.print_exc()
      error = f"{type(failure).__name__}: {failure}"
  outcome = {
    # A run that was interrupted has no time of its own.
    "seconds": None if resumed else time.monotonic() - began,
    "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # kilobytes on Linux
    "error": error,
  }
  common.write_json(job.workdir / _DONE, outcome)


@contextlib.contextmanager
def _one_thread_each(cache: pathlib.Path) -> Iterator[None]:
  """The environment of the processes, which they read when they start."""
  before = dict(os.environ)
  os.environ |= {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": f"{before.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_COMPILATION_CACHE_DIR": before.get("JAX_COMPILATION_CACHE_DIR", str(cache.absolute())),
  }
  try:
    yield
  finally:
    os.environ.clear()
    os.environ |= before
