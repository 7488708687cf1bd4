"""What a classifier's weights say before any training, found by trying its function on random inputs. No data are seen.

`examine` reads off which conditions the weights obey, in which directions the data lie (first layer), and how sure the
classifier was of them (last layer). `kkt_jax.reconstruction.recipes.default` turns this into a recipe, for anybody's
classifier.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks, kkt
from kkt_jax._precision import full_precision
from kkt_jax._tree import tensor_names
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.analysis import first_layer
from kkt_jax.analysis.first_layer import affine_span, FirstLayer, InputSpan, span_above_noise
from kkt_jax.analysis.last_layer import collapsed_features, collapsed_margin, typical_margin
from kkt_jax.classifiers.classifier import Classifier, decay_of_tensors, WeightDecay
from kkt_jax.kkt import symmetries
from kkt_jax.kkt.conditions import Conditions, max_margin_conditions, weight_decay_conditions

#: The stationarity conditions that weights can obey.
FORMS = ("weight_decay", "max_margin", "change")
#: Share of the target that no data can account for, above which an audit is not worth its time.
HOPELESS = 0.05
_HOMOGENEOUS = 1e-2  # greatest error of scaling that counts as none
_PROBES = 24
_FILLED = 0.9  # greatest share of a layer's directions that data may fill for their span to be recognised
_FALL, _NOTHING = 5.0, 1e-4  # least fall of singular values that ends a span, and the most that may follow it
_SHARP, _MANY = 50.0, 8  # a fall that is no chance; directions for each class that are too few where there is none
_ROUNDING = 1e-7  # relative to the greatest singular value; what is smaller is indistinguishable from it
_ALIKE = 1e-3  # relative error below which two gradients are the same
_TURNS = 8  # most turns of finding what is left of a known start
_MOST_LEFT_OUT, _TRIED = 8, 3  # tensors that are left out at most, and of how many the first possible one is taken
_GROUPS = 6  # beyond two for each class
_FEW_VALUES = 16  # of a tensor that says nothing of how it is rounded
_TIE = 0.01  # relative difference of two bounds that says nothing of which form it is


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


@dataclasses.dataclass(frozen=True)
class Examination:
  """What the weights of a classifier say; printing it says so in words.

  Attributes:
    classifier: the classifier.
    form: ``"weight_decay"`` or ``"max_margin"``: which stationarity condition its weights obey; ``"change"`` if their
      start is known: gradients of the data have accumulated to what has changed since.
    why: why that form.
    conditions: the stationarity condition of that form, less the tensors that are left out.
    bounds: for each form, the share of its target that no data can account for, less what is left out for it.
    left_out: tensors without which the conditions of that form can hold, by name, with the share of the whole target
      that lies in each and that no data can account for: those that kept their initialisation, or were trained in
      another way. None if everything fits, and none if nothing sensible would remain.
    unused: names of the tensors on which the logits do not depend; they have no condition.
    free: which tensors have no scale of their own (before a normalisation), a pytree of bools; weight decay leaves no
      condition on them.
    rates: Lambda, balanced.
    scaling_error: how far the network is from quasi-homogeneous.
    start: the constant that the network subtracts from its inputs [*input_shape], the mean of the data if it was stored
      as such; None if the function does not reveal it.
    first: the fully connected first layer, if there is one that is wider than the number of classes.
    origin: a point of the affine subspace [*input_shape] in which the data lie, where the first layer's bias tells it
      (`kkt_jax.analysis.FirstLayer.normal`); then ``span`` has one direction less than the kernel. None if not.
    span: directions of the data, read off a fully connected first layer that is wide enough; None if there is none.
    roles: what each tensor is, a pytree like the parameters: ``"first kernel"``, ``"kernel"``, ``"last bias"`` or
      ``"other"``.
    last: the last dense layer, or None.
    margin: the typical margin of the training data in logits as the last layer reveals it, or None.
    probes: the random inputs that were tried [K, *input_shape].
  """

  classifier: Classifier
  form: str
  why: str
  conditions: Conditions
  bounds: Mapping[str, float]
  left_out: Mapping[str, float]
  unused: tuple[str, ...]
  free: PyTree
  rates: kkt.RateSolution
  scaling_error: float
  start: jax.Array | None
  first: FirstLayer | None
  origin: jax.Array | None
  span: InputSpan | None
  roles: PyTree
  last: LastLayer | None
  margin: float | None
  probes: jax.Array

  @property
  def bound(self) -> float:
    """The share of the target that no data can account for, less what is left out."""
    return self.bounds[self.form]

  @property
  def share(self) -> float:
    """The share of all dimensions that the data are known to fill; 1 if that is unknown."""
    return 1.0 if self.span is None else self.span.strengths.size / math.prod(self.classifier.input_shape)

  @property
  def unit_start(self) -> jax.Array:
    """Where the span starts, in units of the range: the origin, what is subtracted, or the middle of the range."""
    shape, bounded = self.classifier.input_shape, self.classifier.value_range is not None
    if self.origin is not None:
      return self.classifier.to_unit(self.origin)
    if self.start is None:
      return jnp.full(shape, 0.5 if bounded else 0.0)
    unit = self.classifier.to_unit(self.start)
    return jnp.clip(unit, 0.0, 1.0) if bounded else unit

  @property
  def tells_mean(self) -> bool:
    """Whether the start is an image in the data's affine subspace, as their mean is, and not one value throughout."""
    return float(jnp.std(self.unit_start)) > _ALIKE

  @property
  def class_features(self) -> tuple[jax.Array, jax.Array] | None:
    """The common features of each class before the last ReLU [C, F] and their scales [F]; None if not revealed."""
    last = self.last
    if self.margin is None or last is None or last.scale is None or last.shift is None:
      return None
    return collapsed_features(last.kernel, last.scale, last.shift), last.scale

  def _left_out(self) -> list[str]:
    names = ", ".join(f"{name} ({share:.0%} of everything)" for name, share in self.left_out.items())
    return [f"Left out, because no data whatever could have caused them: {names}."] if names else []

  def _directions(self) -> str:
    """In which directions the data lie, and by what single samples could be certified (`extraction.certificates`)."""
    dimensions, rank = math.prod(self.classifier.input_shape), self.first.rank if self.first is not None else 0
    if self.span is None and rank:
      return f"The first layer holds {rank} of {dimensions} directions, which are not taken for those of the data:" + (
        f" with {self.classifier.num_classes} classes so few are left where many samples are fitted alike."
        if self.bound <= HOPELESS and not self.left_out
        else " no data could have caused its weights."
      )
    if self.span is None:
      return "They do not reveal in which directions the data lie."
    count = self.span.strengths.size
    lines = f"They hold {count} of {dimensions} directions, taken for those of the data{_blurred(self.span)}."
    if self.origin is not None:
      lines += " The first layer's bias tells how bright they are."
    if self.classifier.value_range is not None:
      varying = first_layer.varying(self.span)
      least = first_layer.least_tight(count, int(varying.sum()))
      if least <= varying.sum():
        lines += f" A sample with {least} of {varying.sum()} values at an end of their range can be one of them by no"
        lines += " chance."
    return lines

  def __str__(self) -> str:
    """The findings in plain words."""
    count = sum(leaf.size for leaf in jax.tree.leaves(self.classifier.params))
    trained = {
      "weight_decay": "weights trained to convergence with weight decay",
      "max_margin": "weights that gradient descent drove to a maximal margin",
      "change": "the change of weights since their start",
    }[self.form]
    lines = [
      f"{count:,} parameters, {self.classifier.num_classes} classes,"
      f" {'batch norm' if self.classifier.batch_coupled else 'no batch norm'}.",
      f"They are examined as {trained}, because {self.why}.",
      *([f"The function never uses {', '.join(self.unused)}."] if self.unused else []),
      *(["They are rounded to 16 bits, which hides whatever is fainter."] if _rounded(self.classifier.params) else []),
      *self._left_out(),
      f"Share of {'the others' if self.left_out else 'them'} that no data whatever could have caused: {self.bound:.2%}"
      f" ({'too much' if self.bound > HOPELESS else 'so data are not excluded'}; the limit is {HOPELESS:.0%}).",
      self._directions(),
      _subtracted(self.start),
      "They do not reveal the margin of the data."
      if self.margin is None
      else f"The data have a typical margin of {self.margin:.4g} logits.",
    ]
    return "\n".join(lines)


