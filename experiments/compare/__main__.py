"""Methods against one another on the same classifiers: every metric beside its controls, over several seeds.

Runs every method on several classifiers, several times on each, and writes report.md. Several runs go
side by side, each on one thread; what is interrupted goes on with the same command, and what is done stays. For the
100 digits of the README: --set=samples_per_class=10,codes=25.
"""

from collections.abc import Mapping
import dataclasses
import itertools
import pathlib
import shlex
import statistics
from typing import Any

from experiments.compare import pool, report
from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir

_FIRST = "means"  # trains nothing, so that its run is the quickest that trains what the others share


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  experiment: str = flags.flag(
    "mnist", "What is compared on.", choices=("mnist", "faces", "circle"), group="What is compared"
  )
  methods: str = flags.flag(
    "baselines",
    "Methods by name, separated by commas; see experiments/attack/methods.py. baselines: ours and those of others."
    " ablations: ours with one piece less, or with one of the paper's choices put back. all: both.",
  )
  set: str = flags.flag("", "Settings of every run, as name=value, separated by commas.")
  num_seeds: int = flags.flag(3, "Number of seeds; each gives other training data and another classifier.", lower=1)
  first_seed: int = flags.flag(0, "The first of them.", lower=0)
  runs_per_seed: int = flags.flag(3, "Runs of every method on each classifier.", lower=1)
  processes: int = flags.flag(0, "Runs at a time; 0 is one for each core.", lower=0, group="How")
  results: str = flags.flag("", "Markdown document in which to put the table in place of an earlier one of its kind.")


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the comparison; returns the means of the headline metrics."""
  settings = pool.fixed_settings(f"experiments.{config.experiment}", config.set)
  chosen = choose_methods(config)
  if config.results:
    flags.check_folder(pathlib.Path(config.results).absolute().parent, flag="results")
  same = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("processes", "results")}
  out = Workdir(workdir, same)
  jobs = {name: _jobs(config, settings, name, workdir) for name in chosen}
  # One run on each classifier first: it trains what the others share.
  first = [job for job in next(iter(jobs.values())) if job.settings["generator_seed"] == 0]
  pool.run_all(first, processes=config.processes, what="classifiers")
  # The methods in turn, so that an interrupted comparison has something of each.
  in_turn = itertools.zip_longest(*jobs.values())
  pool.run_all([job for turn in in_turn for job in turn if job], processes=config.processes, what="runs")
  given = [f"--{name}={value}" for name, value in same.items() if value != getattr(Config(), name)]
  command = lambda folder: shlex.join(["python", "-m", "experiments.compare", *given, f"--workdir={folder}"])
  kind = "circle" if config.experiment == "circle" else "images"
  rows, columns = report.rows_of(kind, chosen, jobs), report.headline(kind)
  (out.path / "report.md").write_text(report.document(rows, kind, chosen, jobs, command(workdir)) + "\n")
  if config.results:
    group = config.methods if config.methods in ("ablations", "all") else ""
    title = " ".join(filter(None, (config.experiment, group, config.set)))
    report.insert(pathlib.Path(config.results), title, f"{report.markdown(rows, columns)}\n\n`{command('DIR')}`")
  means = {
    row.name: {own.name: statistics.fmean(row.values[own.name]) for own in columns if row.values.get(own.name)}
    for row in rows
  }
  out.finish(means)
  return means | {"summary": report.markdown(rows, columns, legend=False), "pictures": ["report.md"]}


def choose_methods(config: Config) -> dict[str, Any]:
  """The methods that are compared, by name, first that which trains nothing.

  Raises:
    UsageError: a name that is none.
  """
  from experiments.attack import methods

  known = methods.CIRCLE if config.experiment == "circle" else methods.IMAGES
  ablations = [name for name, method in known.items() if method.kind == "ablation"]
  groups = {
    "baselines": [name for name in known if name not in ablations],
    "ablations": ["kkt", *ablations],
    "all": list(known),
  }
  names = groups.get(config.methods) or [name.strip() for name in config.methods.split(",")]
  for name in names:
    if name not in known:
      choices = ", ".join([*groups, *known])
      raise flags.UsageError(
        f"--methods must be of {choices}; got {name!r}{flags.did_you_mean(name, [*groups, *known])}"
      )
  return {name: known[name] for name in dict.fromkeys((_FIRST, *names))}


def _jobs(config: Config, settings: Mapping[str, Any], method: str, workdir: pathlib.Path) -> list[pool.Job]:
  """All runs of a method; that which trains nothing has no randomness of its own, and runs once on each classifier."""
  return [
    pool.Job(
      f"experiments.{config.experiment}",
      {
        **({} if config.experiment == "circle" else {"thorough": True}),
        **settings,
        "method": method,
        "seed": seed,
        "generator_seed": again,
        "shared_dir": str(workdir / "shared" / f"seed_{seed}"),
      },
      workdir / "runs" / method / f"seed_{seed}_{again}",
    )
    for seed in range(config.first_seed, config.first_seed + config.num_seeds)
    for again in range(1 if method == _FIRST else config.runs_per_seed)
  ]


if __name__ == "__main__":
  flags.main(Config, run)
