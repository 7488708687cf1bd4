"""Flags, working directories and progress: what a user meets when something is wrong."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from kkt_jax.cli import flags, progress
from kkt_jax.cli.progress import Clock, Progress
from kkt_jax.cli.workdir import Workdir, write_json


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  size: int = flags.flag(3, "A size.", lower=1, upper=9, group="First things")
  kind: str = flags.flag("plain", "A kind.", choices=("plain", "fancy"))
  rate: float = flags.flag(0.5, "A rate.", group="Last things")
  fast: bool = flags.flag(False, "Whether to hurry.")
  count: int = flags.flag(0, "A number without bounds.")


@dataclasses.dataclass(frozen=True)
class Open(Config):
  steps: int = flags.flag(None, "Some steps.", lower=0, type=int)


@dataclasses.dataclass(frozen=True)
class Samples(Config):
  name: str = flags.flag("", "A name.")


def command(capsys, *argv, run=lambda config, workdir: {}, config_class=Config, jointly=False):
  """Exit status, stdout and stderr of a command line."""
  status = flags.command(config_class, run, ["program", *argv], jointly=jointly)
  return status, *capsys.readouterr()


# The command line.


def test_flags_reach_the_run_with_the_types_of_their_fields(tmp_path, capsys):
  seen = []
  run = lambda config, workdir: seen.append((config, workdir)) or {}
  argv = ["--size=4", "--kind", "fancy", "--rate=2", "--fast", f"--workdir={tmp_path}"]
  assert command(capsys, *argv, run=run)[0] == 0
  assert command(capsys, "--nofast", f"--workdir={tmp_path}", run=run)[0] == 0
  assert seen == [(Config(4, "fancy", 2.0, True), tmp_path), (Config(), tmp_path)]


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ("--siz=3", "Unknown command line flag 'siz'. Did you mean: size ?"),
    ("--size=0", "--size must be an integer in the range [1, 9]; got '0'."),
    ("--size=10", "--size must be an integer in the range [1, 9]; got '10'."),
    ("--size=many", "--size must be an integer in the range [1, 9]; got 'many'."),
    ("--count=99999999999999999999", "--count must be less than 2^63 in size; got '99999999999999999999'."),
    ("--kind=fency", "--kind must be one of plain, fancy; got 'fency'; did you mean fancy?"),
    ("--rate=nan", "--rate must be finite; got 'nan'."),
    ("--rate=1e999", "--rate must be finite; got '1e999'."),
    ("--rate=", "--rate must be a number; got ''."),
    ("--fast=perhaps", "--fast must be true or false; got 'perhaps'."),
    ("--size", "Missing value for flag --size"),
    ("5", "every setting must be a flag --name=value; got '5'."),
  ],
)
def test_a_wrong_command_line_is_refused_in_one_line_and_leaves_nothing(tmp_path, capsys, argv, message):
  status, out, err = command(capsys, f"--workdir={tmp_path / 'new'}", argv)
  assert (status, out, err) == (2, "", f"error: {message}\n")
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("workdir", [[], ["--workdir="]])
def test_a_folder_is_needed(capsys, workdir):
  message = "error: --workdir=DIR is needed: the folder for everything that the run writes.\n"
  assert command(capsys, *workdir) == (2, "", message)


def test_what_is_no_folder_is_named(tmp_path, capsys, monkeypatch):
  (tmp_path / "file").write_text("mine")
  for path in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null", tmp_path / ("n" * 300)):
    status, _, err = command(capsys, f"--workdir={path}")
    assert status == 2
    assert err.startswith(f"error: --workdir={path} must ") and err.count("\n") == 1
  monkeypatch.setattr(os, "access", lambda *_: False)
  assert "must be a folder that you can write to" in command(capsys, f"--workdir={tmp_path / 'new'}")[2]


@pytest.mark.parametrize("error", [flags.RunError("it broke"), FloatingPointError("it broke"), OSError("it broke")])
def test_a_run_that_fails_says_so_in_one_line(tmp_path, capsys, error):
  def run(config, workdir):
    raise error

  assert command(capsys, f"--workdir={tmp_path}", run=run) == (1, "", "error: it broke\n")


def test_stopped_by_hand_it_says_how_to_go_on(tmp_path, capsys, monkeypatch):
  def run(config, workdir):
    raise KeyboardInterrupt

  monkeypatch.setattr(sys, "executable", str(pathlib.Path.cwd() / "env" / "bin" / "python"))
  monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
  status, _, err = command(capsys, "--size=4", f"--workdir={tmp_path}", run=run)
  assert status == 130
  assert f"\n  env/bin/python program --size=4 --workdir={tmp_path}\n" in err  # which can be pasted


def test_a_run_ends_with_its_table_and_the_paths_of_what_it_wrote(tmp_path, capsys):
  def run(config, workdir):
    return {"summary": "| a |", "pictures": ["fig1.png", str(workdir / "fig2.png")], "figures": [1.0] * 100}

  _, out, err = command(capsys, f"--workdir={tmp_path}", run=run)
  assert re.fullmatch(r"took 0:0\d, of which this process compiled for 0:0\d\n", err)
  assert out.splitlines() == ["| a |", "", *(f"{tmp_path}/{name}" for name in ("fig1.png", "fig2.png", "metrics.json"))]


def test_help_shows_groups_in_the_order_of_the_source_and_every_default_once(capsys):
  status, out, _ = command(capsys, "--help", config_class=Open, jointly=True)
  assert status == 0
  assert out.startswith("Flags, working directories and progress")  # the module's own text
  order = [
    "Run:",
    "--workdir=TEXT",
    "First things:",
    "--size=3",
    "--kind=plain",
    "Last things:",
    "--rate=0.5",
    "--fast=false",
  ]
  places = [out.index(text) for text in [*order, "--steps=INTEGER", "--coordinator"]]
  assert places == sorted(places)
  assert "(one of plain, fancy)" in out and "(an integer in the range [1, 9])" in out
  assert out.count("0.5") == 1
  assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
  "argv",
  [
    ["--num_processes=2"],
    ["--coordinator=a:1", "--num_processes=2", "--process_id=2"],
    ["--coordinator=a:1"],
    ["--coordinator=auto", "--process_id=0"],
  ],
)
def test_flags_of_processes_that_do_not_fit_are_refused(tmp_path, capsys, argv):
  status, _, err = command(capsys, f"--workdir={tmp_path}", *argv, jointly=True)
  assert status == 2
  assert "--coordinator=address:port, --num_processes and --process_id" in err and err.count("\n") == 1


# Configs.


def test_the_first_preset_that_names_a_field_fills_it_and_what_is_given_by_hand_stays():
  assert flags.resolve(Open(), {"steps": 5}, {"steps": 100}).steps == 5
  assert flags.resolve(Open(), {}, {"steps": 100}).steps == 100
  assert flags.resolve(Open(steps=0), {"steps": 5}).steps == 0


def test_presets_are_checked():
  with pytest.raises(flags.UsageError, match="--steps must be a non-negative integer; got -1"):
    flags.resolve(Open(), {"steps": -1})
  with pytest.raises(ValueError, match="steps missing"):
    flags.resolve(Open())
  with pytest.raises(ValueError, match="got rate, speed"):
    flags.resolve(Open(), {"steps": 5, "rate": 1.0, "speed": 2})


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("sise=3", "--set: sise is not a flag of this experiment; did you mean size?"),
    ("size", "--set: size needs a value: size=3."),
    ("size=many", "--size must be an integer in the range [1, 9]; got 'many'."),
    ("rate=nan", "--rate must be finite; got 'nan'."),
    ("fast=2", "--fast must be true or false; got '2'."),
  ],
)
def test_settings_in_one_text_are_checked(text, message):
  with pytest.raises(flags.UsageError) as error:
    flags.parse(Config, text)
  assert str(error.value) == message


def test_settings_in_one_text_have_the_types_of_their_fields():
  assert flags.parse(Open, "steps=3, kind=fancy,fast=False,rate=1") == {
    "steps": 3,
    "kind": "fancy",
    "fast": False,
    "rate": 1.0,
  }
  assert flags.parse(Config, "") == {}
  assert flags.parse(Samples, 'size=4,"name=a=1,b=2"') == {"size": 4, "name": "a=1,b=2"}


# The folder.


def test_config_is_written_and_the_same_one_resumes(tmp_path):
  Workdir(tmp_path / "run", Config())
  assert json.loads((tmp_path / "run" / "config.json").read_text())["size"] == 3
  Workdir(tmp_path / "run", Config()).finish({})
  Workdir(tmp_path / "run", Config())


def test_results_of_another_configuration_are_refused_and_left_as_they_are(tmp_path):
  Workdir(tmp_path, Config()).finish({"loss": 1.0})
  with pytest.raises(flags.UsageError, match=r"--workdir=.*--size was 3, now 4"):
    Workdir(tmp_path, Config(size=4))
  assert json.loads((tmp_path / "config.json").read_text())["size"] == 3
  with pytest.raises(flags.UsageError, match=r"--shared_dir="):
    Workdir(tmp_path, {"seed": 2}, flag="shared_dir")


def test_a_config_without_results_does_not_keep_the_corrected_command_out(tmp_path):
  Workdir(tmp_path, Config(size=4))
  Workdir(tmp_path, Config())
  assert json.loads((tmp_path / "config.json").read_text())["size"] == 3


def test_somebody_elses_config_is_never_overwritten(tmp_path):
  (tmp_path / "config.json").write_text('{"mine": 1}')
  with pytest.raises(flags.UsageError, match="--mine was 1, now None"):
    Workdir(tmp_path, Config())
  assert (tmp_path / "config.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("content", ["{", "[1, 2]", "null", "", "\xff"])
def test_a_damaged_config_is_named(tmp_path, content):
  (tmp_path / "config.json").write_text(content, encoding="latin-1")
  with pytest.raises(flags.UsageError, match=r"config\.json cannot be read"):
    Workdir(tmp_path, Config())


def test_a_folder_in_use_is_refused(tmp_path):
  # The lock belongs to a process: another one must hold it.
  program = f"from kkt_jax.cli import workdir; w = workdir.Workdir({str(tmp_path)!r}, {{}}); print(); input()"
  with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
    other.stdout.readline()
    with pytest.raises(flags.UsageError, match="in use by another run"):
      Workdir(tmp_path, {})
    Workdir(tmp_path, {}, alone=False)
    other.communicate(b"\n")
  Workdir(tmp_path, {})


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", ".config.json.tmp"])
def test_links_out_of_the_folder_are_not_followed(tmp_path, name):
  outside = tmp_path / "outside"
  outside.write_text("mine")
  run = tmp_path / "run"
  run.mkdir()
  (run / name).symlink_to(outside)
  with pytest.raises((OSError, flags.UsageError)):
    Workdir(run, Config()).log(1, {})
  assert outside.read_text() == "mine"


def test_a_resumed_run_drops_later_lines_and_one_cut_short(tmp_path):
  out = Workdir(tmp_path, Config())
  assert out.last_logged() == {}
  for step in (1, 2, 3):
    out.log(step, {"loss": float(step)})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "lo')
  assert out.last_logged() == {"step": 3, "loss": 3.0}
  out.forget_after(2)
  assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n'


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
  write_json(tmp_path / "a.json", 1)
  with pytest.raises(TypeError):
    write_json(tmp_path / "a.json", object())
  assert (tmp_path / "a.json").read_text() == "1\n"


# Progress.


def test_what_the_library_logs_is_said_once():
  code = """
