"""What the matrices of all pairs share: the check of the two batches, and the restriction to pairs of one class."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

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
