"""Euclidean distances between samples: near data within a radius, and the spread within a class.

The first three functions are what every comparison of all pairs shares.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks


def check_batches(a_name: str, a: ArrayLike, b_name: str, b: ArrayLike) -> None:
  """Raises ValueError unless both are non-empty floating-point batches of samples of one shape."""
  _checks.check_batch(a_name, a)
  _checks.check_batch(b_name, b)
  if jnp.shape(a)[1:] != jnp.shape(b)[1:]:
    needs = ", ".join(str(size) for size in jnp.shape(a)[1:])
    raise ValueError(f"{b_name} must hold samples like {a_name}, shape [..., {needs}]; got shape {jnp.shape(b)}.")


def same_class(sample_labels: ArrayLike, num_samples: int, data_labels: ArrayLike, num_data: int) -> jax.Array:
  """Boolean [S, N]: sample and data point have one label. Raises ValueError for labels that do not fit."""
  _checks.check_labels("sample_labels", sample_labels, num_samples)
  _checks.check_labels("data_labels", data_labels, num_data)
  return jnp.asarray(sample_labels)[:, None] == jnp.asarray(data_labels)[None, :]


def within_class(matrix: jax.Array, sample_labels: ArrayLike, data_labels: ArrayLike, other: float) -> jax.Array:
  """The matrix [S, N] with ``other`` where the labels of row and column differ."""
  return jnp.where(same_class(sample_labels, matrix.shape[0], data_labels, matrix.shape[1]), matrix, other)


@_checks.annotated
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
  check_batches("a", a, "b", b)
  a, b = (jnp.asarray(value).reshape(jnp.shape(value)[0], -1) for value in (a, b))
  return jax.lax.map(lambda row: jnp.sqrt(jnp.sum(jnp.square(row[None] - b), axis=1)), a)


@_checks.annotated
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
  >>> precision_coverage(jnp.array([[0.0], [5.0]]), jnp.array([0, 0]), jnp.array([[0.5]]), jnp.array([0]), radius=0.5)
  {'precision': 0.5, 'coverage': 1.0, 'median_distance': 2.5}
  """
  check_batches("samples", samples, "data", data)
  distance = within_class(pairwise_distance(samples, data), sample_labels, data_labels, jnp.inf)
  nearest = jnp.min(distance, axis=1)
  return {
    "precision": float(jnp.mean(nearest <= radius)),
    "coverage": float(jnp.mean(jnp.min(distance, axis=0) <= radius)),
    "median_distance": float(jnp.median(nearest)),
  }


@_checks.annotated
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
    of_class = features[labels == label]
    if len(of_class) > 1:
      means.append(float(jnp.sum(pairwise_distance(of_class, of_class))) / (len(of_class) * (len(of_class) - 1)))
  return float(np.mean(means)) if means else 0.0
