"""What the last layer reveals about the data: how sure the classifier was of its training samples."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax.analysis import _probing
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AnalysisCriteria
from kkt_jax.kkt import losses


@dataclasses.dataclass(frozen=True)
class LastLayer:
  """The last dense layer, and the batch norm that feeds it through a ReLU, if there is one.

  Attributes:
    kernel: W [F, C].
    bias: [C], zeros if the layer has none.
    scale: gamma of the batch norm [F], or None.
    shift: beta of the batch norm [F], or None.
  """

  kernel: jax.Array
  bias: jax.Array
  scale: jax.Array | None
  shift: jax.Array | None


def typical_margin(kernel: ArrayLike, *, weight_decay: float, competitors: float | None = None) -> float:
  """The margin of a typical training sample, from the last layer of a classifier trained with weight decay.

  The stationarity of the last kernel W, multiplied by W, says ``w |W|^2 = mean_i sum_c p_c (Phi_y - Phi_c)`` (without
  the last bias). Were all training samples equally sure, with equal logits of k competing classes and no probability
  for the others, the right-hand side would be ``q k / (k + e^q)`` with the margin q. It rises to its peak W(k / e) at
  q = 1 + W(k / e), with Lambert's W, and falls beyond: of the two solutions the greater one is returned. Beyond the
  paper, and data-free: multipliers of the right size need samples of the right margin.

  Args:
    kernel: W [F, C].
    weight_decay: w, positive.
    competitors: k, positive. Exact for two classes with 1 and for equal logits with C - 1; C / 2 if None, which is a
      rule of thumb for classes that are not all alike.

  Returns:
    q in logits, at least 1 + W(k / e); NaN if there is no solution: the weights are too large for this weight decay
    (the classifier has not converged, or was trained otherwise), or all 0.

  Raises:
    ValueError: ``kernel`` is not such a matrix, has fewer than two columns, or ``weight_decay`` is not positive.

  >>> q, w = 5.0, 0.01
  >>> size = math.sqrt(q / (1 + math.exp(q)) / w / 2)
  >>> round(typical_margin(jnp.array([[size, -size]]), weight_decay=w), 3)
  5.0
  """
  _checks.check_rank("kernel", kernel, 2, "[F, C]")
  _checks.check_positive("weight_decay", weight_decay)
  num_classes = jnp.shape(kernel)[1]
  if num_classes < 2:
    raise ValueError(f"kernel must have at least two columns; got shape {jnp.shape(kernel)}.")
  others = num_classes / 2 if competitors is None else competitors
  _checks.check_positive("competitors", others)
  from scipy import optimize, special  # type: ignore[import-untyped]

  wanted = weight_decay * float(np.sum(np.square(np.asarray(kernel, np.float64))))
  low = 1 + float(special.lambertw(others / math.e).real)

  def excess(q: float) -> float:
    return math.log(q) + math.log(others / wanted) - float(np.logaddexp(math.log(others), q))

  if not wanted or excess(low) < 0:
    return math.nan
  # q k / (k + e^q) < q k / e^q < wanted as soon as q - log q > log(k / wanted), and log q < q / 2.
  return optimize.brentq(excess, low, low + 2 * math.log(others / wanted))


def most_weight_decay(kernel: ArrayLike) -> float:
  """The greatest weight decay with which training can have ended at a last kernel, whatever the data.

  The right-hand side of the equation in `typical_margin` is greatest where all samples are equally sure and all C - 1
  other classes equally likely: Lambert's W((C - 1) / e). So ``w <= W((C - 1) / e) / |W|^2``.

  Args:
    kernel: W [F, C].

  Returns:
    w; infinite for a kernel of zeros.

  >>> round(most_weight_decay(jnp.eye(2)), 4)  # W(1 / e) = .2785; |W|^2 = 2
  0.1392
  """
  from scipy import special

  size = float(np.sum(np.square(np.asarray(kernel, np.float64))))
  peak = float(special.lambertw((np.shape(kernel)[1] - 1) / math.e).real)
  return peak / size if size else math.inf


def collapsed_features(kernel: ArrayLike, scale: ArrayLike, shift: ArrayLike) -> jax.Array:
  """What the last batch norm gives for every training sample of a class, read off the last layer.

  Late in training all samples of a class have the same features, and the last layer's weights are those features up to
  a factor and a constant for each unit (neural collapse, Papyan et al. 2020). Batch norm fixes both: over classes of
  equal size its output before scale and shift has mean 0 and variance 1. So the weights of class c, standardised over
  the classes of each unit, are that output. Beyond the paper, and data-free.

  Args:
    kernel: W [F, C] of the last layer, whose inputs are the rectified output of the batch norm.
    scale: gamma of the batch norm [F].
    shift: beta of the batch norm [F].

  Returns:
    The output of the batch norm for each class, before the ReLU [C, F].

  Raises:
    ValueError: shapes do not fit, or fewer than two classes.

  >>> print(collapsed_features(jnp.array([[2.0, 0.0], [-1.0, 1.0]]), jnp.array([1.0, 5.0]), jnp.array([0.0, 1.0])))
  [[ 1. -4.]
   [-1.  6.]]
  """
  _checks.check_rank("kernel", kernel, 2, "[F, C]")
  kernel = jnp.asarray(kernel)
  if kernel.shape[1] < 2:
    raise ValueError(f"kernel must have at least two columns; got shape {kernel.shape}.")
  for name, value in (("scale", scale), ("shift", shift)):
    _checks.check_shape(name, value, kernel.shape[:1], "[F]")
  deviation = jnp.std(kernel, axis=1, keepdims=True)
  standardised = (kernel - jnp.mean(kernel, axis=1, keepdims=True)) / jnp.where(deviation > 0, deviation, 1.0)
  return standardised.T * jnp.asarray(scale)[None] + jnp.asarray(shift)[None]


@full_precision
def collapsed_margin(kernel: ArrayLike, bias: ArrayLike, scale: ArrayLike, shift: ArrayLike) -> float:
  """The common margin of the training samples: that of the logits of their `collapsed_features`.

  The scale e^-alpha of Eq. 6 then need not be found by descent.

  Args:
    kernel: W [F, C] of the last layer.
    bias: its bias [C].
    scale: gamma of the batch norm before it [F].
    shift: beta of that batch norm [F].

  Returns:
    The median over classes of the margin to the runner-up, in logits; below 0 if the classifier did not collapse.

  Raises:
    ValueError: shapes do not fit, or fewer than two classes.

  >>> kernel = jnp.array([[2.0, -2.0], [-1.0, 1.0]])  # features (1, 0) and (0, 1): logits (2, -2) and (-1, 1)
  >>> collapsed_margin(kernel, jnp.zeros(2), jnp.ones(2), jnp.zeros(2))
  3.0
  """
  features = jax.nn.relu(collapsed_features(kernel, scale, shift))
  num_classes = features.shape[0]
  _checks.check_shape("bias", bias, (num_classes,), "[C]")
  logits = features @ jnp.asarray(kernel) + jnp.asarray(bias)[None]
  return float(jnp.median(losses.runner_up_margin(logits, jnp.arange(num_classes))))


class LastReading(NamedTuple):
  """The last dense layer, and the places of its kernel and bias among the parameters' leaves; None without one."""

  layer: LastLayer | None = None
  kernel: int | None = None
  bias: int | None = None