def _blurred(span: InputSpan) -> str:
  """How far a span is off that stands out of noise, by the sine of its angle with the true one."""
  if not span.blur:
    return ""
  best, worst = (float(span.blur / span.strengths[k]) for k in (0, -1))
  return (
    ", those that stand out of noise (what is left of the initialisation, or rounding), which blurs the clearest of"
    f" them by {best:.2g} and the faintest by {worst:.2g} of its length"
  )


def _subtracted(start: jax.Array | None) -> str:
  if start is None:
    return "What the network subtracts from its inputs is not revealed."
  if float(jnp.std(start)) > _ALIKE:
    return "The network subtracts an image from its inputs, taken for the mean of the data."
  value = float(jnp.mean(start))
  return (
    f"The network subtracts {value:.3g} from its inputs."
    if abs(value) > _ALIKE
    else "The network subtracts nothing from its inputs."
  )


@full_precision
def examine(classifier: Classifier, *, form: str | None = None, seed: int = 0) -> Examination:
  """Tries the classifier on random inputs, and draws the conclusions.

  Args:
    classifier: the classifier.
    form: one of `FORMS`; chosen if None: the change if the start is known, weight decay if its strength is known, the
      max-margin form with batch norm, else the form whose target data can account for.
    seed: of the inputs.

  Returns:
    An `Examination`.

  Raises:
    ValueError: another form, or the change of a classifier whose start is unknown.

  >>> from kkt_jax.classifiers.classifier import make_classifier
  >>> params = {"w1": jnp.eye(4), "w2": jnp.ones((4, 2))}
  >>> relu = make_classifier(lambda p, x: jnp.maximum(x @ p["w1"], 0) @ p["w2"], params, (4,))
  >>> examine(relu, form="max_margin").rates.rates["w1"][0, 0].round(3)
  Array(0.5, dtype=float32)
  """
  if form is not None:
    _checks.check_choice("form", form, FORMS)
  if form == "change" and classifier.initial_params is None:
    raise ValueError("form must not be 'change' for a classifier without initial_params.")
  params = classifier.params
  key, shape = jax.random.key(seed), (_PROBES, *classifier.input_shape)
  bounded = classifier.value_range is not None
  probes = classifier.from_unit(jax.random.uniform(key, shape)) if bounded else jax.random.normal(key, shape)
  _check_outputs(classifier, probes)
  rates = kkt.balanced(kkt.derivative_equations(classifier.apply_fn, params, probes), params)
  alphas = jnp.linspace(-0.5, 0.5, 5)
  scaling = jax.jit(functools.partial(kkt.scaling_error, classifier.apply_fn))
  error = float(scaling(params, rates.rates, probes, alphas))
  free = symmetries.scale_invariant(classifier.apply_fn, params, probes)
  start, layer, span, first, left = _first_layer(classifier, probes)
  unused = _unused(classifier, probes)
  forms = [form] if form else FORMS[2:] if classifier.initial_params is not None else FORMS[:2]
  conditions = _possible(classifier, rates, free, unused, left)
  possible = {name: _attainable(classifier, conditions[name], probes, first) for name in forms}
  blurred = span is not None and bool(span.blur)
  if form is None and classifier.initial_params is not None:
    form, why = "change", f"their start is known, of which {left:.4g} times its weights are still in them"
  else:
    form, why = (form, "it was asked for") if form else _choose(classifier, rates, error, possible, blurred)
  names = tensor_names(params)
  if possible[form].bound > HOPELESS or (first is not None and names[first] in possible[form].left_out):
    span = None  # a rank alone is no subspace of data
  affine = affine_span(layer) if layer is not None and span is not None and not span.blur else None
  origin = None
  if affine is not None and classifier.initial_params is None and not classifier.batch_coupled:
    origin, span = jnp.asarray(affine[0].reshape(classifier.input_shape), jnp.float32), affine[1]
  last, last_kernel, last_bias = _last_layer(classifier, probes)
  leaves, structure = jax.tree.flatten(params)
  roles = ["kernel" if leaf.ndim > 1 else "other" for leaf in leaves]
  if first is not None:
    roles[first] = "first kernel"
  if last_bias is not None:
    roles[last_bias] = "last bias"
  return Examination(
    classifier=classifier,
    form=form,
    why=why,
    conditions=possible[form].conditions,
    bounds={name: own.bound for name, own in possible.items()},
    left_out=possible[form].left_out,
    unused=unused,
    free=free,
    rates=rates,
    scaling_error=error,
    start=classifier.offset if classifier.offset is not None else start,
    first=layer,
    origin=origin,
    span=span,
    roles=jax.tree.unflatten(structure, roles),
    last=last,
    margin=_margin(classifier, last, last_kernel),
    probes=probes,
  )


