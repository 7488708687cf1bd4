"""What distinguishes the layers of any network: gradients of single inputs, shapes and digits of tensors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AnalysisCriteria


def gradients(classifier: Classifier, weights: np.ndarray, samples: jax.Array) -> list[list[np.ndarray]]:
  """For each sample the gradient of ``weights . logits`` at inference by every tensor."""
  found = [_gradient(classifier.predict_fn, classifier.params, weights, sample) for sample in np.asarray(samples)]
  return [[np.asarray(g, np.float64) for g in jax.tree.leaves(own)] for own in found]


@functools.partial(jax.jit, static_argnames="predict_fn")
def _gradient(predict_fn: ApplyFn, params: PyTree, weights: jax.Array, sample: jax.Array) -> PyTree:
  return jax.grad(lambda p: jnp.vdot(predict_fn(p, sample[None])[0], weights))(params)


def matrices(leaves: list[jax.Array], size: int, *, axis: int) -> list[tuple[int, bool]]:
  """Matrices with a side of a given size, as flax lays them out (along ``axis``), then turned, as PyTorch does."""
  flat = [(i, leaf.shape) for i, leaf in enumerate(leaves) if leaf.ndim == 2]
  return [(i, turned) for turned in (False, True) for i, shape in flat if shape[1 - axis if turned else axis] == size]


def rounded(params: PyTree, criteria: AnalysisCriteria) -> bool:
  """Whether all matrices of a tree hold values of 16 bits."""
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params) if np.ndim(leaf) > 1]
  alike = lambda leaf, dtype: bool(np.all(leaf == leaf.astype(dtype).astype(leaf.dtype)))
  few = lambda leaf: len(np.unique(leaf)) < criteria.few_values  # such as ones
  with np.errstate(over="ignore"):
    held = any(all(alike(leaf, dtype) for leaf in leaves) for dtype in (jnp.bfloat16, jnp.float16))
  return held and not all(map(few, leaves))