def read_last_layer(classifier: Classifier, x: jax.Array, criteria: AnalysisCriteria) -> LastReading:
  """The last dense layer of a network, found by its gradients at an input x [1, *input_shape].

  The gradient of ``v . logits`` by its kernel is the outer product of the layer's input with v, whatever v is.
  """
  leaves = jax.tree.leaves(classifier.params)
  classes = classifier.num_classes
  weights = [np.linspace(-1.0, 1.0, classes, dtype=np.float32), np.cos(np.arange(classes, dtype=np.float32))]
  matrices = _probing.matrices(leaves, classes, axis=1)
  places = _probing.layers(leaves, matrices)
  by_leaf = [_probing.gradients(classifier, direction, x[:1], places)[0] for direction in weights]
  v = [np.asarray(direction, np.float64) for direction in weights]
  alike = lambda a, b: bool(np.linalg.norm(a - b) <= criteria.alike * max(float(np.linalg.norm(a)), 1e-30))
  for place, turned in matrices:
    gradients = [slopes[place].T if turned else slopes[place] for slopes in by_leaf]
    inputs = gradients[0] @ v[0] / (v[0] @ v[0])
    if not np.any(inputs) or not all(alike(g, np.outer(inputs, d)) for g, d in zip(gradients, v, strict=True)):
      continue
    biases = [i for i, leaf in enumerate(leaves) if leaf.shape == (classes,)]
    bias = next((i for i in biases if all(alike(g[i], d) for g, d in zip(by_leaf, v, strict=True))), None)
    kernel = leaves[place].T if turned else leaves[place]
    scale, shift = _last_norm(classifier, x, kernel.shape[0], criteria.alike)
    layer = LastLayer(kernel, jnp.zeros(classes) if bias is None else leaves[bias], scale, shift)
    return LastReading(layer, place, bias)
  return LastReading()


