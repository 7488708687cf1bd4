"""Random search for settings of the generator, ranked by a score that needs no data, and what that score is worth.

The paper searches batch size and learning rate at random. A run's score is the mean logarithm of what can be known
without data: the stationarity residual of fresh samples, the spread of their margins, and their distance from the
stored batch-norm statistics. Data are looked at only to say, by rank correlation, how far the score can be trusted.
search.md holds the table, search.png the score against the true metrics.

The search is an Optuna study, by default in a SQLite file in the workdir. To search with several machines, start the
same command on each, with a workdir of its own and one --storage for all: the URL of a database, or a file on a shared
disk. On one machine, the same command can be started several times in one workdir.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import functools
import math
import pathlib
import statistics
import time
from typing import Any, TYPE_CHECKING
import zlib

from experiments.compare import metrics, pool
from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir

if TYPE_CHECKING:
  import optuna

_TRUE = {
  "mnist": ("eval_accuracy", "ssim_cover", "coverage_features_k5", "recovered"),
  "circle": ("precision", "coverage"),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  experiment: str = flags.flag("mnist", "Whose settings are searched.", choices=tuple(_TRUE), group="What is searched")
  set: str = flags.flag("", "Settings of every run, as name=value, separated by commas.")
  runs: int = flags.flag(
    20, "Settings that are tried, by all processes together; each may end one that it began.", lower=3
  )
  seed: int = flags.flag(0, "Seed of the settings; they depend on it and on their number alone.", lower=0)
  classifier_seed: int = flags.flag(0, "Seed of the data and of the classifier.", lower=0)
  processes: int = flags.flag(0, "Runs at a time; 0 is one for each core.", lower=0, group="How")
  storage: str = flags.flag(
    "", "URL of a database, or a file on a shared disk, of a study that several machines share."
  )


def suggest(trial: "optuna.Trial", experiment: str) -> dict[str, Any]:
  """The settings of a trial, drawn log-uniformly if they are sizes."""
  images = experiment == "mnist"

  def between(name: str, low: float, high: float) -> float:
    return float(f"{trial.suggest_float(name, low, high, log=True):.3g}")

  weights = {"duality": between("duality", *((3, 50) if images else (0.5, 20)))}
  if images:
    weights["total_variation"] = between("total_variation", 0.5, 8)
  return {
    "codes": trial.suggest_categorical("codes", (10, 25, 50) if images else (20, 40, 60)),
    "method": trial.suggest_categorical("method", ("kkt", "relu")),  # the form of the multipliers
    "learning_rate": between("learning_rate", *((0.01, 0.2) if images else (1e-3, 1e-2))),
    "weights": ",".join(f"{name}={weight}" for name, weight in weights.items()),
  }


def score(results: Mapping[str, Any]) -> float:
  """The mean logarithm (base 10) of what is small if a run is good and can be known without data.

  >>> score({"generated": {"residual": 0.1, "margin_spread": [0.01]}, "final_losses": {"statistics": 0.001}})
  -2.0
  """
  own = metrics.of_results(results)["generated"]
  known = [own["residual"], own["margin_spread"], results["final_losses"].get("statistics")]
  return statistics.fmean(math.log10(max(value, 1e-12)) for value in known if value is not None)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the search; returns the best settings and what the score is worth."""
  flags.check(config)
  module = f"experiments.{config.experiment}"
  fixed = pool.fixed_settings(module, config.set) | {
    "seed": config.classifier_seed,
    "shared_dir": str(workdir / "shared"),
  }
  import optuna

  from experiments.measure import pictures

  same = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("processes", "storage")}
  out = Workdir(workdir, same, alone=False)  # others may work on the same study
  # One run without training first: it trains the classifier that all attack.
  first = pool.Job(module, fixed | {"method": "means"}, workdir / "runs" / "classifier")
  with (workdir / ".lock").open("w") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    pool.run_all([first], processes=1, what="classifier")
    study = open_study(config, workdir)
  running: dict[pathlib.Path, optuna.Trial] = {}

  def jobs() -> Iterator[pool.Job]:
    while len(_ended(study)) + len(running) < config.runs:
      trial = study.ask()
      job = pool.Job(module, fixed | suggest(trial, config.experiment), workdir / "runs" / f"{trial.number:03d}")
      trial.set_user_attr("settings", {name: value for name, value in job.settings.items() if name not in fixed})
      running[job.workdir] = trial
      yield job

  def on_end(job: pool.Job) -> None:
    trial, results = running.pop(job.workdir), job.metrics()
    if results is None:
      study.tell(trial, state=optuna.trial.TrialState.PRUNED)
      return
    true = metrics.of_results(results)["generated"]
    trial.set_user_attr("true", {name: true[name] for name in _TRUE[config.experiment]})
    study.tell(trial, score(results))

  try:
    left = config.runs - len(_ended(study))
    pool.run_all(jobs(), total=left, processes=config.processes, what="settings", on_end=on_end)
  finally:
    for trial in running.values():  # interrupted: another one takes its place
      study.tell(trial, state=optuna.trial.TrialState.FAIL)
  good = [trial for trial in _ended(study) if trial.value is not None]
  if len(good) < 3:
    raise flags.UsageError(f"--runs must leave at least 3 that do not diverge; got {len(good)}.")
  rows = [{"score": t.value, **{key: t.user_attrs[key] for key in ("settings", "true")}} for t in good]
  rows.sort(key=lambda row: row["score"])
  trust = rank_correlations(rows)
  panels = [(name, [row["score"] for row in rows], [row["true"][name] for row in rows]) for name in trust]
  pictures.scatter(out.path / "search.png", panels, "score without data (less is better)")
  text = table(rows, trust)
  (out.path / "search.md").write_text(text + "\n")
  results = {"diverged": len(_ended(study)) - len(good), "rank_correlations": trust, "runs": rows}
  out.finish(results)
  return results | {"summary": text, "pictures": ["search.png", "search.md"]}


