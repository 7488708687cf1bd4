"""The owner's own data, for `kkt_jax.audit` to compare with; nothing else ever sees them."""

from collections.abc import Sequence
import pathlib
from typing import Any
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image

from kkt_jax._errors import InputError
from kkt_jax.audit import membership
from kkt_jax.audit.matching import check_classes
from kkt_jax.audit.samples import Images, Named
from kkt_jax.classifiers import Classifier

_LARGEST = 2 << 30  # bytes of one array
_MOST_PIXELS = 1 << 24  # of one image file
# By channels the modes that Pillow turns into 8-bit pixels without loss; the first is what they become.
_MODES = {1: ("L", "1"), 3: ("RGB", "P", "L", "1"), 4: ("RGBA",)}
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, zlib.error, Image.DecompressionBombError)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_candidates(path: str, classifier: Classifier) -> Named:
  """Samples to ask about, labelled as the classifier takes them: ``x`` of an ``.npz`` file, or a folder's images.

  Raises:
    InputError: the file cannot be read, or holds something else.
  """
  return _read("--candidates", path, classifier, labelled=False)


def read(
  train_data: str, held_out_data: str, classifier: Classifier, *, alone: bool = False
) -> tuple[Named | None, Named | None, Sequence[str]]:
  """The owner's data, with x in [0, 1] as `Classifier.to_unit`.

  Args:
    train_data: path of the training data, or empty.
    held_out_data: path of the other data, or empty.
    classifier: the classifier.
    alone: whether held-out data can be given without training data.

  Returns:
    The training data and the held-out data without repetitions, each None if its path is empty, and what limits the
    comparison in words.

  Raises:
    InputError: a file cannot be read or holds something else, a class is missing, or the two share samples.
  """
  paths = {"--train_data": train_data, "--held_out_data": held_out_data}
  sets = {f"{flag}={path}": _read(flag, path, classifier) for flag, path in paths.items() if path}
  check_classes(sets, range(classifier.num_classes))
  train, held_out = (sets.get(f"{flag}={path}") for flag, path in paths.items())
  remarks: list[str] = []
  if held_out is not None and train is None and not alone:
    raise InputError("--held_out_data needs --train_data or --candidates, with which it is compared.")
  if held_out is not None and train is not None:
    known = {row.tobytes() for row in _rounded(train, classifier)}
    twice = [i for i, row in enumerate(_rounded(held_out, classifier)) if row.tobytes() in known]
    if twice:
      raise InputError(
        f"--held_out_data must hold none of the training samples; {len(twice)} of its {len(held_out.y)} are identical"
        f" to one of --train_data, the first at place {twice[0]} (from 0)."
      )
  sets = {}
  for flag, own in (("--train_data", train), ("--held_out_data", held_out)):
    if own is not None:
      sets[flag], said = _distinct(flag, own, classifier)
      remarks += said
  if len(sets) == 2:
    remarks += membership.limits(*sets.values())
  return sets.get("--train_data"), sets.get("--held_out_data"), remarks


def _distinct(flag: str, images: Named, classifier: Classifier) -> tuple[Named, list[str]]:
  """Samples without repetitions, and how many there were."""
  keys = [(label, row.tobytes()) for label, row in zip(images.y, _rounded(images, classifier), strict=True)]
  first = {key: place for place, key in reversed([*enumerate(keys)])}
  repeated = [(place, first[key]) for place, key in enumerate(keys) if first[key] != place]
  if not repeated:
    return images, []
  names = " repeats ".join(images.names[place] for place in repeated[0])
  remark = f"{len(repeated)} of the {len(keys)} samples of {flag} repeat an earlier one ({names}); each counts once."
  return images.only(np.array(sorted(first.values()))), [remark]


def _rounded(images: Images, classifier: Classifier) -> np.ndarray:
  """Samples in which the last bits make no difference, if their size is known."""
  return images.x if classifier.value_range is None else np.round(images.x, 4) + np.float32(0)


def _read(flag: str, path: str, classifier: Classifier, *, labelled: bool = True) -> Named:
  """Data from an ``.npz`` file with x [N, *input_shape] and y [N], or from a folder for each class."""
  where = pathlib.Path(path)
  try:
    if where.is_dir():
      x, y, names = _read_folder(where, classifier, labelled)
    elif where.is_file() and zipfile.is_zipfile(where):
      x, y = _read_npz(where, classifier.input_shape, labelled)
      names = tuple(f"sample {place}" for place in range(len(x)))
    else:
      raise InputError(f"it is neither an .npz file nor a folder{'' if where.exists() else '; there is no such file'}.")
    unit = _unit(x, classifier)
    taken = np.argmax(classifier.predict(classifier.from_unit(unit)), axis=1) if y is None else y
    return Named(unit, _classes(taken, classifier.num_classes), names)
  except InputError as error:
    raise InputError(f"{flag}={path}: {error}") from error
  except (*_UNREADABLE, zipfile.BadZipFile) as error:
    raise InputError(f"{flag}={path} cannot be read ({type(error).__name__}: {error}).") from error