def _check_outputs(classifier: Classifier, probes: jax.Array) -> None:
  """Raises a ValueError where outputs are no logits, or the same for all inputs."""
  logits = np.asarray(classifier.predict(probes), np.float64)
  if not np.ptp(logits, axis=0).any():
    raise ValueError(
      "classifier must tell inputs apart; it gives all random inputs the same logits: its units are dead, or its"
      " weights are 0."
    )
  wide = [logits, *(np.asarray(classifier.predict(probes * factor), np.float64) for factor in (30.0, 1000.0))]
  difference = [own[:, 1] - own[:, 0] for own in wide]
  many = all(np.all((own >= 0) & (own <= 1)) and np.allclose(own.sum(axis=1), 1, atol=1e-3) for own in wide)
  one = classifier.num_classes == 2 and np.ptp(difference) > 0 and all(np.all((d >= 0) & (d <= 1)) for d in difference)
  if many or one:
    raise ValueError(
      f"classifier must return logits; its outputs are in [0, 1]{' and add up to 1' if many else ''} for every input,"
      " as probabilities are. Leave out the softmax or sigmoid at its end (in Keras: activation=None)."
    )


def _unused(classifier: Classifier, probes: jax.Array) -> tuple[str, ...]:
  """The names of the tensors on which no logit of any random input depends."""
  logits = lambda params: jnp.sum(
    jnp.square(classifier.apply_fn(params, probes) + jnp.cos(jnp.arange(len(probes)))[:, None])
  )
  gradient = jax.tree.leaves(jax.jit(jax.grad(logits))(classifier.params))
  names = zip(tensor_names(classifier.params), gradient, strict=True)
  return tuple(name for name, own in names if own.size and not np.any(np.asarray(own)))


