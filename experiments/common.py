"""What every experiment shares: flags from a config, the working directory, progress, the seeds."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import shlex
import signal
import sys
import time
from typing import Any, cast, TypeVar

from absl import app, flags
from absl import logging as absl_logging
import jax
import numpy as np

from experiments import processes
from kkt_jax import parallel, training
from kkt_jax.checkpoint import Checkpointer, CheckpointError
from kkt_jax.classifier import Classifier
from kkt_jax.conditions import Conditions

ConfigT = TypeVar("ConfigT")


class UsageError(ValueError):
  """The user asked for something impossible; the message says what to change, and no traceback is shown."""


class RunError(RuntimeError):
  """A run in a process of its own broke off; the message says where to look."""


def flag(
  default: Any,
  help_text: str,
  *,
  lower: float | None = None,
  upper: float | None = None,
  choices: tuple[str, ...] | None = None,
) -> Any:
  """A config field that is a command-line flag too: its default, its help, its bounds or choices."""
  return dataclasses.field(
    default=default, metadata={"help": help_text, "lower": lower, "upper": upper, "choices": choices}
  )


def flag_by(name: str, defaults: Mapping[str, Any], help_text: str, **limits: Any) -> Any:
  """A flag whose default depends on another attribute of the config, one for each of its values; see `resolve`.

  Args:
    name: the flag, or property of the config, on which it depends; "" if on none (but ``--method`` may set it).
    defaults: default by value of that attribute; the only one by "".
    help_text: what it means; the defaults are added to it.
    **limits: as of `flag`.
  """
  choices: dict[Any, list[str]] = {}
  for choice, value in defaults.items():
    choices.setdefault(value, []).append(choice)
  shown = "; ".join(f"{value} for {', '.join(own)}" if name else str(value) for value, own in choices.items())
  field = flag(None, f"{help_text} Default: {shown}.", **limits)
  return dataclasses.field(default=None, metadata={**field.metadata, "by": (name, dict(defaults))})


def method_flag(default: Any, help_text: str, **limits: Any) -> Any:
  """A flag that ``--method`` may set; else it has one default."""
  return flag_by("", {"": default}, help_text, **limits)


def resolve(config: ConfigT) -> ConfigT:
  """The config with every default filled in that the method sets or that depends on another attribute; see `flag_by`.

  What was given by hand stays. A method is a mapping from flags to values, the config's property ``preset``.

  Raises:
    UsageError: what was given is out of its bounds or choices.
  """
  check_config(config)
  preset = getattr(config, "preset", {})
  for field in dataclasses.fields(config):  # type: ignore[arg-type]
    if "by" in field.metadata and getattr(config, field.name) is None:
      name, defaults = field.metadata["by"]
      value = preset[field.name] if field.name in preset else defaults[getattr(config, name) if name else ""]
      config = dataclasses.replace(config, **{field.name: value})  # type: ignore[type-var]
  return config


def check_config(config: Any) -> None:
  """Raises UsageError unless every field of a config that has a value lies within its bounds or choices."""
  for field in dataclasses.fields(config):
    value, limits = getattr(config, field.name), field.metadata
    if value is None and "by" in limits:
      continue  # see `resolve`
    if limits["choices"] is not None and value not in limits["choices"]:
      raise UsageError(f"--{field.name} must be one of {', '.join(limits['choices'])}; got {value!r}.")
    if limits["lower"] is not None and not value >= limits["lower"]:
      raise UsageError(f"--{field.name} must be at least {limits['lower']}; got {value}.")
    if limits["upper"] is not None and not value <= limits["upper"]:
      raise UsageError(f"--{field.name} must be at most {limits['upper']}; got {value}.")


def main(
  config_class: type[ConfigT], run: Callable[[ConfigT, pathlib.Path], Mapping[str, Any]], *, jointly: bool = False
) -> None:
  """Defines the flags of a config, parses the command line and runs the experiment.

  Args:
    config_class: a frozen dataclass whose fields are made by `flag`.
    run: ``run(config, workdir) -> final metrics``.
    jointly: whether several processes can run it together; see `experiments.processes`.
  """
  if jointly:
    processes.define_flags()
  for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
    _define_flag(field)
  workdir = flags.DEFINE_string(
    "workdir", None, "Folder for everything the run writes. An interrupted run resumes when run again with it."
  )
  flags.mark_flag_as_required("workdir")
  names = ["workdir", *(field.name for field in dataclasses.fields(config_class))]  # type: ignore[arg-type]
  for name in names + (list(processes.FLAGS) if jointly else []):
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])  # so that --help shows them
  absl_logging.set_verbosity(absl_logging.WARNING)  # jax and orbax chatter otherwise

  def start(argv: list[str]) -> int | None:
    if len(argv) > 1:
      print(f"error: unexpected argument {argv[1]!r}; every setting is a flag --name=value.", file=sys.stderr)
      return 2
    values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends a job saves like Ctrl-C
    try:
      if jointly:
        processes.join()
      with processes.own_folder(pathlib.Path(str(workdir.value))) as folder:
        metrics = run(config_class(**values), folder)
    except (UsageError, RunError, CheckpointError, FloatingPointError, OSError) as error:
      print(f"error: {error}", file=sys.stderr)
      return 1
    except KeyboardInterrupt:
      print(f"\nstopped. This goes on from the last checkpoint:\n  {_own_command()}", file=sys.stderr)
      return 130
    if parallel.is_first_process():
      print(json.dumps(metrics, indent=2))
    return None

  app.run(start)


def _own_command() -> str:
  """The command line of this process."""
  spec = sys.modules["__main__"].__spec__
  module = ["-m", spec.name] if spec is not None else [sys.argv[0]]
  return shlex.join([pathlib.Path(sys.executable).name, *module, *sys.argv[1:]])


def _define_flag(field: dataclasses.Field[Any]) -> None:
  limits, default = field.metadata, cast(Any, field.default)
  example = next(iter(limits["by"][1].values())) if "by" in limits else default  # its type is the flag's
  if limits["choices"] is not None:
    flags.DEFINE_enum(field.name, default, limits["choices"], limits["help"])
  elif isinstance(example, bool):
    flags.DEFINE_bool(field.name, default, limits["help"])
  elif isinstance(example, int):
    flags.DEFINE_integer(field.name, default, limits["help"], lower_bound=limits["lower"], upper_bound=limits["upper"])
  elif isinstance(example, float):
    flags.DEFINE_float(field.name, default, limits["help"], lower_bound=limits["lower"], upper_bound=limits["upper"])
  else:
    flags.DEFINE_string(field.name, default, limits["help"])


class Workdir:
  """The folder of one run: its config, its metrics, its figures, its checkpoints."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    config: Any,
    *,
    flag: str = "workdir",
    tensorboard: bool = False,
    alone: bool = True,
  ):
    """Creates the folder, or opens the one of an earlier run of the same config.

    Args:
      path: the folder.
      config: a frozen dataclass, or a mapping of settings; written to ``config.json``.
      flag: the flag that names the folder, for error messages.
      tensorboard: also write the logged metrics for TensorBoard.
      alone: keep other processes out of the folder for as long as this one lives.

    Raises:
      UsageError: the folder belongs to a run of another config, its config cannot be read, or a run is using it.
      OSError: the folder cannot be written.
    """
    if not isinstance(config, Mapping):
      check_config(config)
      config = dataclasses.asdict(config)
    wanted = dict(config)
    self.path, self._flag = pathlib.Path(path), flag
    self.path.mkdir(parents=True, exist_ok=True)
    if alone:
      self._keep_others_out()
    config_file = self.path / "config.json"
    if config_file.exists():
      self._check_same(config_file, wanted)
    else:
      write_json(config_file, wanted)
    self._metrics_file = self.path / "metrics.jsonl"
    self._board: Any = None
    if tensorboard:
      import tensorboardX  # an option: imported only when asked for

      self._board = tensorboardX.SummaryWriter(str(self.path / "tensorboard"))

  def _keep_others_out(self) -> None:
    """Locks the folder until the process ends, however it ends."""
    self._lock = (self.path / ".lock").open("w")
    try:
      fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UsageError(
        f"--{self._flag}={self.path} is in use by another run; wait for it, stop it, or give another folder."
      ) from error

  def _check_same(self, config_file: pathlib.Path, wanted: Mapping[str, Any]) -> None:
    try:
      found = json.loads(config_file.read_text())
      names = sorted(set(found) | set(wanted))
    except (json.JSONDecodeError, TypeError) as error:
      raise UsageError(
        f"--{self._flag}={self.path}: config.json cannot be read ({error}); give another folder."
      ) from error
    different = [
      f"--{name} was {found.get(name)!r}, now {wanted.get(name)!r}"
      for name in names
      if found.get(name) != wanted.get(name)
    ]
    if different:
      raise UsageError(
        f"--{self._flag}={self.path} holds a run of another configuration ({'; '.join(different)}); use its flags"
        " to resume it, or give another folder."
      )

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends one line to ``metrics.jsonl``."""
    with self._metrics_file.open("a") as file:
      file.write(json.dumps({"step": step, **metrics}) + "\n")
    if self._board is not None:
      for name, value in metrics.items():
        self._board.add_scalar(name, value, step)

  def forget_after(self, step: int) -> None:
    """Drops the logged lines after ``step``, which a resumed run will write again, and a line cut short by a kill."""
    if not self._metrics_file.exists():
      return
    kept = []
    for line in self._metrics_file.read_text().splitlines():
      try:
        if json.loads(line)["step"] <= step:
          kept.append(line)
      except (json.JSONDecodeError, KeyError, TypeError):
        continue
    self._metrics_file.write_text("".join(line + "\n" for line in kept))

  def last_logged(self) -> dict[str, float]:
    """The last line of ``metrics.jsonl``; empty where nothing was logged."""
    lines = self._metrics_file.read_text().splitlines() if self._metrics_file.exists() else []
    return json.loads(lines[-1]) if lines else {}

  def finish(self, metrics: Mapping[str, Any]) -> None:
    """Writes the final figures to ``metrics.json``."""
    write_json(self.path / "metrics.json", metrics)
    if self._board is not None:
      self._board.close()


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that a kill leaves either the old file or the new one."""
  scratch = path.with_suffix(".tmp")
  scratch.write_text(json.dumps(value, indent=2) + "\n")
  scratch.replace(path)


