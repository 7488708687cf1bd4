"""What `experiments.compare` shows of its runs: Markdown tables, and the metrics that are their columns.

``metrics.csv`` says what the metrics are called and mean.
"""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import itertools
import math
import pathlib
import statistics
from typing import Any

from experiments.compare.pool import Job

HEADLINES = {
  "images": (
    *("eval_accuracy", "ssim_cover", "coverage_features_k5", "distinct_nearest"),
    *("useful_accuracy", "retrieval_top1", "residual", "minutes"),
  ),
  "circle": ("precision", "coverage", "median_distance", "residual", "minutes", "gigabytes"),
}
KINDS = ("method", "baseline", "ablation", "control")  # in the order in which they are shown
HOW_TO_READ = (
  "Each number is the mean over the runs ± their standard deviation; a run is one attacked classifier with one random"
  " seed. The best method or baseline with a number for every run is bold. Controls do not compete: they show what a"
  " number is worth. “(2 of 3)”: only 2 of 3 runs gave a number; “-”: none did; an empty cell was not measured."
)
_ABOUT = (
  "Each method was given the weights of classifiers, nothing else. What is nearer to the training data than other real"
  " data are was revealed by the weights. The settings of this library's method were found by looking at such numbers,"
  " on other data of the same kind (digits) or on the same (faces, circle). `runs/METHOD/seed_CLASSIFIER_RUN` has more."
)
_CONTROLS = {
  "training_data": "training data",
  "real_held_out": "other real data",
  "class_means": "class means",
  "dataset_mean": "mean image",
  "uniform_noise": "noise",
  "gaussian_of_the_stored_moments": "stored moments",
  "uniform_in_the_square": "noise",
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


@dataclasses.dataclass(frozen=True)
class Row:
  """What is compared.

  Attributes:
    name: unique.
    title: what people call it.
    kind: one of `KINDS`.
    values: one number per run, by the name of the metric; a metric may be missing.
  """

  name: str
  title: str
  kind: str
  values: Mapping[str, Sequence[float]]

  @property
  def runs(self) -> int:
    """Number of runs: of the metric that has most."""
    return max((len(values) for values in self.values.values()), default=0)

  def cell(self, metric: Metric) -> str:
    """A mean, the deviation, and how many runs gave a number if not all did.

    >>> row = Row("a", "A", "method", {"x": [1.0, 3.0, math.nan], "y": [math.inf], "p_value": [0.2, 0.01]})
    >>> [row.cell(Metric(name, "", "", 1, "", "")) for name in ("x", "y", "z", "p_value")]
    ['2.0 ± 1.4 (2 of 3)', '-', '', '0.2 (2 of 3)']
    """
    values = self.values.get(metric.name, ())
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
      return "-" if values else ""
    parts = [metric.show(max(finite) if metric.is_p_value else statistics.fmean(finite))]
    if len(finite) > 1 and not metric.is_p_value:
      parts.append(f"± {metric.show(statistics.stdev(finite))}")
    if len(finite) < self.runs:
      parts.append(f"({len(finite)} of {self.runs})")
    return " ".join(parts)


def metrics(kind: str) -> list[Metric]:
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
  known = {metric.name for kind in HEADLINES for metric in metrics(kind)}
  mean = lambda value: statistics.fmean(value) if isinstance(value, Sequence) else float(value)
  return {
    "generated" if name == "fresh_noise" else name: {key: mean(row[key]) for key in row if key in known}
    for name, row in results.items()
    if isinstance(row, Mapping) and known & set(row)
  }


def rows_of(kind: str, methods: Mapping[str, Any], jobs: Mapping[str, Sequence[Job]]) -> list[Row]:
  """A row for each method, of its runs that have ended, and for each control, of the runs of the first method.

  Args:
    kind: ``"images"`` or ``"circle"``.
    methods: `experiments.attack.methods.Method` by name.
    jobs: their runs.
  """
  rows = []
  for name, method in methods.items():
    runs, failed = [], 0
    for job in jobs[name]:
      if outcome := job.outcome():
        results = job.metrics()
        failed += results is None
        # A run that failed has no numbers, which the tables must show.
        row = of_results(results)["generated"] if results else dict.fromkeys(HEADLINES[kind], math.nan)
        if outcome["seconds"] is not None:
          row |= {"minutes": outcome["seconds"] / 60, "gigabytes": outcome["peak_memory"] / 1e9}
        runs.append(row)
    title = f"{method.title} ({failed} of {len(jobs[name])} runs failed)" if failed else method.title
    rows.append(Row(name, title, method.kind, _by_metric(runs)))
  sets = [of_results(results) for job in next(iter(jobs.values())) if (results := job.metrics())]
  for name, title in _CONTROLS.items():
    if runs := [one[name] for one in sets if name in one]:
      rows.append(Row(f"control_{name}", title, "control", _by_metric(runs)))
  return rows


def _by_metric(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
  names = dict.fromkeys(name for row in runs for name in row)
  return {name: [row[name] for row in runs if name in row] for name in names}


def best(rows: Sequence[Row], metric: Metric) -> set[str]:
  """Names of the best rows, ties as shown included; none if fewer than two can be compared."""
  means = {
    row.name: statistics.fmean(values)
    for row in rows
    if row.kind != "control" and (values := row.values.get(metric.name, ())) and all(map(math.isfinite, values))
  }
  if not metric.better or len(means) < 2:
    return set()
  first = max(means.values()) if metric.better == "higher" else min(means.values())
  return {name for name, mean in means.items() if metric.show(mean) == metric.show(first)}


def markdown(rows: Sequence[Row], columns: Sequence[Metric], *, legend: bool = True) -> str:
  """Metrics as a GitHub table.

  Args:
    rows: what is compared.
    columns: the metrics.
    legend: whether to explain them.

  Returns:
    Means ± sample standard deviations over runs, the best method or baseline of each metric in bold.

  >>> accuracy = Metric("accuracy", "Accuracy", "higher", 2, "Recognisable", "Share read as wanted.")
  >>> rows = [Row("a", "A", "method", {"accuracy": [0.8, 0.9]}), Row("b", "B", "baseline", {"accuracy": [0.5]})]
  >>> print(markdown(rows, [accuracy], legend=False))
  | | Runs | Accuracy ↑ |
  |---|---:|---:|
  | A | 2 | **0.85 ± 0.07** |
  | B (baseline) | 1 | 0.50 |
  """
  arrow = {"higher": " ↑", "lower": " ↓", "": ""}
  titles = [_plain(metric.title) + arrow[metric.better] for metric in columns]
  lines = ["| | " + " | ".join(["Runs", *titles]) + " |", "|---|---:|" + "---:|" * len(columns)]
  bold = [best(rows, metric) for metric in columns]
  for row in sorted(rows, key=lambda row: KINDS.index(row.kind)):
    cells = [_plain(row.title) + ("" if row.kind == "method" else f" ({row.kind})"), str(row.runs)]
    for metric, names in zip(columns, bold, strict=True):
      cells.append(f"**{row.cell(metric)}**" if row.name in names else row.cell(metric))
    lines.append("| " + " | ".join(cells) + " |")
  if legend:
    lines += ["", HOW_TO_READ, ""]
    for metric in columns:
      direction = f" ({metric.better} is better)" if metric.better else ""
      lines.append(f"- **{_plain(metric.title)}**{direction}: {_plain(metric.explanation)}")
  return "\n".join(lines)


def _plain(text: str) -> str:
  """A text as Markdown that shows it as it is, on one line.

  >>> print(_plain("a|b *c* <i>"))
  a\\|b \\*c\\* &lt;i>
  """
  escaped = "".join(f"\\{c}" if c in "\\`*[]|" else c for c in " ".join(text.split()))
  return escaped.replace("&", "&amp;").replace("<", "&lt;")


def document(rows: Sequence[Row], kind: str, methods: Mapping[str, Any], jobs: Mapping[str, Any], command: str) -> str:
  """The whole report: the metrics that say most, all of them by group, what the methods are, and what failed.

  Args:
    rows: what is compared, see `rows_of`.
    kind: ``"images"`` or ``"circle"``.
    methods: `experiments.attack.methods.Method` by name.
    jobs: all runs of each, see `Job`.
    command: that makes it.

  Returns:
    Markdown.
  """
  parts = ["# Methods against one another", _ABOUT, markdown(rows, headline(kind)), f"`{command}`"]
  for group, of_group in itertools.groupby(metrics(kind), key=lambda metric: metric.group):
    columns = list(of_group)
    measured = [row for row in rows if any(row.values.get(metric.name) for metric in columns)]
    legend = "\n".join(f"- **{_plain(metric.title)}**: {_plain(metric.explanation)}" for metric in columns)
    parts += [f"## {group}", markdown(measured, columns, legend=False), legend]
  parts += ["## What was compared"]
  parts += [f"- **{_plain(own.title)}**: {_plain(own.explanation)}" for own in methods.values() if own.explanation]
  for job in itertools.chain(*jobs.values()):
    if (outcome := job.outcome()) and outcome["error"]:
      run = "{method}, classifier {seed}, run {generator_seed}".format_map(job.settings)
      parts.append(f"Failed: {run}: {_plain(outcome['error'])}")
  return "\n\n".join(parts)


def headline(kind: str) -> list[Metric]:
  """The metrics that say most, in their order."""
  order = HEADLINES[kind]
  return sorted((own for own in metrics(kind) if own.name in order), key=lambda own: order.index(own.name))


def insert(path: pathlib.Path, name: str, text: str) -> None:
  """Puts a text into a Markdown document in place of that of the same name, or at its end.

  Args:
    path: the document; made if there is none.
    name: of the place, which comments in the document mark.
    text: without these comments.
  """
  begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
  old = path.read_text() if path.exists() else ""
  before, found, rest = old.partition(begin)
  after = rest.partition(end)[2] if found else ""
  before = before if found or not before else before.rstrip("\n") + "\n\n"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"{before}{begin}{text.strip()}\n{end}{after}")
