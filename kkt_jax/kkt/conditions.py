"""The left-hand side of the stationarity condition: what the weighted gradients must add up to, tensor by tensor.

Two forms share everything else. The max-margin form (Theorem 1, Eq. 2a) asks ``Lambda-tilde zeta`` of the target group
of parameters and 0 of the slower ones. The weight-decay form holds at every stationary point of the cross-entropy
plus ``w / 2 |zeta|^2``, for any differentiable network: ``w zeta = mean_i sum_c p_c(x_i) [grad Phi_y - grad Phi_c]``.
That is Lambda = I with the classifier's own probabilities as multipliers.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks
from kkt_jax._tree import tensor_names
from kkt_jax._typing import PyTree
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.classifiers.decay import decay_of_tensors, DecayLike
from kkt_jax.kkt.rates import parameter_groups, RateSolution


@functools.partial(jax.tree_util.register_dataclass, data_fields=["target", "mask"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Conditions:
  """The stationarity condition of one classifier: ``mask * (target - stationarity sum) = 0``.

  Both are constants of the training; no gradient flows into them.

  Attributes:
    target: ``Lambda-bar zeta / N`` of Eq. 4, a pytree like the parameters; 0 where the condition is 0.
    mask: the factor of each parameter's error, a pytree like the parameters: 1 where the condition holds, 0 where there
      is none, other values in between and beyond by `weigh_tensors`. Every loss and measure of the condition sees the
      target and the stationarity sum only through it.
  """

  target: PyTree
  mask: PyTree

  def without(self, left_out: PyTree) -> Self:
    """The same without some tensors, a tree of bools like the parameters."""
    masks = jax.tree.map(lambda out, leaf: jnp.zeros_like(leaf) if out else leaf, left_out, self.mask)
    return dataclasses.replace(self, mask=masks)


@_checks.annotated
def max_margin_conditions(
  params: PyTree,
  solution: RateSolution,
  *,
  alpha: ArrayLike | None = None,
  num_samples: int = 1,
  groups: PyTree | None = None,
) -> Conditions:
  """Stationarity of the max-margin problem, Eqs. 2a and 4: ``Lambda-bar zeta / N`` on the target group, else 0.

  Where it departs from the paper: Lambda-bar of Eq. 3 carries the factor ``e^(alpha (2 lambda_max - 1)) / N``. On the
  target group it is one scalar, which the free scale of the multipliers absorbs, so neither alpha nor N need be known
  and the default leaves both at 1. A gradient through it would have a trivial minimum (target and mu to 0).

  Args:
    params: zeta.
    solution: Lambda.
    alpha: the paper's alpha; the factor is left out if None.
    num_samples: the paper's N, at least 1.
    groups: the group of every parameter, -1, 0 (target) or 1 (left out); ``parameter_groups(solution)`` if None.

  Returns:
    `Conditions`.

  Raises:
    ValueError: ``num_samples`` below 1; ``params`` empty, not floating point or not finite; or a target that is 0
      everywhere, which every generator would satisfy. Values are looked at outside of jit and vmap only.

  >>> import jax.numpy as jnp
  >>> from kkt_jax.kkt.rates import given_rates
  >>> params = {"first": jnp.array([3.0]), "last": jnp.array([4.0])}
  >>> conditions = max_margin_conditions(params, given_rates({"first": 0.0, "last": 1.0}, params))
  >>> print(conditions.target["first"], conditions.target["last"], conditions.mask["first"])
  [0.] [4.] [1.]
  """
  _checks.check_at_least("num_samples", num_samples, 1)
  _checks.check_params("params", params)
  groups = parameter_groups(solution) if groups is None else groups
  rate = solution.target_rate
  scale = rate / num_samples
  if alpha is not None:
    scale = scale * jnp.exp(jnp.asarray(alpha) * (2 * rate - 1))
  target, mask, some = _of_groups(params, groups, scale)
  if _checks.concrete(some) is False:
    raise ValueError(
      "solution must have a target group with parameters other than 0 and a rate other than 0; got target rate"
      f" {float(rate):.3g}, and everything in the target is 0."
    )
  return Conditions(*jax.lax.stop_gradient((target, mask)))


@jax.jit  # one compilation for all tensors
def _of_groups(params: PyTree, groups: PyTree, scale: jax.Array) -> tuple[PyTree, PyTree, jax.Array]:
  """Target, mask, and whether anything in the target is not 0."""
  target = jax.tree.map(lambda p, group: jnp.where(group == 0, scale * p, jnp.zeros_like(p)), params, groups)
  mask = jax.tree.map(lambda p, group: (group < 1).astype(jnp.result_type(p)), params, groups)
  return target, mask, jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(target)]))


def weight_decay_conditions(params: PyTree, *, weight_decay: DecayLike = 1.0) -> Conditions:
  """Stationarity of cross-entropy plus ``weight_decay / 2 |zeta|^2``: the target is ``weight_decay * zeta`` everywhere.

  Args:
    params: zeta.
    weight_decay: w: a positive and finite number; or a tree of numbers like ``params``, or a function of the names of
      tensors, 0 where nothing decays: there the gradients must add up to 0. If unknown, leave it at 1 and let the
      multipliers have a free scale.

  Returns:
    `Conditions` with no parameter left out.

  Raises:
    ValueError: ``weight_decay`` negative, 0 everywhere or not finite; ``params`` empty, not floating point or not
      finite.

  >>> import jax.numpy as jnp
  >>> print(weight_decay_conditions({"w": jnp.array([2.0])}, weight_decay=0.5).target["w"])
  [1.]
  >>> params = {"bias": jnp.array([3.0]), "kernel": jnp.array([2.0])}
  >>> weight_decay_conditions(params, weight_decay=lambda name: 0.5 * (name == "kernel")).target["bias"].tolist()
  [0.0]
  """
  _checks.check_params("params", params)
  return Conditions(*jax.lax.stop_gradient(_decayed(params, decay_of_tensors(weight_decay, params))))


@jax.jit  # one compilation for all tensors
def _decayed(params: PyTree, strengths: PyTree) -> tuple[PyTree, PyTree]:
  """Target and mask."""
  return jax.tree.map(lambda p, w: (w * p).astype(p.dtype), params, strengths), jax.tree.map(jnp.ones_like, params)


def conditions_by_form(
  classifier: Classifier, solution: RateSolution, *, free: PyTree, unused: PyTree, left: float
) -> dict[str, Conditions]:
  """The conditions of each form that a classifier's weights can obey, ``"change"`` only if their start is known.

  With momentum, minibatches and weight decay alike, weights are a multiple of the start and a sum of gradients along
  the way. The gradients at its end stand for these.

  Args:
    classifier: the classifier.
    solution: Lambda, which has a target group.
    free: which tensors have no scale of their own, a tree of bools; weight decay leaves no condition on them.
    unused: which tensors have no condition in any form, as the function does not use them.
    left: what is left of a known start.
  """
  params = classifier.params
  decay = Conditions(*_decayed(params, jax.tree.unflatten(jax.tree.structure(params), classifier.decays)))
  target, mask, _ = _of_groups(params, parameter_groups(solution), solution.target_rate)
  possible = {"weight_decay": decay.without(free), "max_margin": Conditions(target, mask)}
  if classifier.initial_params is not None:
    change = jax.tree.map(lambda last, first: last - left * first, params, classifier.initial_params)
    possible["change"] = Conditions(change, decay.mask)
  return {form: conditions.without(unused) for form, conditions in possible.items()}


@_checks.annotated
def weigh_tensors(conditions: Conditions, weights: Mapping[str, float] | PyTree) -> Conditions:
  """Conditions with weighted squared errors, tensor by tensor: the mask times the roots of the weights.

  Args:
    conditions: the conditions.
    weights: by the name of the tensor (`kkt_jax.tensor_names`), 1 for those without; or a pytree of scalars
      like the parameters. At least 0, finite.

  Returns:
    `Conditions` with the same target.

  Raises:
    ValueError: a name that is no tensor's, or a weight that is negative, not finite or no scalar.

  >>> import jax.numpy as jnp
  >>> weighed = weigh_tensors(Conditions({"w": jnp.ones(1)}, {"w": jnp.ones(1)}), {"w": 4.0})
  >>> print(weighed.mask["w"])
  [2.]
  """
  names = tensor_names(conditions.target)
  needed: Any = jax.tree.structure(conditions.target)
  if jax.tree.structure(weights) == needed:
    weights = dict(zip(names, jax.tree.leaves(weights), strict=True))
  unknown = sorted(set(weights) - set(names)) if isinstance(weights, Mapping) else weights
  if unknown:
    raise ValueError(f"weights must name tensors of the conditions, {names}, or be a tree like them; got {unknown}.")
  for name, weight in weights.items():
    _checks.check_rank(f"weights[{name!r}]", weight, 0, "()")
    _checks.check_at_least(f"weights[{name!r}]", weight, 0)
    _checks.check_finite(f"weights[{name!r}]", weight)
  leaves, structure = jax.tree.flatten(conditions.mask)
  weighed = _times_roots(leaves, [weights.get(name, 1.0) for name in names])
  return Conditions(conditions.target, jax.tree.unflatten(structure, weighed))


@jax.jit  # one compilation for all tensors
def _times_roots(leaves: list[jax.Array], weights: list[jax.Array]) -> list[jax.Array]:
  return [leaf * jnp.sqrt(weight).astype(leaf.dtype) for leaf, weight in zip(leaves, weights, strict=True)]