def _rounded(params: PyTree) -> bool:
  """Whether all matrices of a tree hold values of 16 bits."""
  leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params) if np.ndim(leaf) > 1]
  alike = lambda leaf, dtype: bool(jnp.all(leaf == leaf.astype(dtype).astype(leaf.dtype)))
  few = lambda leaf: len(np.unique(np.asarray(leaf))) < _FEW_VALUES  # such as ones
  return any(
    all(alike(leaf, dtype) for leaf in leaves) and not all(map(few, leaves)) for dtype in (jnp.bfloat16, jnp.float16)
  )


def _possible(
  classifier: Classifier, rates: kkt.RateSolution, free: PyTree, unused: Sequence[str], left: float
) -> dict[str, Conditions]:
  """The condition of each form; weight decay leaves none on what has no scale of its own, and none bears on the unused.

  With momentum, minibatches and weight decay alike, weights are a multiple of the start, ``left``, and a sum of
  gradients along the way. The gradients at its end stand for these.
  """
  decay = weight_decay_conditions(classifier.params, weight_decay=classifier.weight_decay or 1.0)
  masks = jax.tree.map(lambda own, ones: jnp.zeros_like(ones) if own else ones, free, decay.mask)
  possible = {
    "weight_decay": dataclasses.replace(decay, mask=masks),
    "max_margin": max_margin_conditions(classifier.params, rates),
  }
  if classifier.initial_params is not None:
    change = jax.tree.map(lambda own, first: own - left * first, classifier.params, classifier.initial_params)
    possible["change"] = Conditions(change, decay.mask)
  if not unused:
    return possible
  names, structure = tensor_names(classifier.params), jax.tree.structure(classifier.params)
  used = jax.tree.unflatten(structure, [float(name not in unused) for name in names])
  return {
    name: dataclasses.replace(own, mask=jax.tree.map(jnp.multiply, own.mask, used)) for name, own in possible.items()
  }


