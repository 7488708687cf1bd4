"""Comparison and search: every run is made once, metrics reach the report, and what is wrong is named."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from experiments import circle, mnist
from experiments.compare import __main__ as compare
from experiments.compare import metrics, pool, search
from kkt_jax.cli import flags

TINY = "width=8,pretrain_steps=40,restarts=1,restart_steps=20,steps=40,log_every=20,save_every=20,codes=4"
CIRCLE = compare.Config(experiment="circle", methods="kkt", num_seeds=1, runs_per_seed=1, set=TINY)


@pytest.mark.slow
def test_a_comparison_runs_reports_and_is_not_done_again(tmp_path):
  means = compare.run(CIRCLE, tmp_path)
  assert set(means) >= {"kkt", "means", "control_training_data"}
  assert means["control_training_data"]["precision"] == 1.0
  page, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
  for text in (page, markdown):
    assert "this library" in text and "precision" in text
  assert page.count("data:image/png;base64,") == 3  # a picture of each method, and the curves of that which trains
  assert "--methods=kkt" in page  # the command that makes it
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
  outcome = {"seconds": 60.0, "peak_memory": 1e9, "pictures": [], "error": error}
  (job.workdir / "done.json").write_text(json.dumps(outcome))


@pytest.fixture
def fake_runs(monkeypatch):
  """Replaces the runs: each leaves what ``results(settings)`` returns, or fails."""

  def install(results, *, failing=()):
    def run_all(jobs, *, on_end=lambda job: None, **_):
      for job in jobs:
        failed = job.settings["method"] in failing
        leave(job, results(job.settings), "TrainingDiverged: x became nan" if failed else "")
        on_end(job)

    monkeypatch.setattr(pool, "run_all", run_all)

  return install


def test_metrics_and_failures_reach_the_report(tmp_path, fake_runs):
  def results(settings):
    value = 0.5 + 0.1 * settings["generator_seed"] + 0.2 * (settings["method"] == "kkt")
    own = dict.fromkeys(metrics.HEADLINES["images"], value) | {"residual": [value]}
    control = dict.fromkeys(metrics.HEADLINES["images"], 0.4)
    return {"fresh_noise": own, "training_data": control, "uniform_noise": control, "exp_minus_alpha": [1.0]}

  fake_runs(results, failing=("points_published",))
  document = tmp_path / "results.md"
  means = compare.run(compare.Config(num_seeds=2, runs_per_seed=2, results=str(document)), tmp_path / "run")
  assert means["kkt"]["eval_accuracy"] == pytest.approx(0.75)  # of 0.7 and 0.8 on each classifier
  assert means["control_training_data"]["eval_accuracy"] == pytest.approx(0.4)
  assert means["kkt"]["minutes"] == 1.0
  lines = (tmp_path / "run" / "report.md").read_text().splitlines()
  # four values 0.7, 0.8, 0.7, 0.8: root of 4 x 0.05^2 / 3
  assert any("this library | 4" in line and "**0.75 ± 0.06**" in line for line in lines)
  failed = next(line for line in lines if "published settings (4 of 4 runs failed)" in line)
  assert "| - | - |" in failed
  page = (tmp_path / "run" / "report.html").read_text()
  assert "points_published, classifier 1, run 1: TrainingDiverged: x became nan" in page
  assert "\n".join(lines) in document.read_text()
  assert "`python -m experiments.compare --num_seeds=2 --runs_per_seed=2 --workdir=DIR`" in document.read_text()
  # Ablations have a table of their own.
  compare.run(compare.Config(methods="ablations", num_seeds=1, results=str(document)), tmp_path / "ablations")
  assert "\n".join(lines) in document.read_text()
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


@pytest.mark.parametrize("module", [compare, search])
@pytest.mark.parametrize("wrong", [{"set": "depth=3"}, {"set": "codes=0"}, {"experiment": "cifar"}])
def test_a_refused_command_leaves_no_folder(tmp_path, module, wrong):
  with pytest.raises(flags.UsageError):
    module.run(module.Config(**wrong), tmp_path / "new")
  assert not (tmp_path / "new").exists()


# The search.


def searched(settings):
  """Results of a run: the smaller the learning rate, the better, in all that is known and in truth."""
  rate = settings.get("learning_rate", 1.0)
  own = {"precision": 1 - rate, "coverage": 0.5, "residual": [rate], "margin_spread": [rate]}
  return {"generated": own, "final_losses": {"statistics": rate}}


def test_a_search_ranks_by_a_score_without_data_and_says_what_it_is_worth(tmp_path, fake_runs):
  fake_runs(searched)
  results = search.run(search.Config(experiment="circle", runs=5), tmp_path)
  rates = [row["settings"]["learning_rate"] for row in results["runs"]]
  assert rates == sorted(rates) and len(set(rates)) == 5
  assert results["rank_correlations"] == {"precision": -1.0, "coverage": None}
  assert results["diverged"] == 0
  assert (tmp_path / "search.md").read_text().startswith("| score | codes | method | learning_rate |")
  assert (tmp_path / "search.png").stat().st_size > 0
  again = search.run(search.Config(experiment="circle", runs=5), tmp_path)
  assert again == results
  assert len(list((tmp_path / "runs").iterdir())) == 6  # and the first, which trains the classifier


def test_runs_that_diverge_count_and_have_no_score(tmp_path, fake_runs):
  fake_runs(searched, failing=("relu",))
  config = search.Config(experiment="circle", runs=12, storage=str(tmp_path / "journal"))
  results = search.run(config, tmp_path)
  assert {row["settings"]["method"] for row in results["runs"]} == {"kkt"}
  assert results["diverged"] == 12 - len(results["runs"]) > 0


def test_what_was_interrupted_is_replaced(tmp_path, fake_runs, monkeypatch):
  fake_runs(searched)
  undisturbed, tell = pool.run_all, []

  def interrupted(jobs, **settings):
    if isinstance(jobs, list):
      return undisturbed(jobs, **settings)  # of the classifier
    tell.append(next(jobs).workdir.name)
    raise KeyboardInterrupt

  config = search.Config(experiment="circle", runs=3, storage=str(tmp_path / "journal"))
  monkeypatch.setattr(pool, "run_all", interrupted)
  with pytest.raises(KeyboardInterrupt):
    search.run(config, tmp_path)
  monkeypatch.setattr(pool, "run_all", undisturbed)
  assert len(search.run(config, tmp_path)["runs"]) == 3
  assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["001", "002", "003", "classifier"]
  assert tell == ["000"]


def test_settings_depend_on_the_seed_and_their_number_whoever_draws_them(tmp_path):
  def drawn(seed, storage, workdir, count):
    study = search.open_study(search.Config(seed=seed, storage=storage), workdir)
    return [search.suggest(study.ask(), "mnist") for _ in range(count)]

  own = drawn(0, "", tmp_path, 4)
  shared = str(tmp_path / "journal")
  assert drawn(0, shared, tmp_path, 2) + drawn(0, shared, tmp_path, 2) == own
  assert drawn(1, shared, tmp_path, 4) != own
  assert len({str(settings) for settings in own}) == 4


def test_settings_are_drawn_within_their_bounds_and_can_be_run(tmp_path):
  for experiment, module in (("mnist", mnist), ("circle", circle)):
    study = search.open_study(search.Config(experiment=experiment, storage=str(tmp_path / "journal")), tmp_path)
    for _ in range(10):
      flags.check(module.Config(**search.suggest(study.ask(), experiment)))


def test_rank_correlation_tells_a_good_score_from_an_empty_one():
  rows = lambda values: [
    {"score": score, "true": {"cover": value}} for score, value in zip((1, 2, 3), values, strict=True)
  ]
  assert search.rank_correlations(rows([0.9, 0.5, 0.1]))["cover"] == pytest.approx(-1.0)
  # ranks 1, 2, 3 against 2, 1, 3 (rising): 1 - 6 x (1 + 1 + 0) / (3 x 8) = 0.5
  assert search.rank_correlations(rows([0.5, 0.1, 0.9]))["cover"] == pytest.approx(0.5)


_WORKER = """
import pathlib, sys, time
sys.path.insert(0, {tests!r})
from test_compare import leave, searched
from experiments.compare import pool, search

def run_all(jobs, *, on_end=lambda job: None, **_):
  for job in jobs:
    leave(job, searched(job.settings))
    time.sleep(0.2)
    on_end(job)

pool.run_all = run_all
search.run(search.Config(experiment="circle", runs=8, storage={storage!r}), pathlib.Path({workdir!r}))
"""


@pytest.mark.slow
def test_two_processes_work_on_one_study(tmp_path):
  names = {"tests": str(pathlib.Path(__file__).parent), "storage": f"sqlite:///{tmp_path / 'study.db'}"}
  programs = [_WORKER.format(workdir=str(tmp_path / own), **names) for own in ("one", "two")]
  workers = [subprocess.Popen([sys.executable, "-c", program]) for program in programs]
  assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
  runs = [[path.name for path in (tmp_path / own / "runs").glob("0*")] for own in ("one", "two")]
  assert all(runs) and not set(runs[0]) & set(runs[1])  # both worked, on settings of their own
  results = [json.loads((tmp_path / own / "metrics.json").read_text()) for own in ("one", "two")]
  assert 8 <= max(len(result["runs"]) for result in results) <= 9  # at most one too many
