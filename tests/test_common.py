"""Working directories, flags and progress: what a user meets when something is wrong."""

import dataclasses
import json

import pytest

from experiments import common


@dataclasses.dataclass(frozen=True)
class Config:
  size: int = common.flag(3, "A size.", lower=1, upper=9)
  kind: str = common.flag("a", "A kind.", choices=("a", "b"))


@dataclasses.dataclass(frozen=True)
class Dependent(Config):
  rate: float = common.flag_by("kind", {"a": 0.5, "b": 2.0}, "A rate.", lower=0)


def test_a_default_can_depend_on_another_flag():
  assert common.resolve(Dependent()).rate == 0.5
  assert common.resolve(Dependent(kind="b")).rate == 2.0
  assert common.resolve(Dependent(kind="b", rate=0.0)).rate == 0.0  # what the user says counts
  assert "A rate. Default: 0.5 for a; 2.0 for b." in dataclasses.fields(Dependent)[-1].metadata["help"]
  with pytest.raises(common.UsageError, match="--rate must be at least 0; got -1"):
    common.check_config(common.resolve(Dependent(rate=-1.0)))


@dataclasses.dataclass(frozen=True)
class Preset(Dependent):
  method: str = common.flag("plain", "What sets others.", choices=("plain", "fast"))
  steps: int = common.method_flag(100, "Some steps.", lower=0)

  @property
  def preset(self):
    return {"steps": 5, "rate": 9.0} if self.method == "fast" else {}


def test_a_method_sets_flags_and_what_is_given_by_hand_goes_first():
  plain, fast = common.resolve(Preset()), common.resolve(Preset(method="fast"))
  assert (plain.steps, plain.rate) == (100, 0.5)
  assert (fast.steps, fast.rate) == (5, 9.0)
  assert common.resolve(Preset(method="fast", steps=0)).steps == 0
  assert dataclasses.fields(Preset)[-1].metadata["help"] == "Some steps. Default: 100."


def test_the_error_names_the_flag_of_the_folder(tmp_path):
  common.Workdir(tmp_path, {"seed": 1}, flag="shared_dir")
  with pytest.raises(common.UsageError, match=r"--shared_dir=.*--seed was 1, now 2"):
    common.Workdir(tmp_path, {"seed": 2}, flag="shared_dir")


def test_config_is_written_and_the_same_one_resumes(tmp_path):
  common.Workdir(tmp_path / "run", Config())
  assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"size": 3, "kind": "a"}
  common.Workdir(tmp_path / "run", Config())


def test_a_workdir_of_another_configuration_is_refused_and_left_as_it_is(tmp_path):
  common.Workdir(tmp_path, Config())
  with pytest.raises(common.UsageError, match=r"--size was 3, now 4"):
    common.Workdir(tmp_path, Config(size=4))
  assert json.loads((tmp_path / "config.json").read_text())["size"] == 3


@pytest.mark.parametrize("content", ["{", "[1, 2]", "null", ""])
def test_a_damaged_config_is_named(tmp_path, content):
  (tmp_path / "config.json").write_text(content)
  with pytest.raises(common.UsageError, match=r"config\.json cannot be read"):
    common.Workdir(tmp_path, Config())


def test_a_file_in_the_place_of_the_workdir_is_named(tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(OSError, match="file"):
    common.Workdir(tmp_path / "file", Config())
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (Config(size=0), "--size must be at least 1; got 0"),
    (Config(size=10), "--size must be at most 9; got 10"),
    (Config(kind="c"), "--kind must be one of a, b; got 'c'"),
  ],
)
def test_impossible_settings_name_their_flag_before_anything_is_written(tmp_path, config, message):
  with pytest.raises(common.UsageError, match=message):
    common.Workdir(tmp_path / "new", config)
  assert not (tmp_path / "new").exists()


def test_a_resumed_run_drops_later_lines_and_one_cut_short(tmp_path):
  out = common.Workdir(tmp_path, Config())
  for step in (1, 2, 3):
    out.log(step, {"loss": float(step)})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "lo')
  out.forget_after(2)
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2]
  assert out.last_logged() == {"step": 2, "loss": 2.0}


def test_tensorboard_files_are_written_without_tensorflow(tmp_path):
  out = common.Workdir(tmp_path, Config(), tensorboard=True)
  out.log(1, {"loss": 0.5})
  out.finish({"loss": 0.5})
  assert list((tmp_path / "tensorboard").glob("events*"))


def test_progress_shows_rate_and_time_left_in_plain_lines(capsys):
  progress = common.Progress("work", 10)
  progress.update(10, {"loss": 0.25})
  line = capsys.readouterr().err
  assert line.startswith("work 10/10")
  assert "/s" in line
  assert "left" in line
  assert "loss 0.25" in line
  assert "\r" not in line  # no terminal here
