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
import numpy as np

from kkt_jax import _checks, kkt
from kkt_jax._precision import full_precision
from kkt_jax._typing import PyTree
from kkt_jax.analysis.first_layer import FirstLayer, FirstReading, origin_of, read_first_layer
from kkt_jax.analysis.last_layer import LastLayer, read_last_layer
from kkt_jax.analysis.probing import Probes
from kkt_jax.analysis.subspace import is_image, Subspace
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.classifiers.decay import WeightDecay
from kkt_jax.criteria import AnalysisCriteria
from kkt_jax.kkt import homogeneity
from kkt_jax.kkt.conditions import Conditions, conditions_by_form
from kkt_jax.kkt.symmetries import Attainable, Symmetries

#: The stationarity conditions that weights can obey.
FORMS = ("weight_decay", "max_margin", "change")
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
    rounded: whether all matrices of the parameters hold values that 16 bits can represent.
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
  rounded: bool
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
  def most_weight_decay(self) -> float | None:
    """The greatest ``weight_decay`` with which training can have ended at the last layer; None if that is unknown.

    Weights alone do not tell whether a smaller one is right.
    """
    given, last = self.classifier.weight_decay, self.last
    if last is None or given is None:
      return None if last is None else last.most_weight_decay
    return float(given) * last.most_weight_decay / last.decay if last.decay else None

  @property
  def class_features(self) -> tuple[jax.Array, jax.Array] | None:
    """The common features of each class before the last ReLU [C, F] and their scales [F]; None if not revealed."""
    last = self.last
    if self.margin is None or last is None or last.scale is None or (features := last.collapsed_features) is None:
      return None
    return features, last.scale

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
      *(["They are rounded to 16 bits, which hides whatever is fainter."] if self.rounded else []),
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

  >>> import jax.numpy as jnp
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
  probes = Probes.drawn(classifier, seed, criteria)
  known = probes.sums()
  params, scales = known.params, np.linspace(-0.5, 0.5, 5)
  rates = kkt.balanced(homogeneity.summed_equations(known), params)
  error = float(kkt.scaling_error(classifier.apply_fn, params, rates.rates, probes.x, scales))
  symmetric = Symmetries(known, criteria=criteria)
  free, unused = symmetric.scale_invariant(), symmetric.tree([name in known.unused for name in known.names])
  first, last = read_first_layer(probes), read_last_layer(probes)
  conditions = conditions_by_form(classifier, rates, free=free, unused=unused, left=first.left)
  tried = [form] if form else FORMS[2:] if classifier.initial_params is not None else FORMS[:2]
  possible = {name: symmetric.attainable(conditions[name], first.place) for name in tried}
  form, why = (form, "it was asked for") if form else _chosen(classifier, rates, error, possible, first, criteria)
  chosen, subspace = possible[form], first.subspace
  if chosen.bound > criteria.unexplained or (first.place is not None and known.names[first.place] in chosen.left_out):
    subspace = None  # a rank alone is no subspace of data
  if last is not None and last.beyond and form == "weight_decay":
    chosen = possible[form] = chosen.short_of(last.beyond)
  roles = ["kernel" if leaf.ndim > 1 else "other" for leaf in probes.leaves]
  if first.place is not None:
    roles[first.place] = "first kernel"
  if last is not None and last.bias_place is not None:
    roles[last.bias_place] = "last bias"
  return Examination(
    classifier=classifier,
    form=form,
    why=why,
    conditions=chosen.conditions,
    bounds={name: attainable.bound for name, attainable in possible.items()},
    left_out=chosen.left_out,
    unused=known.unused,
    free=free,
    rates=rates,
    scaling_error=error,
    start=first.start if classifier.offset is None else classifier.offset,
    first=first.layer,
    subspace=subspace,
    roles=symmetric.tree(roles),
    last=last,
    margin=None if last is None else last.margin,
    rounded=probes.rounded,
    probes=probes.x,
    criteria=criteria,
  )


def _chosen(
  classifier: Classifier,
  rates: kkt.RateSolution,
  error: float,
  possible: Mapping[str, Attainable],
  first: FirstReading,
  criteria: AnalysisCriteria,
) -> tuple[str, str]:
  """The form, and why."""
  if classifier.initial_params is not None:
    return "change", f"their start is known, of which {first.left:.4g} times its weights are still in them"
  if classifier.weight_decay is not None:
    at_most = " at most" if isinstance(classifier.weight_decay, WeightDecay) else ""
    return "weight_decay", f"their weight decay is known,{at_most} {classifier.weight_decay:g}"
  if classifier.batch_coupled:
    return (
      "max_margin",
      "batch norm undoes the scale of the weights before it, which weight decay would shrink for ever",
    )
  # A linear last layer alone is always quasi-homogeneous; if nothing before it is, there is no other solution.
  trivial = bool(rates.null_space_dimension == 0) and float(rates.target_rate) > 1 - criteria.scaling
  if error > criteria.scaling or trivial:
    return "weight_decay", "nothing before the last layer is quasi-homogeneous, which the max-margin form needs"
  blurred = first.subspace is not None and bool(first.subspace.blur)
  decay, margin = possible["weight_decay"].bound, possible["max_margin"].bound
  if min(decay, margin) > criteria.unexplained:
    if abs(decay - margin) <= criteria.tie * decay:
      return "weight_decay", f"neither form fits, and one as little as the other ({decay:.2g} is out of reach)"
    return (
      "weight_decay" if decay < margin else "max_margin",
      f"neither form fits ({decay:.2g} and {margin:.2g} of the targets are out of reach) and it fits better",
    )
  if margin <= criteria.unexplained and (blurred or possible["weight_decay"].left_out):
    return "max_margin", "they still hold some of their initialisation, which weight decay would have undone"
  if decay <= max(criteria.missing, margin):
    return (
      "weight_decay",
      f"its layers are in the balance that weight decay brings about ({decay:.2g} of it is missing)",
    )
  return "max_margin", f"its layers lack the balance that weight decay brings about ({decay:.2g} of it is missing)"
