"""The pictures of the experiments, as PNG files."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from jax.typing import ArrayLike
import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: works without a screen
from matplotlib import pyplot as plt  # noqa: E402

COLUMNS = 20  # images in a row of a picture
_CLASS_COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900", "#0099c6", "#dd4477", "#66aa00")


def scaling_curves(path: pathlib.Path, alphas: ArrayLike, scaled: ArrayLike, expected: ArrayLike) -> None:
  """Fig. 3: Phi(x; e^(alpha Lambda) zeta) solid, e^alpha Phi(x; zeta) dotted, a colour an input.

  Args:
    path: PNG file.
    alphas: [A].
    scaled: [A, K], solid.
    expected: [A, K], dotted.
  """
  figure, axes = plt.subplots(figsize=(5, 4), constrained_layout=True)
  for k, (solid, dotted) in enumerate(zip(np.asarray(scaled).T, np.asarray(expected).T, strict=True)):
    colour = _CLASS_COLOURS[k % len(_CLASS_COLOURS)]
    axes.plot(
      alphas,
      solid,
      color=colour,
      alpha=0.5,
      linewidth=3,
      label=r"$\Phi(x; e^{\alpha\Lambda}\zeta)$" if k == 0 else None,
    )
    axes.plot(alphas, dotted, color="black", linestyle=":", label=r"$e^{\alpha}\Phi(x; \zeta)$" if k == 0 else None)
  axes.set(xlabel=r"$\alpha$", ylabel="output", title="Solid and dotted coincide where Lambda is right")
  axes.legend()
  _save(figure, path)


def u_shape(path: pathlib.Path, margin: ArrayLike, loss: ArrayLike, *, alpha: float, delta: float) -> None:
  """Fig. 2: the duality loss of one margin.

  Args:
    path: PNG file.
    margin: [A].
    loss: [A].
    alpha: where the flat bottom begins, at e^-alpha.
    delta: its width.
  """
  figure, axes = plt.subplots(figsize=(5, 3), constrained_layout=True)
  axes.plot(margin, loss, linewidth=2)
  low = float(np.exp(-alpha))
  axes.axvspan(low, low + delta, alpha=0.15)
  axes.set_xticks([low, low + delta], [r"$e^{-\alpha}$", r"$e^{-\alpha}+\delta$"])
  axes.set(xlabel="margin to the runner-up", ylabel="duality loss")
  _save(figure, path)


def bars(path: pathlib.Path, values: Mapping[str, float], unit: str) -> None:
  """Named values as horizontal bars on a logarithmic axis."""
  figure, axes = plt.subplots(figsize=(8, 0.4 * len(values) + 1), constrained_layout=True)
  drawn = axes.barh(list(values), list(values.values()))
  axes.bar_label(drawn, fmt="%.3g", padding=3)
  axes.set(xscale="log", xlabel=unit)
  axes.margins(x=0.15)
  axes.invert_yaxis()
  _save(figure, path)


def scatter(path: pathlib.Path, panels: Sequence[tuple[str, Any, Any]], label: str) -> None:
  """Points in panels side by side: a title, horizontal and vertical values of each, one horizontal label."""
  figure, grid = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.2), squeeze=False, constrained_layout=True)
  for axes, (title, x, y) in zip(grid[0], panels, strict=True):
    axes.scatter(x, y, s=18, alpha=0.7)
    axes.set(title=title, xlabel=label)
  _save(figure, path)


def image_rows(path: pathlib.Path, rows: Sequence[tuple[str, ArrayLike]], *, scale: int = 3) -> None:
  """Rows of images with a caption at their left, as in Figs. 6 to 8.

  Args:
    path: PNG file.
    rows: captions and images [n, H, W, C] in [0, 1], C of 1 or 3; the rows may have different lengths.
    scale: pixels of the file for one pixel of an image.
  """
  columns = max(np.shape(images)[0] for _, images in rows)
  height, width = np.shape(rows[0][1])[1:3]
  figure, grid = plt.subplots(
    len(rows),
    columns,
    figsize=((columns * width * scale + 220) / 100, len(rows) * (height + 2) * scale / 100),
    squeeze=False,
    gridspec_kw={
      "wspace": 0.06,
      "hspace": 0.06,
      "left": 220 / (columns * width * scale + 220),
      "right": 1,
      "top": 1,
      "bottom": 0,
    },
  )
  for axes_row, (caption, images) in zip(grid, rows, strict=True):
    for axes in axes_row:
      axes.axis("off")
    for axes, image in zip(axes_row, np.asarray(images), strict=False):
      axes.imshow(np.squeeze(np.clip(image, 0, 1)), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    first = axes_row[0].get_position()
    figure.text(first.x0 - 0.01, (first.y0 + first.y1) / 2, caption, ha="right", va="center", fontsize=8)
  _save(figure, path)


def plane(path: pathlib.Path, panels: Sequence[tuple[str, Any]], *, num_classes: int, limit: float = 2.0) -> None:
  """Panels of the plane side by side, as in Figs. 4 and 5.

  Args:
    path: PNG file.
    panels: titles with either ``("points", points [S, 2], labels [S])`` or ``("regions", function)`` where the function
      maps points [K, 2] to logits [K, C].
    num_classes: C.
    limit: half the side of the square that is shown.
  """
  figure, grid = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.6), squeeze=False, constrained_layout=True)
  angle = np.linspace(0, 2 * np.pi, 200)
  for axes, (title, content) in zip(grid[0], panels, strict=True):
    if content[0] == "regions":
      _regions(axes, content[1], limit, num_classes)
    else:
      axes.plot(np.cos(angle), np.sin(angle), color="lightgray", linewidth=0.5, zorder=0)
      for label in range(num_classes):
        own = np.asarray(content[1])[np.asarray(content[2]) == label]
        axes.scatter(own[:, 0], own[:, 1], s=14, alpha=0.6, color=_CLASS_COLOURS[label], linewidths=0)
    axes.set(
      title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1]
    )
  _save(figure, path)


def _regions(axes: Any, logits_fn: Any, limit: float, num_classes: int) -> None:
  """The prediction landscape: the colour of the winning class, white at the boundary."""
  side = np.linspace(-limit, limit, 240, dtype=np.float32)
  points = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
  logits = np.asarray(logits_fn(points))
  ordered = np.sort(logits, axis=1)
  sure = 1 - np.exp(-(ordered[:, -1] - ordered[:, -2]) / (1e-9 + 0.1 * np.median(ordered[:, -1] - ordered[:, -2])))
  colours = np.array([matplotlib.colors.to_rgb(colour) for colour in _CLASS_COLOURS[:num_classes]])
  blended = 1 - (1 - colours[logits.argmax(1)]) * (0.55 * sure[:, None])
  axes.imshow(blended.reshape(240, 240, 3), extent=(-limit, limit, -limit, limit), origin="lower")


def _save(figure: Any, path: pathlib.Path) -> None:
  figure.savefig(path, dpi=100)
  plt.close(figure)
