"""Fig. 2: the U-shaped duality loss of one margin, flat between e^-alpha and e^-alpha + delta."""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp

from experiments import common, figures
from kkt_jax import losses


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  alpha: float = common.flag(0.0, "The flat bottom begins at e^-alpha.")
  delta: float = common.flag(0.5, "Width of the flat bottom, in logits.", lower=0)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Plots the loss; returns it at both ends of the flat bottom and one to either side of it."""
  out = common.Workdir(workdir, config)
  low = jnp.exp(-config.alpha)
  margin = jnp.linspace(low - 2, low + config.delta + 2, 401)
  loss = losses.u_shape(margin, config.alpha, delta=config.delta)
  figures.u_shape(out.path / "fig2.png", margin, loss, alpha=config.alpha, delta=config.delta)
  at = {"below": low - 1, "left_end": low, "right_end": low + config.delta, "above": low + config.delta + 1}
  metrics = {name: float(losses.u_shape(value, config.alpha, delta=config.delta)) for name, value in at.items()}
  out.log(0, metrics)
  out.finish(metrics)
  return metrics


if __name__ == "__main__":
  common.main(Config, run)
