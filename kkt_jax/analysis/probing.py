"""A classifier tried on random inputs: what is checked of its outputs, and what tells its layers from one another."""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AnalysisCriteria
from kkt_jax.kkt.functionals import Functionals, functionals

_DEFAULT = AnalysisCriteria()


@dataclasses.dataclass(frozen=True, eq=False)
class Probes:
  """Random inputs to a classifier, by which its layers are found.

  Attributes:
    classifier: the classifier.
    x: the inputs [K, *input_shape], in the classifier's units.
    criteria: what counts as what.
  """

  classifier: Classifier
  x: jax.Array
  criteria: AnalysisCriteria = _DEFAULT

  @classmethod
  def drawn(cls, classifier: Classifier, seed: int, criteria: AnalysisCriteria = _DEFAULT) -> "Probes":
    """Uniform in the range of the inputs; normal if there is none."""
    key, shape = jax.random.key(seed), (criteria.probes, *classifier.input_shape)
    if classifier.value_range is None:
      return cls(classifier, jax.random.normal(key, shape), criteria)
    return cls(classifier, classifier.from_unit(jax.random.uniform(key, shape)), criteria)

  @functools.cached_property
  def leaves(self) -> list[jax.Array]:
    """The classifier's tensors; its layers are known by places among them."""
    return jax.tree.leaves(self.classifier.params)

  @functools.cached_property
  def rounded(self) -> bool:
    """Whether all matrices hold values that 16 bits can represent."""
    leaves = [np.asarray(leaf) for leaf in self.leaves if leaf.ndim > 1]
    alike = lambda leaf, dtype: bool(np.all(leaf == leaf.astype(dtype).astype(leaf.dtype)))
    few = lambda leaf: len(np.unique(leaf)) < self.criteria.few_values  # such as ones
    with np.errstate(over="ignore"):
      held = any(all(alike(leaf, dtype) for leaf in leaves) for dtype in (jnp.bfloat16, jnp.float16))
    return held and not all(map(few, leaves))

  def matrices(self, size: int, *, axis: int) -> list[tuple[int, bool]]:
    """Matrices with a side of a given size, as flax lays them out (along ``axis``), then turned, as PyTorch does."""
    flat = [(i, leaf.shape) for i, leaf in enumerate(self.leaves) if leaf.ndim == 2]
    return [(i, turned) for turned in (False, True) for i, shape in flat if shape[1 - axis if turned else axis] == size]

  def gradients(
    self, weights: np.ndarray, count: int, matrices: Sequence[tuple[int, bool]]
  ) -> list[dict[int, np.ndarray]]:
    """The gradients of ``weights . logits`` at inference by matrices and vectors that can be their biases, by place.

    One dictionary for each of the first ``count`` inputs.
    """
    sides = {side for place, _ in matrices for side in self.leaves[place].shape}
    biases = {i for i, leaf in enumerate(self.leaves) if leaf.ndim == 1 and leaf.size in sides}
    places = tuple(sorted({place for place, _ in matrices} | biases))
    if not places:
      return [{} for _ in range(count)]
    of = functools.partial(_gradient, self.classifier.predict_fn, self.classifier.params, weights)
    slopes = [of(sample, places) for sample in np.asarray(self.x[:count])]
    return [{place: np.asarray(g, np.float64) for place, g in zip(places, row, strict=True)} for row in slopes]

  def sums(self, *, margins: bool = True) -> Functionals:
    """Random sums of the logits, once these are checked; see `check_outputs`."""
    classifier = self.classifier
    _check_logits(classifier, self.x, self.criteria.steady)
    known = functionals(classifier.apply_fn, classifier.params, self.x, margins=margins)
    if len(known.unused) == len(known.names):
      raise ValueError("apply_fn must compute the logits from params; they do not depend on any of them.")
    return known


@functools.partial(jax.jit, static_argnames=("predict_fn", "places"))
def _gradient(
  predict_fn: ApplyFn, params: PyTree, weights: jax.Array, sample: jax.Array, places: tuple[int, ...]
) -> list[jax.Array]:
  leaves, structure = jax.tree.flatten(params)

  def logit(chosen: list[jax.Array]) -> jax.Array:
    replaced = dict(zip(places, chosen, strict=True))
    whole = jax.tree.unflatten(structure, [replaced.get(place, leaf) for place, leaf in enumerate(leaves)])
    return jnp.vdot(predict_fn(whole, sample[None])[0], weights)

  return jax.grad(logit)([leaves[place] for place in places])


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
  return Probes.drawn(classifier, seed).sums(margins=False).unused


def _check_logits(classifier: Classifier, probes: jax.Array, steady: float) -> None:
  """See `check_outputs`."""
  logits_of = lambda x: np.asarray(jax.jit(classifier.predict_fn)(classifier.params, x), np.float64)
  logits = logits_of(probes)
  if not np.isfinite(logits).all():
    raise ValueError("classifier must give finite logits; of random inputs in its range some are NaN or infinite.")
  others = jnp.tile(probes[::-2], (2, *[1] * len(classifier.input_shape)))[: len(probes)]
  apart = np.abs(logits[::-2] - logits_of(others)[: len(logits[::-2])]).max()
  if apart > steady * np.abs(logits).max():
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
