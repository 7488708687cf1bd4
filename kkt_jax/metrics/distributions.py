"""Two sets of features as draws from two distributions: fidelity, diversity and a distance between them."""

import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax.metrics.distances import check_batches, pairwise_distance


@_checks.annotated
def precision_recall(
  real: ArrayLike, real_labels: ArrayLike, generated: ArrayLike, generated_labels: ArrayLike, *, k: int
) -> dict[str, float]:
  """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), class by class.

  The support of a set is the union of the balls around its points, each as large as the distance to the point's k-th
  nearest neighbour in that set. A point is not its own neighbour; its duplicates are. A point on the surface of a ball
  lies in it, as in the first paper; the code of the second leaves the surface out.

  Args:
    real: features [R, ...].
    real_labels: [R].
    generated: features [G, ...].
    generated_labels: [G].
    k: which nearest neighbour sets the radius, at least 1.

  Returns:
    Means over the classes, which weigh equally, of: ``precision``, share of generated points in a real ball;
    ``recall``, share of real points in a generated ball; ``density``, mean over generated points of the number of real
    balls around them, over k (above 1 where the generated ones sit where the real ones are dense); ``coverage``, share
    of real balls that hold a generated point.

  Raises:
    ValueError: features or labels that do not fit, features that are not finite, ``k`` below 1, or a class with at
      most ``k`` real or at most ``k`` generated points.

  >>> import jax.numpy as jnp
  >>> real, labels = jnp.array([[0.0], [1.0], [3.0]]), jnp.array([0, 0, 0])  # radii 1, 1, 2
  >>> precision_recall(real, labels, jnp.array([[4.0], [8.0]]), jnp.array([0, 0]), k=1)  # radii 4, 4
  {'precision': 0.5, 'recall': 1.0, 'density': 0.5, 'coverage': 0.3333333333333333}
  """
  check_batches("real", real, "generated", generated)
  _checks.check_labels("real_labels", real_labels, jnp.shape(real)[0])
  _checks.check_labels("generated_labels", generated_labels, jnp.shape(generated)[0])
  _checks.check_at_least("k", k, 1)
  _checks.check_finite("real", real)
  _checks.check_finite("generated", generated)
  real, generated = np.asarray(real), np.asarray(generated)
  real_labels, generated_labels = np.asarray(real_labels), np.asarray(generated_labels)
  classes = []
  for label in np.union1d(real_labels, generated_labels):
    own_real, own_generated = real[real_labels == label], generated[generated_labels == label]
    for name, own in (("real", own_real), ("generated", own_generated)):
      if len(own) <= k:
        raise ValueError(f"{name} must hold more than k = {k} samples of every class; got {len(own)} of class {label}.")
    classes.append(_class_precision_recall(own_real, own_generated, k))
  return {name: float(np.mean([of_class[name] for of_class in classes])) for name in classes[0]}


def _class_precision_recall(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
  distance = np.asarray(pairwise_distance(real, generated))
  in_real_ball = distance <= _neighbour_radius(real, k)[:, None]
  in_generated_ball = distance <= _neighbour_radius(generated, k)[None, :]
  return {
    "precision": float(np.mean(in_real_ball.any(axis=0))),
    "recall": float(np.mean(in_generated_ball.any(axis=1))),
    "density": float(np.mean(in_real_ball.sum(axis=0))) / k,
    "coverage": float(np.mean(in_real_ball.any(axis=1))),
  }


def _neighbour_radius(points: np.ndarray, k: int) -> np.ndarray:
  """[P]: distance of each point from its k-th nearest other point."""
  distance = np.array(pairwise_distance(points, points))
  np.fill_diagonal(distance, np.inf)
  return np.partition(distance, k - 1, axis=1)[:, k - 1]


@_checks.annotated
def kernel_distance(a: ArrayLike, b: ArrayLike) -> float:
  """Kernel distance of two sets of features, unbiased (KID, Binkowski et al. 2018).

  The squared maximum mean discrepancy ``mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean k(a_i, b_j)``
  with the kernel ``k(x, y) = (x . y / F + 1)^3``. All pairs are used, where the paper averages over subsets. In double
  precision: the three means are much larger than what is left of them.

  Args:
    a: features [A, F], A at least 2.
    b: features [B, F], B at least 2.

  Returns:
    A float, symmetric in ``a`` and ``b``. 0 on average for two sets of one distribution, and so at times negative.

  Raises:
    ValueError: features of different shapes, or fewer than two of either.

  >>> import jax.numpy as jnp
  >>> kernel_distance(jnp.array([[0.0], [0.0]]), jnp.array([[1.0], [1.0]]))  # 1 + 8 - 2 * 1
  7.0
  """
  _checks.check_rank("a", a, 2, "[A, F]")
  _checks.check_rank("b", b, 2, "[B, F]")
  check_batches("a", a, "b", b)
  for name, features in (("a", a), ("b", b)):
    if jnp.shape(features)[0] < 2:
      raise ValueError(f"{name} must hold at least two samples; got shape {jnp.shape(features)}.")
  x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)

  def kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left @ right.T / left.shape[1] + 1) ** 3

  def mean_of_different(features: np.ndarray) -> float:
    values = kernel(features, features)
    return float((values.sum() - np.trace(values)) / (len(features) * (len(features) - 1)))

  return mean_of_different(x) + mean_of_different(y) - 2 * float(kernel(x, y).mean())