def open_study(config: Config, workdir: pathlib.Path) -> "optuna.Study":
  """The study of a search, new or begun by whoever shares its storage."""
  import optuna
  from optuna.storages import JournalStorage
  from optuna.storages.journal import JournalFileBackend
  from sqlalchemy.exc import DBAPIError

  class ByNumber(optuna.samplers.RandomSampler):
    """Random search whose settings depend on the seed and on the number of the trial, whoever runs it."""

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
      seed = zlib.crc32(f"{config.seed} {trial.number} {param_name}".encode())
      own = optuna.samplers.RandomSampler(seed)
      return own.sample_independent(study, trial, param_name, param_distribution)

  optuna.logging.set_verbosity(optuna.logging.WARNING)
  storage: Any = config.storage or f"sqlite:///{workdir / 'study.db'}"
  if "://" not in storage:
    storage = JournalStorage(JournalFileBackend(storage))
  name = f"{config.experiment} {config.set} {config.classifier_seed} {config.seed}"
  create = functools.partial(
    optuna.create_study, storage=storage, study_name=name, sampler=ByNumber(), load_if_exists=True
  )
  for pause in (0.5, 1.0, 2.0, 4.0):
    with contextlib.suppress(DBAPIError, optuna.exceptions.StorageInternalError):
      return create()
    time.sleep(pause)  # another process is making the tables of a new database
  return create()


def _ended(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
  """The runs that have ended, well or not; not those that were interrupted."""
  from optuna.trial import TrialState

  return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def rank_correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """Spearman's rank correlation of the score with each true metric.

  Args:
    rows: ``score`` and ``true``, metrics by name, of at least three runs.

  Returns:
    -1 if the score ranks as the truth, 0 if it knows nothing; None if all runs are equal.

  >>> rank_correlations([{"score": s, "true": {"cover": c}} for s, c in ((1, 0.9), (2, 0.5), (3, 0.1))])
  {'cover': -1.0}
  """
  import scipy.stats  # type: ignore[import-untyped]

  trust: dict[str, float | None] = {}
  for name in rows[0]["true"]:
    pairs = [(row["score"], row["true"][name]) for row in rows]
    constant = any(len(set(values)) == 1 for values in zip(*pairs, strict=True))
    trust[name] = None if constant else round(float(scipy.stats.spearmanr(pairs).statistic), 4)
  return trust


def table(rows: Sequence[Mapping[str, Any]], trust: Mapping[str, float | None]) -> str:
  """The runs from the best score to the worst, as Markdown."""
  settings, true = (list(rows[0][key]) for key in ("settings", "true"))
  lines = ["| " + " | ".join(["score", *settings, *true]) + " |", "|" + "---|" * (1 + len(settings) + len(true))]
  for row in rows:
    cells = [f"{row['score']:.2f}", *(str(row["settings"][name]) for name in settings)]
    lines.append("| " + " | ".join([*cells, *(f"{row['true'][name]:.3g}" for name in true)]) + " |")
  known = "; ".join(f"{name} {'-' if value is None else f'{value:.2f}'}" for name, value in trust.items())
  return "\n".join([*lines, "", f"Rank correlation of the score with the truth (-1 is perfect, 0 nothing): {known}."])


if __name__ == "__main__":
  flags.main(Config, run)
