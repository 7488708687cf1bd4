"""What `experiments.compare` shows of its runs: rows, controls, and the words around them."""

from collections.abc import Mapping, Sequence
import json
import math
import pathlib

from experiments import merits, pool, report
from experiments.methods import Preset

_PICTURES = {"mnist": "fig6.png", "faces": "fig7.png", "circle": "fig4.png"}
_CONTROLS = {
  "training_data": (
    "training data",
    "The images that the classifier was trained on: what perfect recovery would give.",
  ),
  "real_held_out": ("other real data", "As many real images of the same kind that were not trained on."),
  "class_means": ("class means", "The mean training image of each class, for every sample of it."),
  "dataset_mean": ("mean image", "The mean of all training images, for every sample."),
  "uniform_noise": ("noise", "Uniform noise."),
  "gaussian_of_the_stored_moments": ("stored moments", "Gaussian points of the mean and covariance that are stored."),
  "uniform_in_the_square": ("noise", "Uniform points in the square."),
}


def build(
  experiment: str,
  presets: Mapping[str, Preset],
  jobs: Mapping[str, Sequence[pool.Job]],
  settings: Mapping[str, str],
) -> report.Report:
  """The report of what has ended.

  Args:
    experiment: its module in `experiments`.
    presets: the methods by name.
    jobs: their runs. Those of the first method give the controls.
    settings: what is said of the settings of all runs.

  Returns:
    The report.
  """
  circle = experiment == "circle"
  rows = [_row(experiment, name, preset, jobs[name]) for name, preset in presets.items()]
  failures = [
    f"{job.settings['method']}, {_which(job)}: {outcome['error']}"
    for own in jobs.values()
    for job in own
    if (outcome := job.outcome()) and outcome["error"]
  ]
  what = {
    "circle": "18 points on a circle in three classes",
    "mnist": "handwritten digits (MNIST)",
    "faces": "small pictures of faces",
  }[experiment]
  return report.Report(
    title=f"What a classifier gives away of its training data: {what}",
    introduction=(
      f"A classifier was trained on {what}; then the data were put away. Each method below was given the classifier's"
      " weights, and nothing else, and had to generate the data again.",
      "The generated data were then compared with what the classifier had been trained on. A figure says little alone:"
      " look at the controls, above all at other real data, which resemble the training data as far as data of one kind"
      " resemble one another. What is nearer than that was given away by the weights.",
      "Everything is measured on fresh draws of each generator. The classifiers are small and trained to convergence by"
      " gradient descent over all of their data, as the theory asks; what holds for them need not hold for others.",
    ),
    figures=merits.CIRCLE if circle else merits.IMAGES,
    rows=[*rows, *_controls(experiment, next(iter(jobs.values())))],
    headline=_headline(experiment),
    settings={
      **settings,
      **{
        f"flags of {name}": ", ".join(f"{k}={v}" for k, v in preset.flags.items()) or "none"
        for name, preset in presets.items()
      },
    },
    notes=[
      "The settings of this library's method were found by looking at such figures, on other data of the same kind"
      " (digits) or on the same data (faces, circle); see the lab book. Those of the baselines as their rows say.",
      *(f"Failed: {failure}" for failure in failures),
    ],
  )


def _headline(experiment: str) -> Sequence[str]:
  return merits.CIRCLE_HEADLINE if experiment == "circle" else merits.IMAGES_HEADLINE


def _row(experiment: str, name: str, method: Preset, jobs: Sequence[pool.Job]) -> report.Row:
  values: dict[str, list[float]] = {}
  curves = []
  for job in jobs:
    figures, outcome = job.metrics(), job.outcome()
    if outcome is None:
      continue
    if figures is None:  # it failed, which the tables must show
      own = dict.fromkeys(_headline(experiment), math.nan)
    else:
      own = merits.of_circle(figures) if experiment == "circle" else merits.of_images(figures["fresh_noise"])
    if outcome["seconds"] is not None:
      own |= {"minutes": outcome["seconds"] / 60, "gigabytes": outcome["peak_memory"] / 1e9}
    for key, value in own.items():
      values.setdefault(key, []).append(value)
    lines = [json.loads(line) for line in _lines(job.workdir / "metrics.jsonl")]
    if lines:
      curves.append((_which(job), [line["step"] for line in lines], [line["total"] for line in lines]))
  picture = jobs[0].workdir / _PICTURES[experiment]
  caption = "generated in odd rows, the most similar training image below each"
  if experiment == "circle":
    caption = "training points, regions of the classifier, generated points"
  pictures = [(f"{_which(jobs[0]).capitalize()}: {caption}.", picture)] if picture.exists() else []
  failed = sum(bool(outcome["error"]) for job in jobs if (outcome := job.outcome()))
  title = f"{method.title} ({failed} of {len(jobs)} runs failed)" if failed else method.title
  return report.Row(name, title, method.explanation, method.kind, values, pictures, curves)


def _controls(experiment: str, jobs: Sequence[pool.Job]) -> list[report.Row]:
  """Rows of what everything is compared with, one number for each classifier."""
  rows = []
  results = [figures for job in jobs if (figures := job.metrics())]
  for name, (title, explanation) in _CONTROLS.items():
    if experiment == "circle":
      flat = [merits.of_circle(own, name) for own in results if name in own["controls"]]
    else:
      flat = [merits.of_images(own[name]) for own in results if name in own]
    if not flat:
      continue
    values = {key: [own[key] for own in flat] for key in flat[0]}
    rows.append(report.Row(f"control_{name}", title, explanation, "control", values))
  return rows


def _which(job: pool.Job) -> str:
  return f"classifier {job.settings['seed']}, run {job.settings['generator_seed']}"


def _lines(path: pathlib.Path) -> list[str]:
  return path.read_text().splitlines() if path.exists() else []
