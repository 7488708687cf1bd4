"""What distinguishes the layers of any network: gradients of single inputs, shapes and digits of tensors."""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AnalysisCriteria


def gradients(
  classifier: Classifier, weights: np.ndarray, samples: jax.Array, places: Sequence[int]
) -> list[dict[int, np.ndarray]]:
  """For each sample, the gradients of ``weights . logits`` at inference by the tensors at some places, by place."""
  params, wanted = classifier.params, tuple(sorted(set(places)))
  if not wanted:
    return [{} for _ in samples]
  slopes = [_gradient(classifier.predict_fn, params, weights, sample, wanted) for sample in np.asarray(samples)]
  return [{place: np.asarray(g, np.float64) for place, g in zip(wanted, row, strict=True)} for row in slopes]


@functools.partial(jax.jit, static_argnames=("predict_fn", "places"))
def _gradient(
  predict_fn: ApplyFn, params: PyTree, weights: jax.Array, sample: jax.Array, places: tuple[int, ...]
) -> list[jax.Array]:
  leaves, structure = jax.tree.flatten(params)

  def logit(chosen: list[jax.Array]) -> jax.Array:
    replaced = dict(zip(places, chosen, strict=True))
    whole = jax.tree.unflatten(structure, [replaced.get(place, leaf) for place, leaf in enumerate(leaves)])
    return jnp.vdot(predict_fn(whole, sample[None])[0], weights)

  return jax.grad(logit)([leaves[place] for place in places])


def matrices(leaves: list[jax.Array], size: int, *, axis: int) -> list[tuple[int, bool]]:
  """Matrices with a side of a given size, as flax lays them out (along ``axis``), then turned, as PyTorch does."""
  flat = [(i, leaf.shape) for i, leaf in enumerate(leaves) if leaf.ndim == 2]
  return [(i, turned) for turned in (False, True) for i, shape in flat if shape[1 - axis if turned else axis] == size]


def layers(leaves: list[jax.Array], kernels: list[tuple[int, bool]]) -> list[int]:
  """The places of matrices, and of the vectors that can be their biases."""
  sides = {side for place, _ in kernels for side in leaves[place].shape}
  return [place for place, _ in kernels] + [i for i, leaf in enumerate(leaves) if leaf.ndim == 1 and leaf.size in sides]


def rounded(params: PyTree, criteria: AnalysisCriteria) -> bool:
  """Whether all matrices of a tree hold values that 16 bits can represent."""
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params) if np.ndim(leaf) > 1]
  alike = lambda leaf, dtype: bool(np.all(leaf == leaf.astype(dtype).astype(leaf.dtype)))
  few = lambda leaf: len(np.unique(leaf)) < criteria.few_values  # such as ones
  with np.errstate(over="ignore"):
    held = any(all(alike(leaf, dtype) for leaf in leaves) for dtype in (jnp.bfloat16, jnp.float16))
  return held and not all(map(few, leaves))
