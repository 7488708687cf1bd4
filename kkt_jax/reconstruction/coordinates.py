"""The equations of one classifier as a training step evaluates them, in the coordinates of its subspace where it can.

Samples in the subspace are ``origin + basis @ c`` with r coordinates c. A fully connected first layer sees them through
``basis^T W`` alone: r numbers for each unit instead of as many as an input has, forwards and in every derivative. The
function stays the user's: its program is read up to where inputs meet the first kernel, and goes on from there.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from kkt_jax._precision import full_precision
from kkt_jax.analysis.examination import Examination
from kkt_jax.classifiers.classifier import Classifier, Evaluation, Forward
from kkt_jax.classifiers.relaxation import INLINED, run
from kkt_jax.kkt import losses
from kkt_jax.kkt.conditions import Conditions

#: Measures that are made of norms and products of whole tensors, which no rotation changes.
OF_NORMS = (
  losses.absolute_residual,
  losses.cosine_distance,
  losses.mean_relative_residual,
  losses.relative_residual,
  losses.squared_residual,
)
_AFFINE = ("add", "broadcast_in_dim", "convert_element_type", "copy", "div", "mul", "reshape", "squeeze", "sub")
_SAME = 1e-4  # of logits and gradients at random points: they are computed in another order, no more


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["classifier", "conditions", "size", "shift"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Equations:
  """What the samples of one classifier must satisfy; a pytree.

  Attributes:
    classifier: the one that is evaluated.
    conditions: its stationarity condition.
    size: of a coordinate in the classifier's own units; None where samples themselves are evaluated.
    shift: inputs of the classifier for the coordinates 0, [K].
  """

  classifier: Classifier
  conditions: Conditions
  size: jax.Array | None = None
  shift: jax.Array | None = None

  def inputs(self, coordinates: jax.Array) -> jax.Array:
    """The classifier's inputs [M, K] for samples with coordinates [M, r]."""
    assert self.size is not None and self.shift is not None
    missing = self.shift.shape[0] - coordinates.shape[1]
    return self.size * jnp.pad(coordinates, ((0, 0), (0, missing))) + self.shift[None]


@full_precision
def in_coordinates(
  classifier: Classifier, conditions: Conditions, examination: Examination, equalised: float = 0.0
) -> Equations | None:
  """The same equations for samples that are given by their coordinates in the examination's subspace.

  The first kernel has a row for each direction of the subspace, one for what lies between its origin and the layer's
  start, and one that no sample reaches: there its target holds, unit by unit, the norm of what lies outside of all
  these. So norms and products of targets and sums are what they were.

  Args:
    classifier: as it is trained against, that of ``examination`` but for its derivatives.
    conditions: its stationarity condition.
    examination: says where the first layer and the subspace are.
    equalised: see `kkt_jax.reconstruction.Stationarity`.

  Returns:
    The `Equations`; None where the first layer is not known, the inputs meet something else, or its condition does not
    weigh all of the kernel alike.
  """
  first, subspace = examination.first, examination.subspace
  if first is None or subspace is None:
    return None
  mask = np.asarray(jax.tree.leaves(conditions.mask)[first.place])
  if mask.min() != mask.max():
    return None
  low, high = classifier.value_range or (0.0, 1.0)
  basis, size = np.asarray(subspace.basis, np.float64), first.gain * (high - low)
  begin = first.gain * (np.asarray(classifier.from_unit(subspace.origin), np.float64).reshape(-1) - first.start)
  beyond = begin - basis @ (begin @ basis)
  length = np.linalg.norm(beyond)
  rows = np.concatenate([basis.T, beyond[None] / max(length, 1e-300)])

  def reduced(tree: Any, *, outside: bool = False) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    kernel = np.asarray(leaves[first.place], np.float64)
    kernel = kernel.T if first.turned else kernel
    inside = rows @ kernel
    rest = np.linalg.norm(kernel - rows.T @ inside, axis=0) * outside
    leaves[first.place] = jnp.asarray(np.concatenate([inside, rest[None]]), leaves[first.place].dtype)
    return jax.tree.unflatten(structure, leaves)

  leaves, structure = jax.tree.flatten(conditions.mask)
  params = reduced(classifier.params)
  target = reduced(conditions.target, outside=True)
  kernel = np.asarray(jax.tree.leaves(params)[first.place])
  strengths = np.linalg.norm(kernel, axis=1, keepdims=True)
  least = max(float(strengths[subspace.dimension - 1, 0]), 1e-30)
  weights = mask.min() * (least / np.maximum(strengths, least)) ** equalised
  leaves[first.place] = jnp.asarray(np.broadcast_to(weights, kernel.shape), mask.dtype)
  shift = jnp.asarray([*(begin @ basis), length, 0.0], jnp.float32)
  exact = _InCoordinates(
    classifier.exact_forward,
    _Kernel(first.place, jax.tree.leaves(classifier.params)[first.place].shape, int(first.turned)),
    classifier.input_shape,
  )
  within = dataclasses.replace(classifier, forward=exact, params=params, input_shape=shift.shape, initial_params=None)
  made = Equations(within, Conditions(target, jax.tree.unflatten(structure, leaves)), jnp.asarray(size), shift)
  generator = np.random.default_rng(0)
  drawn = generator.normal(scale=0.5, size=(8, subspace.dimension)).astype(np.float32)
  directions = generator.normal(size=(8, classifier.num_classes)).astype(np.float32)
  logits, gradients = _tried(classifier, classifier.from_unit(subspace.points(drawn)), directions)
  try:
    logits_within, gradients_within = _tried(within, made.inputs(jnp.asarray(drawn)), directions)
  except NotImplementedError:
    return None
  # Gradients, too: inputs may have met another parameter before the kernel, such as a learned mean.
  sides = (logits, reduced(gradients)), (logits_within, gradients_within)
  pairs = [[np.asarray(leaf, np.float64) for leaf in pair] for pair in zip(*map(jax.tree.leaves, sides), strict=True)]
  norm = lambda *leaves: math.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in leaves))
  least = norm(*jax.tree.leaves(gradients)) / 10  # one that is 0, as of a bias before batch norm, is rounding errors
  return made if all(norm(a - b) <= _SAME * (norm(a) + least) for a, b in pairs) else None


