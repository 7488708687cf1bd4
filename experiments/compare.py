"""Methods against one another on the same classifiers: every figure beside its controls, over several seeds, one page.

Runs every method on several classifiers, several times on each, and writes ``report.html`` and ``report.md``. Several
runs go side by side, each on one thread; what is interrupted goes on with the same command, and what is done stays.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from experiments import common, merits, methods, pool, report

_METHODS = {"mnist": methods.IMAGES, "faces": methods.IMAGES, "circle": methods.CIRCLE}
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
_FIRST = "means"  # needs no training, so that it is the run that trains what the others share


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  experiment: str = common.flag("mnist", "What is compared on.", choices=tuple(_METHODS))
  methods: str = common.flag(
    "baselines",
    "Methods by name, separated by commas; see experiments/methods.py. baselines: ours and the neighbours'. ablations:"
    " ours with one piece less, or with one of the paper's choices put back. all: both.",
  )
  seeds: int = common.flag(3, "Number of classifiers, each trained on data of its own.", lower=1)
  generator_seeds: int = common.flag(3, "Runs of every method on each of them.", lower=1)
  first_seed: int = common.flag(0, "The first classifier's seed.", lower=0)
  small: bool = common.flag(True, "mnist: 100 training digits instead of 500, and 25 codes a class.")
  flags: str = common.flag("", "Further flags of every run: name=value, separated by commas.")
  processes: int = common.flag(0, "Runs at a time; 0 is one for each core.", lower=0)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the comparison; returns the means of the headline figures."""
  common.check_config(config)
  chosen = chosen_methods(config)
  common.Workdir(workdir, {**dataclasses.asdict(config), "processes": 0})  # their number may change
  jobs = {method: _jobs(config, method, workdir) for method in chosen}
  processes = config.processes or os.cpu_count() or 1
  cache = workdir / "compiled"
  # One run on each classifier first: it trains what the others share.
  first = [job for job in jobs[_FIRST] if job.settings["generator_seed"] == 0]
  pool.run_all(first, processes=processes, what="classifiers", cache=cache)
  # The methods in turn, so that an interrupted comparison has something of each.
  rest = [job for own in zip(*(jobs[method] for method in chosen), strict=True) for job in own if job not in first]
  pool.run_all(rest, processes=processes, what="runs", cache=cache)
  made = build_report(config, jobs, workdir)
  report.write(made, workdir)
  common.say(f"the report is {workdir / 'report.html'}, its table {workdir / 'report.md'}")
  return {
    row.name: {name: float(np.mean(row.values[name])) for name in made.headline if name in row.values}
    for row in made.rows
  }


def chosen_methods(config: Config) -> list[str]:
  """The methods that are compared, by name; always with the one that trains what the others share.

  Raises:
    UsageError: a name that is none.

  >>> chosen_methods(Config(methods="kkt,ce"))
  ['means', 'kkt', 'ce']
  """
  known = _METHODS[config.experiment]
  ablations = [name for name, method in known.items() if method.kind == "ablation"]
  groups = {
    "baselines": [name for name in known if name not in ablations],
    "ablations": ["kkt", *ablations],
    "all": list(known),
  }
  names = groups.get(config.methods) or [name.strip() for name in config.methods.split(",")]
  unknown = [name for name in names if name not in known]
  if unknown:
    raise common.UsageError(
      f"--methods must be baselines, ablations, all, or some of {', '.join(known)}; got {', '.join(unknown)}."
    )
  return [_FIRST, *(name for name in dict.fromkeys(names) if name != _FIRST)]


def _jobs(config: Config, method: str, workdir: pathlib.Path) -> list[pool.Job]:
  """All runs of a method; one without randomness of its own runs once on each classifier."""
  settings = parsed_flags(config.flags, config.experiment)
  if config.experiment == "mnist" and config.small:
    settings = {"samples_per_class": 10, "codes": 25} | settings
  if method == _FIRST:  # which is nothing without its own settings
    settings = {
      name: value for name, value in settings.items() if name not in _METHODS[config.experiment][method].flags
    }
  return [
    pool.Job(
      config.experiment,
      settings
      | {
        "seed": seed,
        "generator_seed": again,
        "method": method,
        "shared_dir": str(workdir / "shared" / f"seed_{seed}"),
      },
      workdir / "runs" / method / f"seed_{seed}_{again}",
    )
    for seed in range(config.first_seed, config.first_seed + config.seeds)
    for again in range(config.generator_seeds)
  ]


