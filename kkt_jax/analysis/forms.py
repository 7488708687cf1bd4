"""Which stationarity condition the weights obey, and which of their tensors."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax import kkt
from kkt_jax._typing import PyTree
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.classifiers.decay import WeightDecay
from kkt_jax.criteria import AnalysisCriteria
from kkt_jax.kkt import symmetries
from kkt_jax.kkt.conditions import Conditions, max_margin_conditions, weight_decay_conditions
from kkt_jax.kkt.functionals import Functionals

#: The stationarity conditions that weights can obey.
FORMS = ("weight_decay", "max_margin", "change")


def possible_conditions(
  classifier: Classifier, rates: kkt.RateSolution, free: PyTree, known: Functionals, left: float
) -> dict[str, Conditions]:
  """The conditions of each form, without unused tensors, and in weight decay without those that have no scale.

  With momentum, minibatches and weight decay alike, weights are a multiple of the start, ``left``, and a sum of
  gradients along the way. The gradients at its end stand for these.
  """
  decay = weight_decay_conditions(classifier.params, weight_decay=classifier.weight_decay or 1.0)
  masks = jax.tree.map(lambda is_free, ones: jnp.zeros_like(ones) if is_free else ones, free, decay.mask)
  possible = {
    "weight_decay": dataclasses.replace(decay, mask=masks),
    "max_margin": max_margin_conditions(classifier.params, rates),
  }
  if classifier.initial_params is not None:
    change = jax.tree.map(lambda last, first: last - left * first, classifier.params, classifier.initial_params)
    possible["change"] = Conditions(change, decay.mask)
  if not known.unused:
    return possible
  structure = jax.tree.structure(classifier.params)
  used = jax.tree.unflatten(structure, [float(name not in known.unused) for name in known.names])
  return {
    name: dataclasses.replace(each, mask=jax.tree.map(jnp.multiply, each.mask, used)) for name, each in possible.items()
  }


class Attainable(NamedTuple):
  """Conditions that data can satisfy, the tensors that were left out for that, and the bound on the others."""

  conditions: Conditions
  left_out: Mapping[str, float]
  bound: float


def attainable(
  symmetric: symmetries.Symmetries, conditions: Conditions, first: int | None, criteria: AnalysisCriteria
) -> Attainable:
  """The conditions without the tensors of which most is out of reach, if data can satisfy the others.

  A tensor on which no symmetry bears has a bound of 0 whatever it is. So what is left must be moved by one, and be the
  first kernel, at place ``first``, or more than half of the parameters.
  """
  names, structure = symmetric.names, jax.tree.structure(conditions.mask)
  sizes = {name: leaf.size for name, leaf in zip(names, jax.tree.leaves(conditions.mask), strict=True)}

  def without(left: Sequence[str]) -> Conditions:
    leaves = zip(names, jax.tree.leaves(conditions.mask), strict=True)
    masks = [jnp.zeros_like(leaf) if name in left else leaf for name, leaf in leaves]
    return dataclasses.replace(conditions, mask=jax.tree.unflatten(structure, masks))

  def tells(residual: symmetries.LeastResidual) -> bool:
    known = first is not None and names[first] in residual.by_tensor
    return known or 2 * sum(sizes[name] for name in residual.by_tensor) > sum(sizes.values())

  judge = symmetric.bound(conditions)
  whole = rest = judge([])
  left: list[str] = []
  while rest.value > criteria.unexplained and len(left) < criteria.left_out:
    worst = sorted(rest.by_tensor, key=lambda name: -rest.by_tensor[name])[: criteria.tried]
    trials = ((name, judge([*left, name])) for name in worst)
    name, trial = next(((name, of) for name, of in trials if tells(of)), ("", rest))
    if not name:
      break
    left, rest = [*left, name], trial
  if rest.value > criteria.unexplained:
    return Attainable(conditions, {}, whole.value)
  return Attainable(without(left), {name: whole.by_tensor.get(name, 0.0) for name in left}, rest.value)


def short_of(given: Attainable, least: float) -> Attainable:
  """The same with a greater bound: at least so much, squared and absolute, is out of reach for another reason."""
  trees = (given.conditions.target, given.conditions.mask)
  parts = zip(*([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in trees), strict=True)
  whole = sum(float(np.sum(np.square(target * mask))) for target, mask in parts)
  return given._replace(bound=max(given.bound, min(1.0, least / max(whole, 1e-300))))


def choose(
  classifier: Classifier,
  rates: kkt.RateSolution,
  error: float,
  possible: Mapping[str, Attainable],
  blurred: bool,
  criteria: AnalysisCriteria,
) -> tuple[str, str]:
  """The form, and why."""
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
