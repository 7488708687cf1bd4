"""The Gram matrix of many samples' gradients, in one pass over the samples wherever a layer allows it.

The gradient of one sample by a dense layer's kernel is ``x s^T``, its input times its signal. So the Gram matrix of
many is ``(X X^T) * (S S^T)``, and memory does not grow with samples times parameters.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

_RANK_ONE = 1e-5  # up to which share of its length a gradient is a product of two vectors; float32 leaves 1e-7
_ROWS = 2**30  # bytes of the gradients that are kept where they are no such products
_COLUMNS = 2**16  # of them in float64 at once
SKETCHED = 2**21  # entries of a sample's gradients that are no such products, beyond which sums of them stand for them
_SUMS = 2**18  # such sums, less if there are many samples

Gradients = Callable[[slice], list[jax.Array]]


@jax.jit
def _factors(leaf: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """u [m, R], v [m, C] with ``u v^T`` = leaf [m, ..., C] where that has rank one, and the greatest share it misses."""
  matrices = leaf.reshape(leaf.shape[0], -1, leaf.shape[-1])
  longest = jnp.argmax(jnp.sum(jnp.square(matrices), axis=2), axis=1)
  v = jnp.take_along_axis(matrices, longest[:, None, None], axis=1)[:, 0]
  u = jnp.einsum("mrc,mc->mr", matrices, v) / jnp.maximum(jnp.sum(jnp.square(v), axis=1, keepdims=True), 1e-37)
  lengths = jnp.sum(jnp.square(matrices), axis=(1, 2))
  missed = jnp.sum(jnp.square(matrices - u[:, :, None] * v[:, None]), axis=(1, 2))
  return u, v, jnp.max(jnp.sqrt(missed / jnp.maximum(lengths, 1e-37)), initial=0.0)


def gram(
  gradients: Gradients, count: int, target: Sequence[np.ndarray], *, chunk_size: int
) -> tuple[np.ndarray, np.ndarray]:
  """All inner products of the gradients of M samples, and those with a target, in float64.

  Gradients of many entries that are no such products are summed with random signs into 260,000 numbers, in one pass:
  inner products of unit gradients are then off by about .002, one over the root of that number; lengths and products
  with the target are not.

  Args:
    gradients: of the samples of a slice, a list of tensors [m, ...].
    count: how many samples there are, M.
    target: a tensor for each of these, without the first axis.
    chunk_size: samples whose gradients are in memory at once; of tensors that no dense layer has, a GiB besides.

  Returns:
    The products of gradients [M, M] and those with the target [M].
  """
  chunks = _slices(count, chunk_size)
  if sum(wanted.size for wanted in target) > SKETCHED:
    first = [leaf.ndim > 2 and float(_factors(leaf)[2]) <= _RANK_ONE for leaf in map(jnp.asarray, gradients(chunks[0]))]
    if sum(wanted.size for wanted, product in zip(target, first, strict=True) if not product) > SKETCHED:
      return _sketched(gradients, chunks, target, first)
  factors = [[_factors(leaf) for leaf in gradients(chunk) if leaf.ndim > 2] for chunk in chunks]
  products, total, rest = np.zeros(count), np.zeros((count, count)), []
  matrices = iter(zip(*factors, strict=True))
  for place, wanted in enumerate(target):
    pairs = next(matrices) if wanted.ndim > 1 else []
    if not pairs or max(float(missed) for _, _, missed in pairs) > _RANK_ONE:
      rest.append(place)
      continue
    u, v = (np.concatenate([np.asarray(pair[i], np.float64) for pair in pairs]) for i in range(2))
    products += np.sum((u @ wanted.reshape(u.shape[1], -1)) * v, axis=1)
    total += (u @ u.T) * (v @ v.T)
  if not rest:
    return total, products
  flat = np.concatenate([target[place].reshape(-1) for place in rest])[None]

  def rows(block: slice) -> np.ndarray:
    parts = []
    for chunk in _slices(block.stop, chunk_size, block.start):
      leaves = gradients(chunk)
      parts.append(np.concatenate([np.asarray(leaves[i]).reshape(leaves[i].shape[0], -1) for i in rest], axis=1))
    return np.concatenate(parts)

  blocks = _slices(count, max(1, _ROWS // (2 * 4 * flat.size)))
  for number, block in enumerate(blocks):
    block_rows = rows(block)
    products[block] += _products(block_rows, flat)[:, 0]
    for other in blocks[number:]:
      between = _products(block_rows, block_rows if other is block else rows(other))
      total[block, other] += between
      if other is not block:
        total[other, block] += between.T
  return total, products


def _sketched(
  gradients: Gradients, chunks: Sequence[slice], target: Sequence[np.ndarray], are_products: Sequence[bool]
) -> tuple[np.ndarray, np.ndarray]:
  """The same in one pass, with sums of entries with random signs for all but what are products of two vectors."""
  count, rest = chunks[-1].stop, [place for place, is_product in enumerate(are_products) if not is_product]
  flat = np.concatenate([target[place].reshape(-1) for place in rest])
  number = min(_SUMS, 2**28 // count) | 1  # odd: widths of layers are even
  padded = -(-flat.size // number) * number
  signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), padded)
  rows, products = np.zeros((count, number), np.float32), np.zeros(count)
  pairs: dict[int, list[tuple[np.ndarray, ...]]] = {place: [] for place in range(len(target)) if place not in rest}
  for chunk in chunks:
    leaves = gradients(chunk)
    for place, collected in pairs.items():
      *factors, missed = _factors(leaves[place])
      if float(missed) > _RANK_ONE:
        return _sketched(gradients, chunks, target, [flag and at != place for at, flag in enumerate(are_products)])
      collected.append(tuple(np.asarray(factor, np.float64) for factor in factors))
    arrays = [np.asarray(leaves[place]) for place in rest]
    for row, sample in enumerate(range(chunk.start, chunk.stop)):
      entries = np.concatenate([array[row].reshape(-1) for array in arrays])
      products[sample] = entries @ flat
      summed = (np.pad(entries, (0, padded - flat.size)) * signs).reshape(-1, number).sum(axis=0)
      rows[sample] = summed * np.linalg.norm(entries) / max(float(np.linalg.norm(summed)), 1e-37)
  total = _products(rows, rows)
  for place, collected in pairs.items():
    u, v = (np.concatenate(factors) for factors in zip(*collected, strict=True))
    products += np.sum((u @ target[place].reshape(u.shape[1], -1)) * v, axis=1)
    total += (u @ u.T) * (v @ v.T)
  return total, products


def _slices(stop: int, size: int, start: int = 0) -> list[slice]:
  return [slice(begin, min(begin + size, stop)) for begin in range(start, stop, size)]


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  total = np.zeros((len(a), len(b)))
  for columns in _slices(a.shape[1], _COLUMNS):
    total += a[:, columns].astype(np.float64) @ b[:, columns].astype(np.float64).T
  return total
