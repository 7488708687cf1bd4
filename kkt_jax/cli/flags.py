"""Command lines from frozen dataclasses: every field is a flag, with help in groups and errors of one form.

An experiment is a module with a ``Config``, a function ``run(config, workdir)`` and ``flags.main(Config, run)``. It
imports what is slow to import inside ``run``, so that a mistyped flag is refused at once; and ``run`` checks all that
can be wrong before it makes the folder.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import copy
import csv
import dataclasses
import difflib
import math
import os
import pathlib
import re
import shlex
import signal
import sys
import textwrap
from typing import Any, TypeVar

from absl import app, logging
from absl import flags as absl_flags

from kkt_jax._errors import InputError
from kkt_jax.cli import processes
from kkt_jax.cli.progress import Clock, say

ConfigT = TypeVar("ConfigT")

_PARSERS: Mapping[type, Any] = {int: absl_flags.IntegerParser, float: absl_flags.FloatParser}
_SHOWN = {bool: "BOOLEAN", int: "INTEGER", float: "NUMBER", str: "TEXT"}
_WIDTH = 110  # of the help
_HELP = {"--help", "-h", "--helpshort", "--helpfull"}


class UsageError(InputError):
  """The user asked for something impossible; the message says what to change, and no traceback is shown."""


class RunError(RuntimeError):
  """A run in a process of its own broke off; the message says where to look."""


def flag(
  default: Any,
  help: str,
  *,
  lower: float | None = None,
  upper: float | None = None,
  choices: Sequence[str] | None = None,
  group: str | None = None,
  type: type | None = None,
) -> Any:
  """A field of a config, which is a flag of the command line, too.

  Args:
    default: its default; None (with ``type``) if it depends on other flags, see `resolve`.
    help: what it means.
    lower: least value.
    upper: greatest value.
    choices: the only values.
    group: heading in the help of this field and of those after it, up to the next that has one.
    type: bool, int, float or str; that of the default if None.

  Returns:
    A dataclass field.
  """
  if default is None and type is None:
    raise ValueError("a flag without a default needs a type.")
  kind = type or default.__class__
  parser: Any = absl_flags.BooleanParser() if kind is bool else absl_flags.ArgumentParser()
  wanted = "true or false" if kind is bool else "text"
  if kind in _PARSERS:
    parser = _PARSERS[kind](lower_bound=lower, upper_bound=upper)
    wanted = parser.syntactic_help
  elif choices is not None:
    parser, wanted = absl_flags.EnumParser(choices), f"one of {', '.join(choices)}"
  metadata = {"help": help, "choices": choices, "group": group, "type": kind, "parser": parser, "wanted": wanted}
  return dataclasses.field(default=default, metadata=metadata)


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """The end of a message about a name that is not among the known ones.

  >>> did_you_mean("--hiden", ["--hidden", "--seed"]), did_you_mean("x", ["hidden"])
  ('; did you mean --hidden?', '.')
  """
  by_lower_case = {word.lower(): word for word in known}
  near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
  return f"; did you mean {by_lower_case[near[0]]}?" if near else "."


class Checked:
  """A configuration: of a dataclass of `flag` fields that extends this one, every instance has valid values.

  >>> @dataclasses.dataclass(frozen=True)
  ... class Config(Checked):
  ...   rate: float = flag(0.1, "Step size.", lower=0)
  >>> Config(rate=-1.0)
  Traceback (most recent call last):
  kkt_jax.cli.flags.UsageError: --rate must be a non-negative number; got -1.0.
  """

  def __post_init__(self) -> None:
    """Raises UsageError unless every field has the right type, is finite, and lies in its bounds or choices."""
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      if getattr(self, field.name) is not None or field.default is not None:  # see `resolve`
        _value(field, getattr(self, field.name))


def _value(field: dataclasses.Field[Any], given: Any) -> Any:
  """The value of a field, which is given as such or as text."""
  kind, wanted, hint = field.metadata["type"], field.metadata["wanted"], "."
  try:
    value = field.metadata["parser"].parse(given)
    if kind is float and not math.isfinite(value):
      wanted = "finite"
    elif kind is int and not -(2**63) <= value < 2**63:
      wanted = "less than 2^63 in size"
    elif isinstance(given, (str, int, float) if kind is float else (str, kind)):
      return value
  except (TypeError, ValueError):
    if field.metadata["choices"]:
      hint = did_you_mean(str(given), field.metadata["choices"])
  raise UsageError(f"--{field.name} must be {wanted}; got {given!r}{hint}")


def resolve(config: ConfigT, *presets: Mapping[str, Any]) -> ConfigT:
  """Fills every field whose default depends on other flags from the first preset that names it.

  Args:
    config: what the user gave, a `Checked` one; a value given by hand stays.
    *presets: values by field name, e.g. of a method, of a data set, and last those of the experiment.

  Returns:
    A config without fields left open.

  Raises:
    UsageError: a value is out of its bounds or choices.
    ValueError: no preset names an open field, or one names a field that is not open by default.

  >>> @dataclasses.dataclass(frozen=True)
  ... class Config(Checked):
  ...   rate: float = flag(None, "Step size.", type=float)
  ...   steps: int = flag(None, "Steps.", type=int)
  >>> resolve(Config(steps=7), {"rate": 0.5}, {"rate": 0.1, "steps": 100})
  Config(rate=0.5, steps=7)
  """
  open_fields = [field.name for field in dataclasses.fields(config) if field.default is None]  # type: ignore[arg-type]
  useless = {name for preset in presets for name in preset} - set(open_fields)
  if useless:
    raise ValueError(f"presets must name fields whose default is None; got {', '.join(sorted(useless))}.")
  values = {name: preset[name] for preset in reversed(presets) for name in preset}
  missing = [name for name in open_fields if getattr(config, name) is None and name not in values]
  if missing:
    raise ValueError(f"presets must name every field whose default is None; {', '.join(missing)} missing.")
  given = {name: value for name in open_fields if (value := getattr(config, name)) is not None}
  return dataclasses.replace(config, **values | given)  # type: ignore[type-var]


def parse(config_class: type[Any], text: str, *, flag: str = "set") -> dict[str, Any]:
  """Values of fields from ``name=value,name=value``, each of its field's type.

  Args:
    config_class: whose fields.
    text: from the command line; a part whose value has commas stands in double quotes.
    flag: which flag holds it, for error messages.

  Returns:
    The values by name.

  Raises:
    UsageError: there is no such field, or its value cannot be read or is out of bounds.

  >>> @dataclasses.dataclass(frozen=True)
  ... class Config:
  ...   rate: float = flag(0.1, "Step size.")
  ...   fast: bool = flag(False, "Whether to hurry.")
  >>> parse(Config, "rate=1,fast=true")
  {'rate': 1.0, 'fast': True}
  """
  fields = {field.name: field for field in dataclasses.fields(config_class)}
  values = {}
  try:
    parts = next(csv.reader([text], skipinitialspace=True), [])
  except csv.Error as error:
    raise UsageError(f"--{flag} must be name=value, separated by commas; got {text!r}.") from error
  for part in filter(None, parts):
    name, equals, value = part.partition("=")
    if name not in fields:
      raise UsageError(f"--{flag}: {name} is not a flag of this experiment{did_you_mean(name, fields)}")
    if not equals:
      raise UsageError(f"--{flag}: {name} needs a value: {name}={fields[name].default}.")
    values[name] = _value(fields[name], value)
  return values


def command_line(program: str, config: Any, workdir: pathlib.Path) -> str:
  """A command line that can be pasted, with all that differs from the defaults.

  >>> @dataclasses.dataclass(frozen=True)
  ... class Config:
  ...   name: str = flag("", "Name.")
  ...   force: bool = flag(False, "Whether to go on.")
  ...   seed: int = flag(0, "Seed.")
  >>> command_line("python -m this", Config("a b", force=True), pathlib.Path("runs"))
  "python -m this '--name=a b' --force=true --workdir=runs"
  """
  values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  given = [
    (field.name, values[field.name]) for field in dataclasses.fields(config) if values[field.name] != field.default
  ]
  texts = [f"--{name}={'true' if value is True else value}" for name, value in [*given, ("workdir", workdir)]]
  return f"{program} {shlex.join(texts)}"


def check_folder(path: str | os.PathLike[str], *, flag: str = "workdir") -> pathlib.Path:
  """A path at which there is, or can be made, a folder to write to; makes nothing. Raises UsageError if it cannot."""
  if not os.fspath(path):
    raise UsageError(f"--{flag}=DIR is needed: the folder for everything that the run writes.")
  folder = pathlib.Path(path)
  try:
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
  except OSError as error:
    raise UsageError(f"--{flag}={path} must name a folder; got {error.strerror}.") from error
  if not existing.is_dir():
    raise UsageError(f"--{flag}={path} must be a folder; {existing} is none.")
  if not os.access(existing, os.W_OK | os.X_OK):
    raise UsageError(f"--{flag}={path} must be a folder that you can write to; {existing} is not.")
  return folder


@dataclasses.dataclass(frozen=True)
class _Folder:
  workdir: str = flag(
    "", "Folder for everything that the run writes. An interrupted run goes on when started with it again.", group="Run"
  )
  compilation_cache: str = flag(
    "",
    "Folder in which later runs find what was compiled; off for none. ~/.cache/kkt_jax, which can be deleted at any"
    " time, or how JAX is configured.",
  )


@dataclasses.dataclass(frozen=True)
class _Jointly:
  coordinator: str = flag(
    "",
    "address:port of the first process, or auto to ask the cluster (SLURM, Open MPI, Cloud TPU).",
    group="Several processes that train together",
  )
  num_processes: int = flag(0, "Their number.", lower=0)
  process_id: int = flag(-1, "Which of them this is, from 0.", lower=-1)

  def check(self) -> None:
    number, place = self.num_processes, self.process_id
    asked = self.coordinator in ("", "auto")
    if (number, place) != (0, -1) if asked else not 0 <= place < number:
      raise UsageError(
        "--coordinator=address:port, --num_processes and --process_id (from 0, less than their number) must be given"
        f" together, and neither number with --coordinator=auto; got {self.coordinator!r}, {number}, {place}."
      )


def main(
  config_class: type[ConfigT], run: Callable[[ConfigT, pathlib.Path], Mapping[str, Any]], *, jointly: bool = False
) -> None:
  """The program of an experiment: reads the command line, runs, prints the result, exits.

  Beside the fields it takes the flags of absl, such as ``--pdb`` and ``--flagfile``, and of JAX, such as
  ``--jax_debug_nans``.

  Args:
    config_class: a frozen dataclass whose fields are made by `flag`.
    run: ``run(config, workdir) -> metrics``. Of these ``summary`` (text) and ``pictures`` (paths in the workdir) are
      shown at the end.
    jointly: whether several processes can run it together; see `kkt_jax.cli.processes`.
  """

  def parsed(argv: list[str]) -> list[str]:
    absl_flags.FLAGS.mark_as_parsed()
    with contextlib.suppress(InputError):  # which `command` will say
      _parsed(_classes(config_class, jointly), argv)  # absl wants to know its own before it runs anything
    return argv

  app.run(lambda argv: command(config_class, run, argv, jointly=jointly), flags_parser=parsed)


def command(
  config_class: type[ConfigT],
  run: Callable[[ConfigT, pathlib.Path], Mapping[str, Any]],
  argv: Sequence[str],
  *,
  jointly: bool = False,
) -> int:
  """What `main` does, with a command line that is given.

  Args:
    config_class: see `main`.
    run: see `main`.
    argv: the program's name and its flags.
    jointly: see `main`.

  Returns:
    Exit status: 0, 1 if the run failed, 2 if the command line was refused, 130 if the user stopped it.
  """
  classes = _classes(config_class, jointly)
  if _HELP & set(argv):
    print(_help(classes, sys.modules[run.__module__].__doc__ or "", _own_command(argv[:1])))
    return 0
  logging.set_verbosity(logging.WARNING)  # jax and orbax chatter otherwise
  try:
    folder, config, *joint = _parsed(classes, argv)
    workdir = check_folder(folder.workdir)
    if joint:
      joint[0].check()
    _prepare_jax(folder.compilation_cache)
  except InputError as error:
    return _say_error(error, 2)
  clock = Clock()
  from kkt_jax.checkpoint import CheckpointError  # slow to import

  signal.signal(signal.SIGTERM, signal.default_int_handler)  # what ends a job saves like Ctrl-C
  try:
    if joint and joint[0].coordinator:
      processes.join(**dataclasses.asdict(joint[0]))
    with processes.own_folder(workdir, alone=not joint or not joint[0].coordinator) as (target, talks):
      metrics = run(config, target)
  except InputError as error:
    return _say_error(error, 2)
  except (RunError, CheckpointError, FloatingPointError, OSError) as error:
    return _say_error(error, 1)
  except KeyboardInterrupt:
    print(f"\nstopped. This goes on from what is saved:\n  {_own_command(argv)}", file=sys.stderr)
    return 130
  if talks:
    say(str(clock))
    if "summary" in metrics:
      print(metrics["summary"], end="\n\n")
    for path in (*metrics.get("pictures", ()), "metrics.json"):
      shown = pathlib.Path(path)
      print(shown if shown.is_relative_to(workdir) else workdir / shown)
  return 0


def _prepare_jax(folder: str) -> None:
  """Sets JAX, not yet imported, to keep what it compiles and to multiply in full precision, also in child processes.

  A user's own settings in the environment stay. For the precision see `kkt_jax._precision`.
  """
  default = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kkt_jax"
  if folder == "off":
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  elif folder:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.abspath(folder)
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(default))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
  os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")


def _classes(config_class: type[Any], jointly: bool) -> list[type[Any]]:
  return [_Folder, config_class, *([_Jointly] if jointly else [])]


def _say_error(error: Exception, status: int) -> int:
  print(f"error: {error}", file=sys.stderr)
  return status


def _own_command(argv: Sequence[str]) -> str:
  """A command line of this program that can be pasted."""
  spec = sys.modules["__main__"].__spec__
  module = ["-m", spec.name.removesuffix(".__main__")] if spec is not None else [argv[0]]
  python = pathlib.Path(sys.executable)
  if python.is_relative_to(pathlib.Path.cwd()):
    python = python.relative_to(pathlib.Path.cwd())
  return shlex.join([str(python), *module, *argv[1:]])


def _parsed(classes: Sequence[type[Any]], argv: Sequence[str]) -> list[Any]:
  """The config of each class, from one command line; the flags of absl and of JAX in it take effect."""
  values = absl_flags.FlagValues()
  fields = [field for config_class in classes for field in dataclasses.fields(config_class)]
  for field in fields:  # as text, so that what is wrong is said in one form; see `_value`
    parser, serializer = absl_flags.ArgumentParser[str](), absl_flags.ArgumentSerializer[str]()
    boolean = field.metadata["type"] is bool
    absl_flag = absl_flags.Flag(parser, serializer, field.name, None, "", boolean=boolean)
    absl_flags.DEFINE_flag(absl_flag, values)
  of_absl = absl_flags.FLAGS.flags_by_module_dict()
  for other in (*of_absl["absl.app"], *of_absl["absl.logging"]):
    if other.name not in values and f"--{other.name}" not in _HELP:
      values[other.name] = other
  try:
    try:
      surplus = values(argv)[1:]
    except absl_flags.UnrecognizedFlagError as error:
      if not error.flagname.removeprefix("no").startswith("jax_"):
        raise
      surplus = _with_jax(values, argv)[1:]
  except absl_flags.Error as error:
    raise UsageError(str(error).removeprefix("ERROR:: ")) from error
  if surplus:
    raise UsageError(f"every setting must be a flag --name=value; got {surplus[0]!r}.")
  given = {field.name: _value(field, text) for field in fields if (text := values[field.name].value) is not None}
  return [
    config_class(**{field.name: given[field.name] for field in dataclasses.fields(config_class) if field.name in given})
    for config_class in classes
  ]


def _with_jax(values: absl_flags.FlagValues, argv: Sequence[str]) -> list[str]:
  """What is left of a command line with flags of JAX, which take effect in this process and its children."""
  _prepare_jax(values["compilation_cache"].value or "")
  import jax

  if "jax_debug_nans" not in absl_flags.FLAGS:
    jax.config.config_with_absl()
  names = [name for name in absl_flags.FLAGS if name.startswith("jax_")]
  for name in names:
    values[name] = copy.deepcopy(absl_flags.FLAGS[name])
  surplus = values(argv)
  for name in names:
    if values[name].present:
      jax.config.update(name, values[name].value)
      os.environ[name.upper()] = str(values[name].value)
  return surplus


def _help(classes: Sequence[type[Any]], about: str, own_command: str) -> str:
  """The text of ``--help``: flags with their defaults, in the order of the source, under their groups' headings."""
  groups: dict[str, list[str]] = {}
  for config_class in classes:
    group = "Settings"
    for field in dataclasses.fields(config_class):
      group, default = field.metadata["group"] or group, field.default
      shown = str(default).lower() if isinstance(default, bool) else default
      shown = _SHOWN[field.metadata["type"]] if shown in (None, "") else shown
      wanted = field.metadata["wanted"] if field.metadata["type"] in _PARSERS or field.metadata["choices"] else ""
      text = f"--{field.name}={shown}  {field.metadata['help']}" + (f" ({wanted})" if wanted else "")
      lines = textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
      groups.setdefault(group, []).extend(lines)
  about = re.sub("``(.*?)``|`(.*?)`", r"\1\2", about.strip())
  sections = "\n\n".join("\n".join([f"{heading}:", *lines]) for heading, lines in groups.items())
  return f"{about}\n\n{own_command} --workdir=DIR [--flag=value ...]\n\n{sections}"
