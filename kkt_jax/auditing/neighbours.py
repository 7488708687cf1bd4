"""How near the weights are to what the training data, as they are described, would make of them.

Accuracy does not see a mild slip: a mean left out may leave all samples right. The weights see it, whatever trained
them: the gradient of the loss on the training data points along the weights where weight decay or long training ends,
and partly so far before; with inputs moved by a tenth of their range it does not. With batch norm its stored statistics
are those of the training data. So a slip in the range or the mean is found by looking for the inputs that fit best.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize  # type: ignore[import-untyped]

from kkt_jax._precision import full_precision
from kkt_jax._typing import PyTree
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AuditCriteria

_DEFAULT = AuditCriteria()
_GAINS, _SHIFTS = (0.25, 0.5, 1.0, 2.0, 4.0), (-2.0, -1.0, 0.0, 1.0, 2.0)  # first tried; these in deviations
_EVALUATIONS, _OF_SHIFTS = 60, 20  # of each of two searches, and of shifts alone between them
_PRECISE = 0.01  # shifts between the two searches, in deviations: the second one goes on from there
_STEPS = (-0.7, -0.35, 0.0, 0.35, 0.7)  # in the logarithm of the gain
_WORK, _LEAST = 2 * 10**12, 32  # operations for all evaluations of a large network, and samples that it has at least


class Neighbour(NamedTuple):
  """Inputs that fit better than those described.

  Attributes:
    what: what they are, in words; empty if none are much nearer.
    ratio: how many times as near they are; 1 if none are.
    confirmed: whether those described are near, and none are much nearer.
  """

  what: str = ""
  ratio: float = 1.0
  confirmed: bool = False

  def __str__(self) -> str:
    """In a sentence, or empty."""
    times = f"{self.ratio:,.0f}" if self.ratio < 1e4 else "more than 10,000"
    return (
      self.what and f"With {self.what} the weights are {times} times as near to what these data would make of them."
    )


def nearest(classifier: Classifier, unit: np.ndarray, y: np.ndarray, criteria: AuditCriteria = _DEFAULT) -> Neighbour:
  """The best of the usual slips (`preprocessed`) and of all gains and shifts of the inputs.

  Nearness is the share of the squared gradient that points along the weights, tensor by tensor, over the share that
  does not; of a known start, along the change. With batch norm, which undoes gains and shifts in training, it is one
  over the relative squared error of the stored statistics. Right descriptions were beaten 1.5 times by converged
  weights, 2 times by others, and 5 times if the inputs were noisy in training; see docs/audit.md.

  Args:
    classifier: the classifier.
    unit: the training samples in [0, 1], as `Classifier.to_unit`.
    y: their labels.
    criteria: what much nearer is.

  Returns:
    A `Neighbour`.
  """
  drawn = _affordable(classifier, len(y))
  unit, y = unit[drawn], y[drawn]
  x = np.asarray(classifier.from_unit(unit))
  near = _nearness(classifier, x, y)
  ground, deviation = float(np.median(x)), max(float(x.std()), 1e-6)  # most values of a digit are its ground
  moved = lambda gain, shift: gain * (x - ground) + ground + shift * deviation
  given = near(x)
  named = {what: near(other) for what, other in preprocessed(classifier, unit)}
  farness = lambda place: -np.log(near(moved(np.exp(place[0]), place[1])) + 1e-9)

  def search(start: np.ndarray, size: float) -> optimize.OptimizeResult:
    simplex = start + np.array([[0, 0], [size, 0], [0, size]])
    options = {"maxfev": _EVALUATIONS, "initial_simplex": simplex}
    return optimize.minimize(farness, start, method="Nelder-Mead", options=options)

  def shifted(log_gain: float, shift: float) -> tuple[float, float]:  # it is far better determined than a gain
    along = lambda moved_by: farness((log_gain, moved_by))
    bounds, precise = (shift - 1, shift + 1), {"maxiter": _OF_SHIFTS, "xatol": _PRECISE}
    least = optimize.minimize_scalar(along, bounds=bounds, method="bounded", options=precise)
    return log_gain, float(least.x)

  optimum = search(np.array(min(((np.log(gain), shift) for gain in _GAINS for shift in _SHIFTS), key=farness)), 0.3)
  places = [shifted(log_gain, optimum.x[1]) for middle in (0.0, optimum.x[0]) for log_gain in middle + np.array(_STEPS)]
  optimum = search(np.array(min([tuple(optimum.x), *places], key=farness)), 0.03)
  gain, shift = float(np.exp(optimum.x[0])), float(optimum.x[1])
  best, what = float(np.exp(-optimum.fun)), _in_words(gain, ground - gain * ground + shift * deviation)
  slip = max(named, key=lambda name: named[name])
  if named[slip] > 0.5 * best:
    best, what = named[slip], slip
  least = criteria.least_near_batch_norm if classifier.batch_coupled else criteria.least_near
  if best < least or best < criteria.nearer_doubted * given:
    return Neighbour(confirmed=given >= least)
  return Neighbour(what, best / max(given, 1e-9))


def _affordable(classifier: Classifier, count: int) -> np.ndarray:
  """The places of the samples with which one search takes at most `_WORK` operations, or the least number of them."""
  one = jax.ShapeDtypeStruct((1, *classifier.input_shape), jnp.float32)
  counted: Any = jax.jit(classifier.predict_fn).lower(classifier.params, one).cost_analysis() or {}
  evaluations = 2 * _EVALUATIONS + 2 * len(_STEPS) * _OF_SHIFTS
  passes = evaluations * (3 if classifier.statistics_fn is None else 1)  # a gradient takes three
  most = max(_LEAST, int(_WORK / (passes * max(counted.get("flops", 0.0), 1.0))))
  return np.sort(np.random.default_rng(0).choice(count, min(count, most), replace=False))


def other_decay(classifier: Classifier, x: np.ndarray, y: np.ndarray, criteria: AuditCriteria = _DEFAULT) -> str:
  """A sentence if the gradients on the training data contradict the weight decay that was described; else empty."""
  if classifier.weight_decay is None or classifier.batch_coupled or classifier.initial_params is not None:
    return ""
  near, shares, _ = _along(classifier, y)(x)
  kernels = [leaf.ndim > 1 for leaf in jax.tree.leaves(classifier.params)]
  described = zip(shares, classifier.decays, kernels, strict=True)
  ratios = [float(share) / decay for share, decay, kernel in described if kernel and decay > 0]
  ratio = float(np.median(ratios)) if ratios else 1.0
  if float(near) < criteria.converged or 1 / criteria.other_decay < ratio < criteria.other_decay:
    return ""
  return (
    f"With these training data the weights are where {ratio:.2g} times the weight_decay that was described would hold"
    " them; docs/frameworks.md tells what it is in other libraries' names."
  )


def between_norms(classifier: Classifier, x: np.ndarray, criteria: AuditCriteria = _DEFAULT) -> str:
  """A sentence if some stored statistics are the training data's to rounding errors, and others are not."""
  if classifier.statistics_fn is None:
    return ""
  errors = _errors(classifier.statistics, jax.jit(classifier.statistics_fn)(classifier.params, jnp.asarray(x)))
  wrong = [layer for layer, error in errors.items() if error > criteria.other_statistics]
  if not wrong or min(errors.values()) > criteria.same_statistics:
    return ""
  right = [layer for layer, error in errors.items() if error <= criteria.same_statistics]
  return (
    f"The stored statistics of {', '.join(right)} are those of the training data, those of {', '.join(wrong)} are not:"
    " what comes before the latter may be described wrongly, as the epsilon of another batch norm, padding, an"
    " activation, or the inputs."
  )