class Progress:
  """Progress on stderr with a rate and a time left: one line that rewrites itself on a terminal, plain lines else."""

  def __init__(self, what: str, total: int, *, start: int = 0):
    """Starts the clock.

    Args:
      what: what is going on, a word or two.
      total: number of steps altogether.
      start: steps done by an earlier run.
    """
    self._what, self._total, self._start = what, total, start
    self._began = self._shown = time.monotonic()
    self._terminal = sys.stderr.isatty()

  def update(self, step: int, shown: Mapping[str, float] | None = None) -> None:
    """Shows that ``step`` steps are done, with a few figures; cheap enough to call often."""
    now = time.monotonic()
    finished = step >= self._total
    if not finished and now - self._shown < (0.2 if self._terminal else 15):
      return
    self._shown = now
    rate = (step - self._start) / max(now - self._began, 1e-9)
    left = (self._total - step) / rate if rate > 0 else math.inf
    figures = "".join(f"  {name} {value:.4g}" for name, value in (shown or {}).items())
    speed = f"{rate:.1f}/s" if rate >= 0.1 else f"{60 * rate:.1f}/min"
    line = f"{self._what} {step}/{self._total}  {speed}  {_duration(left)} left{figures}"
    if self._terminal:
      print(f"\r\033[K{line}", end="\n" if finished else "", file=sys.stderr, flush=True)
    else:
      print(line, file=sys.stderr, flush=True)


