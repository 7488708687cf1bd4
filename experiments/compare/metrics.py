"""The metrics of the comparison: ``metrics.csv`` says what they are called and mean; here is where a run keeps them."""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import pathlib
import statistics
from typing import Any

HEADLINES = {
  "images": (
    "eval_accuracy",
    "ssim_cover",
    "coverage_features_k5",
    "distinct_nearest",
    "useful_accuracy",
    "retrieval_top1",
    "residual",
    "minutes",
  ),
  "circle": ("precision", "coverage", "median_distance", "residual", "minutes", "gigabytes"),
}


@dataclasses.dataclass(frozen=True)
class Metric:
  """A column.

  Attributes:
    name: its key in the results of a run.
    title: what people call it.
    better: "higher", "lower" or "" (neither).
    digits: decimals shown.
    group: heading of its table.
    explanation: one sentence for someone who has not read the paper.
  """

  name: str
  title: str
  better: str
  digits: int
  group: str
  explanation: str

  @property
  def direction(self) -> str:
    """Which values are better, in words."""
    return {"higher": "↑ higher is better", "lower": "↓ lower is better", "": ""}[self.better]

  @property
  def is_p_value(self) -> bool:
    """Whether it is a p-value: of several runs the largest is shown, and a small one as an inequality."""
    return self.name.endswith("p_value")

  def show(self, value: float) -> str:
    """A number as the tables show it.

    >>> Metric("x_p_value", "", "", 3, "", "").show(1e-9)
    '< 0.001'
    """
    if self.is_p_value and value < 10**-self.digits:
      return f"< {10**-self.digits:.{self.digits}f}"
    return f"{value:z,.{self.digits}f}"


def table(kind: str) -> list[Metric]:
  """The metrics of a kind of experiment, ``"images"`` or ``"circle"``, in the order in which they are shown."""
  with pathlib.Path(__file__).with_name("metrics.csv").open(newline="") as file:
    rows = [row for row in csv.DictReader(file) if row.pop("of") in (kind, "all")]
  return [Metric(**{**row, "digits": int(row["digits"])}) for row in rows]  # type: ignore[arg-type]


def of_results(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
  """The metrics of every set of samples in the results of a run: what was generated, and the controls.

  Args:
    results: the run's ``metrics.json``; a metric of several classifiers is a list, whose mean counts.

  Returns:
    Numbers by set and metric; fresh samples of the generator are ``generated``.

  >>> of_results({"fresh_noise": {"residual": [0.1, 0.3]}, "seed": 0})
  {'generated': {'residual': 0.2}}
  """
  known = {metric.name for kind in HEADLINES for metric in table(kind)}
  sets = {
    "generated" if name == "fresh_noise" else name: own
    for name, own in results.items()
    if isinstance(own, Mapping) and known & set(own)
  }
  return {name: {key: _mean(own[key]) for key in own if key in known} for name, own in sets.items()}


def _mean(value: Any) -> float:
  return statistics.fmean(value) if isinstance(value, Sequence) else float(value)
