"""Fig. 7: faces from nothing but the weights of a classifier of them.

By default the classifier tells faces from other pictures, with the images that scikit-image ships; with
``--data=celeba`` it tells one attribute of CelebA's faces. See `experiments.images` for what happens; ``fig7.png``
shows generated images in odd rows.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from experiments import common, image_config, images
from experiments.data import FACE_SOURCES, load_faces, split


def by_data(lfw: Any, celeba: Any, help_text: str, **limits: Any) -> Any:
  """A flag with one default for the grey images of scikit-image and another for CelebA's."""
  return common.flag_by("data", {"lfw": lfw, "celeba": celeba, "tfds": celeba}, help_text, **limits)


@dataclasses.dataclass(frozen=True)
class Config(image_config.Config):
  """Settings of the run; each is a flag of the same name."""

  data: str = common.flag(
    "lfw",
    "Where the images come from. lfw: 100 faces and 100 other pictures, 25 x 25 grey, shipped by scikit-image. celeba:"
    " a folder in CelebA's layout. tfds: downloads CelebA.",
    choices=FACE_SOURCES,
  )
  celeba_dir: str = common.flag(
    "", "celeba: folder with img_align_celeba/*.jpg and list_attr_celeba.txt, as CelebA is published."
  )
  attribute: str = common.flag("Male", "celeba, tfds: the attribute that the classifier tells, by CelebA's name.")
  size: int = common.flag(32, "celeba, tfds: height and width to which the faces are scaled.", lower=8)
  codes: int = common.method_flag(250, "span: images that the noise picks from, for each class.", lower=1)
  weight_decay: float = by_data(0.03, 0.005, "Weight decay of the classifier's training.", lower=1e-6)
  pretrain_steps: int = common.flag(8000, "Steps of full-batch gradient descent.", lower=1)
  start: float = by_data(
    1.0, 0.3, "span, free: first deviation from the mean image, over that of black and white pixels of it.", lower=0
  )
  binarisation_weight: float = common.method_flag(0.0, "Weight of the prior that pixels are black or white.", lower=0)
  judge_epochs: int = common.flag(30, "Passes over the data of the independent judge's training.", lower=1)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the experiment; returns the final metrics."""
  config = common.resolve(config)
  common.check_config(config)
  if config.classifiers != 1:
    raise common.UsageError(f"--classifiers must be 1: there are two classes only; got {config.classifiers}.")
  faces = load_faces(config.data, attribute=config.attribute, celeba_dir=config.celeba_dir, size=config.size)
  data = split(
    faces,
    train_per_class=config.samples_per_class,
    held_out_per_class=20 if config.data == "lfw" else 50,
    distractors_per_class=10 if config.data == "lfw" else 50,
    seed=config.seed,
  )
  return images.run(config, workdir, data, num_samples=100, figure="fig7.png")


if __name__ == "__main__":
  common.main(Config, run, jointly=True)
