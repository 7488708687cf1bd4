"""How well scores tell members of a training set from others: curves, and a trial of every member."""

import dataclasses

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from experiments.data import Images
from experiments.measure.comparison import comparable, first_of_each_class, similarity
from kkt_jax.metrics import roc

__all__ = ["limits", "roc", "trial", "Trial"]
SIGNIFICANT = 0.01  # p-value below which something is no chance


@dataclasses.dataclass(frozen=True)
class Trial:
  """Every tested training sample, beside others of its class that were not trained on; the groups are disjoint.

  Attributes:
    y: labels [n].
    members: how near what was generated comes to each training sample [n].
    others: how near it comes to the others of each [n, g].
    best: the greatest value, that of equality.
    places: which of the training samples were tested [n].
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
    """How many training samples lie above all others: the true positives without a false one."""
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
      own = scores[self.y == label]
      for turn in range(times):
        drawn = random.permutation(own.ravel()).reshape(own.shape)
        hits[turn] += np.sum(drawn[:, 0] > drawn[:, 1:].max(axis=1))
    return hits


def trial(samples: Images, train: Images, held_out: Images) -> Trial:
  """Sets samples the task of picking out training data.

  Args:
    samples: all that was generated.
    train: training data without repetitions.
    held_out: data of the same classes that were not trained on, none of them twice.

  Returns:
    The trial. As many of each class take part as the rarest class of the smaller set has.
  """
  count, group = _sizes(train, held_out)
  places = first_of_each_class(Images(np.arange(len(train.y)), train.y), count).x
  others = similarity(samples, first_of_each_class(held_out, group * count)).reshape(-1, group)
  members = similarity(samples, Images(train.x[places], train.y[places]))
  return Trial(train.y[places], members, others, 1.0 if comparable(train) else 0.0, places)


def _sizes(train: Images, held_out: Images) -> tuple[int, int]:
  """How many training samples of each class can be tested, and how many others there are to each."""
  fewest, available = (int(np.unique(images.y, return_counts=True)[1].min()) for images in (train, held_out))
  count = min(fewest, available)
  return count, available // count


def limits(train: Images, held_out: Images) -> list[str]:
  """What a trial of these data cannot tell, in words; nothing if it can tell all."""
  count, group = _sizes(train, held_out)
  tested, said = count * len(np.unique(train.y)), []
  if tested < len(train.y):
    said.append(
      f"Only {tested} of the {len(train.y)} training samples can be tested, {count} of each class: so many has the"
      " rarest class of the training data or of those held out."
    )
  if 2 * (1 + group) ** -tested >= SIGNIFICANT:
    said.append(f"The data are too few for a verdict: even if all {tested} were picked out, that could be luck.")
  return said
