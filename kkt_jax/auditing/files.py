"""Samples from files of strangers, read without trust: ``.npz`` files and folders of images."""

import pathlib
from typing import Any
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image

from kkt_jax._errors import InputError
from kkt_jax.auditing.samples import Samples
from kkt_jax.classifiers import Classifier

_LARGEST = 2 << 30  # bytes of one array
_MOST_PIXELS = 1 << 24  # of one image file
# By channels the modes that Pillow turns into 8-bit pixels without loss; the first is what they become.
_MODES = {1: ("L", "1"), 3: ("RGB", "P", "L", "1"), 4: ("RGBA",)}
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, zlib.error, Image.DecompressionBombError)
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_samples(path: str, classifier: Classifier, *, labelled: bool = True, name: str = "path") -> Samples:
  """Samples from a file.

  Args:
    path: an ``.npz`` file with ``x`` [N, *input_shape] and ``y`` [N], or a folder with a folder of images for each
      class, 0, 1, and so on, or whatever its label is.
    classifier: whose samples they are.
    labelled: whether there are labels; else the classifier gives them, and a folder's images may lie anywhere in it.
    name: of the argument, for errors.

  Returns:
    Samples, named by their files.

  Raises:
    InputError: the file cannot be read, or holds something else.
  """
  where = pathlib.Path(path)
  name = f"{name}={path}"
  try:
    if where.is_dir():
      x, y, names = _read_folder(where, classifier, labelled)
    elif where.is_file() and zipfile.is_zipfile(where):
      x, y = _read_npz(where, classifier.input_shape, labelled)
      names = ()
    else:
      raise InputError(f"it is neither an .npz file nor a folder{'' if where.exists() else '; there is no such file'}.")
  except InputError as error:
    raise InputError(f"{name}: {error}") from error
  except (*_UNREADABLE, zipfile.BadZipFile) as error:
    raise InputError(f"{name} cannot be read ({type(error).__name__}: {error}).") from error
  return Samples.of(name, classifier, x, y, names)


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
      got = " and ".join(str(kind) for _, kind in headers)
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
  wanted = [str(label) for label in classifier.labels] if labelled else []
  folders = {folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")}
  if labelled and (strange := sorted(folders ^ set(wanted))):
    which = "missing" if strange[0] not in folders else "no class"
    plain = classifier.labels == tuple(range(len(wanted)))
    called = f"0 to {wanted[-1]}" if plain else ", ".join(wanted)
    raise InputError(f"it must hold a folder of images for each class, {called}; {strange[0]!r} is {which}.")
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
