"""Given candidates, which of them were in the training set? Scores without any training. Beyond the paper.

All need members and others in one call: a score says little by itself, and much beside those of samples that are known
not to have been trained on.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._tree import tensor_names
from kkt_jax._typing import PyTree
from kkt_jax.analysis.examination import Examination
from kkt_jax.classifiers import relaxation
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.extraction import certificates, signals
from kkt_jax.kkt import losses
from kkt_jax.kkt.conditions import Conditions, weigh_tensors
from kkt_jax.membership._gram import gram as gram_of
from kkt_jax.membership._gram import SKETCHED

# Distances from a boundary, in standard deviations, between which candidates are counted. Beyond the last but one their
# number is that of samples that were not trained on.
_DISTANCES = np.array([0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1])
_ARGUMENTS, _BLOCK = 2**27, 64  # most arguments of gates that are kept, and candidates at once if there are more
_LEAST_RIDGE = 1e-9  # relative to an atom's own square: keeps a factorisation possible


class _Candidates(NamedTuple):
  """Candidates that are checked, and what the classifier says of them.

  Attributes:
    classifier: the classifier.
    x: the candidates [M, *input_shape].
    classes: of their labels [M].
    logits: at inference [M, C].
  """

  classifier: Classifier
  x: jax.Array
  classes: jax.Array
  logits: jax.Array

  @classmethod
  def of(cls, classifier: Classifier, x: ArrayLike, labels: ArrayLike | None) -> "_Candidates":
    """Raises ValueError for shapes that do not fit, numbers that are not finite, and labels that are not known."""
    x = jnp.asarray(x)
    _checks.check_finite("x", x)
    logits = classifier.predict(x)
    if labels is None:
      return cls(classifier, x, jnp.argmax(logits, axis=1), logits)
    _checks.check_labels("labels", labels, len(x))
    return cls(classifier, x, classifier.classes_of(labels), logits)


@_checks.annotated
@full_precision
def scores(examination: Examination, x: ArrayLike, labels: ArrayLike | None = None) -> dict[str, np.ndarray]:
  """All scores that the classifier allows; the higher, the more likely a candidate was trained on.

  Args:
    examination: of the classifier.
    x: candidates [M, *input_shape], in the classifier's units; at least two.
    labels: their labels [M], among the classifier's; what it takes them for if None.

  Returns:
    By name, each [M]: ``multipliers`` (`multipliers`, on the kernel of a fully connected first layer alone if it has a
    target, for what is left of the initialisation hides that least; else, without weight decay, on all tensors,
    weighed); ``subspace``, minus the share of a candidate outside the subspace of the training data, where that is
    revealed; ``signal``, minus the distance of a candidate's own signal from the row space of the first kernel
    (`kkt_jax.extraction.signals`), which needs no other sample, where weight decay has made that space; ``boundaries``
    (`boundary_scores`), where gates outside of loops have samples along their first axis; ``margin``
    (`common_margin`), where training drove all margins to one value; ``together``, the ranks by multipliers and
    boundaries, with batch norm those by multipliers and margin, as Fisher combines p-values; and what needs no theory,
    ``loss``, minus the cross-entropy.
  """
  classifier, conditions = examination.classifier, _of_first_kernel(examination)
  given = _Candidates.of(classifier, x, labels)
  weighed = conditions is examination.conditions and examination.form != "weight_decay"
  scored = {"multipliers": _multipliers(given, conditions, weighed=weighed)}
  if examination.subspace is not None:
    scored["subspace"] = -np.asarray(examination.subspace.distance(classifier.to_unit(given.x)))
  if certificates.applicable(examination):
    labels = np.asarray(classifier.labels)[given.classes]
    scored["signal"] = -signals.signals(examination, given.x, labels).distance
  if any(shape[:1] == given.x.shape[:1] for shape in _arguments_of_gates(classifier, given.x)):
    scored["boundaries"] = boundary_scores(classifier, given.x)
  if examination.form == "max_margin":
    scored["margin"] = common_margin(losses.runner_up_margin(given.logits, given.classes), examination.margin)
  second = scored.get("boundaries" if classifier.statistics is None else "margin")
  if second is not None:
    scored["together"] = _joined([scored["multipliers"], second])
  lost = optax.losses.softmax_cross_entropy_with_integer_labels(given.logits, given.classes)
  return scored | {"loss": -np.asarray(lost)}


@_checks.annotated
@full_precision
def multipliers(
  classifier: Classifier,
  conditions: Conditions,
  x: ArrayLike,
  labels: ArrayLike,
  *,
  ridge: float = 0.1,
  weighed: bool = False,
  chunk_size: int = 32,
) -> np.ndarray:
  """The share of each candidate in the stored weights, if these are a sum over few of them.

  The target of the stationarity condition is a sum over the training data of ``a_i grad log p(y_i | x_i)``, a_i > 0
  (with cross-entropy and weight decay all a_i are equal). Other candidates have no part in it. Non-negative least
  squares over all candidates, with a ridge in proportion to what remains unexplained, because weights that are at no
  stationary point hold more than that sum. ImpMIA (arXiv 2510.10625) does so with one multiplier for each class.

  Args:
    classifier: with batch norm its stored statistics are taken for constants.
    conditions: the stationarity condition.
    x: candidates [M, *input_shape], in the classifier's units.
    labels: their labels [M], among the classifier's.
    ridge: on unit gradients, at most: times the share of the target that remains unexplained.
    weighed: solve twice, and weigh every tensor the second time by the inverse variance of what the first solution
      leaves of it. Where the sum does not hold in all tensors alike this tells in which it does.
    chunk_size: candidates whose gradients are in memory at once. Dense layers need one pass over the candidates, of any
      number; other layers one for every GiB of their gradients.

  Returns:
    Scores [M]: the multiplier in units in which each candidate's gradient has length 1, times its probability; where
    that is 0, the slope of the least squares, at most 0.

  Raises:
    ValueError: shapes that do not fit, or a label that the classifier does not know.
  """
  _checks.check_at_least("chunk_size", chunk_size, 1)
  given = _Candidates.of(classifier, x, labels)
  return _multipliers(given, conditions, ridge=ridge, weighed=weighed, chunk_size=chunk_size)


def _multipliers(
  given: _Candidates, conditions: Conditions, *, ridge: float = 0.1, weighed: bool = False, chunk_size: int = 32
) -> np.ndarray:
  """See `multipliers`."""
  correlations = _correlations(given, conditions, chunk_size)
  if weighed:
    parts = _parts(correlations, ridge)[0] / correlations.sizes
    weights = _weights(given, conditions, parts, chunk_size)
    correlations = _correlations(given, weigh_tensors(conditions, weights), chunk_size)
  return _scaled_parts(given, correlations, ridge)


@_checks.annotated
@full_precision
def change_scores(before: Classifier, after: Classifier, x: ArrayLike, labels: ArrayLike) -> dict[str, np.ndarray]:
  """How much of the change from one classifier to another each candidate explains, as what was removed in between.

  Taking a sample out of the training data moves the parameters away from where its gradient had drawn them. So the
  gradient at a sample that was removed points along ``params before - params after``.

  Args:
    before: the classifier that was trained on the candidates in question.
    after: the same network after they were removed, by whatever method.
    x: candidates [M, *input_shape], in the classifiers' units.
    labels: their labels [M], among the classifiers'.

  Returns:
    By name, each [M], the higher, the more likely removed: ``change``, the cosine of a candidate's gradient and the
    change; ``change_multipliers``, its multiplier if the change is a sum over few candidates (as in `multipliers`).

  Raises:
    ValueError: parameters of two shapes or without a change, or shapes that do not fit.
  """
  _checks.check_same_shapes("after.params", after.params, "before.params", before.params)
  change = jax.tree.map(lambda first, last: first - last, before.params, after.params)
  if not any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(change)):
    raise ValueError("after must have other parameters than before; they are equal, so nothing was removed.")
  given = _Candidates.of(before, x, labels)
  correlations = _correlations(given, Conditions(change, jax.tree.map(jnp.ones_like, change)), 32)
  return {
    "change": correlations.products / correlations.length,
    "change_multipliers": _scaled_parts(given, correlations, 0.1),
  }


class _Correlations(NamedTuple):
  """Inner products of gradients of length 1, with one another [M, M] and with the target [M].

  Attributes:
    length: of the target.
    sizes: lengths of the gradients [M].
  """

  gram: np.ndarray
  products: np.ndarray
  length: float
  sizes: np.ndarray


def _correlations(given: _Candidates, conditions: Conditions, chunk_size: int) -> _Correlations:
  classifier, x, classes, _ = given
  masks = jax.tree.leaves(conditions.mask)
  kept = [i for i, mask in enumerate(masks) if bool(jnp.any(mask != 0))]
  masked = lambda tree: [leaf * masks[i] for i, leaf in enumerate(jax.tree.leaves(tree)) if i in kept]

  def gradients(params: PyTree, x: jax.Array, index: jax.Array) -> list[jax.Array]:
    return masked(jax.grad(lambda p: _log_odds(classifier, p, x[None], index[None])[0])(params))

  target = [np.asarray(leaf, np.float64) for leaf in masked(conditions.target)]
  if sum(leaf.size for leaf in target) > SKETCHED:  # one by one: together their convolutions are slower, and large
    one = jax.jit(lambda params, x, index: [leaf[None] for leaf in gradients(params, x, index)])
    chunk_size, of = 1, lambda chunk: one(classifier.params, x[chunk.start], classes[chunk.start])
  else:
    many = jax.jit(jax.vmap(gradients, in_axes=(None, 0, 0)))
    of = lambda chunk: many(classifier.params, x[chunk], classes[chunk])
  gram, products = gram_of(of, len(x), target, chunk_size=chunk_size)
  size = np.sqrt(np.maximum(np.diag(gram), 1e-30))
  length = float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in target)))
  return _Correlations(gram / np.outer(size, size), products / size, length, size)


def _log_odds(classifier: Classifier, params: PyTree, x: jax.Array, classes: jax.Array) -> jax.Array:
  """The log-odds of the labels [M]: their gradient points as that of log p does, but does not vanish with the loss."""
  return -jax.nn.logsumexp(-losses.margins(classifier.predict_fn(params, x), classes), axis=1)


def _weights(given: _Candidates, conditions: Conditions, parts: np.ndarray, chunk_size: int) -> dict[str, float]:
  """By tensor the inverse variance of what a sum of gradients leaves of the target; 0 for a target that is 0."""

  classifier, x, classes, _ = given

  @jax.jit
  def summed(params: PyTree, parts: jax.Array, x: jax.Array, index: jax.Array) -> PyTree:
    return jax.grad(lambda own: parts @ _log_odds(classifier, own, x, index))(params)

  order = np.argsort(-parts, kind="stable")
  total = jax.tree.map(jnp.zeros_like, classifier.params)
  for start in range(0, int(np.sum(parts > 0)), chunk_size):
    chunk = order[start : start + chunk_size]
    found = summed(classifier.params, jnp.asarray(parts[chunk], x.dtype), x[chunk], classes[chunk])
    total = jax.tree.map(jnp.add, total, found)
  weights = {}
  trees = (conditions.target, total, conditions.mask)
  arrays = (map(np.asarray, jax.tree.leaves(tree)) for tree in trees)  # in JAX each shape would be compiled
  for name, target, found, mask in zip(tensor_names(total), *arrays, strict=True):
    left, all_of_it = (float(np.mean(np.square(mask * own))) for own in (target - found, target))
    weights[name] = 1 / max(left, 1e-9 * all_of_it) if all_of_it else 0.0
  return weights


def _scaled_parts(given: _Candidates, correlations: _Correlations, ridge: float) -> np.ndarray:
  """The multipliers times the probabilities of the labels; where they are 0, the slope of the least squares."""
  parts, slopes = _parts(correlations, ridge)
  probability = np.asarray(jax.nn.softmax(given.logits)[jnp.arange(len(given.classes)), given.classes])
  return np.where(parts > 0, parts * probability, np.minimum(slopes, 0.0))


def _parts(correlations: _Correlations, ridge: float) -> tuple[np.ndarray, np.ndarray]:
  """The multipliers of unit gradients [M], and the slopes of the least squares [M]."""
  from scipy import linalg, optimize  # type: ignore[import-untyped]

  gram, products, length, _ = correlations
  unexplained = 0.0
  for _ in range(2):
    used = _LEAST_RIDGE + ridge * unexplained
    factor = np.linalg.cholesky(gram + used * np.eye(len(gram)))
    wanted = linalg.solve_triangular(factor, products, lower=True)
    parts = optimize.nnls(factor.T, wanted, maxiter=100 * len(gram))[0]
    unexplained = np.clip(1 + parts @ (gram @ parts - 2 * products) / length**2, 0.0, 1.0)
  return parts, products - gram @ parts


def _joined(scores: Sequence[np.ndarray]) -> np.ndarray:
  """Fisher's combination of the ranks among the candidates [M] by several scores."""
  from scipy import stats

  return -sum(np.log(stats.rankdata(-values, method="max") / len(values)) for values in scores)