from absl import app
import logging
from kkt_jax.cli.progress import say_what_is_logged
def main(argv):
  for _ in range(2):
    say_what_is_logged()
  logging.getLogger("kkt_jax.auditing.run").info("measuring")
  logging.getLogger("kkt_jax.auditing.run").warning("beware")
app.run(main)
"""
  said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
  assert said == "measuring\nbeware\n"


def test_progress_shows_rate_and_time_left_in_plain_lines(capsys):
  Progress("work", 10).update(10, {"loss": 0.25})
  line = capsys.readouterr().err
  assert line.startswith("work 10/10")
  assert "/s" in line and "left" in line and "loss 0.25" in line
  assert "\r" not in line  # no terminal here


def test_the_clock_counts_what_is_compiled_after_its_start():
  of_zeros = lambda number: jax.block_until_ready(jax.jit(lambda x: x + number)(jnp.zeros(number)))
  of_zeros(7)
  clock = Clock()
  before = progress._compiling()[0]
  of_zeros(8)
  after = progress._compiling()[0]
  assert clock._compiled <= before < after < before + 10


@pytest.mark.parametrize(
  ("flag", "found"),
  [
    ("", {"JAX_COMPILATION_CACHE_DIR": "cache/kkt_jax"}),
    ("own", {"JAX_COMPILATION_CACHE_DIR": "own"}),
    ("off", {"JAX_ENABLE_COMPILATION_CACHE": "false"}),
  ],
)
def test_what_is_compiled_is_kept_for_later_runs(tmp_path, monkeypatch, flag, found):
  environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
  monkeypatch.setattr(os, "environ", environment)
  flags._prepare_jax(str(tmp_path / flag) if flag == "own" else flag)
  assert found.items() <= {name: value.replace(f"{tmp_path}/", "") for name, value in environment.items()}.items()


def test_flags_of_absl_and_of_jax_take_effect(tmp_path, capsys, monkeypatch):
  for name in ("JAX_DEBUG_NANS", "JAX_LOG_COMPILES"):
    monkeypatch.delenv(name, raising=False)
  (tmp_path / "flags").write_text("--size=4\n--jax_debug_nans\n")
  seen = []
  run = lambda config, workdir: (
    seen.append((config.size, jax.config.jax_debug_nans, os.environ["JAX_DEBUG_NANS"])) or {}
  )
  argv = [f"--flagfile={tmp_path / 'flags'}", "--verbosity=1", "--nojax_log_compiles", f"--workdir={tmp_path / 'new'}"]
  try:
    assert command(capsys, *argv, run=run)[0] == 0
  finally:
    jax.config.update("jax_debug_nans", False)
  assert seen == [(4, True, "True")]


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ("--jax_debug_nan", "Unknown command line flag 'jax_debug_nan'. Did you mean: jax_debug_nans ?"),
    ("--jax_debug_nans=perhaps", "flag --jax_debug_nans=perhaps: "),
    ("--verbosity=loud", "flag --verbosity=loud: "),
    ("--flagfile=/nowhere", "Unable to open flagfile"),
  ],
)
def test_wrong_flags_of_absl_and_of_jax_are_refused(tmp_path, capsys, argv, message):
  status, _, err = command(capsys, f"--workdir={tmp_path / 'new'}", argv)
  assert status == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
  assert not (tmp_path / "new").exists()


def test_flags_of_jax_do_not_cost_what_jax_is_told_before_it_is_imported(tmp_path):
  program = """
import dataclasses, sys
from kkt_jax.cli import flags

@dataclasses.dataclass(frozen=True)
class Config:
  pass

def run(config, workdir):
  import jax
  return {"summary": f"{jax.config.jax_debug_nans} {jax.config.jax_default_matmul_precision}"}

sys.exit(flags.command(Config, run, ["program", "--jax_debug_nans", f"--workdir={sys.argv[1]}"]))
"""
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
  argv = [sys.executable, "-c", program, str(tmp_path)]
  done = subprocess.run(argv, env=environment | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout.splitlines()[0] == "True highest"


def test_absl_learns_of_its_flags_before_it_runs(monkeypatch):
  seen = []
  monkeypatch.setattr(flags.app, "run", lambda run, flags_parser: seen.append(flags_parser(["program", "--pdb"])))
  try:
    flags.main(Config, lambda config, workdir: {})
    assert flags.absl_flags.FLAGS.pdb
  finally:
    flags.absl_flags.FLAGS["pdb"].unparse()
  assert seen == [["program", "--pdb"]]
