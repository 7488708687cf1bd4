"""What a classifier's weights say before any training, found by trying its function on random inputs. No data are seen.

`examine` reads off which conditions the weights obey, in which directions the data lie (first layer), and how sure the
classifier was of them (last layer). `kkt_jax.reconstruction.recipes.default` turns this into a recipe, for anybody's
classifier.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax import _checks, kkt
from kkt_jax._precision import full_precision
from kkt_jax._typing import PyTree
from kkt_jax.analysis import _probing, forms
from kkt_jax.analysis.first_layer import FirstLayer, origin_of, read_first_layer
from kkt_jax.analysis.forms import FORMS
from kkt_jax.analysis.last_layer import collapsed_features, decay_limit, LastLayer, margin_of, read_last_layer
from kkt_jax.analysis.subspace import is_image, Subspace
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AnalysisCriteria
from kkt_jax.kkt import functionals, homogeneity, symmetries
from kkt_jax.kkt.conditions import Conditions

_DEFAULT = AnalysisCriteria()


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
    subspace: that of the data, read off a fully connected first layer that is wide enough; None if there is none. Where
      the layer's bias tells how bright the data are (`kkt_jax.analysis.FirstLayer.normal`), it has one direction less
      than the kernel, and does not go through what is subtracted.
    roles: what each tensor is, a pytree like the parameters: ``"first kernel"``, ``"kernel"``, ``"last bias"`` or
      ``"other"``.
    last: the last dense layer, or None.
    margin: the typical margin of the training data in logits as the last layer reveals it, or None.
    most_weight_decay: the greatest weight decay with which training can have ended at the last layer, or None. Weights
      alone do not tell whether a smaller one is right.
    probes: the random inputs that were tried [K, *input_shape].
    criteria: by which all this was decided.
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
  subspace: Subspace | None
  roles: PyTree
  last: LastLayer | None
  margin: float | None
  most_weight_decay: float | None
  probes: jax.Array
  criteria: AnalysisCriteria = _DEFAULT

  @classmethod
  def unexamined(cls, classifier: Classifier, form: str, conditions: Conditions, **known: Any) -> Self:
    """The conditions of a classifier that is not examined, and what else is ``known``; all the rest is None."""
    unknown: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(cls))
    given = {"classifier": classifier, "form": form, "conditions": conditions, "criteria": _DEFAULT}
    return cls(**unknown | given | known)

  @property
  def bound(self) -> float:
    """The share of the target that no data can account for, without the tensors that are left out."""
    return self.bounds[self.form]

  @property
  def explained(self) -> bool:
    """Whether data could account for the target: ``bound`` is small."""
    return self.bound <= self.criteria.unexplained

  @property
  def share(self) -> float:
    """The share of all dimensions that the data are known to fill; 1 if that is unknown."""
    return 1.0 if self.subspace is None else self.subspace.dimension / math.prod(self.classifier.input_shape)

  @property
  def origin(self) -> jax.Array:
    """Where samples start, in units of the range: the subspace's origin, what is subtracted, or the range's middle."""
    return origin_of(self.classifier, self.start) if self.subspace is None else self.subspace.origin

  @property
  def tells_mean(self) -> bool:
    """Whether the origin is an image, as the data's mean is, and not one value throughout."""
    return is_image(self.origin, self.criteria)

  @property
  def most_samples(self) -> int:
    """How many training samples the subspace can hold; 0 if there is none."""
    return 0 if self.subspace is None else self.subspace.most_samples

  @property
  def class_features(self) -> tuple[jax.Array, jax.Array] | None:
    """The common features of each class before the last ReLU [C, F] and their scales [F]; None if not revealed."""
    last = self.last
    if self.margin is None or last is None or last.scale is None or last.shift is None:
      return None
    return collapsed_features(last.kernel, last.scale, last.shift), last.scale

  def _decay(self) -> str:
    """In words, whether the weights agree with the weight decay that they are said to have had."""
    decay, most = self.classifier.weight_decay, self.most_weight_decay
    if decay is None or most is None or self.form != "weight_decay":
      return ""
    if decay > most:
      return f" That is too much: where training ends, such a last layer has had {most:.2g} at most."
    return f" They do not tell whether that is right; up to {most:.2g} it can be."

  def _left_out(self) -> list[str]:
    names = ", ".join(f"{name} ({share:.0%} of everything)" for name, share in self.left_out.items())
    return [f"Left out, because no training set could have caused them: {names}."] if names else []

  def _directions(self) -> str:
    """In words, the subspace of the data, and how a single sample could be certified (`extraction.certificates`)."""
    subspace, rank = self.subspace, self.first.rank if self.first is not None else 0
    dimensions = math.prod(self.classifier.input_shape)
    if subspace is None and rank:
      return f"The first layer has rank {rank} of {dimensions}, which is not taken for the input subspace:" + (
        f" with {self.classifier.num_classes} classes so few are left where many samples are fitted alike."
        if self.explained and not self.left_out
        else " no training set could have caused its weights."
      )
    if subspace is None:
      return "The input subspace is not identifiable from the first layer."
    count = subspace.dimension
    lines = f"They reveal an input subspace of {count} of {dimensions} dimensions{_blurred(subspace)}."
    if count < rank:
      lines += " The first layer's bias tells how bright they are."
    if self.classifier.value_range is not None and subspace.certifies:
      number, required = int(subspace.free_coordinates.sum()), subspace.required_active()
      lines += f" A sample with {required} of {number} values at an end of their range can be one of them by no"
      lines += " chance."
    return lines

  def __str__(self) -> str:
    """The findings in plain words."""
    params, limit = self.classifier.params, self.criteria.unexplained
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    rounded = ["They are rounded to 16 bits, which hides whatever is fainter."]
    rough = jax.eval_shape(self.classifier.apply_fn, params, self.probes[:2]).dtype.itemsize < 4
    trained = {
      "weight_decay": "weights trained to convergence with weight decay",
      "max_margin": "weights that gradient descent drove to a maximal margin",
      "change": "the change of weights since their start",
    }[self.form]
    lines = [
      f"{count:,} parameters, {self.classifier.num_classes} classes,"
      f" {'batch norm' if self.classifier.batch_coupled else 'no batch norm'}.",
      f"They are examined as {trained}, because {self.why}.{self._decay()}",
      *([f"The function never uses {', '.join(self.unused)}."] if self.unused else []),
      *(rounded if _probing.rounded(params, self.criteria) else []),
      *(["The function computes in 16 bits, which hides whatever is fainter."] if rough else []),
      *self._left_out(),
      f"At least {self.bound:.2%} of {'the rest' if self.left_out else 'the stationarity target'} is unreachable by any"
      f" training set ({'so data are not excluded' if self.explained else 'too much'}; the limit is {limit:.0%}).",
      self._directions(),
      _subtracted(self.start, self.criteria.alike),
      "They do not reveal the margin of the data."
      if self.margin is None
      else f"The data have a typical margin of {self.margin:.4g} logits.",
    ]
    return "\n".join(lines)


