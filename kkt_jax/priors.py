"""What the equations do not say: priors on the generated samples that choose among the solutions.

The stationarity condition alone does not identify the data; see the README. Only total variation is the paper's. Each
of these is a term that the caller weighs, and each is data-free: it looks at generated samples and at the classifier.
"""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._typing import PyTree


@_checks.annotated
def total_variation(x: ArrayLike) -> jax.Array:
  """Isotropic total variation (Rudin et al. 1992): mean length of the gradient between neighbouring pixels, per image.

  Args:
    x: images [M, H, W, C] or [M, H, W], floating point, H and W at least 2.

  Returns:
    [M], in units of the pixel values. Rounded off below 1e-3, where its gradient falls to 0.

  Raises:
    ValueError: ``x`` is not a batch of such images.

  >>> import jax.numpy as jnp
  >>> print(total_variation(jnp.array([[[0.0, 4.0], [3.0, 0.0]]])).round(2))  # 3 down and 4 across: (9 + 16)^.5
  [5.]
  """
  x = _checks.floats(x)
  _checks.check_batch("x", x)
  if x.ndim not in (3, 4) or min(x.shape[1:3]) < 2:
    raise ValueError(f"x must be images [M, H, W] or [M, H, W, C] with H, W >= 2; got shape {x.shape}.")
  channels, row = math.prod(x.shape[3:]), math.prod(x.shape[2:])
  flat = x.reshape(x.shape[0], -1)  # over one axis loops are fast; the last column has no neighbour, and counts as 0
  down, across = _differences(flat, row, channels)
  inside = np.arange(down.shape[1]) % row < row - channels
  tiny = 1e-3
  lengths = jnp.where(inside, jnp.sqrt(down**2 + across**2 + tiny**2) - tiny, 0.0)
  return jnp.sum(lengths, axis=1) / float(np.count_nonzero(inside))


def _steps_on(flat: jax.Array, *steps: int) -> list[jax.Array]:
  """How much larger the values two steps on are, [M, D - sum of steps] each; the first step is the greatest."""
  last = flat.shape[1] - sum(steps)
  return [flat[:, step : step + last] - flat[:, :last] for step in steps]


def _pulled_back(row: int, channels: int, _: None, gradients: list[jax.Array]) -> tuple[jax.Array]:
  """As JAX has it, but each gradient is laid out among zeros once: one loop over four paddings is thrice as slow."""
  roomy = jax.lax.optimization_barrier([jnp.pad(gradient, ((0, 0), (row, row + channels))) for gradient in gradients])
  at = lambda array, step: array[:, row - step : array.shape[1] - step]
  return (sum(at(array, step) - at(array, 0) for array, step in zip(roomy, (row, channels), strict=True)),)


_differences = jax.custom_vjp(_steps_on, nondiff_argnums=(1, 2))
_differences.defvjp(lambda flat, *steps: (_steps_on(flat, *steps), None), _pulled_back)


@_checks.annotated
def binarisation(x: ArrayLike) -> jax.Array:
  """Pixels of drawings are black or white: ``mean x (1 - x)`` per sample, for x in [0, 1].

  Args:
    x: samples [M, ...]; values outside [0, 1] count as black or white, without gradient.

  Returns:
    [M], between 0 (all pixels black or white) and 1/4 (all grey).

  >>> import jax.numpy as jnp
  >>> print(binarisation(jnp.array([[0.0, 1.0], [0.5, 0.5]])))
  [0.   0.25]
  """
  x = _checks.floats(x)
  _checks.check_batch("x", x)
  x = x.reshape(x.shape[0], -1)
  return jnp.mean(jnp.where((x <= 0) | (x >= 1), 0.0, x * (1 - x)), axis=1)


@_checks.annotated
def out_of_range(x: ArrayLike, *, low: float = 0.0, high: float = 1.0) -> jax.Array:
  """Inputs have a known range: mean squared excess over it, per sample.

  Args:
    x: samples [M, ...].
    low: least possible value.
    high: greatest possible value.

  Returns:
    [M], in squared units of ``x``; 0 where every value lies in [low, high].

  >>> import jax.numpy as jnp
  >>> print(out_of_range(jnp.array([[0.2, 1.0], [-1.0, 2.0]])))
  [0. 1.]
  """
  x = _checks.floats(x)
  _checks.check_batch("x", x)
  excess = jax.nn.relu(low - x) + jax.nn.relu(x - high)
  return jnp.mean(jnp.square(excess).reshape(x.shape[0], -1), axis=1)


def statistics_distance(statistics: PyTree, stored: PyTree) -> jax.Array:
  """How far a batch's internal statistics are from the classifier's stored ones, in units of the stored deviations.

  With batch norm the stored means and variances are part of the given parameters, and the training data reproduce them
  exactly.

  Args:
    statistics: of a generated batch: a tree with a mapping ``{"mean": [F], "var": [F]}`` for each layer.
    stored: the classifier's own, same tree.

  Returns:
    A scalar: the sum over layers of the means over features of ``(mean - stored mean)^2 / stored variance`` and
    ``(deviation / stored deviation - 1)^2``. Dead features (variance 0) count with a variance of 1e-5.

  Raises:
    ValueError: the trees differ.

  >>> import jax.numpy as jnp
  >>> batch = {"layer": {"mean": jnp.array([1.0]), "var": jnp.array([9.0])}}
  >>> stored = {"layer": {"mean": jnp.array([0.0]), "var": jnp.array([4.0])}}
  >>> print(statistics_distance(batch, stored).round(3))  # 1 / 4 + (3 / 2 - 1)^2
  0.5
  """
  _checks.check_same_structure("statistics", statistics, "stored", stored)
  tiny = 1e-5
  statistics, stored = jax.tree.map(_checks.floats, (statistics, stored))

  def distance(batch: Mapping[str, jax.Array], reference: Mapping[str, jax.Array]) -> jax.Array:
    means = jnp.square(batch["mean"] - reference["mean"]) / (reference["var"] + tiny)
    deviations = jnp.square(jnp.sqrt((batch["var"] + tiny) / (reference["var"] + tiny)) - 1)
    return jnp.mean(means) + jnp.mean(deviations)

  def is_layer(node: PyTree) -> bool:
    return isinstance(node, Mapping) and set(node) == {"mean", "var"}

  layers = jax.tree.map(distance, statistics, stored, is_leaf=is_layer)
  return jax.tree.reduce(jnp.add, layers, jnp.zeros(()))


