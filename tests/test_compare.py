"""Comparison and search: every run is made once, figures reach the report, and what is wrong is named."""

import dataclasses
import json

import pytest

from experiments import circle, common, compare, merits, mnist, pool, search

TINY = "width=8,pretrain_steps=40,restarts=1,restart_steps=20,steps=40,log_every=20,checkpoint_every=20"
CIRCLE = compare.Config(experiment="circle", methods="kkt", seeds=1, generator_seeds=2, flags=f"{TINY},codes=4")


def test_a_comparison_runs_reports_and_is_not_done_again(tmp_path):
  means = compare.run(CIRCLE, tmp_path)
  assert set(means) >= {"kkt", "means", "control_training_data"}
  assert means["control_training_data"]["precision"] == 1.0
  page, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
  for text in (page, markdown):
    assert "this library" in text
    assert "precision" in text
  assert "data:image/png;base64," in page
  assert "--methods=kkt" in page  # the command that makes it
  done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/done.json")}
  assert len(done) == 3  # one classifier: one run of the mean image, two of the method
  assert compare.run(CIRCLE, tmp_path) == means
  assert all(path.stat().st_mtime_ns == then for path, then in done.items())
  assert len(list(tmp_path.glob("shared/*/classifier"))) == 1
  with pytest.raises(common.UsageError, match="--seeds was 1, now 2"):
    compare.run(dataclasses.replace(CIRCLE, seeds=2), tmp_path)


def fake_runs(monkeypatch, figures, *, failing=()):
  """Replaces the runs: each leaves what ``figures(settings)`` returns, or fails."""

  def run_all(jobs, **_):
    for job in jobs:
      job.workdir.mkdir(parents=True, exist_ok=True)
      failed = job.settings["method"] in failing
      (job.workdir / "metrics.json").write_text(json.dumps(figures(job.settings)))
      outcome = {"seconds": 60.0, "peak_memory": 1e9, "error": "Diverged: x became nan" if failed else ""}
      (job.workdir / "done.json").write_text(json.dumps(outcome))

  monkeypatch.setattr(pool, "run_all", run_all)


def test_figures_and_failures_reach_the_report(tmp_path, monkeypatch):
  def figures(settings):
    value = 0.5 + 0.1 * settings["generator_seed"] + 0.2 * (settings["method"] == "kkt")
    own = dict.fromkeys(merits.IMAGES_HEADLINE, value) | {
      "residual": [value],
      "residual_per_tensor": [{"Dense_0/kernel": value}],
    }
    return {"fresh_noise": own, "training_data": own, "uniform_noise": own}

  fake_runs(monkeypatch, figures, failing=("points_published",))
  means = compare.run(compare.Config(seeds=1, generator_seeds=2), tmp_path)
  assert means["kkt"]["eval_accuracy"] == pytest.approx(0.75)  # of 0.7 and 0.8
  assert means["control_training_data"]["eval_accuracy"] == pytest.approx(0.5)
  assert means["kkt"]["minutes"] == 1.0
  lines = (tmp_path / "report.md").read_text().splitlines()
  assert any("this library" in line and "**0.75 ± 0.07**" in line for line in lines)
  failed = next(line for line in lines if "published settings (2 of 2 runs failed)" in line)
  assert "| - | - |" in failed
  page = (tmp_path / "report.html").read_text()
  assert "x became nan" in page
  assert "steps=600" in page  # the settings of the baselines


def test_methods_are_chosen_by_group_or_by_name():
  chosen = lambda methods: compare.chosen_methods(compare.Config(methods=methods))
  assert chosen("baselines") == ["means", "kkt", "points", "points_published", "ce", "inversion"]
  assert "no_span" in chosen("ablations")
  assert "ce" not in chosen("ablations")
  assert set(chosen("all")) == set(chosen("ablations")) | set(chosen("baselines"))
  with pytest.raises(common.UsageError, match=r"--methods must be .* got best"):
    chosen("kkt,best")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("depth=3", "--flags must name flags of circle; got 'depth=3'"),
    ("codes=many", "codes must be of type int; got 'many'"),
  ],
)
def test_flags_that_do_not_exist_are_named(flags, message):
  with pytest.raises(common.UsageError, match=message):
    compare.parsed_flags(flags, "circle")


def test_flags_have_the_type_of_their_field():
  parsed = compare.parsed_flags("codes=3,labels=contiguous,batch_norm=false,jitter=1", "circle")
  assert parsed == {"codes": 3, "labels": "contiguous", "batch_norm": False, "jitter": 1.0}
  common.check_config(common.resolve(circle.Config(**parsed)))


def test_a_search_ranks_by_a_score_without_data_and_says_what_it_is_worth(tmp_path, monkeypatch):
  def figures(settings):
    rate = settings.get("learning_rate", 1.0)  # the smaller, the better, in all that is known and in truth
    residual = [{"generated": rate}]
    true = {"precision": 1 - rate, "coverage": 0.5, "median_distance": 0.0}
    return true | {"residual": residual, "margin_spread": [rate], "final_losses": {"statistics": rate}}

  fake_runs(monkeypatch, lambda settings: figures(settings))
  monkeypatch.setattr(search, "without_training", lambda experiment, settings: settings | {"method": "means"})
  config = search.Config(experiment="circle", runs=5)
  monkeypatch.setattr(
    search, "draw_settings", lambda *_: [{"method": "kkt", "learning_rate": r} for r in (0.3, 0.1, 0.5, 0.2, 0.4)]
  )
  results = search.run(config, tmp_path)
  assert results["best_settings"]["learning_rate"] == 0.1
  assert results["failed"] == 0
  assert results["rank_correlations"] == {"precision": pytest.approx(-1.0), "coverage": None}
  lines = (tmp_path / "search.md").read_text().splitlines()
  assert lines[0].startswith("| score | method | learning_rate |")
  scores = [float(line.split("|")[1]) for line in lines[2:7]]
  assert scores == [1.0, 2.0, 3.0, 4.0, 5.0]
  assert (tmp_path / "search.png").stat().st_size > 0


def test_settings_are_drawn_within_their_bounds_and_can_be_run():
  for experiment, module in (("mnist", mnist), ("circle", circle)):
    for settings in search.draw_settings(experiment, 20, 1):
      common.check_config(common.resolve(module.Config(**settings)))


def test_rank_correlation_tells_a_good_score_from_an_empty_one():
  rows = lambda values: [
    {"score": score, "true": {"cover": value}} for score, value in zip((1, 2, 3), values, strict=True)
  ]
  assert search.rank_correlations(rows([0.9, 0.5, 0.1]), ["cover"])["cover"] == pytest.approx(-1.0)
  assert search.rank_correlations(rows([0.5, 0.5, 0.5]), ["cover"])["cover"] is None
