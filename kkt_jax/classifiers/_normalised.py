"""Batch norm: the statistics of a batch, from the running averages that follow it, and whether functions agree."""

from collections.abc import Callable, Mapping, Sequence
import logging
from typing import Any

import jax
import jax.numpy as jnp

from kkt_jax._typing import PyTree
from kkt_jax.classifiers import _statistics
from kkt_jax.classifiers.classifier import Classifier, Evaluation, lifted_logits

_APART = (
  0.05  # greatest difference of logits in training and at inference with the same statistics, of the greatest logit
)


def train(
  train_fn: Callable[[PyTree, jax.Array], tuple[Any, ...]],
  stored: _statistics.Stored,
  params: PyTree,
  statistics: PyTree,
  x: jax.Array,
) -> tuple[Any, ...]:
  """What ``train_fn`` gives: logits [M, C], running statistics like the stored ones, and features if it has them."""
  logits, changed, *features = train_fn(stored.whole(params, statistics), x)
  fresh = _statistics.split(changed, frozenset())[1] if isinstance(changed, Mapping) else changed
  needed: Any = jax.tree.structure(statistics)
  if jax.tree.structure(fresh) != needed:
    raise ValueError(
      "train_fn must return (logits, batch_stats), the latter a tree like"
      f" {_statistics.some_names(statistics)}; got {type(changed).__name__} {jax.tree.structure(changed)}."
    )
  return logits, fresh, *features


def evaluate_fn(
  train: Callable[[PyTree, PyTree, jax.Array], tuple[Any, ...]],
  params: PyTree,
  stored: PyTree,
  input_shape: Sequence[int],
) -> Callable[[PyTree, jax.Array], Evaluation]:
  """A pass as in training, with the statistics of the batch, of which running averages hold a share, 1 - momentum."""

  @jax.jit
  def kept(params: PyTree, x: jax.Array) -> PyTree:  # what the next averages keep of a one; no constants to fold
    filled = [jax.tree.map(lambda leaf, v=v: jnp.full_like(leaf, v), stored) for v in (0.0, 1.0)]
    zeros, ones = (train(params, averages, x)[1] for averages in filled)
    return jax.tree.map(lambda zero, one: jnp.mean(one - zero), zeros, ones)

  share = jax.tree.map(lambda part: 1 - float(part), kept(params, jnp.zeros((2, *input_shape))))
  if max(jax.tree.leaves(share)) <= 0:
    raise ValueError(
      "train_fn must return running averages that follow the batch; they do not change with it. (Of a module,"
      " train_argument names what switches it to training.)"
    )

  def evaluate(params: PyTree, x: jax.Array) -> Evaluation:
    logits, fresh, *features = train(params, jax.tree.map(jnp.zeros_like, stored), x)
    statistics = jax.tree.map(lambda leaf, part, kept: leaf / part if part > 0 else kept, fresh, share, stored)
    return Evaluation(logits, statistics, *features)

  return evaluate


def check_train_fn(
  evaluate: Callable[[PyTree, jax.Array], Evaluation],
  inference: Callable[[PyTree, PyTree, jax.Array], Evaluation],
  classifier: Classifier,
  stored: PyTree,
) -> None:
  """Checks that training gives what inference gives with the batch's own statistics; with dropout it does not.

  If every sample comes twice, biased variances stay, and unbiased ones fall from n / (n - 1) to 2n / (2n - 1) times
  them, which tells n, the number of values that a feature has in the batch.
  """
  x = classifier.from_unit(jax.random.uniform(jax.random.key(0), (4, *classifier.input_shape)))

  @jax.jit
  def compared(params: PyTree) -> tuple[jax.Array, jax.Array, PyTree]:
    once, twice = (evaluate(params, batch) for batch in (x, jnp.concatenate([x, x])))
    total = lambda leaf: jnp.sum(leaf.astype(jnp.float32))
    ratios = jax.tree.map(
      lambda one, two: total(two) / jnp.maximum(total(one), 1e-30), once.statistics, twice.statistics
    )
    # With r = 2 (n - 1) / (2n - 1): (n - 1) / n = r / (2 - r), which is 1 for r = 1.
    biased = lambda key, value, ratio: value * ratio / (2 - ratio) if _statistics.is_variance(key[-1].key) else value
    statistics = jax.tree_util.tree_map_with_path(biased, once.statistics, ratios)
    predicted = inference(params, statistics, x)
    return lifted_logits(once.logits), lifted_logits(predicted.logits), ratios

  trained, inferred, ratios = compared(classifier.params)
  apart = float(jnp.max(jnp.abs(trained - inferred)) / jnp.maximum(jnp.max(jnp.abs(inferred)), 1e-30))
  if not apart <= _APART:
    raise ValueError(
      "train_fn must give the logits that apply_fn gives with the statistics of the batch, which it returns; they"
      f" differ by {apart:.0%}. Is dropout or other noise on in it, or is its epsilon another?"
    )
  for (path, ratio), name in zip(
    jax.tree_util.tree_leaves_with_path(ratios), _statistics.names_of(stored), strict=True
  ):
    unbiased = float(ratio) < 1 - 1e-5
    if _statistics.is_variance(path[-1].key) and unbiased != _statistics.is_unbiased(path[-1].key):
      logging.warning(
        "train_fn returns %s variances for %r; by its name it stores %s ones (PyTorch divides by n - 1, flax and Keras"
        " by n).",
        *(("unbiased", name, "biased") if unbiased else ("biased", name, "unbiased")),
      )


def feeds_last_layer(
  evaluate: Callable[[PyTree, jax.Array], Evaluation], params: PyTree, input_shape: Sequence[int]
) -> bool:
  """Whether the ReLU of the features is the last layer's input: the gradient of a logit by a column of the kernel."""
  x = jax.random.normal(jax.random.key(0), (4, *input_shape))

  @jax.jit
  def probe(params: PyTree) -> tuple[jax.Array, PyTree]:
    first_logit = lambda params: jnp.sum(lifted_logits(evaluate(params, x).logits)[:, 0])
    return jax.nn.relu(jnp.asarray(evaluate(params, x).features)), jax.grad(first_logit)(params)

  rectified, gradient = probe(params)
  if rectified.ndim != 2 or not jnp.any(rectified > 0):
    return False
  wanted = jnp.sum(rectified, axis=0)
  matrices = [leaf for leaf in jax.tree.leaves(gradient) if leaf.ndim == 2]
  columns = [matrix[:, 0] for leaf in matrices for matrix in (leaf, leaf.T)]
  near = lambda column: jnp.max(jnp.abs(column - wanted)) <= 1e-4 * jnp.max(jnp.abs(wanted))
  return any(column.shape == wanted.shape and bool(near(column)) for column in columns)
