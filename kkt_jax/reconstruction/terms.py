"""The terms of a generator's loss beside stationarity: duality (Eq. 6) and the priors, as functions of a batch.

Each is ``(classifier, batch) -> [M] or a scalar``, whose mean over the batch enters the loss. The arithmetic is in
`kkt_jax.kkt.losses` and `kkt_jax.priors`; here it meets the batch.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kkt_jax import _checks, deformations, priors
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.kkt import losses, multipliers

Schedule = Callable[[jax.Array], Any]


class Batch(NamedTuple):
  """What was generated for one classifier in one step.

  Attributes:
    x: samples [M, *input_shape], in the classifier's own units.
    unit: the same in units of its range, [0, 1]; x itself if it has none.
    y: their labels [M].
    classes: the output indices of the labels [M].
    code: which of the samples of its label each is [M], of an endless generator None.
    t: index of the classifier, a Python integer.
    alpha: log-scale of the margin, a scalar.
    logits: [M, C], as in training if the classifier evaluates everything in one pass, else at inference.
    statistics: of the batch inside the classifier, if it stores such.
    features: the output of its last batch norm [M, F], if it is known.
    mu: multipliers [M, C]; None while they are computed themselves.
  """

  x: jax.Array
  unit: jax.Array
  y: jax.Array
  classes: jax.Array
  code: jax.Array | None
  t: int
  alpha: jax.Array
  logits: jax.Array
  statistics: Any = None
  features: Any = None
  mu: Any = None


TermFn = Callable[[Classifier, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Term:
  """One term of the loss.

  Attributes:
    weight: its weight, at least 0; a term of weight 0 is not computed.
    function: ``(classifier, batch) -> [M] or a scalar``. A scalar says that the term is one of the batch as a whole,
      which cannot be gathered by microbatches.
    schedule: factor on the weight, a function of the progress from 0 to 1 through the training; 1 throughout if None.
  """

  weight: float
  function: TermFn
  schedule: Schedule | None = None

  def __post_init__(self) -> None:
    _checks.check_at_least("weight", self.weight, 0)
    _checks.check_finite("weight", self.weight)


def duality(*, delta: float, relative: bool = True) -> TermFn:
  """Eq. 6; see `kkt_jax.kkt.duality_loss`."""
  return lambda classifier, batch: losses.duality_loss(
    batch.logits, batch.classes, batch.alpha, delta=delta, relative=relative
  )


def in_range(classifier: Classifier, batch: Batch) -> jax.Array:
  """Inputs have a known range."""
  return priors.out_of_range(batch.unit)


def total_variation(classifier: Classifier, batch: Batch) -> jax.Array:
  """Images are smooth, the paper's prior."""
  return priors.total_variation(batch.unit)


def binarisation(classifier: Classifier, batch: Batch) -> jax.Array:
  """Pixels of drawings are black or white."""
  return priors.binarisation(batch.unit)


def mean_square(classifier: Classifier, batch: Batch) -> jax.Array:
  """Pixels are small."""
  return jnp.mean(jnp.square(batch.unit.reshape(batch.unit.shape[0], -1)), axis=1)


def statistics(classifier: Classifier, batch: Batch) -> jax.Array:
  """A batch reproduces the stored batch-norm statistics."""
  return priors.statistics_distance(batch.statistics, classifier.statistics)


def class_features(of_classes: list[tuple[jax.Array, jax.Array]]) -> TermFn:
  """Samples have the common features of their class; for each classifier the features [C, F] and their scales [F]."""

  def distance(classifier: Classifier, batch: Batch) -> jax.Array:
    features, scale = of_classes[batch.t]
    return priors.collapse(batch.features, features[batch.classes], scale)

  return distance


def contrast(*, temperature: float = 0.1, size: float = 1.5) -> TermFn:
  """Images differ from one another in the classifier's features; see `kkt_jax.priors.contrast`.

  The two views of an image are bent by ``size`` (`kkt_jax.deformations.warp`), all images of a batch alike, for that is
  cheap; the bits of the batch are the key.
  """

  def distance(classifier: Classifier, batch: Batch) -> jax.Array:
    features_fn = classifier.features_fn or classifier.predict_fn
    bits = jax.lax.bitcast_convert_type(batch.unit.astype(jnp.float32), jnp.uint32)
    keys = jax.random.split(jax.random.key(jnp.sum(bits)))
    stacked = jnp.moveaxis(batch.unit, 0, -1)  # images are further channels, which move together
    views = [deformations.warp(key, stacked.reshape(1, *stacked.shape[:2], -1), size=size) for key in keys]
    x = [classifier.from_unit(jnp.moveaxis(view.reshape(stacked.shape), -1, 0)) for view in views]
    return priors.contrast(*(features_fn(classifier.params, view) for view in x), temperature=temperature)

  return distance


def cross_entropy(classifier: Classifier, batch: Batch) -> jax.Array:
  """Samples are classified as wanted, at inference, as in DeepInversion (Yin et al. 2020)."""
  logits = classifier.predict_fn(classifier.params, batch.x)
  return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch.classes)


def softmax_distance(classifier: Classifier, batch: Batch) -> jax.Array:
  """Free multipliers are drawn to the classifier's own probabilities; see `multipliers.softmax_distance`."""
  return multipliers.softmax_distance(batch.mu, batch.logits, batch.classes)


def least_multiplier(least: float) -> TermFn:
  """Every sample is a support vector; see `kkt_jax.kkt.multipliers.shortfall`."""
  return lambda classifier, batch: multipliers.shortfall(batch.mu, least=least)