def train(
  method: training.Method,
  state: training.TrainState,
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  out: Workdir,
  *,
  num_steps: int,
  log_every: int,
  checkpoint_every: int,
  steps_per_call: int = 1,
  on_checkpoint: Callable[[training.TrainState], None] | None = None,
) -> training.TrainState:
  """Trains the generator with logs, checkpoints and progress, from its last checkpoint if the workdir has one.

  Where there are several devices, of one process or of several, the samples of every step are split among them.

  Args:
    method: the method.
    state: where to start if there is no checkpoint.
    classifiers: T classifiers.
    conditions: the stationarity condition of each.
    out: the workdir; checkpoints go to its folder ``generator``.
    num_steps: step at which to stop.
    log_every: steps between logged metrics.
    checkpoint_every: steps between checkpoints.
    steps_per_call: see `kkt_jax.training.make_train_step`; all the other numbers must be multiples of it.
    on_checkpoint: called with the state after each, to draw a picture.

  Returns:
    The trained state.
  """
  with Checkpointer(out.path / "generator") as checkpointer:
    restored = checkpointer.restore(state)
    if restored:
      state = restored[1]
      say(f"resuming the generator at step {restored[0]}")
    if jax.device_count() > 1:
      mesh = parallel.device_mesh()
      say(f"training on {jax.device_count()} devices")
      method = dataclasses.replace(method, mesh=mesh)
      state, classifiers, conditions = parallel.replicate((state, classifiers, conditions), mesh)
    start = int(state.step)
    out.forget_after(start)
    progress = Progress("generator", num_steps, start=start)

    def on_log(step: int, metrics: dict[str, float]) -> None:
      out.log(step, metrics)
      progress.update(step, {k: v for k, v in metrics.items() if k.startswith(("total", "residual"))})

    step = training.make_train_step(method, steps_per_call=steps_per_call)
    while state.step < num_steps:
      state = training.fit(
        step,
        state,
        classifiers,
        conditions,
        num_steps=min((int(state.step) // checkpoint_every + 1) * checkpoint_every, num_steps),
        log_every=log_every,
        on_log=on_log,
        checkpointer=checkpointer,
        checkpoint_every=checkpoint_every,
      )
      if on_checkpoint is not None:
        on_checkpoint(parallel.fetch(state))
  return parallel.fetch(state)


def say(text: str) -> None:
  """Prints a line for the person who watches, on stderr: stdout is for the final figures."""
  print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
  """A time for people.

  >>> _duration(75), _duration(math.inf)
  ('1:15', '?')
  """
  if not math.isfinite(seconds):
    return "?"
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes}:{seconds:02d}"


def seeded(seed: int) -> np.random.Generator:
  """The generator of every random choice about data: which samples are for training, which for evaluation."""
  return np.random.default_rng(seed)
