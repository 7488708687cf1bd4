"""Random search for settings of the generator, ranked by a score that uses no data, and what that score is worth.

The paper searches batch size and learning rate at random. Here beta, delta, the weight of the total variation and the
form of the multipliers join. A run's score is its mean rank in what can be known without data: the stationarity
residual of fresh samples, the spread of their margins, and their distance from the stored batch-norm statistics. Data
are looked at only to say, by rank correlation, how far the score can be trusted. ``search.md`` holds the table,
``search.png`` the score against the true figures.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np
import scipy.stats  # type: ignore[import-untyped]

from experiments import common, figures, merits, pool
from experiments.compare import parsed_flags, without_training

_TRUE = {
  "mnist": ("eval_accuracy", "ssim_cover", "coverage_features_k5", "recovered"),
  "circle": ("precision", "coverage"),
}
_SCORED = ("residual", "margin_spread", "statistics")  # less is better


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  experiment: str = common.flag("mnist", "Whose settings are searched.", choices=tuple(_TRUE))
  runs: int = common.flag(20, "Settings that are drawn.", lower=3)
  seed: int = common.flag(0, "Seed of the draw.", lower=0)
  classifier_seed: int = common.flag(0, "Seed of the data and of the classifier.", lower=0)
  small: bool = common.flag(True, "mnist: 100 training digits instead of 500.")
  flags: str = common.flag("", "Further flags of every run: name=value, separated by commas.")
  processes: int = common.flag(0, "Runs at a time; 0 is one for each core.", lower=0)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the search; returns the best settings and what the score is worth."""
  common.check_config(config)
  out = common.Workdir(workdir, {**dataclasses.asdict(config), "processes": 0})  # their number may change
  fixed = parsed_flags(config.flags, config.experiment)
  if config.experiment == "mnist" and config.small:
    fixed = {"samples_per_class": 10} | fixed
  fixed |= {"seed": config.classifier_seed, "shared_dir": str(workdir / "shared")}
  processes, cache = config.processes or os.cpu_count() or 1, workdir / "compiled"
  # One run without training first: it trains the classifier that all attack.
  first = pool.Job(config.experiment, without_training(config.experiment, fixed), workdir / "runs" / "classifier")
  pool.run_all([first], processes=1, what="classifier", cache=cache)
  drawn = draw_settings(config.experiment, config.runs, config.seed)
  jobs = [
    pool.Job(config.experiment, fixed | settings, workdir / "runs" / f"{number:03d}")
    for number, settings in enumerate(drawn)
  ]
  pool.run_all(jobs, processes=processes, what="settings", cache=cache)
  rows: list[dict[str, Any]] = [
    {"settings": settings} | _figures(config.experiment, found)
    for settings, job in zip(drawn, jobs, strict=True)
    if (found := job.metrics())
  ]
  if len(rows) < 3:
    raise common.UsageError(f"--runs must leave at least 3 that do not fail; got {len(rows)} of {config.runs}.")
  for row, score in zip(rows, scores([row["scored"] for row in rows]), strict=True):
    row["score"] = score
  rows.sort(key=lambda row: row["score"])
  trust = rank_correlations(rows, _TRUE[config.experiment])
  results = {"failed": config.runs - len(rows), "rank_correlations": trust, "settings": rows}
  (workdir / "search.md").write_text(table(rows, trust))
  panels = [(name, [row["score"] for row in rows], [row["true"][name] for row in rows]) for name in trust]
  figures.scatter(workdir / "search.png", panels, "score without data (less is better)")
  out.finish(results)
  common.say(table(rows, trust))
  return {"best_settings": rows[0]["settings"], "rank_correlations": trust, "failed": results["failed"]}


def draw_settings(experiment: str, count: int, seed: int) -> list[dict[str, Any]]:
  """Settings drawn at random, log-uniformly where they are sizes; the first are the same whatever the number.

  >>> draw_settings("mnist", 2, 0)[0].keys() == draw_settings("mnist", 9, 0)[0].keys()
  True
  """
  generator = common.seeded(seed)

  def between(low: float, high: float) -> float:
    return float(f"{np.exp(generator.uniform(np.log(low), np.log(high))):.3g}")

  def one_of(*choices: Any) -> Any:
    return choices[generator.integers(len(choices))]

  drawn = []
  for _ in range(count):
    settings = {
      "codes": one_of(10, 25, 50) if experiment == "mnist" else one_of(20, 40, 60),
      "learning_rate": between(0.01, 0.2) if experiment == "mnist" else between(1e-3, 1e-2),
      "beta": between(3, 50) if experiment == "mnist" else between(0.5, 20),
      "delta": between(0.003, 0.3),
      "multiplier_form": one_of("softplus", "relu"),
    }
    if experiment == "mnist":
      settings["total_variation_weight"] = between(5, 60)
    drawn.append(settings)
  return drawn


def _figures(experiment: str, found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """What a run's score is made of, and its true figures."""
  if experiment == "circle":
    true, margin_spread = merits.of_circle(found), float(np.mean(found["margin_spread"]))
  else:
    true = merits.of_images(found["fresh_noise"])
    margin_spread = true["margin_spread"]
  scored = {
    "residual": true["residual"],
    "margin_spread": margin_spread,
    "statistics": found["final_losses"].get("statistics", 0.0),
  }
  return {"scored": scored, "true": {name: true[name] for name in _TRUE[experiment]}}


def scores(scored: Sequence[Mapping[str, float]]) -> list[float]:
  """The mean rank of each run in what its score is made of, from 1, the best.

  >>> good = {"residual": 0.1, "margin_spread": 0.2, "statistics": 0.3}
  >>> scores([good, good | {"residual": 0.5, "margin_spread": 0.4}])  # (1 + 1 + 1.5) / 3 and (2 + 2 + 1.5) / 3
  [1.1666666666666667, 1.8333333333333333]
  """
  ranks = [scipy.stats.rankdata([own[name] for own in scored]) for name in _SCORED]
  return [float(rank) for rank in np.mean(ranks, axis=0)]


def rank_correlations(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, float | None]:
  """Spearman's rank correlation of the score with each true figure: -1 if the score ranks as the truth, 0 if it knows
  nothing; None where all runs have the same figure."""
  trust: dict[str, float | None] = {}
  for name in names:
    values = [row["true"][name] for row in rows]
    score = [row["score"] for row in rows]
    constant = len(set(values)) == 1 or len(set(score)) == 1
    trust[name] = None if constant else float(scipy.stats.spearmanr(score, values).statistic)
  return trust


def table(rows: Sequence[Mapping[str, Any]], trust: Mapping[str, float | None]) -> str:
  """The runs from the best score to the worst, as Markdown."""
  settings, scored, true = (list(rows[0][key]) for key in ("settings", "scored", "true"))
  lines = [
    "| " + " | ".join(["score", *settings, *scored, *true]) + " |",
    "|" + "---|" * (1 + len(settings) + len(scored) + len(true)),
  ]
  for row in rows:
    cells = [f"{row['score']:.1f}", *(str(row["settings"][name]) for name in settings)]
    cells += [f"{row[key][name]:.3g}" for key, names in (("scored", scored), ("true", true)) for name in names]
    lines.append("| " + " | ".join(cells) + " |")
  known = "; ".join(f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in trust.items())
  return "\n".join(
    [*lines, "", f"Rank correlation of the score with the truth (-1 is perfect, 0 nothing): {known}.", ""]
  )


if __name__ == "__main__":
  common.main(Config, run)
