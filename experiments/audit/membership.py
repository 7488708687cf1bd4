"""What a trial of training samples against others can tell; the curve of any score is `kkt_jax.metrics.roc`."""

import numpy as np

from experiments.data import Images
from experiments.measure.comparison import comparable, EXACT, similarity, tested
from kkt_jax.metrics import roc

__all__ = ["limits", "roc"]
SIGNIFICANT = 0.01  # p-value below which something is no chance
_PAIRS = 10**7  # of images that are compared before the training


def limits(train: Images, held_out: Images) -> list[str]:
  """What a trial of these data cannot tell, in words; nothing if it can tell all."""
  count, group = tested(train, held_out)
  number, said = count * len(np.unique(train.y)), []
  if number < len(train.y):
    said.append(
      f"Only {number} of the {len(train.y)} training samples can be tested, {count} of each class: so many has the"
      " rarest class of the training data or of those held out."
    )
  if 2 * (1 + group) ** -number >= SIGNIFICANT:
    said.append(f"The data are too few for a verdict: even if all {number} were picked out, that could be luck.")
  if comparable(train) and len(train.y) * len(held_out.y) <= _PAIRS:
    near = int(np.sum(similarity(train, held_out) > EXACT))
    if near:
      said.append(f"{near} held-out samples are all but equal to a training sample, and cannot be told from it.")
  return said
