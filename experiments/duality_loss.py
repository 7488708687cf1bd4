"""Fig. 2: the U-shaped duality loss of one margin, flat between e^-alpha and e^-alpha + delta."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from kkt_jax.cli import flags
from kkt_jax.cli.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  alpha: float = flags.flag(0.0, "The flat bottom begins at e^-alpha.", lower=-20, upper=20)
  delta: float = flags.flag(0.5, "Width of the flat bottom, in logits.", lower=0)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Plots the loss; returns it at both ends of the flat bottom and one to either side of it."""
  import jax.numpy as jnp

  from experiments.measure import pictures
  from kkt_jax.kkt import losses

  out = Workdir(workdir, config)
  low = jnp.exp(-config.alpha)
  margin = jnp.linspace(low - 2, low + config.delta + 2, 401)
  loss = losses.u_shape(margin, config.alpha, delta=config.delta)
  pictures.u_shape(out.path / "fig2.png", margin, loss, alpha=config.alpha, delta=config.delta)
  at = {"below": low - 1, "left_end": low, "right_end": low + config.delta, "above": low + config.delta + 1}
  metrics: dict[str, Any] = {
    name: float(losses.u_shape(value, config.alpha, delta=config.delta)) for name, value in at.items()
  }
  metrics["pictures"] = ["fig2.png"]
  out.finish(metrics)
  return metrics


if __name__ == "__main__":
  flags.main(Config, run)
