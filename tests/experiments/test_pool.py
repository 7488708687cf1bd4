"""Many runs side by side: what is done stays done, and what diverges is noted while the others go on."""

import multiprocessing
import sys
import time

import pytest

from experiments.compare import pool
from kkt_jax.cli import flags

_TINY = """
import dataclasses, os, sys, time
from kkt_jax.cli import flags, workdir

@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  seed: int = flags.flag(0, "A seed.", lower=0)
  ends: str = flags.flag("well", "How it ends.")

def run(config, folder):
  assert "numpy" not in sys.modules  # which reads the number of threads when it is imported
  out = workdir.Workdir(folder, config)
  print(f"seed {config.seed} at work", file=sys.stderr, flush=True)
  if config.ends == "slowly": time.sleep(600)
  if config.ends == "diverging": raise FloatingPointError("loss became nan")
  if config.ends == "broken": raise KeyError("lost")
  if config.ends == "killed": os.kill(os.getpid(), 9)
  out.finish({"threads": os.environ["OMP_NUM_THREADS"], "xla": os.environ["XLA_FLAGS"]})
  return {}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
  (tmp_path / "tiny_experiment.py").write_text(_TINY)
  monkeypatch.syspath_prepend(tmp_path)
  sys.modules.pop("tiny_experiment", None)
  return lambda seed=0, ends="well": pool.Job(
    "tiny_experiment", {"seed": seed, "ends": ends}, tmp_path / "runs" / f"{ends}_{seed}"
  )


def run_all(jobs, tmp_path, **settings):
  pool.run_all(jobs, **{"processes": 2, "what": "runs"} | settings)


def test_runs_end_and_are_not_done_again(tmp_path, job, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--mine")
  jobs = [job(seed) for seed in range(3)]
  assert jobs[0].outcome() is jobs[0].metrics() is None
  run_all(jobs, tmp_path)
  for one in jobs:
    outcome = one.outcome()
    assert outcome["error"] == ""
    assert 0 <= outcome["seconds"] < 60 and outcome["peak_memory"] > 1e6
    assert one.metrics()["threads"] == "1" and "--mine" in one.metrics()["xla"]
    assert "at work" in (one.workdir / "log.txt").read_text()
  before = [(one.workdir / "done.json").stat().st_mtime_ns for one in jobs]
  run_all(jobs, tmp_path)
  assert [(one.workdir / "done.json").stat().st_mtime_ns for one in jobs] == before


def test_a_run_that_diverges_is_noted_and_the_others_go_on(tmp_path, job):
  ended = [job(ends="diverging"), job(1)]
  run_all(ended, tmp_path, processes=1)
  assert ended[0].outcome()["error"] == "FloatingPointError: loss became nan"
  assert ended[0].metrics() is None
  assert ended[1].metrics() is not None


@pytest.mark.parametrize(
  ("ends", "seed", "message"),
  [
    ("broken", 0, r"broken_0 broke off \(KeyError: 'lost'\); see its log\.txt"),
    ("killed", 0, r"killed_0 was killed, perhaps for want of memory \(seed 0 at work\)"),
    ("well", -1, r"well_-1 broke off \(.*UsageError: --seed must be a non-negative integer; got -1\.\)"),
  ],
)
def test_a_run_that_breaks_off_stops_the_others_and_is_done_again(tmp_path, job, ends, seed, message):
  began = time.monotonic()
  with pytest.raises(flags.RunError, match=message):
    run_all([job(ends="slowly"), job(seed, ends)], tmp_path)
  assert time.monotonic() - began < 60
  assert job(seed, ends).outcome() is None
  assert not multiprocessing.active_children()


def test_progress_shows_what_the_run_that_spoke_last_said_last(tmp_path, job):
  jobs = [job(seed) for seed in range(3)]
  for seed in (0, 1):
    jobs[seed].workdir.mkdir(parents=True)
    (jobs[seed].workdir / "log.txt").write_text(f"first\nstep {seed}/9\nhalf a li")
    time.sleep(0.02)
  assert pool._last_words(jobs) == "runs/well_1  step 1/9"
  assert pool._last_words(jobs[2:]) == ""


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("depth=3", "depth is not a flag"),
    ("seed=3", "must leave method, seed, generator_seed, shared_dir alone; got seed"),
  ],
)
def test_settings_of_every_run_are_checked(job, text, message):
  with pytest.raises(flags.UsageError, match=message):
    pool.fixed_settings(job().module, text)
  assert pool.fixed_settings(job().module, "ends=slowly") == {"ends": "slowly"}