def _unit(x: np.ndarray, classifier: Classifier) -> np.ndarray:
  """Samples in [0, 1], from bytes or from numbers in the classifier's range; as they are if it has none."""
  if classifier.value_range is None:
    if x.dtype == np.uint8 or not np.all(np.isfinite(x)):
      raise InputError("x must be floating point and finite, for the classifier has no value_range.")
    return x.astype(np.float32)
  if x.dtype == np.uint8:
    return x.astype(np.float32) / 255
  low, high = classifier.value_range
  unit = np.asarray(classifier.to_unit(x.astype(np.float32)))
  if not (unit.min() >= -1e-3 and unit.max() <= 1 + 1e-3):  # NaN is neither
    raise InputError(f"x must lie in the classifier's range, {low} to {high}; got {x.min()} to {x.max()}.")
  return np.clip(unit, 0, 1)


def _classes(y: np.ndarray, num_classes: int) -> np.ndarray:
  if not len(y) or y.min() < 0 or y.max() >= num_classes:
    found = f"{y.min()} to {y.max()}" if len(y) else "none"
    raise InputError(f"labels must lie in 0 to {num_classes - 1}; got {found}.")
  return y.astype(np.int32)


def _read_npz(path: pathlib.Path, input_shape: tuple[int, ...], labelled: bool) -> tuple[np.ndarray, np.ndarray | None]:
  names = ("x", "y") if labelled else ("x",)
  with zipfile.ZipFile(path) as archive:
    missing = [name for name in names if f"{name}.npy" not in archive.namelist()]
    if missing:
      raise InputError(
        f"it must hold {'arrays x and y' if labelled else 'an array x'}; {' and '.join(missing)} missing."
      )
    headers = [_header(archive, f"{name}.npy") for name in names]
    x_shape, x_type = headers[0]
    if x_shape[1:] != input_shape or any(shape != x_shape[:1] for shape, _ in headers[1:]):
      wanted = ", ".join(map(str, input_shape))
      got = " and ".join(str(shape) for shape, _ in headers)
      raise InputError(f"x must have shape [N, {wanted}]{' and y [N]' if labelled else ''}; got {got}.")
    integers = all(np.issubdtype(y_type, np.integer) for _, y_type in headers[1:])
    if not integers or not (x_type == np.uint8 or np.issubdtype(x_type, np.floating)):
      got = " and ".join(str(own) for _, own in headers)
      raise InputError(f"x must be uint8 or floating point{', and y integers' if labelled else ''}; got {got}.")
    arrays = []
    for name in names:
      with archive.open(f"{name}.npy") as member:
        arrays.append(np.lib.format.read_array(member, allow_pickle=False))
  return arrays[0], arrays[1] if labelled else None


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], Any]:
  """Shape and dtype of an array that has not been read, after a look at whether its numbers can be there."""
  with archive.open(name) as member:
    version = np.lib.format.read_magic(member)
    if version not in _HEADERS:
      raise InputError(f"{name} is of the unknown format {version}.")
    shape, _, dtype = _HEADERS[version](member)
    size, held = int(np.prod(shape, dtype=object)) * dtype.itemsize, archive.getinfo(name).file_size - member.tell()
  if dtype.hasobject or size != held:
    raise InputError(f"{name} is damaged: its header says {shape} of {dtype}, and {held:,} bytes follow.")
  if size > _LARGEST:
    raise InputError(f"{name} has {size:,} bytes; at most {_LARGEST:,} are read.")
  return shape, dtype


def _read_folder(
  path: pathlib.Path, classifier: Classifier, labelled: bool
) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
  input_shape = classifier.input_shape
  if len(input_shape) != 3 or input_shape[2] not in _MODES:
    raise InputError(f"folders are for images [H, W, channels]; the classifier takes {input_shape}.")
  wanted = [str(label) for label in range(classifier.num_classes)] if labelled else []
  folders = {own.name for own in path.iterdir() if own.is_dir() and not own.name.startswith(".")}
  if labelled and (strange := sorted(folders ^ set(wanted))):
    which = "missing" if strange[0] not in folders else "no class"
    raise InputError(
      f"it must hold a folder of images for each class, 0 to {classifier.num_classes - 1}; {strange[0]!r} is {which}."
    )
  files = [file for label in wanted for file in sorted((path / label).iterdir())] or sorted(path.rglob("*"))
  files = [file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg") and file.is_file()]
  if not files:
    raise InputError("its folders hold no PNG or JPEG images.")
  x = np.stack([_read_image(file, input_shape) for file in files])
  y = np.array([int(file.parent.name) for file in files]) if labelled else None
  return x, y, tuple(file.relative_to(path).as_posix() for file in files)


def _read_image(file: pathlib.Path, input_shape: tuple[int, ...]) -> np.ndarray:
  height, width, channels = input_shape
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, before anything is decoded
    with Image.open(file, formats=["PNG", "JPEG"]) as image:  # reads the header only
      if image.size != (width, height) or width * height > _MOST_PIXELS:
        found = f"{image.size[0]} x {image.size[1]}"
        raise InputError(f"{file.name} has {found} pixels; the classifier takes {width} x {height}.")
      if image.mode not in _MODES[channels]:
        raise InputError(
          f"{file.name} has pixels of the kind {image.mode}; with {channels} channel(s) it must be 8-bit"
          f" {_MODES[channels][0]}. Convert it as it was for the training."
        )
      return np.asarray(image.convert(_MODES[channels][0]), np.uint8).reshape(input_shape)