def common_margin(margins: ArrayLike, margin: float | None = None, *, neighbours: int = 10) -> np.ndarray:
  """How near each margin comes to the one that all training samples share (Eq. 2b): minus the logarithm of their ratio.

  Args:
    margins: of candidates to the runner-up [M].
    margin: the training samples', positive; where the candidates' positive margins are densest if None.
    neighbours: how many margins that lie together are the densest.

  Returns:
    Scores [M], at most 0; minus infinity where the margin is not positive.

  >>> common_margin(np.array([5.0, 1.0, 5.0, 5.1, -5.0])).round(2).tolist()
  [-0.0, -1.61, -0.0, -0.02, -inf]
  """
  values = np.asarray(margins, np.float64)
  logs = np.full(values.shape, -np.inf)
  logs[values > 0] = np.log(values[values > 0])
  ordered = np.sort(logs[values > 0])
  if margin is None and ordered.size:
    reach = min(neighbours, ordered.size - 1)
    wide = ordered[reach:] - ordered[: ordered.size - reach]
    narrowest = int(np.argmin(wide))
    centre = float(np.median(ordered[narrowest : narrowest + reach + 1]))
  else:
    centre = np.log(margin or 1.0)
  return -np.abs(logs - centre)


def _of_first_kernel(examination: Examination) -> Conditions:
  """The conditions on a fully connected first layer's kernel alone, left out before or not; all if it has no target."""
  conditions = examination.conditions
  held = lambda role, target: role == "first kernel" and bool(np.any(np.asarray(target)))
  if not any(jax.tree.leaves(jax.tree.map(held, examination.roles, conditions.target))):
    return conditions
  mask = jax.tree.map(
    lambda role, own: jnp.full_like(own, role == "first kernel"), examination.roles, conditions.target
  )
  return dataclasses.replace(conditions, mask=mask)


