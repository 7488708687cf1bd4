"""Labelled samples, with names."""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Images:
  """Labelled images.

  Attributes:
    x: [N, H, W, C] in [0, 1], float32.
    y: labels [N], int32.
  """

  x: np.ndarray
  y: np.ndarray

  def digest(self) -> str:
    """What tells these images from all others, in a few characters."""
    return hashlib.sha256(self.x.tobytes() + self.y.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Named(Images):
  """Data whose samples have names: of their files, or "sample" and their places from 0."""

  names: tuple[str, ...] = ()

  def only(self, places: np.ndarray) -> "Named":
    """Some of them."""
    return Named(self.x[places], self.y[places], tuple(self.names[place] for place in places))
