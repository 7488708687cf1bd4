"""Many runs side by side: what is done stays done, and what fails is noted while the others go on."""

import json

import pytest

from experiments import common, pool


def jobs(tmp_path, *seeds):
  return [pool.Job("lambda_estimation", {"seed": seed, "hidden": 3}, tmp_path / str(seed)) for seed in seeds]


def test_runs_end_and_are_not_done_again(tmp_path):
  own = jobs(tmp_path, 0, 1)
  assert own[0].outcome() is None
  assert own[0].metrics() is None
  pool.run_all(own, processes=2, what="runs", cache=tmp_path / "cache")
  assert [job.outcome()["error"] for job in own] == ["", ""]
  assert all(job.outcome()["seconds"] > 0 and job.outcome()["peak_memory"] > 1e7 for job in own)
  assert own[0].metrics() == json.loads((tmp_path / "0" / "metrics.json").read_text())
  before = (tmp_path / "0" / "done.json").stat().st_mtime_ns
  pool.run_all(own, processes=2, what="runs", cache=tmp_path / "cache")
  assert (tmp_path / "0" / "done.json").stat().st_mtime_ns == before


def test_a_failure_is_noted_and_the_others_go_on(tmp_path):
  broken = pool.Job("lambda_estimation", {"hidden": 0}, tmp_path / "broken")
  good = jobs(tmp_path, 5)
  pool.run_all([broken, *good], processes=1, what="runs", cache=tmp_path / "cache")
  assert "--hidden must be at least 1" in broken.outcome()["error"]
  assert broken.metrics() is None
  assert good[0].metrics() is not None


def test_the_environment_is_left_as_it_was(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--mine")
  with pool._one_thread_each(tmp_path):
    assert "--mine" in pool.os.environ["XLA_FLAGS"]
    assert pool.os.environ["OMP_NUM_THREADS"] == "1"
  assert pool.os.environ["XLA_FLAGS"] == "--mine"


def test_a_crash_stops_everything_and_names_the_log(tmp_path):
  with pytest.raises(common.RunError, match=r"crash ended with exit status 1; see its log\.txt"):
    pool.run_all([pool.Job("none", {}, tmp_path / "crash")], processes=1, what="runs", cache=tmp_path / "cache")
  assert "ModuleNotFoundError" in (tmp_path / "crash" / "log.txt").read_text()