class _Attainable(NamedTuple):
  """Conditions, the tensors that were left out of them for their sake, and the bound of the others."""

  conditions: Conditions
  left_out: Mapping[str, float]
  bound: float


def _attainable(classifier: Classifier, conditions: Conditions, probes: jax.Array, first: int | None) -> _Attainable:
  """The conditions without the tensors that account for most of what is out of reach, if they can hold then.

  A tensor on which no symmetry bears has a bound of 0 whatever it is. So what is left must be moved by one, and be the
  first kernel, at place ``first``, or more than half of the parameters.
  """
  names, structure = tensor_names(conditions.mask), jax.tree.structure(conditions.mask)
  sizes = {name: leaf.size for name, leaf in zip(names, jax.tree.leaves(conditions.mask), strict=True)}

  def without(left: Sequence[str]) -> Conditions:
    leaves = zip(names, jax.tree.leaves(conditions.mask), strict=True)
    masks = [jnp.zeros_like(leaf) if name in left else leaf for name, leaf in leaves]
    return dataclasses.replace(conditions, mask=jax.tree.unflatten(structure, masks))

  def judge(left: Sequence[str]) -> symmetries.LeastResidual:
    return symmetries.least_residual(classifier.apply_fn, classifier.params, without(left), probes)

  def tells(found: symmetries.LeastResidual) -> bool:
    known = first is not None and names[first] in found.by_tensor
    return known or 2 * sum(sizes[name] for name in found.by_tensor) > sum(sizes.values())

  whole = found = judge([])
  left: list[str] = []
  while found.value > HOPELESS and len(left) < _MOST_LEFT_OUT:
    worst = sorted(found.by_tensor, key=lambda name: -found.by_tensor[name])[:_TRIED]
    trials = ((name, judge([*left, name])) for name in worst)
    name, trial = next(((name, own) for name, own in trials if tells(own)), ("", found))
    if not name:
      break
    left, found = [*left, name], trial
  if found.value > HOPELESS:
    return _Attainable(conditions, {}, whole.value)
  return _Attainable(without(left), {name: whole.by_tensor.get(name, 0.0) for name in left}, found.value)


def _choose(
  classifier: Classifier,
  rates: kkt.RateSolution,
  error: float,
  possible: Mapping[str, _Attainable],
  blurred: bool,
) -> tuple[str, str]:
  """The form, and why."""
  if classifier.weight_decay is not None:
    some = " at most" if isinstance(classifier.weight_decay, WeightDecay) else ""
    return "weight_decay", f"their weight decay is known,{some} {classifier.weight_decay:g}"
  if classifier.batch_coupled:
    return (
      "max_margin",
      "batch norm undoes the scale of the weights before it, which weight decay would shrink for ever",
    )
  # A linear last layer alone is always quasi-homogeneous; if nothing before it is, there is no other solution.
  trivial = bool(rates.null_space_dimension == 0) and float(rates.target_rate) > 1 - _HOMOGENEOUS
  if error > _HOMOGENEOUS or trivial:
    return "weight_decay", "nothing before the last layer is quasi-homogeneous, which the max-margin form needs"
  decay, margin = possible["weight_decay"].bound, possible["max_margin"].bound
  if min(decay, margin) > HOPELESS:
    if abs(decay - margin) <= _TIE * decay:
      return "weight_decay", f"neither form fits, and one as little as the other ({decay:.2g} is out of reach)"
    return (
      "weight_decay" if decay < margin else "max_margin",
      f"neither form fits ({decay:.2g} and {margin:.2g} of the targets are out of reach) and it fits better",
    )
  if margin <= HOPELESS and (blurred or possible["weight_decay"].left_out):
    return "max_margin", "they still hold some of their initialisation, which weight decay would have undone"
  if decay <= max(0.01, margin):
    return (
      "weight_decay",
      f"its layers are in the balance that weight decay brings about ({decay:.2g} of it is missing)",
    )
  return "max_margin", f"its layers lack the balance that weight decay brings about ({decay:.2g} of it is missing)"


