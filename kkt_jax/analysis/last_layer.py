"""What the last layer reveals about the data: how sure the classifier was of its training samples."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax._precision import full_precision
from kkt_jax.analysis.probing import Probes
from kkt_jax.kkt import losses


@dataclasses.dataclass(frozen=True, eq=False)
class LastLayer:
  """The last dense layer, and the batch norm that feeds it through a ReLU, if there is one.

  Attributes:
    kernel: W [F, C], of two classes or more.
    bias: [C], zeros if the layer has none.
    scale: gamma of the batch norm [F], or None.
    shift: beta of the batch norm [F], or None.
    decay: the kernel's weight decay, or None if it is unknown.
    place: of the kernel among the parameters' leaves.
    bias_place: of the bias, or None.
  """

  kernel: jax.Array
  bias: jax.Array
  scale: jax.Array | None = None
  shift: jax.Array | None = None
  decay: float | None = None
  place: int = 0
  bias_place: int | None = None

  @functools.cached_property
  def square(self) -> float:
    """The sum of the squares of W."""
    return float(np.sum(np.square(np.asarray(self.kernel, np.float64))))

  def typical_margin(self, *, weight_decay: float, competitors: float | None = None) -> float:
    """The margin of a typical training sample, if the classifier was trained with weight decay.

    The stationarity of W, multiplied by W, says ``w |W|^2 = mean_i sum_c p_c (Phi_y - Phi_c)`` (without the last bias).
    Were all training samples equally sure, with equal logits of k competing classes and no probability for the others,
    the right-hand side would be ``q k / (k + e^q)`` with the margin q. It rises to its peak W(k / e) at
    q = 1 + W(k / e), with Lambert's W, and falls beyond: of the two solutions the greater one is returned. Beyond the
    paper, and data-free: multipliers of the right size need samples of the right margin.

    Args:
      weight_decay: w, positive.
      competitors: k, positive. Exact for two classes with 1 and for equal logits with C - 1; C / 2 if None, which is a
        rule of thumb for classes that are not all alike.

    Returns:
      q in logits, at least 1 + W(k / e); NaN if there is no solution: the weights are too large for this weight decay
      (the classifier has not converged, or was trained otherwise), or all 0.

    >>> q, w = 5.0, 0.01
    >>> size = math.sqrt(q / (1 + math.exp(q)) / w / 2)
    >>> round(LastLayer(jnp.array([[size, -size]]), jnp.zeros(2)).typical_margin(weight_decay=w), 3)
    5.0
    """
    from scipy import optimize, special  # type: ignore[import-untyped]

    others = self.kernel.shape[1] / 2 if competitors is None else competitors
    wanted = weight_decay * self.square
    low = 1 + float(special.lambertw(others / math.e).real)

    def excess(q: float) -> float:
      return math.log(q) + math.log(others / wanted) - float(np.logaddexp(math.log(others), q))

    if not wanted or excess(low) < 0:
      return math.nan
    # q k / (k + e^q) < q k / e^q < wanted as soon as q - log q > log(k / wanted), and log q < q / 2.
    return optimize.brentq(excess, low, low + 2 * math.log(others / wanted))

  @property
  def most_weight_decay(self) -> float:
    """The greatest weight decay w with which training can have ended, whatever the data; infinite for weights of 0.

    The right-hand side of the equation in `typical_margin` is greatest where all samples are equally sure and all C - 1
    other classes equally likely: Lambert's W((C - 1) / e). So ``w <= W((C - 1) / e) / |W|^2``.

    >>> round(LastLayer(jnp.eye(2), jnp.zeros(2)).most_weight_decay, 4)  # W(1 / e) = .2785; |W|^2 = 2
    0.1392
    """
    from scipy import special

    peak = float(special.lambertw((self.kernel.shape[1] - 1) / math.e).real)
    return peak / self.square if self.square else math.inf

  @property
  def collapsed_features(self) -> jax.Array | None:
    """What the last batch norm gives for every training sample of a class, before the ReLU [C, F]; None without it.

    Late in training all samples of a class have the same features, and the last layer's weights are those features up
    to a factor and a constant for each unit (neural collapse, Papyan et al. 2020). Batch norm fixes both: over classes
    of equal size its output before scale and shift has mean 0 and variance 1. So the weights of class c, standardised
    over the classes of each unit, are that output. Beyond the paper, and data-free.

    >>> kernel, scale, shift = jnp.array([[2.0, 0.0], [-1.0, 1.0]]), jnp.array([1.0, 5.0]), jnp.array([0.0, 1.0])
    >>> print(LastLayer(kernel, jnp.zeros(2), scale, shift).collapsed_features)
    [[ 1. -4.]
     [-1.  6.]]
    """
    if self.scale is None or self.shift is None:
      return None
    deviation = jnp.std(self.kernel, axis=1, keepdims=True)
    centred = self.kernel - jnp.mean(self.kernel, axis=1, keepdims=True)
    return (centred / jnp.where(deviation > 0, deviation, 1.0)).T * self.scale[None] + self.shift[None]

  @property
  @full_precision
  def collapsed_margin(self) -> float:
    """The common margin of the training samples in logits: that of their `collapsed_features`; NaN without these.

    The median over classes of the margin to the runner-up; below 0 if the classifier did not collapse. The scale
    e^-alpha of Eq. 6 then need not be found by descent.

    >>> kernel = jnp.array([[2.0, -2.0], [-1.0, 1.0]])  # features (1, 0) and (0, 1): logits (2, -2) and (-1, 1)
    >>> LastLayer(kernel, jnp.zeros(2), jnp.ones(2), jnp.zeros(2)).collapsed_margin
    3.0
    """
    features = self.collapsed_features
    if features is None:
      return math.nan
    logits = jax.nn.relu(features) @ self.kernel + self.bias[None]
    return float(jnp.median(losses.runner_up_margin(logits, jnp.arange(len(features)))))

  @property
  def margin(self) -> float | None:
    """The typical margin of the training data, by weight decay or else by batch norm; None if it is not revealed."""
    margin = self.collapsed_margin if self.decay is None else math.nan
    if self.decay:
      margin = self.typical_margin(weight_decay=self.decay)
    return margin if margin > 0 else None

  @property
  def beyond(self) -> float:
    """The squared length in the target of the weight decay above the greatest possible one; no data reach it.

    Of ``decay W`` they reach ``most_weight_decay W`` at most.
    """
    return 0.0 if self.decay is None else max(self.decay - self.most_weight_decay, 0.0) ** 2 * self.square


def read_last_layer(probes: Probes) -> LastLayer | None:
  """The last dense layer of a network, found by its gradients at one input.

  The gradient of ``v . logits`` by its kernel is the outer product of the layer's input with v, whatever v is.
  """
  classifier, leaves, classes = probes.classifier, probes.leaves, probes.classifier.num_classes
  weights = [np.linspace(-1.0, 1.0, classes, dtype=np.float32), np.cos(np.arange(classes, dtype=np.float32))]
  matrices = probes.matrices(classes, axis=1)
  by_leaf = [probes.gradients(direction, 1, matrices)[0] for direction in weights]
  v = [np.asarray(direction, np.float64) for direction in weights]
  error = probes.criteria.alike
  alike = lambda a, b: bool(np.linalg.norm(a - b) <= error * max(float(np.linalg.norm(a)), 1e-30))
  for place, turned in matrices:
    gradients = [slopes[place].T if turned else slopes[place] for slopes in by_leaf]
    inputs = gradients[0] @ v[0] / (v[0] @ v[0])
    if not np.any(inputs) or not all(alike(g, np.outer(inputs, d)) for g, d in zip(gradients, v, strict=True)):
      continue
    biases = [i for i, leaf in enumerate(leaves) if leaf.shape == (classes,)]
    bias = next((i for i in biases if all(alike(g[i], d) for g, d in zip(by_leaf, v, strict=True))), None)
    kernel = leaves[place].T if turned else leaves[place]
    scale, shift = _last_norm(probes, kernel.shape[0])
    shifted = jnp.zeros(classes) if bias is None else leaves[bias]
    decay = None if classifier.weight_decay is None else float(classifier.decays[place])
    return LastLayer(kernel, shifted, scale, shift, decay, place, bias)
  return None


def _last_norm(probes: Probes, width: int) -> tuple[jax.Array | None, jax.Array | None]:
  """Scale and shift [F] of the batch norm whose output is the features: f = scale * normalised + shift."""
  features_fn, x, alike = probes.classifier.features_fn, probes.x[:1], probes.criteria.alike
  if features_fn is None:
    return None, None
  leaves, structure = jax.tree.flatten(probes.classifier.params)
  places = [i for i, leaf in enumerate(leaves) if leaf.shape == (width,)]

  @jax.jit
  def of_one(leaves: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """Features [F] of a sample, and the derivative of their sum: by the shift 1, by the scale the normalised value."""

    def features(chosen: list[jax.Array]) -> jax.Array:
      replaced = dict(zip(places, chosen, strict=True))
      return features_fn(jax.tree.unflatten(structure, [replaced.get(i, leaf) for i, leaf in enumerate(leaves)]), x)

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
