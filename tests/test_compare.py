"""Comparison and search: every run is made once, figures reach the report, and what is wrong is named."""

import dataclasses

import pytest

from experiments import circle, common, compare, merits, search

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


def test_image_runs_fill_every_figure(tmp_path):
  flags = "samples_per_class=4,codes=2,width=48,second_width=8,pretrain_steps=30,steps=4,warmup=2,judge_epochs=1"
  config = compare.Config(methods="ce", seeds=1, generator_seeds=1, flags=flags)
  means = compare.run(config, tmp_path)
  assert set(merits.IMAGES_HEADLINE) - {"coverage_features_k5"} <= set(means["ce"])  # k = 5 needs six images a class
  assert means["control_training_data"]["ssim_cover"] == pytest.approx(1.0)
  assert "minutes" not in means["control_training_data"]


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


def test_a_search_ranks_by_a_score_without_data_and_says_what_it_is_worth(tmp_path):
  config = search.Config(experiment="circle", runs=3, flags=TINY)
  results = search.run(config, tmp_path)
  assert results["failed"] == 0
  assert set(results["rank_correlations"]) == {"precision", "coverage"}
  lines = (tmp_path / "search.md").read_text().splitlines()
  assert lines[0].startswith("| score | codes |")
  scores = [float(line.split("|")[1]) for line in lines[2:5]]
  assert scores == sorted(scores)
  assert (tmp_path / "search.png").stat().st_size > 0
  assert search.run(config, tmp_path) == results


def test_rank_correlation_tells_a_good_score_from_an_empty_one():
  rows = lambda values: [
    {"score": score, "true": {"cover": value}} for score, value in zip((1, 2, 3), values, strict=True)
  ]
  assert search.rank_correlations(rows([0.9, 0.5, 0.1]), ["cover"])["cover"] == pytest.approx(-1.0)
  assert search.rank_correlations(rows([0.5, 0.5, 0.5]), ["cover"])["cover"] is None