def _margin(classifier: Classifier, last: LastLayer | None, place: int | None) -> float | None:
  """The typical margin of the training data, if the last layer reveals it."""
  if last is None or place is None:
    return None
  margin = math.nan
  if classifier.weight_decay is not None:
    decay = jax.tree.leaves(decay_of_tensors(classifier.weight_decay, classifier.params))[place]
    margin = typical_margin(last.kernel, weight_decay=decay) if decay else math.nan
  elif last.scale is not None and last.shift is not None:
    margin = collapsed_margin(last.kernel, last.bias, last.scale, last.shift)
  return margin if margin > 0 else None


def _gradients(classifier: Classifier, weights: jax.Array, samples: jax.Array) -> list[list[np.ndarray]]:
  """For each sample the gradient of ``weights . logits`` at inference by every tensor."""
  found = [_gradient(classifier.predict_fn, classifier.params, weights, sample) for sample in samples]
  return [[np.asarray(g, np.float64) for g in jax.tree.leaves(own)] for own in found]


@functools.partial(jax.jit, static_argnames="predict_fn")
def _gradient(predict_fn: ApplyFn, params: PyTree, weights: jax.Array, sample: jax.Array) -> PyTree:
  return jax.grad(lambda p: jnp.vdot(predict_fn(p, sample[None])[0], weights))(params)


def _matrices(leaves: list[jax.Array], size: int, *, axis: int) -> list[tuple[int, bool]]:
  """Matrices with a side of a given size, as flax lays them out (along ``axis``), then turned, as PyTorch does."""
  flat = [(i, leaf.shape) for i, leaf in enumerate(leaves) if leaf.ndim == 2]
  return [(i, turned) for turned in (False, True) for i, shape in flat if shape[1 - axis if turned else axis] == size]


def _first_layer(
  classifier: Classifier, x: jax.Array
) -> tuple[jax.Array | None, FirstLayer | None, InputSpan | None, int | None, float]:
  """What a network subtracts from its inputs, its fully connected first layer, the span and the place of its kernel.

  Last comes how much of a known start is left in the kernel; 1 if that is unknown.

  The gradient of any logit by the kernel of such a layer is the outer product of the layer's input with another vector.
  So the direction of what the layer sees of each input x_i follows from gradients, ``x_i - m = c_i u_i``, and three
  inputs determine their c_i and the constant m that was subtracted.
  """
  leaves = jax.tree.leaves(classifier.params)
  found = _gradients(classifier, jnp.linspace(-1.0, 1.0, classifier.num_classes), x[:3])
  flat = np.asarray(x[:3], np.float64).reshape(3, -1)
  for place, turned in _matrices(leaves, flat.shape[1], axis=0) if flat.shape[1] > 1 else []:
    upright = lambda leaf, turned=turned: np.asarray(leaf).T if turned else np.asarray(leaf)
    gradients = [upright(own[place]) for own in found]
    constant = _constant(flat, gradients)
    if constant is None:
      continue  # its inputs are not the data: another layer, or they go through something else first
    kernel = upright(leaves[place])
    start = jnp.asarray(constant.reshape(classifier.input_shape), jnp.float32)
    if kernel.shape[1] <= classifier.num_classes:
      return start, None, None, place, 1.0  # such as a last layer, which tells of classes
    # Batch norm makes the gradients of a batch add up to 0: their span is one of differences, around the data's mean.
    around_mean = not classifier.batch_coupled or float(np.std(constant)) > _ALIKE * np.abs(flat).max()
    left = 1.0
    if classifier.initial_params is not None:
      kernel, left = _change(kernel, upright(jax.tree.leaves(classifier.initial_params)[place]))
    noise = around_mean and classifier.initial_params is None and not _rounded(classifier.params)
    usable = around_mean or classifier.initial_params is None
    rank, span = _span(kernel, noise=noise, num_classes=classifier.num_classes) if usable else (0, None)
    at, gain = _first_bias(leaves, found, gradients, flat - constant)
    decays = jax.tree.leaves(decay_of_tensors(classifier.weight_decay or 1.0, classifier.params))
    bias = None if at is None or decays[at] != decays[place] else np.asarray(leaves[at])
    return start, FirstLayer(kernel / gain, constant, place, turned, gain, bias, rank, decays[place]), span, place, left
  return None, None, None, None, 1.0