@_checks.annotated
def collapse(features: ArrayLike, of_class: ArrayLike, scale: ArrayLike) -> jax.Array:
  """How far samples are from their class's features (`kkt_jax.analysis.last_layer.LastLayer.collapsed_features`).

  Args:
    features: of the samples [M, F].
    of_class: those of the training samples of their classes [M, F].
    scale: size of each feature [F], not 0, such as the scale of a batch norm.

  Returns:
    [M]: mean over F of the squared distance in units of ``scale``.

  >>> import jax.numpy as jnp
  >>> print(collapse(jnp.array([[1.0, 4.0]]), jnp.array([[1.0, 0.0]]), jnp.array([1.0, 2.0])))  # (0 + 2^2) / 2
  [2.]
  """
  _checks.check_same_shapes("of_class", of_class, "features", features)
  distance = (_checks.floats(features) - _checks.floats(of_class)) / _checks.floats(scale)[None]
  return jnp.mean(jnp.square(distance), axis=1)


@_checks.annotated
@full_precision
def repulsion(x: ArrayLike, labels: ArrayLike, *, bandwidth: float) -> jax.Array:
  """Samples of one label push one another apart: mean over pairs of ``exp(-|x_i - x_j|^2 / (2 bandwidth^2))``.

  Args:
    x: samples [M, D].
    labels: [M]; only pairs of one label count.
    bandwidth: distance at which the push fades, in units of ``x``, positive.

  Returns:
    A scalar in [0, 1]; 0 if no label has two samples.

  Raises:
    ValueError: shapes do not fit or ``bandwidth`` is not positive.

  >>> import jax.numpy as jnp
  >>> print(repulsion(jnp.array([[0.0], [0.0], [9.0]]), jnp.array([0, 0, 0]), bandwidth=1.0).round(4))  # 1 pair of 3
  0.3333
  """
  _checks.check_rank("x", x, 2, "[M, D]")
  _checks.check_positive("bandwidth", bandwidth)
  pairs = _same_label_pairs(labels, jnp.shape(x)[0])
  nearness = jnp.exp(-_squared_distances(_checks.floats(x)) / (2 * bandwidth**2))
  return jnp.sum(jnp.where(pairs, nearness, 0.0)) / jnp.maximum(jnp.sum(pairs), 1).astype(nearness.dtype)


@_checks.annotated
@full_precision
def contrast(first: ArrayLike, second: ArrayLike, *, temperature: float = 0.1) -> jax.Array:
  """Two views of a sample resemble each other more than the views of all others (InfoNCE, van den Oord et al. 2018).

  Where a batch holds all samples, it is the memory bank of contrastive model inversion (CMI, Fang et al. 2021).

  Args:
    first: features of a view of each sample [M, F].
    second: features of another view of each [M, F].
    temperature: of the softmax over cosines, positive.

  Returns:
    A scalar: mean cross-entropy of picking out the other view of a sample among the 2M - 1 other views.

  Raises:
    ValueError: shapes do not fit, or ``temperature`` is not positive.

  >>> import jax.numpy as jnp
  >>> print(contrast(jnp.eye(2), jnp.eye(2), temperature=1.0).round(3))  # ln(e + 1 + 1) - 1
  0.551
  """
  _checks.check_rank("first", first, 2, "[M, F]")
  _checks.check_batch("first", first)
  _checks.check_same_shapes("second", second, "first", first)
  _checks.check_positive("temperature", temperature)
  views = jnp.concatenate([_checks.floats(first), _checks.floats(second)])
  views /= jnp.sqrt(jnp.sum(views**2, axis=1, keepdims=True) + 1e-12)
  count = views.shape[0]
  scores = jnp.where(jnp.eye(count, dtype=bool), -jnp.inf, views @ views.T / temperature)
  partners = jnp.roll(jnp.arange(count), count // 2)
  return jnp.mean(jax.nn.logsumexp(scores, axis=1) - scores[jnp.arange(count), partners])


def _same_label_pairs(labels: ArrayLike, num_samples: int) -> jax.Array:
  """Boolean [M, M]: two different samples of one label."""
  _checks.check_labels("labels", labels, num_samples)
  labels = jnp.asarray(labels)
  return (labels[:, None] == labels[None, :]) & ~jnp.eye(num_samples, dtype=bool)


def _squared_distances(x: jax.Array) -> jax.Array:
  """[M, M] through one matrix product; never below 0."""
  square = jnp.sum(x * x, axis=1)
  return jax.nn.relu(square[:, None] + square[None, :] - 2 * x @ x.T)