@_checks.annotated
@full_precision
def boundary_fractions(classifier: Classifier, x: ArrayLike, *, within: float = 0.001) -> np.ndarray:
  """The fraction of all units on whose activation boundary each sample lies.

  Gradient descent with weight decay comes to rest where activation boundaries lie exactly on training samples, as a
  ball does at the bottom of a valley. So a sample on many more boundaries than others was most likely trained on.

  Args:
    classifier: any whose gates `kkt_jax.classifiers.relaxation` recognises.
    x: candidates [M, *input_shape], in the classifier's units; at least two.
    within: of a kink, in standard deviations of the gate's argument among the candidates; positive.

  Returns:
    Shares [M] of the gates outside loops and branches that change among the candidates at all; of so many gates that
    their arguments would fill more than half a GiB, of every other one, or fewer.

  Raises:
    ValueError: shapes that do not fit, a network without gates, or ``within`` not positive.
  """
  _checks.check_positive("within", within)
  return np.mean(np.concatenate(_distances(classifier, jnp.asarray(x)), axis=1) < within, axis=1)


@full_precision
def boundary_scores(classifier: Classifier, x: ArrayLike) -> np.ndarray:
  """Scores samples by the excess of candidates that lie as close to activation boundaries as they do.

  In every layer candidates are counted by their distance from the boundaries. Where training moved these to its
  samples, more candidates lie than the density farther away suggests. The logarithm of that ratio, where it is
  positive, is added up over all units; it is 0 in layers whose boundaries were not moved, such as convolutions, which
  have most of the units.

  Args:
    classifier: as in `boundary_fractions`.
    x: candidates [M, *input_shape], in the classifier's units; at least two.

  Returns:
    Scores [M].

  Raises:
    ValueError: as in `boundary_fractions`.
  """
  total, widths = np.zeros(len(np.asarray(x))), np.diff(_DISTANCES)
  for distances in _distances(classifier, jnp.asarray(x)):
    places = np.digitize(distances, _DISTANCES) - 1
    counts = np.bincount(places.ravel(), minlength=len(_DISTANCES))[:-1]
    excess = np.log((counts + 1) / (counts[-1] / widths[-1] * widths + 1))
    total += np.append(np.maximum(excess, 0.0), 0.0)[places].sum(axis=1)
  return total