def parsed_flags(text: str, experiment: str) -> dict[str, Any]:
  """Flags of an experiment from ``name=value,name=value``, each of its field's type.

  Raises:
    UsageError: there is no such flag, or its value cannot be read.

  >>> parsed_flags("steps=20,learning_rate=.1,batch_norm=false", "mnist")
  {'steps': 20, 'learning_rate': 0.1, 'batch_norm': False}
  """
  types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(pool.config_class(experiment))}
  settings: dict[str, Any] = {}
  for part in filter(None, text.split(",")):
    name, _, value = part.partition("=")
    if name not in types:
      raise common.UsageError(f"--flags must name flags of {experiment}; got {part!r}.")
    try:
      settings[name] = {"true": True, "false": False}[value.lower()] if types[name] is bool else types[name](value)
    except (ValueError, KeyError) as error:
      raise common.UsageError(f"--flags: {name} must be of type {types[name].__name__}; got {value!r}.") from error
  return settings


def build_report(config: Config, jobs: Mapping[str, Sequence[pool.Job]], workdir: pathlib.Path) -> report.Report:
  """The report of what has ended."""
  circle = config.experiment == "circle"
  rows = [_row(config, name, own) for name, own in jobs.items()] + _controls(config, jobs[_FIRST])
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
  }[config.experiment]
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
    rows=rows,
    headline=merits.CIRCLE_HEADLINE if circle else merits.IMAGES_HEADLINE,
    settings={
      "command": command(config, workdir),
      "classifiers": str(config.seeds),
      "runs on each": str(config.generator_seeds),
      "flags of every run": ", ".join(f"{k}={v}" for k, v in jobs[_FIRST][0].settings.items() if k not in _OWN)
      or "none",
      **{
        f"flags of {name}": ", ".join(f"{k}={v}" for k, v in _METHODS[config.experiment][name].flags.items()) or "none"
        for name in jobs
      },
    },
    notes=[
      "The settings of this library's method were found by looking at such figures, on other data of the same kind"
      " (digits) or on the same data (faces, circle); see the lab book. Those of the baselines as their rows say.",
      *(f"Failed: {failure}" for failure in failures),
    ],
  )


_OWN = ("seed", "generator_seed", "method", "shared_dir")  # settings in which the runs differ


def command(config: Config, workdir: pathlib.Path) -> str:
  """The command that makes this comparison."""
  given = [
    f"--{field.name}={value}"
    for field in dataclasses.fields(config)
    if (value := getattr(config, field.name)) != field.default and field.name != "processes"
  ]
  return " ".join(["python -m experiments.compare", *given, f"--workdir={workdir}"])


def _row(config: Config, name: str, jobs: Sequence[pool.Job]) -> report.Row:
  method = _METHODS[config.experiment][name]
  values: dict[str, list[float]] = {}
  curves = []
  for job in jobs:
    figures, outcome = job.metrics(), job.outcome()
    if figures is None or outcome is None:
      continue
    own = merits.of_circle(figures) if config.experiment == "circle" else merits.of_images(figures["fresh_noise"])
    if outcome["seconds"] is not None:
      own |= {"minutes": outcome["seconds"] / 60, "gigabytes": outcome["peak_memory"] / 1e9}
    for key, value in own.items():
      values.setdefault(key, []).append(value)
    lines = [json.loads(line) for line in _lines(job.workdir / "metrics.jsonl")]
    if lines:
      curves.append((_which(job), [line["step"] for line in lines], [line["total"] for line in lines]))
  picture = jobs[0].workdir / _PICTURES[config.experiment]
  caption = "generated in odd rows, the most similar training image below each"
  if config.experiment == "circle":
    caption = "training points, regions of the classifier, generated points"
  pictures = [(f"Classifier {config.first_seed}, run 0: {caption}.", picture)] if picture.exists() else []
  failed = sum(bool(outcome["error"]) for job in jobs if (outcome := job.outcome()))
  title = f"{method.title} ({failed} of {len(jobs)} runs failed)" if failed else method.title
  return report.Row(name, title, method.explanation, method.kind, values, pictures, curves)


def _controls(config: Config, jobs: Sequence[pool.Job]) -> list[report.Row]:
  """Rows of what everything is compared with, one number for each classifier."""
  rows = []
  results = [figures for job in jobs if job.settings["generator_seed"] == 0 and (figures := job.metrics())]
  for name, (title, explanation) in _CONTROLS.items():
    found = [own["controls"] if config.experiment == "circle" else own for own in results]
    of = merits.of_circle if config.experiment == "circle" else merits.of_images
    flat = [of(own[name]) for own in found if name in own]
    if not flat:
      continue
    values = {key: [own[key] for own in flat] for key in flat[0]}
    rows.append(report.Row(f"control_{name}", title, explanation, "control", values))
  return rows


def _which(job: pool.Job) -> str:
  return f"classifier {job.settings['seed']}, run {job.settings['generator_seed']}"


def _lines(path: pathlib.Path) -> list[str]:
  return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
  common.main(Config, run)
