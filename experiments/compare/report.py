"""What `experiments.compare` shows of its runs: one self-contained HTML page, and a Markdown table."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import io
import itertools
import math
import pathlib
import statistics
from typing import Any

from matplotlib.figure import Figure

from experiments.compare import metrics
from experiments.compare.metrics import Metric
from experiments.compare.pool import Job
from kkt_jax.auditing import pages
from kkt_jax.cli.workdir import read_log

KINDS = {
  "method": "Methods",
  "baseline": "Baselines",
  "ablation": "Ablations of this library's method",
  "control": "Controls, which do not compete",
}
HOW_TO_READ = (
  "Each number is the mean over the runs ± their standard deviation; a run is one attacked classifier with one random"
  " seed. The best method or baseline with a number for every run is bold. Controls do not compete: they show what a"
  " number is worth. “(2 of 3)”: only 2 of 3 runs gave a number; “-”: none did; an empty cell was not measured."
)
_CONTROLS = {
  "training_data": (
    "training data",
    "The images that the classifier was trained on: what perfect recovery would give.",
  ),
  "real_held_out": ("other real data", "As many real images of the same kind, on which it was not trained."),
  "class_means": ("class means", "The mean training image of each class, for every sample of it."),
  "dataset_mean": ("mean image", "The mean of all training images, for every sample."),
  "uniform_noise": ("noise", "Uniform noise."),
  "gaussian_of_the_stored_moments": (
    "stored moments",
    "Gaussian points of the mean and covariance that the first batch norm stores.",
  ),
  "uniform_in_the_square": ("noise", "Uniform points in the square."),
}
_SUBJECTS = {
  "circle": ("18 points on a circle in three classes", "training points, regions of the classifier, generated points"),
  "mnist": ("handwritten digits (MNIST)", "generated in odd rows, the most similar training image below each"),
  "faces": ("small pictures of faces", "generated in odd rows, the most similar training image below each"),
}


@dataclasses.dataclass(frozen=True)
class Row:
  """What is compared.

  Attributes:
    name: unique.
    title: what people call it.
    explanation: what it is, in a sentence or two.
    kind: one of `KINDS`.
    values: one number per run, by the name of the metric; a metric may be missing.
    pictures: captions and PNG files.
    curves: captions and the logged steps and losses, one per run.
  """

  name: str
  title: str
  explanation: str
  kind: str
  values: Mapping[str, Sequence[float]]
  pictures: Sequence[tuple[str, pathlib.Path]] = ()
  curves: Sequence[tuple[str, Sequence[float], Sequence[float]]] = ()

  @property
  def runs(self) -> int:
    """Number of runs: of the metric that has most."""
    return max((len(values) for values in self.values.values()), default=0)

  def cell(self, metric: Metric) -> tuple[str, str]:
    """A mean, and what follows it: the deviation, and how many runs gave a number if not all did.

    >>> row = Row("a", "A", "", "method", {"x": [1.0, 3.0, math.nan], "y": [math.inf], "p_value": [0.2, 0.01]})
    >>> [row.cell(Metric(name, "", "", 1, "", "")) for name in ("x", "y", "z", "p_value")]
    [('2.0', '± 1.4 (2 of 3)'), ('-', ''), ('', ''), ('0.2', '(2 of 3)')]
    """
    values = [float(value) for value in self.values.get(metric.name, ())]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
      return ("-" if values else ""), ""
    after = [f"({len(finite)} of {self.runs})"] if len(finite) < self.runs else []
    if metric.is_p_value:
      return metric.show(max(finite)), " ".join(after)
    spread = [f"± {metric.show(statistics.stdev(finite))}"] if len(finite) > 1 else []
    return metric.show(statistics.fmean(finite)), " ".join(spread + after)

  @functools.cached_property
  def plot(self) -> bytes | None:
    """The loss curves of all runs as a PNG; None if there is no finite loss."""
    losses = [loss for *_, own in self.curves for loss in own if math.isfinite(loss)]
    if not losses:
      return None
    figure = Figure(figsize=(7.2, 3), layout="constrained")
    axes = figure.subplots()
    for caption, steps, own in self.curves:
      axes.plot(steps, [loss if math.isfinite(loss) else math.nan for loss in own], label=caption, linewidth=1.2)
    axes.set(xlabel="training step", ylabel="loss", yscale="log" if min(losses) > 0 else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


@dataclasses.dataclass(frozen=True)
class Report:
  """All that is shown.

  Attributes:
    what: what the classifiers were trained on.
    metrics: all columns, in order.
    rows: in the order in which they are shown within their kind.
    headline: names of the metrics in the summary and in the Markdown.
    command: that makes it.
    num_runs: of which it is made.
    failures: what became of runs that failed, a sentence each.
  """

  what: str
  metrics: Sequence[Metric]
  rows: Sequence[Row]
  headline: Sequence[str]
  command: str
  num_runs: int
  failures: Sequence[str] = ()

  @property
  def summary(self) -> list[Metric]:
    """The metrics of the headline, in its order."""
    return [metric for name in self.headline for metric in self.metrics if metric.name == name]

  @property
  def ordered(self) -> list[Row]:
    """The rows by kind."""
    return [row for kind in KINDS for row in self.rows if row.kind == kind]

  def measured(self, kind: str, metrics: Sequence[Metric]) -> list[Row]:
    """The rows of a kind that have any of some metrics."""
    return [row for row in self.rows if row.kind == kind and any(row.values.get(metric.name) for metric in metrics)]

  def best(self, metric: Metric) -> set[str]:
    """Names of the best rows, ties as shown included; none if fewer than two can be compared."""
    means = {
      row.name: statistics.fmean(values)
      for row in self.rows
      if row.kind != "control" and (values := row.values.get(metric.name, ())) and all(map(math.isfinite, values))
    }
    if not metric.better or len(means) < 2:
      return set()
    best = max(means.values()) if metric.better == "higher" else min(means.values())
    return {name for name, mean in means.items() if metric.show(mean) == metric.show(best)}


def build(experiment: str, methods: Mapping[str, Any], jobs: Mapping[str, Sequence[Job]], command: str) -> Report:
  """The report of what has ended.

  Args:
    experiment: its module in `experiments`.
    methods: `experiments.attack.methods.Method` by name.
    jobs: their runs. Those of the first method give the controls.
    command: that makes it.

  Returns:
    The report.
  """
  kind = "circle" if experiment == "circle" else "images"
  what, caption = _SUBJECTS[experiment]
  headline = metrics.HEADLINES[kind]
  rows = [_row(name, method, jobs[name], headline, caption) for name, method in methods.items()]
  every_job = [job for own in jobs.values() for job in own]
  failures = [
    f"Failed: {job.settings['method']}, {_which(job)}: {outcome['error']}"
    for job in every_job
    if (outcome := job.outcome()) and outcome["error"]
  ]
  rows += _controls(next(iter(jobs.values())))
  return Report(what, metrics.table(kind), rows, headline, command, len(every_job), failures)


def _row(name: str, method: Any, jobs: Sequence[Job], headline: Sequence[str], caption: str) -> Row:
  values: dict[str, list[float]] = {}
  curves, failed = [], 0
  for job in jobs:
    outcome, results = job.outcome(), job.metrics()
    if outcome is None:
      continue
    failed += bool(outcome["error"])
    # A run that failed has no numbers, which the tables must show.
    own = metrics.of_results(results)["generated"] if results else dict.fromkeys(headline, math.nan)
    if outcome["seconds"] is not None:
      own |= {"minutes": outcome["seconds"] / 60, "gigabytes": outcome["peak_memory"] / 1e9}
    for key, value in own.items():
      values.setdefault(key, []).append(value)
    if lines := [line for line in read_log(job.workdir) if "total" in line]:
      curves.append((_which(job), [line["step"] for line in lines], [line["total"] for line in lines]))
  drawn = (jobs[0].outcome() or {"pictures": []})["pictures"]
  pictures = [(f"{_which(jobs[0]).capitalize()}: {caption}.", jobs[0].workdir / picture) for picture in drawn[:1]]
  title = f"{method.title} ({failed} of {len(jobs)} runs failed)" if failed else method.title
  return Row(name, title, method.explanation, method.kind, values, pictures, curves)


def _controls(jobs: Sequence[Job]) -> list[Row]:
  """Rows of what everything is compared with, one number for each classifier."""
  sets = [metrics.of_results(results) for job in jobs if (results := job.metrics())]
  rows = []
  for name, (title, explanation) in _CONTROLS.items():
    own = [one[name] for one in sets if name in one]
    values = {key: [one[key] for one in own] for key in (own[0] if own else ())}
    rows += [Row(f"control_{name}", title, explanation, "control", values)] if own else []
  return rows


def _which(job: Job) -> str:
  return f"classifier {job.settings['seed']}, run {job.settings['generator_seed']}"


def markdown(report: Report, *, legend: bool = True) -> str:
  """The headline metrics as a GitHub table.

  Args:
    report: what to show.
    legend: whether to explain it.

  Returns:
    Means ± sample standard deviations over runs, the best method or baseline of each metric in bold.

  >>> accuracy = Metric("accuracy", "Accuracy", "higher", 2, "Recognisable", "Share read as wanted.")
  >>> rows = [Row("a", "A", "", "method", {"accuracy": [0.8, 0.9]}), Row("b", "B", "", "baseline", {"accuracy": [0.5]})]
  >>> print(markdown(Report("tests", [accuracy], rows, ["accuracy"], "", 2), legend=False))
  | | Runs | Accuracy ↑ |
  |---|---:|---:|
  | A | 2 | **0.85 ± 0.07** |
  | B (baseline) | 1 | 0.50 |
  """
  shown = report.summary
  titles = [f"{_plain(metric.title)} {metric.direction[:1]}".rstrip() for metric in shown]
  lines = ["| | " + " | ".join(["Runs", *titles]) + " |", "|---|---:|" + "---:|" * len(shown)]
  best = [report.best(metric) for metric in shown]
  for row in report.ordered:
    cells = [_plain(row.title) + ("" if row.kind == "method" else f" ({row.kind})"), str(row.runs)]
    for metric, names in zip(shown, best, strict=True):
      text = " ".join(row.cell(metric)).strip()
      cells.append(f"**{text}**" if row.name in names else text)
    lines.append("| " + " | ".join(cells) + " |")
  if legend:
    lines += ["", HOW_TO_READ, ""]
    for metric in shown:
      direction = f" ({metric.direction[2:]})" if metric.better else ""
      lines.append(f"- **{_plain(metric.title)}**{direction}: {_plain(metric.explanation)}")
  return "\n".join(lines)


def _plain(text: str) -> str:
  """A text as Markdown that shows it as it is, on one line.

  >>> print(_plain("a|b *c* <i>"))
  a\\|b \\*c\\* &lt;i>
  """
  escaped = "".join(f"\\{c}" if c in "\\`*[]|" else c for c in " ".join(text.split()))
  return escaped.replace("&", "&amp;").replace("<", "&lt;")


def html(report: Report) -> str:
  """The whole report as one page that needs no other file. Raises OSError or ValueError if a picture is no PNG."""
  groups = {key: list(own) for key, own in itertools.groupby(report.metrics, key=lambda metric: metric.group)}
  template = pathlib.Path(__file__).with_name("page.html.j2")
  title = f"What the weights of a classifier reveal of its training data: {report.what}"
  return pages.render(template, title=title, report=report, groups=groups, kinds=KINDS, how_to_read=HOW_TO_READ)


def insert(document: pathlib.Path, name: str, text: str) -> None:
  """Puts a text into a Markdown document in place of that of the same name, or at its end.

  Args:
    document: the file; made if there is none.
    name: of the place, which comments in the document mark.
    text: without these comments.
  """
  begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
  old = document.read_text() if document.exists() else ""
  before, found, rest = old.partition(begin)
  after = rest.partition(end)[2] if found else ""
  before = before if found or not before else before.rstrip("\n") + "\n\n"
  document.parent.mkdir(parents=True, exist_ok=True)
  document.write_text(f"{before}{begin}{text.strip()}\n{end}{after}")