def _blurred(subspace: Subspace) -> str:
  """In words, how far noise turns a subspace: the sine of the angle between its directions and the true ones."""
  if not subspace.blur:
    return ""
  best, worst = (float(subspace.blur / subspace.singular_values[k]) for k in (0, -1))
  return (
    ", those that stand out of noise (what is left of the initialisation, or rounding), which blurs the clearest of"
    f" them by {best:.2g} and the faintest by {worst:.2g} of its length"
  )


def _subtracted(start: jax.Array | None, alike: float) -> str:
  if start is None:
    return "What the network subtracts from its inputs is not revealed."
  if float(np.std(start)) > alike:
    return "The network subtracts an image from its inputs, taken for the mean of the data."
  value = float(np.mean(start))
  return (
    f"The network subtracts {value:.3g} from its inputs."
    if abs(value) > alike
    else "The network subtracts nothing from its inputs."
  )


@_checks.annotated
@full_precision
def examine(
  classifier: Classifier, *, form: str | None = None, seed: int = 0, criteria: AnalysisCriteria = _DEFAULT
) -> Examination:
  """What the weights of a classifier reveal, found by trying its function on random inputs.

  Args:
    classifier: the classifier.
    form: one of `FORMS`; chosen if None: the change if the start is known, weight decay if its strength is known, the
      max-margin form with batch norm, else the form whose target data can account for.
    seed: of the inputs.
    criteria: what counts as what; the defaults were measured.

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
  probes = _probes(classifier, seed, criteria.probes)
  _check_logits(classifier, probes)
  known = functionals.functionals(classifier.apply_fn, params, probes)
  unused = _unused(known)
  rates = kkt.balanced(homogeneity.summed_equations(classifier.apply_fn, params, probes, known), params)
  error = float(kkt.scaling_error(classifier.apply_fn, params, rates.rates, probes, np.linspace(-0.5, 0.5, 5)))
  symmetric = symmetries.Symmetries(params, known, criteria=criteria)
  free = symmetric.scale_invariant()
  start, layer, subspace, first, left = read_first_layer(classifier, probes, criteria)
  tried = [form] if form else FORMS[2:] if classifier.initial_params is not None else FORMS[:2]
  conditions = forms.possible_conditions(classifier, rates, free, known, left)
  possible = {name: forms.attainable(symmetric, conditions[name], first, criteria) for name in tried}
  blurred = subspace is not None and bool(subspace.blur)
  if form is None and classifier.initial_params is not None:
    form, why = "change", f"their start is known, of which {left:.4g} times its weights are still in them"
  else:
    choice = lambda: forms.choose(classifier, rates, error, possible, blurred, criteria)
    form, why = (form, "it was asked for") if form else choice()
  chosen = possible[form]
  if chosen.bound > criteria.unexplained or (first is not None and known.names[first] in chosen.left_out):
    subspace = None  # a rank alone is no subspace of data
  last = read_last_layer(classifier, probes, criteria)
  most_decay, beyond = decay_limit(classifier, last)
  if beyond and form == "weight_decay":
    chosen = possible[form] = forms.short_of(chosen, beyond)
  leaves, structure = jax.tree.flatten(params)
  roles = ["kernel" if leaf.ndim > 1 else "other" for leaf in leaves]
  if first is not None:
    roles[first] = "first kernel"
  if last.bias is not None:
    roles[last.bias] = "last bias"
  return Examination(
    classifier=classifier,
    form=form,
    why=why,
    conditions=chosen.conditions,
    bounds={name: attainable.bound for name, attainable in possible.items()},
    left_out=chosen.left_out,
    unused=unused,
    free=free,
    rates=rates,
    scaling_error=error,
    start=classifier.offset if classifier.offset is not None else start,
    first=layer,
    subspace=subspace,
    roles=jax.tree.unflatten(structure, roles),
    last=last.layer,
    margin=margin_of(classifier, last),
    most_weight_decay=most_decay,
    probes=probes,
    criteria=criteria,
  )


def _probes(classifier: Classifier, seed: int, count: int = AnalysisCriteria().probes) -> jax.Array:
  """Random inputs [K, *input_shape], in the classifier's units."""
  key, shape = jax.random.key(seed), (count, *classifier.input_shape)
  if classifier.value_range is None:
    return jax.random.normal(key, shape)
  return classifier.from_unit(jax.random.uniform(key, shape))