def _in_words(gain: float, shift: float) -> str:
  parts = [f"multiplied by {gain:.2g}"] if abs(np.log(gain)) > 0.05 else []
  parts += [f"{'raised' if shift > 0 else 'lowered'} by {abs(shift):.2g}"] if abs(shift) > 0.005 else []
  return f"inputs {' and '.join(parts) or 'as they are'} (a range, a mean or a deviation)"


def _nearness(classifier: Classifier, x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], float]:
  """A function that says how near inputs with labels ``y`` are to the weights, 0 if they hardly fit. See `nearest`."""
  if classifier.statistics_fn is None:
    along = _along(classifier, y)
    given = along(x)[2]
    most = 0.5 * float(np.log(classifier.num_classes))  # inputs of next to no size are near to all weights

    def near(x: np.ndarray) -> float:
      ratio, _, loss = along(x)
      return float(ratio) if float(loss) <= max(most, float(given)) else 0.0

    return near
  of_batch = jax.jit(classifier.statistics_fn)
  error_of = lambda x: [*_errors(classifier.statistics, of_batch(classifier.params, jnp.asarray(x))).values()]
  return lambda x: 1 / (float(np.mean(error_of(x))) + 1e-9)


def _along(
  classifier: Classifier, y: np.ndarray
) -> Callable[[np.ndarray], tuple[jax.Array, list[jax.Array], jax.Array]]:
  """A function of inputs: how near they are, how many times its tensor each gradient holds, and the loss."""
  rows = jnp.arange(len(y))

  @full_precision
  @jax.jit
  def along(params: PyTree, start: PyTree, x: jax.Array) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    def loss(params: PyTree) -> jax.Array:
      logits = classifier.apply_fn(params, x)
      return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[rows, y])

    moved = params if start is None else jax.tree.map(jnp.subtract, params, start)
    value, gradient = jax.value_and_grad(loss)(params)
    pairs = list(zip(*map(jax.tree.leaves, (gradient, moved)), strict=True))
    shares = [jnp.maximum(-jnp.vdot(slope, w), 0) / jnp.maximum(jnp.vdot(w, w), 1e-30) for slope, w in pairs]
    left = sum(jnp.sum(jnp.square(slope + a * w)) for a, (slope, w) in zip(shares, pairs, strict=True))
    whole = sum(jnp.vdot(slope, slope) for slope, _ in pairs)
    return jnp.nan_to_num(jnp.maximum(whole - left, 0) / left), shares, value

  return lambda x: along(classifier.params, classifier.initial_params, jnp.asarray(x, jnp.float32))