@jax.jit
def _tried(classifier: Classifier, x: jax.Array, directions: jax.Array) -> tuple[jax.Array, Any]:
  """Logits as in training, and the gradients by the parameters of their sum along some directions."""

  def summed(params: Any) -> tuple[jax.Array, jax.Array]:
    logits = classifier.exact_forward(params, x, True).logits
    return jnp.vdot(directions.astype(logits.dtype), logits), logits

  gradients, logits = jax.grad(summed, has_aux=True)(classifier.params)
  return logits, gradients


class _Kernel(NamedTuple):
  """The first kernel among the parameters' leaves, its shape, and its axis along which inputs are multiplied."""

  place: int
  shape: tuple[int, ...]
  axis: int


class _Rows(NamedTuple):
  """What stands for the first kernel: its rows in coordinates [K, F], and which axis of the kernel they are."""

  array: jax.Array
  axis: int


class _Inputs(NamedTuple):
  """What stands for an affine function of the samples: inputs in coordinates [M, K], and which axis of it they are."""

  array: jax.Array
  axis: int = 1


@dataclasses.dataclass(frozen=True)
class _InCoordinates:
  """``forward`` of a classifier whose first kernel and inputs are given in coordinates; equal if the functions are.

  Attributes:
    whole: ``forward`` of the classifier.
    kernel: where the kernel is.
    input_shape: of an input of ``whole``.
  """

  whole: Forward
  kernel: _Kernel
  input_shape: tuple[int, ...]

  def __call__(self, params: Any, x: jax.Array, train: bool) -> Evaluation:
    """See `kkt_jax.classifiers.Classifier`; raises NotImplementedError if inputs or kernel meet anything else."""
    place, shape, axis = self.kernel
    leaves, structure = jax.tree.flatten(params)
    stored = [jax.ShapeDtypeStruct(shape if k == place else a.shape, a.dtype) for k, a in enumerate(leaves)]
    samples = jax.ShapeDtypeStruct((len(x), *self.input_shape), x.dtype)
    forward = lambda params, x: self.whole(params, x, train)
    closed, result = jax.make_jaxpr(forward, return_shape=True)(jax.tree.unflatten(structure, stored), samples)
    leaves[place] = _Rows(leaves[place], axis)
    evaluation: Evaluation = jax.tree.unflatten(jax.tree.structure(result), _walk(closed, [*leaves, _Inputs(x)]))
    return evaluation


def _walk(closed: Any, arguments: Sequence[Any]) -> list[Any]:
  """Runs a program in which some values are stood for."""
  jaxpr = closed.jaxpr
  known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *arguments], strict=True))
  read = lambda atom: atom.val if isinstance(atom, core.Literal) else known[atom]
  for equation in jaxpr.eqns:
    inputs, name = [read(atom) for atom in equation.invars], equation.primitive.name
    if not any(isinstance(value, _Rows | _Inputs) for value in inputs):
      outputs = run(jaxpr, equation, inputs)
    elif name in INLINED:
      outputs = _walk(equation.params[INLINED[name]], inputs)
    else:
      outputs = [_operation(equation, inputs)]
    known |= dict(zip(equation.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _operation(equation: Any, inputs: Sequence[Any]) -> Any:
  """An operation on what stands for something."""
  name, standing = equation.primitive.name, [value for value in inputs if isinstance(value, _Rows | _Inputs)]
  match name, standing:
    case "dot_general", [_Inputs() | _Rows() as left, _Inputs() | _Rows() as right] if type(left) is not type(right):
      if equation.params["dimension_numbers"] == (((left.axis,), (right.axis,)), ((), ())):
        x, rows = (left.array, right.array) if isinstance(left, _Inputs) else (right.array, left.array)
        settings = {key: equation.params[key] for key in ("precision", "preferred_element_type")}
        product = jnp.dot(x, rows, **settings)
        return product if isinstance(left, _Inputs) else product.T
    case "transpose", [value] if equation.params["permutation"] == (1, 0):
      return value._replace(axis=1 - value.axis)
    case "convert_element_type", [value]:
      return value._replace(array=value.array.astype(equation.params["new_dtype"]))
    case _, [_Inputs(axis=1) as value] if name in _AFFINE:
      return value
  raise NotImplementedError(f"{name} of the inputs or of the first kernel")