@_checks.annotated
@full_precision
def check_outputs(classifier: Classifier, *, seed: int = 0) -> tuple[str, ...]:
  """Checks that the outputs are logits, each of which depends on its own input and on the parameters.

  Args:
    classifier: the classifier.
    seed: of the random inputs that are tried.

  Returns:
    The names of the tensors on which no logit depends.

  Raises:
    ValueError: logits that are not finite, the same for all inputs, probabilities, different in another batch (batch
      norm on batch statistics, dropout) or independent of all parameters.

  >>> from kkt_jax.classifiers.classifier import make_classifier
  >>> check_outputs(make_classifier(lambda p, x: x @ p["w"], {"w": jnp.eye(2), "step": jnp.ones(())}, (2,)))
  ('step',)
  """
  probes = _probes(classifier, seed)
  _check_logits(classifier, probes)
  known = functionals.functionals(classifier.apply_fn, classifier.params, probes, margins=False)
  return _unused(known)


def _check_logits(classifier: Classifier, probes: jax.Array) -> None:
  """See `check_outputs`."""
  logits_of = lambda x: np.asarray(jax.jit(classifier.predict_fn)(classifier.params, x), np.float64)
  logits = logits_of(probes)
  if not np.isfinite(logits).all():
    raise ValueError("classifier must give finite logits; of random inputs in its range some are NaN or infinite.")
  others = jnp.tile(probes[::-2], (2, *[1] * len(classifier.input_shape)))[: len(probes)]
  apart = np.abs(logits[::-2] - logits_of(others)[: len(logits[::-2])]).max()
  if apart > 0.01 * np.abs(logits).max():
    raise ValueError(
      "classifier must give each input its own logits at inference (predict_fn); those of random inputs change with the"
      f" rest of their batch, by up to {apart:.2g}. Is batch norm on batch statistics, or dropout on?"
    )
  if not np.ptp(logits, axis=0).any():
    raise ValueError(
      "classifier must tell inputs apart; it gives all random inputs the same logits: its units are dead, or its"
      " weights are 0."
    )
  wide = [logits, *(logits_of(probes * factor) for factor in (30.0, 1000.0))]
  difference = [output[:, 1] - output[:, 0] for output in wide]
  many = all(np.all((output >= 0) & (output <= 1)) for output in wide)
  one = classifier.num_classes == 2 and np.ptp(difference) > 0 and all(np.all((d >= 0) & (d <= 1)) for d in difference)
  if many or one:
    raise ValueError(
      "classifier must return logits; its outputs are in [0, 1] for every input, as probabilities are. Leave out the"
      " softmax or sigmoid at its end (in Keras: activation=None)."
    )


def _unused(known: functionals.Functionals) -> tuple[str, ...]:
  """The names of the tensors on which no logit of any random input depends."""
  if len(known.unused) == len(known.names):
    raise ValueError("apply_fn must compute the logits from params; they do not depend on any of them.")
  return known.unused
