"""What each equation makes of one wrong digit: how well stationarity, batch-norm statistics and margins tell the truth.

Trains a classifier of digits, and exchanges some of them for the most similar ones of their class that it never saw, in
the subspace that the first layer gives away. What a quantity says of one digit is how much it changes, beside what it
has at the true digits, where it ought to be 0: its floor.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from experiments import images, mnist
from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir

_EXCHANGED = (0, 1, 3, 10, 30, 100)


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  seed: int = flags.flag(0, "Seed of the digits and of the classifier.", lower=0)
  samples_per_class: int = flags.flag(10, "Training images of each class.", lower=2)
  batch_norm: bool = flags.flag(True, "The paper's classifier, with batch norm; without, it has weight decay.")


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Exchanges; returns what was measured."""
  settings = images.resolve(mnist.Config(**dataclasses.asdict(flags.resolve(config))), mnist.DEFAULTS)
  import jax
  import jax.numpy as jnp
  import numpy as np

  from experiments.attack import classifiers
  import kkt_jax
  from kkt_jax.analysis import Subspace
  from kkt_jax.kkt import diagnostics

  data = mnist.digits(settings)
  out = Workdir(workdir, config)
  (classifier,) = classifiers.of_images(settings, data.train.x, data.train.y, out.path / "classifier", seed=config.seed)
  examination = kkt_jax.examine(classifier, seed=config.seed)
  y, subspace = data.train.y, examination.subspace or Subspace.whole(examination.origin)

  def similar(place: int) -> Any:
    """The most similar unseen image of the class, in the subspace."""
    others = data.held_out.x[data.held_out.y == y[place]]
    nearest = others[np.argmin(np.sum(np.square(others - data.train.x[place]), axis=(1, 2, 3)))]
    return subspace.points(subspace.coordinates(nearest[None]))[0]

  def statistics(statistics_fn: Any, x: Any) -> float:
    stored, computed = (jax.tree.leaves(tree) for tree in (classifier.statistics, statistics_fn(classifier.params, x)))
    missing = sum(float(jnp.sum(jnp.square(a - b))) for a, b in zip(stored, computed, strict=True))
    return missing / sum(float(jnp.sum(jnp.square(a))) for a in stored)

  order = np.random.default_rng(config.seed).permutation(len(y))
  rows = {}
  for count in sorted({min(count, len(y)) for count in _EXCHANGED}):
    x = data.train.x.astype(np.float32)
    for place in order[:count]:
      x[place] = similar(place)
    diagnosis = diagnostics.diagnose(classifier, examination.conditions, x, y)
    rows[f"{count} exchanged"] = {"stationarity": diagnosis.residual, "margin spread": diagnosis.margin_spread}
    if classifier.statistics_fn is not None:
      rows[f"{count} exchanged"]["statistics"] = statistics(classifier.statistics_fn, jnp.asarray(x))
  lines = [" " * 14 + "".join(f"{name:>16}" for name in next(iter(rows.values())))]
  lines += [f"{title:<14}" + "".join(f"{value:16.3g}" for value in row.values()) for title, row in rows.items()]
  results = {"rows": rows, "summary": "\n".join(lines)}
  out.finish(results)
  return results


if __name__ == "__main__":
  flags.main(Config, run)