def _last_norm(
  classifier: Classifier, x: jax.Array, width: int, alike: float
) -> tuple[jax.Array | None, jax.Array | None]:
  """Scale and shift [F] of the batch norm whose output is the features: f = scale * normalised + shift."""
  if classifier.features_fn is None:
    return None, None
  features_fn, (leaves, structure) = classifier.features_fn, jax.tree.flatten(classifier.params)
  places = [i for i, leaf in enumerate(leaves) if leaf.shape == (width,)]

  @jax.jit
  def of_one(leaves: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """Features [F] of a sample, and the derivative of their sum: by the shift 1, by the scale the normalised value."""

    def features(chosen: list[jax.Array]) -> jax.Array:
      replaced = dict(zip(places, chosen, strict=True))
      return features_fn(jax.tree.unflatten(structure, [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]), x[:1])

    output, pull_back = jax.vjp(features, [leaves[i] for i in places])
    return output[0], pull_back(jnp.ones_like(output))[0]

  whole, gradients = of_one(leaves)
  features, gradient = np.asarray(whole, np.float64), dict(zip(places, gradients, strict=True))
  shifts = [i for i in places if np.allclose(gradient[i], 1.0, atol=alike)]
  for shift in shifts:
    for scale in places:
      value = np.asarray(leaves[scale] * gradient[scale] + leaves[shift], np.float64)
      if scale != shift and np.linalg.norm(value - features) <= alike * np.linalg.norm(features):
        return leaves[scale], leaves[shift]
  return None, None


def decay_limit(classifier: Classifier, reading: LastReading) -> tuple[float | None, float]:
  """The greatest possible ``weight_decay``, None if unknown, and the squared length in the target of what is above it.

  The latter is squared and absolute: with ``own > most``, no data reach more than ``most W`` of ``own W``, along W.
  """
  if reading.layer is None or reading.kernel is None:
    return None, 0.0
  most = most_weight_decay(reading.layer.kernel)
  if classifier.weight_decay is None:
    return most, 0.0
  decay = float(classifier.decays[reading.kernel])
  size = float(np.sum(np.square(np.asarray(reading.layer.kernel, np.float64))))
  return (float(classifier.weight_decay) * most / decay, max(decay - most, 0.0) ** 2 * size) if decay else (None, 0.0)


def margin_of(classifier: Classifier, reading: LastReading) -> float | None:
  """The typical margin of the training data, if the last layer reveals it."""
  last, place = reading.layer, reading.kernel
  if last is None or place is None:
    return None
  margin = math.nan
  if classifier.weight_decay is not None:
    decay = classifier.decays[place]
    margin = typical_margin(last.kernel, weight_decay=decay) if decay else math.nan
  elif last.scale is not None and last.shift is not None:
    margin = collapsed_margin(last.kernel, last.bias, last.scale, last.shift)
  return margin if margin > 0 else None
