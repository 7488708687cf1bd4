"""Comparison: every run is made once, metrics reach the report, and what is wrong is named."""

import dataclasses
import json

import pytest

from experiments.compare import __main__ as compare
from experiments.compare import pool, report
from kkt_jax.cli import flags

TINY = "width=8,pretrain_steps=40,restarts=1,restart_steps=20,steps=40,log_every=20,save_every=20,codes=4"
CIRCLE = compare.Config(experiment="circle", methods="kkt", num_seeds=1, runs_per_seed=1, set=TINY)


@pytest.mark.slow
def test_a_comparison_runs_reports_and_is_not_done_again(tmp_path):
  means = compare.run(CIRCLE, tmp_path)
  assert set(means) >= {"kkt", "means", "control_training_data"}
  assert means["control_training_data"]["precision"] == 1.0
  text = (tmp_path / "report.md").read_text()
  assert "| this library | 1 |" in text and "precision" in text
  assert "--methods=kkt" in text  # the command that makes it
  assert "| this library | 1 |" in means["summary"]
  done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/done.json")}
  assert len(done) == 2
  assert compare.run(CIRCLE, tmp_path) == means
  assert all(path.stat().st_mtime_ns == then for path, then in done.items())
  assert len(list(tmp_path.glob("shared/*/classifier"))) == 1
  with pytest.raises(flags.UsageError, match="--num_seeds was 1, now 2"):
    compare.run(dataclasses.replace(CIRCLE, num_seeds=2), tmp_path)


def leave(job, results, error=""):
  """Leaves what a run leaves."""
  job.workdir.mkdir(parents=True, exist_ok=True)
  (job.workdir / "metrics.json").write_text(json.dumps(results))
  outcome = {"seconds": 60.0, "peak_memory": 1e9, "error": error}
  (job.workdir / "done.json").write_text(json.dumps(outcome))


@pytest.fixture
def fake_runs(monkeypatch):
  """Replaces the runs: each leaves what ``results(settings)`` returns, or fails."""

  def install(results, *, failing=()):
    def run_all(jobs, **_):
      for job in jobs:
        failed = job.settings["method"] in failing
        leave(job, results(job.settings), "TrainingDiverged: x became nan" if failed else "")

    monkeypatch.setattr(pool, "run_all", run_all)

  return install


def test_metrics_and_failures_reach_the_report(tmp_path, fake_runs):
  def results(settings):
    value = 0.5 + 0.1 * settings["generator_seed"] + 0.2 * (settings["method"] == "kkt")
    own = dict.fromkeys(report.HEADLINES["images"], value) | {"residual": [value]}
    control = dict.fromkeys(report.HEADLINES["images"], 0.4)
    return {"fresh_noise": own, "training_data": control, "uniform_noise": control, "exp_minus_alpha": [1.0]}

  fake_runs(results, failing=("points_published",))
  document = tmp_path / "results.md"
  means = compare.run(compare.Config(num_seeds=2, runs_per_seed=2, results=str(document)), tmp_path / "run")
  assert means["kkt"]["eval_accuracy"] == pytest.approx(0.75)  # of 0.7 and 0.8 on each classifier
  assert means["control_training_data"]["eval_accuracy"] == pytest.approx(0.4)
  assert means["kkt"]["minutes"] == 1.0
  text = (tmp_path / "run" / "report.md").read_text()
  lines = text.splitlines()
  # four values 0.7, 0.8, 0.7, 0.8: root of 4 x 0.05^2 / 3
  assert any("this library | 4" in line and "**0.75 ± 0.06**" in line for line in lines)
  failed = next(line for line in lines if "published settings (4 of 4 runs failed)" in line)
  assert "| - | - |" in failed
  assert "Failed: points_published, classifier 1, run 1: TrainingDiverged: x became nan" in text
  assert "## Diverse\n\n| | Runs |" in text and "\n## The method's own\n" in text
  table = text[text.index("| | Runs") : text.index("\n\n`python")]
  assert table in document.read_text()
  assert "`python -m experiments.compare --num_seeds=2 --runs_per_seed=2 --workdir=DIR`" in document.read_text()
  # Ablations have a table of their own.
  compare.run(compare.Config(methods="ablations", num_seeds=1, results=str(document)), tmp_path / "ablations")
  assert table in document.read_text()
  assert "<!-- begin mnist ablations -->" in document.read_text()


def test_methods_are_chosen_by_group_or_by_name():
  chosen = lambda methods: list(compare.choose_methods(compare.Config(methods=methods)))
  assert chosen("kkt,ce") == ["means", "kkt", "ce"]
  assert chosen("baselines") == ["means", "kkt", "points", "points_published", "ce", "inversion", "cmi", "blind"]
  assert "no_span" in chosen("ablations")
  assert "ce" not in chosen("ablations")
  assert set(chosen("all")) == set(chosen("ablations")) | set(chosen("baselines"))
  with pytest.raises(flags.UsageError, match=r"--methods must be .*; got 'no_spam'; did you mean no_span\?"):
    chosen("kkt,no_spam")


@pytest.mark.parametrize("wrong", [{"set": "depth=3"}, {"set": "codes=-1"}, {"experiment": "cifar"}])
def test_a_refused_command_leaves_no_folder(tmp_path, wrong):
  with pytest.raises(flags.UsageError):
    compare.run(compare.Config(**wrong), tmp_path / "new")
  assert not (tmp_path / "new").exists()
