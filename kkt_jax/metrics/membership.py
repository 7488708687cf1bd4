"""How well a score tells members of a training set from others."""

from collections.abc import Sequence
import math
from typing import NamedTuple

from jax.typing import ArrayLike
import numpy as np
from scipy import optimize, stats  # type: ignore[import-untyped]

_Z = 1.96  # of a two-sided interval of 95 %


class Point(NamedTuple):
  """A point of the curve: who lies above a threshold.

  Attributes:
    allowed: the share of others that may, .01 say.
    others: how many do; fewer than allowed if scores are tied, or if there are too few others for such a share.
    members: how many members do.
    share: their share of all members, with its Clopper-Pearson interval of 95 %, ``low`` to ``high``.
  """

  allowed: float
  others: int
  members: int
  share: float
  low: float
  high: float


class Roc(NamedTuple):
  """True against false positives.

  Attributes:
    auc: the area under the curve: the odds that a member's score is above another's, ties counted half.
    low: lower end of its interval of 95 % (Newcombe 2006, method 5), which is not empty at 1, either.
    high: upper end.
    points: at few false positives.
  """

  auc: float
  low: float
  high: float
  points: tuple[Point, ...]


def roc(members: ArrayLike, others: ArrayLike, *, allowed: Sequence[float] = (0.0, 0.001, 0.01)) -> Roc:
  """The curve of a score that is meant to be greater for members.

  Args:
    members: scores of training samples [n]; infinite ones are scores like others.
    others: scores of samples of the same kind that were not trained on [m].
    allowed: shares of false positives, each at least 0 and less than 1.

  Returns:
    The curve. Thresholds are chosen among the others' scores, so that intervals of true positives are for given others.

  Raises:
    ValueError: scores are missing, not vectors or NaN.

  >>> curve = roc([0.9, 0.8, 0.3], [0.5, 0.2])
  >>> round(curve.auc, 3), curve.points[0].members, round(curve.points[0].low, 3)  # 5 of 6 pairs; 2 of 3
  (0.833, 2, 0.094)
  """
  members, others = np.asarray(members), np.asarray(others)
  for name, scores in (("members", members), ("others", others)):
    if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
      raise ValueError(f"{name} must be a vector of at least one score without NaN; got shape {scores.shape}.")
  n, m = len(members), len(others)
  auc = float(stats.mannwhitneyu(members, others).statistic) / (n * m)
  falling = np.sort(others)[::-1]
  points = []
  for share in allowed:
    threshold = falling[math.floor(share * m * (1 + 1e-12))]
    true, false = (int(np.sum(scores > threshold)) for scores in (members, others))
    interval = stats.binomtest(true, n).proportion_ci()
    points.append(Point(share, false, true, true / n, float(interval.low), float(interval.high)))
  low, high = (
    float(optimize.brentq(_beyond, end, np.clip(auc, 1e-9, 1 - 1e-9), args=(auc, n, m))) for end in (0.0, 1.0)
  )
  return Roc(auc, low, high, tuple(points))


def _beyond(area: float, auc: float, n: int, m: int) -> float:
  """Positive where the area is too far from the one that was found, by the variance of Hanley and McNeil (1982)."""
  half = (n + m) / 2 - 1
  variance = area * (1 - area) * (1 + half * (1 - area) / (2 - area) + half * area / (1 + area)) / (n * m)
  return (area - auc) ** 2 - _Z**2 * variance
