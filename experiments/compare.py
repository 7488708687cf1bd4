"""Methods against one another on the same classifiers: every figure beside its controls, over several seeds, one page.

Runs every method on several classifiers, several times on each, and writes ``report.html`` and ``report.md``. Several
runs go side by side, each on one thread; what is interrupted goes on with the same command, and what is done stays.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import os
import pathlib
from typing import Any

import numpy as np

from experiments import common, compare_report, methods, pool, report

_METHODS = {"mnist": methods.IMAGES, "faces": methods.IMAGES, "circle": methods.CIRCLE}
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
  small: bool = common.flag(True, "mnist: 100 training digits instead of 500, and 25 codes a class; faces: 50 codes.")
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
  pool.run_all(jobs[_FIRST], processes=processes, what="classifiers", cache=cache)
  # The methods in turn, so that an interrupted comparison has something of each.
  in_turn = itertools.zip_longest(*(jobs[method] for method in chosen if method != _FIRST))
  pool.run_all([job for own in in_turn for job in own], processes=processes, what="runs", cache=cache)
  settings = {
    "command": command(config, workdir),
    "classifiers": str(config.seeds),
    "runs on each": str(config.generator_seeds),
    "flags of every run": ", ".join(f"{k}={v}" for k, v in _flags(config).items()) or "none",
  }
  chosen_presets = {method: _METHODS[config.experiment][method] for method in chosen}
  made = compare_report.build(config.experiment, chosen_presets, jobs, settings)
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
  """All runs of a method; that without randomness of its own, and without other settings, runs once a classifier."""
  settings, again_and_again = _flags(config), range(config.generator_seeds)
  if method == _FIRST:
    settings, again_and_again = without_training(config.experiment, settings), range(1)
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
    for again in again_and_again
  ]


def without_training(experiment: str, settings: Mapping[str, Any]) -> dict[str, Any]:
  """Settings of the run that trains what others share: those given, less what a method without training decides.

  >>> without_training("mnist", {"samples_per_class": 10, "steps": 500})
  {'samples_per_class': 10, 'method': 'means'}
  """
  own = _METHODS[experiment][_FIRST].flags
  return {name: value for name, value in settings.items() if name not in own} | {"method": _FIRST}


def _flags(config: Config) -> dict[str, Any]:
  """The flags that all runs have in common."""
  small: dict[str, dict[str, Any]] = {"mnist": {"samples_per_class": 10, "codes": 25}, "faces": {"codes": 50}}
  return (small.get(config.experiment, {}) if config.small else {}) | parsed_flags(config.flags, config.experiment)


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


def command(config: Config, workdir: pathlib.Path) -> str:
  """The command that makes this comparison."""
  given = [
    f"--{field.name}={value}"
    for field in dataclasses.fields(config)
    if (value := getattr(config, field.name)) != field.default and field.name != "processes"
  ]
  return " ".join(["python -m experiments.compare", *given, f"--workdir={workdir}"])


if __name__ == "__main__":
  common.main(Config, run)
