"""Euclidean distances between samples: near data within a radius, and the spread within a class."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax.metrics import _pairs


@jax.jit
def pairwise_distance(a: ArrayLike, b: ArrayLike) -> jax.Array:
  """Euclidean distance of every sample of ``a`` from every sample of ``b``.

  Args:
    a: [A, ...], floating point.
    b: [B, ...], samples of the same shape.

  Returns:
    [A, B], in units of the samples. Differences are squared before they are summed, so equal samples are at exactly 0.

  Raises:
    ValueError: the batches are empty, not floating point or of different shapes.

  >>> import jax.numpy as jnp
  >>> print(pairwise_distance(jnp.array([[0.0, 0.0]]), jnp.array([[3.0, 4.0], [0.0, 1.0]])))
  [[5. 1.]]
  """
  _pairs.check_batches("a", a, "b", b)
  a, b = (jnp.asarray(value).reshape(jnp.shape(value)[0], -1) for value in (a, b))
  return jax.lax.map(lambda row: jnp.sqrt(jnp.sum(jnp.square(row[None] - b), axis=1)), a)


def precision_coverage(
  samples: ArrayLike, sample_labels: ArrayLike, data: ArrayLike, data_labels: ArrayLike, *, radius: float
) -> dict[str, float]:
  """How many samples lie near data of their class, and how many data points have such a sample.

  Args:
    samples: [S, ...].
    sample_labels: [S].
    data: [N, ...].
    data_labels: [N].
    radius: what counts as near, in units of the data.

  Returns:
    ``precision``: share of samples within ``radius`` of a data point of their class; ``coverage``: share of data points
    with a sample of their class within ``radius``; ``median_distance``: median over samples of the distance to the
    nearest data point of their class.

  Raises:
    ValueError: samples or labels that do not fit.

  >>> import jax.numpy as jnp
  >>> precision_coverage(jnp.array([[0.0], [5.0]]), jnp.array([0, 0]), jnp.array([[0.1]]), jnp.array([0]), radius=0.2)
  {'precision': 0.5, 'coverage': 1.0, 'median_distance': 2.5}
  """
  _pairs.check_batches("samples", samples, "data", data)
  distance = _pairs.within_class(pairwise_distance(samples, data), sample_labels, data_labels, jnp.inf)
  nearest = jnp.min(distance, axis=1)
  return {
    "precision": float(jnp.mean(nearest <= radius)),
    "coverage": float(jnp.mean(jnp.min(distance, axis=0) <= radius)),
    "median_distance": round(float(jnp.median(nearest)), 6),
  }


def within_class_distance(features: ArrayLike, labels: ArrayLike) -> float:
  """Mean distance of two different samples of one class, averaged over the classes that have at least two samples.

  The ``spread`` of the experiments is this over the same of real data: 0 where a class has collapsed to one image.

  Args:
    features: [S, ...].
    labels: [S].

  Returns:
    A float, in units of the features; 0 where no class has two samples.

  Raises:
    ValueError: features or labels that do not fit.

  >>> import jax.numpy as jnp
  >>> within_class_distance(jnp.array([[0.0], [4.0], [9.0]]), jnp.array([0, 0, 1]))
  4.0
  """
  _checks.check_batch("features", features)
  _checks.check_labels("labels", labels, jnp.shape(features)[0])
  features, labels = np.asarray(features), np.asarray(labels)
  means = []
  for label in np.unique(labels):
    own = features[labels == label]
    if len(own) > 1:
      means.append(float(jnp.sum(pairwise_distance(own, own))) / (len(own) * (len(own) - 1)))
  return float(np.mean(means)) if means else 0.0
