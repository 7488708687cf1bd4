"""Batches larger than memory: means over samples, gathered microbatch by microbatch, with an exact gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kkt_jax import _checks
from kkt_jax.classifier import PyTree


def microbatch_mean(function: Callable[[PyTree], PyTree], batch: PyTree, *, size: int | None) -> PyTree:
  """The mean over microbatches of what a function returns for each, as if it had seen the whole batch at once.

  It is exact where the function itself returns means over its samples, such as the stationarity sum (Eq. 4). What is
  computed from that mean, such as the squared residual, then has its exact gradient in two passes over the
  microbatches: the first adds up the mean; the second, in reverse mode, runs each microbatch again and pulls the
  gradient back through it. What the first pass computed on its way is not kept, so memory does not grow with the batch.

  Args:
    function: from a microbatch, a pytree with leaves [size, ...], to a pytree of floating-point arrays. It may close
      over traced values, such as the parameters that the gradient is taken of.
    batch: the whole batch, a pytree with leaves [M, ...].
    size: samples of a microbatch, a divisor of M; the whole batch at once where None.

  Returns:
    The mean, a pytree like what the function returns.

  Raises:
    ValueError: ``size`` is below 1 or does not divide M.

  >>> print(microbatch_mean(lambda x: jnp.mean(x, axis=0), jnp.array([[1.0], [2.0], [3.0], [6.0]]), size=2))
  [3.]
  """
  num_samples = jax.tree.leaves(batch)[0].shape[0]
  if size is None:
    return function(batch)
  _checks.check_at_least("size", size, 1)
  if num_samples % size:
    raise ValueError(f"size must divide the {num_samples} samples of the batch; got {size}.")
  number = num_samples // size
  parts = jax.tree.map(lambda leaf: leaf.reshape(number, size, *leaf.shape[1:]), batch)
  again = jax.checkpoint(function)

  def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
    return jax.tree.map(jnp.add, total, again(part)), None

  first = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], parts))
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
  total, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda leaf: leaf / number, total)
