"""The owner's own data, for `experiments.audit` to compare with; nothing else ever sees them."""

from collections.abc import Sequence
import pathlib
import warnings
import zipfile

import numpy as np
from PIL import Image

from experiments import common
from experiments.data import Images

_LARGEST = 2 << 30  # bytes of one array
_MOST_PIXELS = 1 << 24  # of one image file
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_images(
  path: str, *, flag: str, input_shape: Sequence[int], num_classes: int, value_range: tuple[float, float]
) -> Images:
  """Labelled data from an ``.npz`` file or from a folder.

  Args:
    path: an ``.npz`` file with ``x`` [N, *input_shape], in the classifier's own range or uint8, and ``y`` [N]; or a
      folder with one folder of PNG or JPEG images for each class, named 0, 1, ....
    flag: the flag that names it, for messages.
    input_shape: shape of one input.
    num_classes: C.
    value_range: the range of the classifier's inputs.

  Returns:
    The data with x in [0, 1].

  Raises:
    UsageError: the file is damaged, too large, or holds something else.
  """
  where = pathlib.Path(path)
  read = _read_folder if where.is_dir() else _read_npz
  try:
    x, y = read(where, tuple(input_shape))
  except common.UsageError as error:
    raise common.UsageError(f"--{flag}={path}: {error}") from error
  except (OSError, ValueError, KeyError, SyntaxError, zipfile.BadZipFile, Image.DecompressionBombError) as error:
    raise common.UsageError(f"--{flag}={path} cannot be read ({type(error).__name__}: {error}).") from error
  if not len(y) or y.min() < 0 or y.max() >= num_classes:
    found = f"{y.min()}..{y.max()}" if len(y) else "none"
    raise common.UsageError(f"--{flag}={path}: labels must lie in 0..{num_classes - 1}; got {found}.")
  if x.dtype == np.uint8:
    return Images(x.astype(np.float32) / 255, y)
  low, high = value_range
  scaled = (x.astype(np.float32) - low) / (high - low)
  if not np.all(np.isfinite(scaled)) or scaled.min() < -1e-3 or scaled.max() > 1 + 1e-3:
    raise common.UsageError(
      f"--{flag}={path}: x must lie in the classifier's range, {low} to {high}; got {x.min()} to {x.max()}."
    )
  return Images(np.clip(scaled, 0, 1), y)


def _read_npz(path: pathlib.Path, input_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  with zipfile.ZipFile(path) as archive:
    for member in archive.infolist():
      if member.file_size > _LARGEST:
        raise common.UsageError(f"{member.filename} would have {member.file_size:,} bytes; at most {_LARGEST:,}.")
  with np.load(path, allow_pickle=False) as arrays:
    missing = [name for name in ("x", "y") if name not in arrays]
    if missing:
      raise common.UsageError(f"it must hold arrays x and y; {' and '.join(missing)} missing.")
    x, y = arrays["x"], arrays["y"]
  if x.shape[1:] != input_shape or y.shape != x.shape[:1]:
    raise common.UsageError(
      f"x must have shape [N, {', '.join(map(str, input_shape))}] and y [N]; got {x.shape}, {y.shape}."
    )
  if not np.issubdtype(y.dtype, np.integer) or not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
    raise common.UsageError(f"x must be uint8 or floating point and y integers; got {x.dtype} and {y.dtype}.")
  return x, y.astype(np.int32)


def _read_folder(path: pathlib.Path, input_shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  if len(input_shape) != 3 or input_shape[2] not in _MODES:
    raise common.UsageError(f"folders are for images [H, W, channels]; the classifier takes {input_shape}.")
  x, y = [], []
  for folder in sorted(path.iterdir()):
    if folder.is_dir() and folder.name.isdigit():
      for file in sorted(folder.iterdir()):
        if file.suffix.lower() in (".png", ".jpg", ".jpeg"):
          x.append(_read_image(file, input_shape))
          y.append(int(folder.name))
  if not x:
    raise common.UsageError("it holds no folders 0, 1, ... with PNG or JPEG images.")
  return np.stack(x), np.asarray(y, np.int32)


def _read_image(file: pathlib.Path, input_shape: tuple[int, ...]) -> np.ndarray:
  height, width, channels = input_shape
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, before anything is decoded
    with Image.open(file, formats=["PNG", "JPEG"]) as image:  # reads the header only
      if image.size != (width, height) or width * height > _MOST_PIXELS:
        raise common.UsageError(
          f"{file.name} has {image.size[0]} x {image.size[1]} pixels; the classifier takes {width} x {height}."
        )
      return np.asarray(image.convert(_MODES[channels]), np.uint8).reshape(input_shape)
