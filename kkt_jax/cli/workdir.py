"""The folder of one run: its config, its metrics, its pictures, its checkpoints."""

from collections.abc import Mapping
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
from typing import Any, IO

from kkt_jax.cli.flags import check_folder, UsageError

_NO_RESULTS = {"config.json", ".lock", "log.txt"}


class Workdir:
  """The folder of one run. Only a run of the same config goes on in a folder that holds results."""

  def __init__(self, path: str | os.PathLike[str], config: Any, *, flag: str = "workdir", alone: bool = True):
    """Creates the folder, or opens the one of an earlier run.

    Args:
      path: the folder.
      config: a frozen dataclass, or a mapping of settings; written to ``config.json``.
      flag: the flag that names the folder, for error messages.
      alone: keep other processes out of the folder for as long as this one lives.

    Raises:
      UsageError: the folder holds results of another config, its config cannot be read, a run is using it, or it
        cannot be written.
    """
    wanted = json.loads(json.dumps(dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)))
    self.path, self._flag = check_folder(path, flag=flag), flag
    self._metrics_file, config_file = self.path / "metrics.jsonl", self.path / "config.json"
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      # A run that was refused leaves no results; a config beside no lock is somebody else's.
      ours = (self.path / ".lock").exists()
      empty = ours and all(path.is_dir() or path.name in _NO_RESULTS for path in self.path.rglob("*"))
      if alone:
        self._keep_others_out()
      if config_file.exists() and not empty:
        self._check_same(config_file, wanted)
      else:
        write_json(config_file, wanted)
    except OSError as error:
      raise UsageError(f"--{flag}={path} must be a folder that can be written to; {error}.") from error

  def _keep_others_out(self) -> None:
    """Locks the folder until the process ends, however it ends."""
    self._lock = _open(self.path / ".lock", "w")
    try:
      fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UsageError(
        f"--{self._flag}={self.path} is in use by another run; wait for it, stop it, or give another folder."
      ) from error

  def _check_same(self, config_file: pathlib.Path, wanted: Mapping[str, Any]) -> None:
    try:
      stored = dict(json.loads(config_file.read_text()))
    except (ValueError, TypeError) as error:
      raise UsageError(
        f"--{self._flag}={self.path}: config.json cannot be read ({error}); give another folder."
      ) from error
    different = [
      f"--{name} was {stored.get(name)!r}, now {wanted.get(name)!r}"
      for name in sorted({*stored, *wanted})
      if stored.get(name) != wanted.get(name)
    ]
    if different:
      raise UsageError(
        f"--{self._flag}={self.path} holds a run of another configuration ({'; '.join(different)}); use its flags"
        " to resume it, or give another folder."
      )

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends one line to ``metrics.jsonl``."""
    with _open(self._metrics_file, "a") as file:
      file.write(json.dumps({"step": step, **metrics}) + "\n")

  def forget_after(self, step: int) -> None:
    """Drops the logged lines after ``step``, which a resumed run will write again, and a line cut short by a kill."""
    if self._metrics_file.exists():
      kept = [json.dumps(line) + "\n" for line in read_log(self.path) if line["step"] <= step]
      _replace(self._metrics_file, "".join(kept))

  def last_logged(self) -> dict[str, float]:
    """The last line of ``metrics.jsonl``; empty if nothing was logged."""
    return (read_log(self.path) or [{}])[-1]

  def finish(self, metrics: Mapping[str, Any]) -> None:
    """Writes the final metrics to ``metrics.json``."""
    write_json(self.path / "metrics.json", metrics)


def read_log(folder: pathlib.Path) -> list[dict[str, float]]:
  """All lines of a run's ``metrics.jsonl``, without one that a kill cut short; none if nothing was logged."""
  path, lines = folder / "metrics.jsonl", []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError, TypeError):
      lines.append(dict(json.loads(line)))
  return [line for line in lines if "step" in line]


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes JSON so that a kill leaves either the old file or the new one."""
  _replace(path, json.dumps(value, indent=2) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
  scratch = path.with_name(f".{path.name}.tmp")
  with _open(scratch, "w") as file:
    file.write(text)
  scratch.replace(path)


def _open(path: pathlib.Path, mode: str) -> IO[str]:
  """Opens a file for writing, but no link that leads out of the folder."""
  return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666), encoding="utf-8")
