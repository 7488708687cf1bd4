"""How well a score tells members of a training set from others: the curve, and a trial of every member."""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

from jax.typing import ArrayLike
import numpy as np
from scipy import optimize, special, stats  # type: ignore[import-untyped]

from kkt_jax import _checks
from kkt_jax._errors import InputError

_Z = 1.96  # of a two-sided interval of 95 %


class Point(NamedTuple):
  """A point of the curve: how many lie above a threshold.

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


@_checks.annotated
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
  members, others = _scores("members", members), _scores("others", others)
  if not isinstance(allowed, Sequence | np.ndarray) or not all(
    isinstance(share, float | int) and 0 <= share < 1 for share in allowed
  ):
    raise InputError(f"allowed must hold shares, each at least 0 and less than 1; got {allowed!r:.60}.")
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


@_checks.annotated
def conformal_p_values(scores: ArrayLike, others: ArrayLike) -> np.ndarray:
  """For each sample by itself, the probability of so high a score if it was not trained on.

  Args:
    scores: of the samples in question [n], the higher, the more likely a member.
    others: of samples of the same source that were not trained on [m].

  Raises:
    InputError: scores are missing, not vectors or NaN.

  Returns:
    [n]: ``(1 + others that score at least as high) / (1 + m)``, valid if a non-member is exchangeable with the others
    (Bates et al., Testing for outliers with conformal p-values, 2023).

  >>> conformal_p_values([0.9, 0.4], [0.5, 0.2, 0.1])
  array([0.25, 0.5 ])
  """
  scores, rising = _scores("scores", scores), np.sort(_scores("others", others))
  return (1 + len(rising) - np.searchsorted(rising, scores)) / (1 + len(rising))


@_checks.annotated
def epsilon_lower_bound(members: ArrayLike, others: ArrayLike, *, confidence: float = 0.95) -> float:
  """A lower bound on epsilon, of differential privacy, from how many of the highest scores are of members.

  If training is epsilon-differentially private (delta = 0) and every sample is in the training data by a draw of its
  own, then of r samples that are guessed to be members at most a share of ``1 / (1 + e^-epsilon m / n)`` is expected to
  be right, and no more than a binomial number (Steinke, Nasr and Jagielski, Privacy auditing with one training run,
  2023, with n members among n + m samples instead of half). The r highest scores are guessed, r = 1, 2, 4 and so on.

  Args:
    members: scores of training samples [n].
    others: scores of samples of the same source that were not trained on [m].
    confidence: of the bound, over all r together (Bonferroni).

  Returns:
    The bound, at least 0.

  >>> round(epsilon_lower_bound(range(100, 200), range(100)), 2)  # 64 of the first 64 are members
  2.52
  >>> epsilon_lower_bound(range(100), range(100, 200))
  0.0
  """
  values = np.concatenate([np.asarray(others, np.float64), np.asarray(members, np.float64)])
  n, m = len(values) - len(np.asarray(others)), len(np.asarray(others))
  right = np.cumsum(np.argsort(-values, kind="stable") >= m)  # in ties the others come first
  guesses = 2 ** np.arange(n.bit_length())
  correct = right[guesses - 1]
  low = stats.beta.ppf((1 - confidence) / len(guesses), np.maximum(correct, 1e-9), guesses - correct + 1)
  return float(max(0.0, np.max(special.logit(low)) - np.log(n / m)))


@_checks.annotated
def q_values(p_values: ArrayLike) -> np.ndarray:
  """The least false-discovery rate at which each of several hypotheses is rejected (Benjamini and Hochberg 1995).

  Args:
    p_values: of one hypothesis each [n].

  Returns:
    [n]: among all those with a q-value up to q the expected share of false ones is at most q.

  >>> q_values([0.01, 0.5, 0.02, 0.03]).round(3).tolist()
  [0.04, 0.5, 0.04, 0.04]
  """
  values = np.asarray(p_values, np.float64)
  if values.ndim != 1 or not np.all((values >= 0) & (values <= 1)):
    raise InputError(f"p_values must be a vector of numbers from 0 to 1; got {values!r:.60}.")
  return stats.false_discovery_control(values)


def _scores(name: str, scores: ArrayLike) -> np.ndarray:
  values = np.asarray(scores)
  if values.ndim != 1 or not len(values) or np.isnan(values).any():
    raise InputError(f"{name} must be a vector of at least one score without NaN; got shape {values.shape}.")
  return values


def _beyond(area: float, auc: float, n: int, m: int) -> float:
  """Positive where the area is too far from the one that was found, by the variance of Hanley and McNeil (1982)."""
  half = (n + m) / 2 - 1
  variance = area * (1 - area) * (1 + half * (1 - area) / (2 - area) + half * area / (1 + area)) / (n * m)
  return (area - auc) ** 2 - _Z**2 * variance


@dataclasses.dataclass(frozen=True)
class Trial:
  """Every tested training sample, beside others of its class that were not trained on; the groups are disjoint.

  Attributes:
    y: labels [n].
    members: how near what was generated comes to each training sample [n].
    others: how near it comes to the others of each [n, g].
    best: the greatest value, that of equality.
    places: which of the training samples were tested [n].

  >>> own = Trial(np.zeros(2, int), np.array([0.9, 0.5]), np.array([[0.8, 0.1], [0.2, 0.6]]), 1.0, np.arange(2))
  >>> print(own.hits, own.ratios, own.leading)  # (1 - .8) / (1 - .9) and (1 - .6) / (1 - .5)
  [ True False] [2.  0.8] 1
  """

  y: np.ndarray
  members: np.ndarray
  others: np.ndarray
  best: float
  places: np.ndarray

  @property
  def hits(self) -> np.ndarray:
    """Which training samples are picked out [n]: nearer than all of their group; a tie is no hit."""
    return self.members > self.others.max(axis=1)

  @property
  def ratios(self) -> np.ndarray:
    """How much farther away the nearest of a group is than the training sample [n]; above 1 for hits."""
    with np.errstate(divide="ignore", invalid="ignore"):
      return np.nan_to_num((self.best - self.others.max(axis=1)) / (self.best - self.members), nan=1.0, posinf=np.inf)

  @property
  def chance(self) -> float:
    """The share of hits if nothing is known."""
    return 1 / (1 + self.others.shape[1])

  @property
  def leading(self) -> int:
    """How many training samples lie above all others: the true positives at a false positive rate of 0."""
    return int(np.sum(self.members > self.others.max()))

  @property
  def p_value(self) -> float:
    """The odds of this by chance, exact for exchangeable samples: the lesser of two, doubled.

    Of as many hits (the mean sample), binomial; and of as many leading ones (the worst case): a leading sample is the
    first of those of its class that are left with probability ``chance`` at most.
    """
    hits = stats.binomtest(int(self.hits.sum()), len(self.y), self.chance, alternative="greater").pvalue
    return float(min(1.0, 2 * min(hits, self.chance**self.leading)))

  def shuffled(self, times: int = 1000) -> np.ndarray:
    """Hits [times] if it is drawn anew within each class who counts as a training sample."""
    random, hits = np.random.default_rng(0), np.zeros(times, int)
    scores = np.concatenate([self.members[:, None], self.others], axis=1)
    for label in np.unique(self.y):
      of_class = scores[self.y == label]
      for turn in range(times):
        drawn = random.permutation(of_class.ravel()).reshape(of_class.shape)
        hits[turn] += np.sum(drawn[:, 0] > drawn[:, 1:].max(axis=1))
    return hits