def _errors(stored: PyTree, fresh: PyTree, before: str = "") -> dict[str, float]:
  """By layer the squared relative errors of means and variances."""
  if not {"mean", "var"} <= set(stored):
    return {
      layer: error for key in stored for layer, error in _errors(stored[key], fresh[key], f"{before}{key}/").items()
    }
  means, variances = ([np.asarray(tree[name], np.float64) for tree in (stored, fresh)] for name in ("mean", "var"))
  total = np.maximum(sum(variances), 1e-30)
  error = np.square(means[1] - means[0]) / total + np.square((variances[1] - variances[0]) / total)
  return {before.rstrip("/"): float(np.mean(np.minimum(error, 1e3)))}


def preprocessed(classifier: Classifier, unit: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
  """The inputs as they would have been after the usual slips, in the classifier's units, each named."""
  x = np.asarray(classifier.from_unit(unit))
  if classifier.value_range is None:
    yield "the sign changed", -x
  else:
    yield "black for white", np.asarray(classifier.from_unit(1 - unit))
    for low, high in {(0, 1), (-1, 1), (0, 255)} - {classifier.value_range}:
      yield f"inputs from {low} to {high}", low + (high - low) * unit
    yield "inputs a 255th as great", x / 255
    yield "inputs halved and raised by a half, as after a second normalisation to -1 to 1", (x + 1) / 2
  mean, deviation, image = x.mean(), max(x.std(), 1e-6), x.mean(axis=0, keepdims=True)
  spread = np.maximum(x.std(axis=0, keepdims=True), 1e-6)
  yield "the mean subtracted", x - mean
  yield "the mean subtracted and the deviation divided by", (x - mean) / deviation
  yield "the mean and deviation undone, which the function applies", x * deviation + mean
  yield "the mean of each value (the mean image) subtracted", x - image
  yield "the mean of each value (the mean image) added, which the function subtracts", x + image
  yield "each value less its mean and divided by its deviation", (x - image) / spread
  shapes = {unit.shape[1:]}
  if unit.ndim == 2:  # perhaps a flattened image
    sides = {channels: round((unit.shape[1] / channels) ** 0.5) for channels in (1, 3)}
    shapes = {(side, side, channels) for channels, side in sides.items() if side * side * channels == unit.shape[1]}
  for shape in shapes:
    if len(shape) not in (2, 3):
      continue
    images = x.reshape(-1, *shape[:2], shape[2] if len(shape) == 3 else 1)
    height, width, channels = images.shape[1:]
    turned = {"rows and columns exchanged": images.swapaxes(1, 2)} if height == width else {}
    turned |= {"images upside down": images[:, ::-1], "images mirrored": images[:, :, ::-1]}
    if channels > 1:
      turned |= {
        "channels before pixels (channel-first)": images.transpose(0, 3, 1, 2),
        "pixels before channels (channel-last)": images.reshape(-1, channels, height, width).transpose(0, 2, 3, 1),
        "the channels in reverse order (RGB, BGR)": images[..., ::-1],
        "the mean of each channel subtracted and its deviation divided by": (images - images.mean(axis=(0, 1, 2)))
        / np.maximum(images.std(axis=(0, 1, 2)), 1e-6),
      }
    if unit.ndim > 2:
      for step in (-3, -2, -1, 1, 2, 3):
        moved = np.roll(images, (step, step), axis=(1, 2))
        turned[f"images moved by {abs(step)} pixels to the {'lower right' if step > 0 else 'upper left'} (padding)"] = (
          moved
        )
    for what, images in turned.items():
      yield what, images.reshape(x.shape)