def _first_bias(
  leaves: list[jax.Array], found: list[list[np.ndarray]], gradients: list[np.ndarray], offsets: np.ndarray
) -> tuple[int | None, float]:
  """The place of the first layer's bias, if it has one, and what the network multiplies its inputs by before; else 1.

  By the kernel a logit's gradient is the outer product of the layer's input with the one by its bias.
  """
  signals = np.stack([offset @ own / (offset @ offset) for offset, own in zip(offsets, gradients, strict=True)])
  for place, leaf in enumerate(leaves):
    if leaf.shape == signals.shape[1:]:
      own = np.stack([gradient[place] for gradient in found])
      gain = float(np.vdot(signals, own) / max(np.vdot(own, own), 1e-300))
      if gain > 0 and np.linalg.norm(signals - gain * own) <= _ALIKE * np.linalg.norm(signals):
        return place, gain if abs(gain - 1) > _ALIKE else 1.0
  return None, 1.0


def _constant(x: np.ndarray, gradients: Sequence[np.ndarray]) -> np.ndarray | None:
  """The constant m [D] for which each ``x_i - m`` is what a layer sees of x_i [K, D], from its gradients [D, F]."""
  directions = []
  for gradient in gradients:
    column = gradient[:, np.argmax(np.sum(np.square(gradient), axis=0))]
    rest = gradient - np.outer(column, column @ gradient) / max(float(column @ column), 1e-300)
    if not np.any(column) or np.linalg.norm(rest) > _ALIKE * np.linalg.norm(gradient):
      return None
    directions.append(column / np.linalg.norm(column))
  count, size = x.shape
  equations = np.zeros((count - 1, size, count))
  equations[:, :, 0] = directions[0]
  equations[np.arange(count - 1), :, np.arange(1, count)] = -np.stack(directions[1:])
  c = np.linalg.lstsq(equations.reshape(-1, count), (x[0] - x[1:]).reshape(-1))[0]
  constants = x - c[:, None] * np.stack(directions)
  return constants[0] if np.abs(constants - constants[0]).max() <= _ALIKE * np.abs(x).max() else None


def _change(kernel: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, float]:
  """``W - c W_0`` with the c that leaves nothing in directions without data, and c.

  Weight decay shrinks the start: there ``W = c W_0``. A singular value with vectors u and v falls with c at the rate
  ``d = u^T W_0 v``, and becomes 0 where s = d times a step, for all directions without data at once. The step is the
  least squares solution of these equations, each divided by s, so that those of data do not count.
  """
  final, initial = np.asarray(kernel, np.float64), np.asarray(first, np.float64)
  change, left = final - initial, 1.0
  for _ in range(_TURNS):
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    size = np.maximum(s, _ROUNDING * max(s[0], 1e-30))
    rates = np.sum((u.T @ initial) * vt, axis=1) / size
    step = float(np.vdot(rates, s / size) / np.vdot(rates, rates))
    left += step
    change = final - left * initial
    if abs(step) < _ROUNDING:
      break
  return change.astype(kernel.dtype), left


def _span(kernel: ArrayLike, *, noise: bool = True, num_classes: int = 0) -> tuple[int, InputSpan | None]:
  """How many directions stand before a fall of the singular values, and the span of the data, if it is that.

  The kernel ``sum_i x_i s_i^T`` has the rank of the signals s_i where these are fewer than the samples: samples of one
  class that open the same gates are fitted alike, and two classes leave two to a dozen directions, whatever the number
  of samples. So there must be more than two for each class before a sharp fall, or above noise, and many more else.
  """
  basis, strengths, _ = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
  rank, sharp = _fall(strengths)
  if rank:
    enough = rank > (_fitted_alike(num_classes) if sharp else _MANY * num_classes)
    found = InputSpan(jnp.asarray(basis[:, :rank], jnp.float32), jnp.asarray(strengths[:rank], jnp.float32))
    return rank, found if enough else None
  span = span_above_noise(kernel) if noise else None
  return 0, span if span is not None and span.strengths.size > _fitted_alike(num_classes) else None


