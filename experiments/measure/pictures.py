"""The pictures of the experiments, as PNG files."""

from collections.abc import Callable, Mapping, Sequence
import pathlib
from typing import Any

from jax.typing import ArrayLike
import numpy as np

_CLASS_COLOURS = ("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900", "#0099c6", "#dd4477", "#66aa00")


def scaling_curves(path: pathlib.Path, alphas: ArrayLike, scaled: ArrayLike, expected: ArrayLike) -> None:
  """Fig. 3: Phi(x; e^(alpha Lambda) zeta) solid, e^alpha Phi(x; zeta) dotted, one colour per input.

  Args:
    path: PNG file.
    alphas: [A].
    scaled: [A, K], solid.
    expected: [A, K], dotted.
  """
  figure, (axes,) = _figure((5, 4))
  for k, (solid, dotted) in enumerate(zip(np.asarray(scaled).T, np.asarray(expected).T, strict=True)):
    labels = (r"$\Phi(x; e^{\alpha\Lambda}\zeta)$", r"$e^{\alpha}\Phi(x; \zeta)$") if k == 0 else (None, None)
    axes.plot(alphas, solid, color=_CLASS_COLOURS[k % len(_CLASS_COLOURS)], alpha=0.5, linewidth=3, label=labels[0])
    axes.plot(alphas, dotted, color="black", linestyle=":", label=labels[1])
  axes.set(xlabel=r"$\alpha$", ylabel="output", title="Solid and dotted coincide where Lambda is right")
  axes.legend()
  figure.savefig(path)


def u_shape(path: pathlib.Path, margin: ArrayLike, loss: ArrayLike, *, alpha: float, delta: float) -> None:
  """Fig. 2: the duality loss of one margin.

  Args:
    path: PNG file.
    margin: [A].
    loss: [A].
    alpha: the flat bottom begins at e^-alpha.
    delta: its width.
  """
  figure, (axes,) = _figure((5, 3))
  axes.plot(margin, loss, linewidth=2)
  low = float(np.exp(-alpha))
  axes.axvspan(low, low + delta, alpha=0.15)
  axes.set_xticks([low, low + delta], [r"$e^{-\alpha}$", r"$e^{-\alpha}+\delta$"])
  axes.set(xlabel="margin to the runner-up", ylabel="duality loss")
  figure.savefig(path)


def curves(path: pathlib.Path, x: Sequence[float], y: Mapping[str, Sequence[float]], label: str) -> None:
  """Named curves over the same numbers, with the label of these."""
  figure, (axes,) = _figure((6, 4))
  for name, values in y.items():
    axes.plot(x, values, marker="o", label=name)
  axes.set(xlabel=label, ylim=(-0.03, 1.03))
  axes.legend()
  figure.savefig(path)


def plane(path: pathlib.Path, panels: Sequence[tuple[str, Any]], *, num_classes: int, limit: float = 2.0) -> None:
  """Panels of the plane side by side, as in Figs. 4 and 5.

  Args:
    path: PNG file.
    panels: titles with either points [S, 2] and their labels [S], or a function from points [K, 2] to logits [K, C].
    num_classes: C.
    limit: half the side of the square that is shown.
  """
  figure, grid = _figure((3.4 * len(panels), 3.6), columns=len(panels))
  angle = np.linspace(0, 2 * np.pi, 200)
  for axes, (title, content) in zip(grid, panels, strict=True):
    if callable(content):
      _regions(axes, content, limit, num_classes)
    else:
      axes.plot(np.cos(angle), np.sin(angle), color="lightgray", linewidth=0.5, zorder=0)
      for label in range(num_classes):
        points = np.asarray(content[0])[np.asarray(content[1]) == label]
        axes.scatter(points[:, 0], points[:, 1], s=14, alpha=0.6, color=_CLASS_COLOURS[label], linewidths=0)
    sides = {"xlim": (-limit, limit), "ylim": (-limit, limit), "xticks": [-1, 0, 1], "yticks": [-1, 0, 1]}
    axes.set(title=title, aspect="equal", **sides)
  figure.savefig(path)


def _regions(axes: Any, logits_fn: Callable[[np.ndarray], ArrayLike], limit: float, num_classes: int) -> None:
  """The prediction landscape: the colour of the winning class, white at the boundary."""
  from matplotlib import colors

  side = np.linspace(-limit, limit, 240, dtype=np.float32)
  points = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
  logits = np.asarray(logits_fn(points))
  second, first = np.sort(logits, axis=1).T[-2:]
  sure = 1 - np.exp(-(first - second) / (1e-9 + 0.1 * np.median(first - second)))
  colours = colors.to_rgba_array(_CLASS_COLOURS[:num_classes])[:, :3]
  blended = 1 - (1 - colours[logits.argmax(1)]) * (0.55 * sure[:, None])
  axes.imshow(blended.reshape(240, 240, 3), extent=(-limit, limit, -limit, limit), origin="lower")


def _figure(size: tuple[float, float], *, columns: int = 1) -> tuple[Any, Any]:
  """A figure and its row of axes [columns], without the state and the screen of pyplot."""
  from matplotlib.figure import Figure  # slow to import; only when something is drawn

  figure = Figure(figsize=size, dpi=100, layout="constrained")
  return figure, figure.subplots(1, columns, squeeze=False)[0]
