"""Images and curves, as the content of PNG files."""

from collections.abc import Mapping, Sequence
import io
import textwrap
from typing import Any

from jax.typing import ArrayLike
import numpy as np
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]

COLUMNS = 20  # images in a row of a picture
_CAPTIONS = 220  # pixels at their left
_SCALE, _FRAME = 3, (0.1, 0.65, 0.2)  # pixels of a picture for each of an image; colour


def image_rows(rows: Sequence[tuple[str, ArrayLike]], *, framed: Mapping[int, ArrayLike] | None = None) -> bytes:
  """Rows of images with a caption at their left, as in Figs. 6 to 8.

  Args:
    rows: captions and images [n, H, W, C] in [0, 1], C of 1 or 3; the rows may have different lengths.
    framed: by the index of a row, which of its images have a frame [n].
  """
  from matplotlib.figure import Figure

  gap = 2
  height, width = np.add(np.shape(rows[0][1])[1:3], gap)
  columns = max(np.shape(images)[0] for _, images in rows)
  canvas = np.ones((len(rows) * height, columns * width, 3))
  for row, (_, images) in enumerate(rows):
    frames = np.resize(np.asarray((framed or {}).get(row, False)), len(np.asarray(images)))
    for column, (image, frame) in enumerate(zip(np.clip(images, 0, 1), frames, strict=True)):
      top, left = row * height, column * width
      if frame:
        canvas[top : top + height, left : left + width] = _FRAME
      canvas[top + 1 : top + height - 1, left + 1 : left + width - 1] = image
  canvas = canvas.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)
  size = np.array([canvas.shape[1] + _CAPTIONS, canvas.shape[0]])
  figure = Figure(figsize=tuple(size / 100), dpi=100)
  figure.figimage(canvas, xo=_CAPTIONS)
  for row, (caption, _) in enumerate(rows):
    middle = 1 - (row + 0.5 - gap / height / 2) / len(rows)
    figure.text((_CAPTIONS - 8) / size[0], middle, caption, ha="right", va="center", fontsize=8)
  return _content(figure)


def scores(values: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
  """ROC curves of scores on logarithmic axes, and how the first of them is distributed, in ranks.

  Args:
    values: by what a score is called, those of members [n] and of non-members [m]; the last is the baseline.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
  left, right = figure.subplots(1, 2)
  for (name, (members, others)), style in zip(values.items(), ("-", "--"), strict=False):
    falling = np.sort(others)[::-1]
    true = [np.mean(members > threshold) for threshold in (*falling, -np.inf)]
    left.plot(np.arange(len(true)) / len(falling), true, style, drawstyle="steps-post", label=name)
  least = 1 / len(falling)
  left.plot([least, 1], [least, 1], ":", color="grey", label="chance")
  left.set_xscale("symlog", linthresh=least)
  left.set(yscale="log", xlim=(0, 1), ylim=(least, 1.1))
  left.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
  left.legend(fontsize=7)
  name, (members, others) = next(iter(values.items()))
  ranks = stats.rankdata(np.concatenate([members, others]))
  bins = np.linspace(0, len(ranks), 26)
  for group, label in ((ranks[: len(members)], "members"), (ranks[len(members) :], "non-members")):
    right.hist(group, bins, density=True, alpha=0.6, label=label)
  right.set(xlabel=textwrap.fill(f"rank by {name}", 48), yticks=[], ylabel="density", title="Members and non-members")
  right.legend(fontsize=7)
  return _content(figure)


def _content(figure: Any) -> bytes:
  content = io.BytesIO()
  figure.savefig(content)
  return content.getvalue()


def png(image: ArrayLike) -> bytes:
  """The content of a PNG file with one image [H, W, C] in [0, 1], C of 1 or 3, at its own size."""
  values = np.round(255 * np.clip(np.asarray(image), 0, 1)).astype(np.uint8)
  content = io.BytesIO()
  Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values).save(content, "PNG")
  return content.getvalue()
