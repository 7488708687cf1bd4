"""Does a generator know its training set better than other data of the same kind?"""

import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from kkt_jax import _checks
from kkt_jax.metrics.distances import check_batches, pairwise_distance


@_checks.annotated
def nearer_to_training(generated: ArrayLike, training: ArrayLike, disjoint: ArrayLike) -> dict[str, float]:
  """Are generated samples nearer (Euclidean) to their training set than to an equally large set of other real data?

  Args:
    generated: [G, ...], images or features.
    training: [N, ...].
    disjoint: [N, ...], real data of the same kind that were not trained on.

  Returns:
    ``share``: share of generated samples whose nearest training sample is nearer than their nearest disjoint one, ties
    counted half, 1/2 if the training set is not known; ``median_ratio``: median over generated samples of the distance
    to the nearest training sample over that to the nearest disjoint one, 1 where both are 0, infinite where only the
    second is; ``p_value``: two-sided binomial test against 1/2 (sign test: ties are left out; 1 if all are tied). It
    treats the samples as independent given the two sets, so it does not see the chance that drew these two sets, and it
    is only indicative; `retrieval` has a test without that flaw.

  Raises:
    ValueError: ``training`` and ``disjoint`` have different sizes, shapes do not fit, or a value is not finite.

  >>> import jax.numpy as jnp
  >>> nearer_to_training(jnp.array([[1.0], [1.5]]), jnp.array([[0.0]]), jnp.array([[3.0]]))  # 1 : 2 and a tie
  {'share': 0.75, 'median_ratio': 0.75, 'p_value': 1.0}
  """
  check_batches("generated", generated, "training", training)
  _checks.check_shape("disjoint", disjoint, jnp.shape(training), "that of training")
  for name, batch in (("generated", generated), ("training", training), ("disjoint", disjoint)):
    _checks.check_finite(name, batch)
  to_training = np.asarray(pairwise_distance(generated, training)).min(axis=1)
  to_disjoint = np.asarray(pairwise_distance(generated, disjoint)).min(axis=1)
  nearer, tied = int(np.sum(to_training < to_disjoint)), int(np.sum(to_training == to_disjoint))
  total = len(to_training)
  ratio = np.full(total, np.inf)
  np.divide(to_training, to_disjoint, out=ratio, where=to_disjoint > 0)
  ratio[to_training == to_disjoint] = 1.0
  return {
    "share": (nearer + tied / 2) / total,
    "median_ratio": float(np.median(ratio)),
    "p_value": float(stats.binomtest(nearer, total - tied, 0.5).pvalue) if tied < total else 1.0,
  }


@_checks.annotated
def retrieval(training_scores: ArrayLike, distractor_scores: ArrayLike) -> dict[str, float]:
  """Can training images be picked out of real images of the same kind by how near a generator comes to them?

  Every training image has its own group of ``m // n`` distractors, real images that were not trained on; the last
  ``m % n`` distractors are not used. It is retrieved if its score is strictly greater than all of its group's.

  If the generator knows nothing of the training set beyond its distribution, a training image and its distractors are
  exchangeable, and so are their scores. The groups are disjoint, hence the trials independent, and the number of hits
  is Binomial(n, 1 / N) with N = m // n + 1 candidates: exactly so without ties; with them, hits are
  rarer, as a tie is no hit.

  Args:
    training_scores: [n], best similarity of each training image to any generated sample. -inf is a score like another.
    distractor_scores: [m], the same of the distractors. Group i is ``distractor_scores[i (m // n) : (i + 1) (m // n)]``
      and must be of the class of training image i: pass both sorted by class, with as many distractors to each training
      image in every class.

  Returns:
    ``top1``: share of training images retrieved; ``chance``: 1 / N; ``hits``: their number; ``candidates``: N;
    ``p_value``: chance of as many hits or more under the hypothesis.

  Raises:
    ValueError: not vectors, fewer distractors than training images, no training image, or a score that is NaN.

  >>> import jax.numpy as jnp
  >>> retrieval(jnp.array([0.9, 0.8]), jnp.array([0.1, 0.2]))  # p = 1/2^2
  {'top1': 1.0, 'chance': 0.5, 'hits': 2, 'candidates': 2, 'p_value': 0.25}
  """
  for name, scores in (("training_scores", training_scores), ("distractor_scores", distractor_scores)):
    _checks.check_rank(name, scores, 1, "[n]")
    if np.any(np.isnan(np.asarray(scores))):
      raise ValueError(f"{name} must not be NaN; got {int(np.isnan(np.asarray(scores)).sum())} of them.")
  training, distractors = np.asarray(training_scores), np.asarray(distractor_scores)
  if len(training) == 0:
    raise ValueError("training_scores must hold at least one score; got none.")
  if len(distractors) < len(training):
    raise ValueError(
      f"distractor_scores must hold at least one score per training score, {len(training)}; got {len(distractors)}."
    )
  group = len(distractors) // len(training)
  best_of_group = distractors[: len(training) * group].reshape(len(training), group).max(axis=1)
  hits = int(np.sum(training > best_of_group))
  return {
    "top1": hits / len(training),
    "chance": 1 / (group + 1),
    "hits": hits,
    "candidates": group + 1,
    "p_value": float(stats.binomtest(hits, len(training), 1 / (group + 1), alternative="greater").pvalue),
  }