def _fitted_alike(num_classes: int) -> int:
  """How many directions may be left where all samples of a class open one of few sets of gates; measured: 6 of two."""
  return 2 * num_classes + _GROUPS if num_classes else 0


def _fall(strengths: np.ndarray) -> tuple[int, bool]:
  """How many singular values stand before their greatest fall to almost nothing, 0 if there is none; is it sharp?

  It is if it is deep, or ends in rounding errors, below which nothing can be seen to fall.
  """
  values = np.maximum(strengths / max(strengths[0], 1e-300), _ROUNDING)
  falls = np.where(values[1:] < _NOTHING, values[:-1] / values[1:], 0.0)
  falls = falls[: int(_FILLED * len(falls))]  # a normalisation takes directions away, which says nothing of data
  at = int(np.argmax(falls)) if len(falls) else 0
  if len(falls) and falls[at] > _FALL:
    return at + 1, bool(falls[at] > _SHARP or values[at + 1] <= _ROUNDING)
  # Without a sharp fall, what lies below the rounding errors of the training is no direction of the data.
  count = int(np.sum(values > 2 * _ROUNDING))
  return (count if 0 < count < _FILLED * len(values) else 0), False


def _last_layer(classifier: Classifier, x: jax.Array) -> tuple[LastLayer | None, int | None, int | None]:
  """The last dense layer, and the places of its kernel and bias among the tensors.

  The gradient of ``v . logits`` by its kernel is the outer product of the layer's input with v, whatever v is.
  """
  leaves = jax.tree.leaves(classifier.params)
  classes = classifier.num_classes
  weights = [jnp.linspace(-1.0, 1.0, classes), jnp.cos(jnp.arange(float(classes)))]
  found = [_gradients(classifier, own, x[:1])[0] for own in weights]
  v = [np.asarray(own, np.float64) for own in weights]
  alike = lambda a, b: bool(np.linalg.norm(a - b) <= _ALIKE * max(float(np.linalg.norm(a)), 1e-30))
  for place, turned in _matrices(leaves, classes, axis=1):
    gradients = [own[place].T if turned else own[place] for own in found]
    inputs = gradients[0] @ v[0] / (v[0] @ v[0])
    if not np.any(inputs) or not all(alike(g, np.outer(inputs, own)) for g, own in zip(gradients, v, strict=True)):
      continue
    biases = [i for i, leaf in enumerate(leaves) if leaf.shape == (classes,)]
    bias = next((i for i in biases if all(alike(g[i], own) for g, own in zip(found, v, strict=True))), None)
    kernel = leaves[place].T if turned else leaves[place]
    scale, shift = _last_norm(classifier, x, kernel.shape[0])
    return LastLayer(kernel, jnp.zeros(classes) if bias is None else leaves[bias], scale, shift), place, bias
  return None, None, None


def _last_norm(classifier: Classifier, x: jax.Array, width: int) -> tuple[jax.Array | None, jax.Array | None]:
  """Scale and shift [F] of the batch norm whose output is the features: f = scale * normalised + shift."""
  if classifier.features_fn is None:
    return None, None
  features_fn, params = classifier.features_fn, classifier.params

  @jax.jit
  def of_one(params: PyTree) -> tuple[jax.Array, PyTree]:
    """Features [F] of a sample, and the derivative of their sum: by the shift 1, by the scale the normalised value."""
    found, pull_back = jax.vjp(lambda p: features_fn(p, x[:1]), params)
    return found[0], pull_back(jnp.ones_like(found))[0]

  whole, gradients = of_one(params)
  features, leaves, gradient = np.asarray(whole, np.float64), *map(jax.tree.leaves, (params, gradients))
  places = [i for i, leaf in enumerate(leaves) if leaf.shape == (width,)]
  shifts = [i for i in places if np.allclose(gradient[i], 1.0, atol=_ALIKE)]
  for shift in shifts:
    for scale in places:
      value = np.asarray(leaves[scale] * gradient[scale] + leaves[shift], np.float64)
      if scale != shift and np.linalg.norm(value - features) <= _ALIKE * np.linalg.norm(features):
        return leaves[scale], leaves[shift]
  return None, None
