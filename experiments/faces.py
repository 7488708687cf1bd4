"""Fig. 7: faces from nothing but the weights of a classifier of them.

By default the classifier tells faces from other pictures, with the images that scikit-image ships; with
``--data=celeba`` it tells one attribute of CelebA's faces. See `experiments.images` for what happens; ``fig7.png``
shows generated images in odd rows.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from experiments import images
from kkt_jax.cli import flags

_DEFAULTS = {"codes": 250, "pretrain_steps": 8000, "judge_epochs": 30}
_LFW = {"weight_decay": 0.03, "deviation": 1.0, "attribute": ""}
_CELEBA = {"weight_decay": 0.005, "deviation": 0.3, "attribute": "Male"}


@dataclasses.dataclass(frozen=True)
class Config(images.Config):
  """Settings of the run; each is a flag of the same name."""

  data: str = flags.flag(
    "lfw",
    "Source of the faces. lfw: 100 faces and 100 other pictures, 25 x 25 grey, shipped by scikit-image. celeba: a"
    " folder in CelebA's layout. tfds: downloads CelebA.",
    choices=("lfw", "celeba", "tfds"),
    group="Data",
  )
  celeba_dir: str = flags.flag("", "celeba: folder with img_align_celeba/*.jpg and list_attr_celeba.txt.")
  attribute: str = flags.flag(None, "celeba, tfds: the attribute that is classified, by CelebA's name.", type=str)
  size: int = flags.flag(32, "celeba, tfds: height and width to which the faces are scaled.", lower=8)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the experiment; returns the final metrics."""
  lfw = config.data == "lfw"
  config = images.resolve(config, _DEFAULTS | (_LFW if lfw else _CELEBA))
  if config.classifiers != 1:
    raise flags.UsageError(f"--classifiers must be 1: there are two classes only; got {config.classifiers}.")
  if lfw and config.attribute:
    raise flags.UsageError(f"--attribute must be empty with --data=lfw, which has none; got {config.attribute!r}.")
  from experiments.data import load_faces, split  # slow

  faces = load_faces(config.data, attribute=config.attribute, celeba_dir=config.celeba_dir, size=config.size)
  few = {"held_out_per_class": 20, "distractors_per_class": 10}
  many = {"held_out_per_class": 50, "distractors_per_class": 50}
  data = split(faces, train_per_class=config.samples_per_class, seed=config.seed, **(few if lfw else many))
  return images.run(config, workdir, data, drawings=False, num_samples=100, picture="fig7.png")


if __name__ == "__main__":
  flags.main(Config, run, jointly=True)
