"""What a classifier's weights say before any training: which conditions they obey, and how far they are from them.

Everything here is found by trying the classifier's function on random inputs. No data are seen.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax import homogeneity, symmetries
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import Conditions, max_margin_conditions, weight_decay_conditions
from kkt_jax.first_layer import input_span, InputSpan

FORMS = ("auto", "weight_decay", "max_margin")
HOPELESS = 0.05  # share of the target that no data can account for, above which an audit is not worth its time
_HOMOGENEOUS = 1e-2  # greatest error of scaling that counts as none
_PROBES = 24
_FILLED = 0.9  # the greatest share of a layer's directions that data may fill for their span to be told
_CLIFF, _NOTHING = 5.0, 1e-4  # the least fall of singular values that ends a span, and what must be left after it


@dataclasses.dataclass(frozen=True)
class Findings:
  """What the weights say.

  Attributes:
    form: ``"weight_decay"`` or ``"max_margin"``.
    why: why that form.
    conditions: the stationarity condition of that form.
    bounds: for each possible form, the share of its target that no data can account for.
    free: which tensors have no scale of their own (before a normalisation), a tree of bools; weight decay leaves no
      condition on them.
    scaling_error: how far the network is from quasi-homogeneous.
    rates: Lambda, balanced.
    start: the constant that the network subtracts from its inputs, the data's mean where it was stored as such,
      [*input_shape] in [0, 1]; None where the function does not tell.
    span: directions of the data, read off a fully connected first layer that is wide enough; None where there is none.
  """

  form: str
  why: str
  conditions: Conditions
  bounds: Mapping[str, float]
  free: PyTree
  scaling_error: float
  rates: homogeneity.RateSolution
  start: jax.Array | None
  span: InputSpan | None

  @property
  def bound(self) -> float:
    """The share of the chosen target that no data can account for."""
    return self.bounds[self.form]


def examine(classifier: Classifier, *, form: str = "auto", seed: int = 0) -> Findings:
  """Tries the classifier on random inputs, and draws the conclusions.

  Args:
    classifier: the classifier.
    form: one of `FORMS`; ``"auto"`` chooses.
    seed: of the inputs.

  Returns:
    `Findings`.
  """
  x = jax.random.uniform(jax.random.key(seed), (_PROBES, *classifier.input_shape))
  equations = homogeneity.derivative_equations(classifier.apply_fn, classifier.params, x)
  rates = homogeneity.solve_rates(equations, classifier.params)
  alphas = jnp.linspace(-0.5, 0.5, 5)
  error = float(homogeneity.scaling_error(classifier.apply_fn, classifier.params, rates.rates, x, alphas))
  decay = weight_decay_conditions(classifier.params)
  free = symmetries.scale_invariant(classifier.apply_fn, classifier.params, x)
  masks = jax.tree.map(lambda own, ones: jnp.zeros_like(ones) if own else ones, free, decay.mask)
  possible = {
    "weight_decay": dataclasses.replace(decay, mask=masks),
    "max_margin": max_margin_conditions(classifier.params, rates),
  }
  bounds = {
    name: symmetries.least_residual(classifier.apply_fn, classifier.params, own, x).value
    for name, own in possible.items()
  }
  # A linear last layer alone is always quasi-homogeneous; where nothing before it is, there is no other solution.
  trivial = bool(rates.null_space_dimension == 0) and float(rates.target_rate) > 1 - _HOMOGENEOUS
  chosen, why = (form, "it was asked for") if form != "auto" else _choose(classifier, bounds, error, trivial)
  start, span = _first_layer(classifier, x)
  return Findings(chosen, why, possible[chosen], bounds, free, error, rates, start, span)


def _choose(classifier: Classifier, bounds: Mapping[str, float], error: float, trivial: bool) -> tuple[str, str]:
  decay, margin = bounds["weight_decay"], bounds["max_margin"]
  if classifier.batch_coupled:
    return (
      "max_margin",
      "batch norm undoes the scale of the weights before it, which weight decay would shrink for ever",
    )
  if error > _HOMOGENEOUS or trivial:
    return "weight_decay", "nothing before the last layer is quasi-homogeneous, which the max-margin form needs"
  if decay <= max(0.01, margin):
    return (
      "weight_decay",
      f"its layers are in the balance that weight decay brings about ({decay:.2g} of it is missing)",
    )
  return "max_margin", f"its layers lack the balance that weight decay brings about ({decay:.2g} of it is missing)"


def describe(classifier: Classifier, findings: Findings) -> str:
  """The findings for people."""
  shapes = [
    f"  {name} {tuple(leaf.shape)}"
    for name, leaf in zip(homogeneity.tensor_names(classifier.params), jax.tree.leaves(classifier.params), strict=True)
  ]
  count = sum(leaf.size for leaf in jax.tree.leaves(classifier.params))
  lines = [
    f"{count:,} parameters in {len(shapes)} tensors:",
    *shapes,
    "batch norm: normalised by the batch; its stored statistics are part of what is given away"
    if classifier.batch_coupled
    else "no batch norm",
    f"quasi-homogeneity: scaling error {findings.scaling_error:.2g} (0 is exact);"
    f" {int(findings.rates.null_space_dimension)} ways to rescale tensors against one another",
  ]
  free = [
    n for n, own in zip(homogeneity.tensor_names(findings.free), jax.tree.leaves(findings.free), strict=True) if own
  ]
  if free:
    lines.append(f"without a scale of their own, before a normalisation: {', '.join(free)}")
  if findings.form == "max_margin":
    lines.append(homogeneity.groups_table(findings.rates))
  lines += [f"no data can account for {bound:.2g} of the {name} conditions" for name, bound in findings.bounds.items()]
  lines.append(f"form: {findings.form}, because {findings.why}")
  if findings.start is None:
    lines.append("the constant that it subtracts from its inputs is not told by its function")
  else:
    spread = float(jnp.std(findings.start))
    what = "an image, taken for the mean of the data" if spread > 1e-3 else f"{float(jnp.mean(findings.start)):.3g}"
    lines.append(f"it subtracts from its inputs: {what}")
  if findings.span is not None:
    rank, dimensions = findings.span.strengths.size, int(np.prod(classifier.input_shape))
    lines.append(f"the first layer tells that the data lie in {rank} of {dimensions} dimensions")
  return "\n".join(lines)


def _first_layer(classifier: Classifier, x: jax.Array) -> tuple[jax.Array | None, InputSpan | None]:
  """What a network subtracts from its inputs, and the span of a fully connected first layer, if it begins with one.

  The gradient of any logit by the kernel of such a layer is the outer product of the layer's input with the gradient by
  its bias. So the input that the layer sees is told by gradients, and with it what was subtracted.
  """
  dimensions = int(np.prod(classifier.input_shape))
  leaves = jax.tree.leaves(classifier.params)
  # As flax lays them out, or the other way round as PyTorch does.
  kernels = [(i, False) for i, leaf in enumerate(leaves) if leaf.ndim == 2 and leaf.shape[0] == dimensions]
  kernels += [(i, True) for i, leaf in enumerate(leaves) if leaf.ndim == 2 and leaf.shape[1] == dimensions]
  weights = jnp.linspace(-1.0, 1.0, classifier.num_classes)

  @jax.jit
  def gradients(sample: jax.Array) -> list[jax.Array]:
    logit = lambda params: jnp.vdot(classifier.predict_fn(params, sample[None])[0], weights)
    return jax.tree.leaves(jax.grad(logit)(classifier.params))

  found = [[np.asarray(g, np.float64) for g in gradients(sample)] for sample in x[:3]]
  flat = np.asarray(x[:3], np.float64).reshape(3, -1)
  for place, turned in kernels:
    kernel = leaves[place].T if turned else leaves[place]
    by_kernel = [own[place].T if turned else own[place] for own in found]
    for bias in (i for i, leaf in enumerate(leaves) if leaf.shape == kernel.shape[1:]):
      by_bias = [own[bias] for own in found]
      pairs = list(zip(by_kernel, by_bias, strict=True))
      seen = np.stack([k @ b / max(float(b @ b), 1e-300) for k, b in pairs])
      missing = [np.linalg.norm(k - np.outer(s, b)) for (k, b), s in zip(pairs, seen, strict=True)]
      if any(m > 1e-3 * np.linalg.norm(k) for m, k in zip(missing, by_kernel, strict=True)):
        continue  # another layer's bias
      moved = flat[0] - flat[1]
      scale = float(np.vdot(seen[0] - seen[1], moved) / np.vdot(moved, moved))
      offsets = flat - seen / scale
      if np.abs(offsets - offsets[0]).max() > 1e-3:
        return None, None  # the data go through something else first
      start = jnp.asarray(offsets[0].reshape(classifier.input_shape), jnp.float32)
      cliff = _cliff(kernel)
      return start, None if cliff is None else input_span(kernel, tolerance=cliff)
  return classifier.offset, None


def _cliff(kernel: jax.Array) -> float | None:
  """Where the singular values fall off, relative to the greatest: amid the greatest fall to almost nothing, if any."""
  strengths: np.ndarray = np.asarray(jnp.linalg.svd(kernel, compute_uv=False), np.float64)
  values = np.maximum(strengths / strengths[0], 1e-12)
  falls = np.where(values[1:] < _NOTHING, values[:-1] / values[1:], 0.0)
  falls = falls[: int(_FILLED * len(falls))]  # a normalisation takes directions away, which says nothing of data
  at = int(np.argmax(falls))
  return float(np.sqrt(values[at] * values[at + 1])) if falls[at] > _CLIFF else None