def _arguments_of_gates(classifier: Classifier, x: jax.Array) -> list[tuple[int, ...]]:
  """The shapes of the gates' arguments outside of loops and branches; those of single samples are [M, ...]."""
  of = functools.partial(relaxation.pre_activations, classifier.predict_fn)
  return [root.shape for root in jax.eval_shape(of, classifier.params, x)]


def _distances(classifier: Classifier, x: jax.Array) -> list[np.ndarray]:
  """For each layer, how far [M, units] candidates are from its boundaries, in deviations of what changes at all."""
  _checks.check_shape("x", x, (len(x), *classifier.input_shape), "[M, *input_shape]")
  _checks.check_at_least("the number of candidates", x.shape[0], 2)
  of = jax.jit(functools.partial(relaxation.pre_activations, classifier.predict_fn))
  shapes = _arguments_of_gates(classifier, x)
  kept = [place for place, shape in enumerate(shapes) if shape[:1] == x.shape[:1]]
  if not kept:
    raise ValueError("classifier must have gates such as ReLU, with an argument for each sample; it has none.")
  step = -(-sum(math.prod(shapes[place]) for place in kept) // _ARGUMENTS)
  blocks = [x] if step == 1 else np.split(np.asarray(x), range(_BLOCK, len(x), _BLOCK))
  arguments = ((len(block), of(classifier.params, block)) for block in blocks)
  rows = [[np.asarray(roots[place]).reshape(count, -1)[:, ::step] for place in kept] for count, roots in arguments]
  layers = [np.concatenate(of_layer) for of_layer in zip(*rows, strict=True)]
  deviations = [layer.std(axis=0) for layer in layers]
  moving = 1e-6 * max(deviation.max() for deviation in deviations)
  return [np.abs(layer[:, wide > moving]) / wide[wide > moving] for layer, wide in zip(layers, deviations, strict=True)]
