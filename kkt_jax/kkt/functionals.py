"""Random sums of a network's logits, and how they change along directions in its tensors.

Along every direction at once: one backward pass for each sum, of which there need be hardly more than tensors. In
forward mode each direction takes a pass, and ResNet-18 has 400 of them.
"""

from collections.abc import Iterator
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax._precision import full_precision
from kkt_jax._tree import tensor_names
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers.dataflow import bias_tensors

_LOGITS, _MARGINS = 8, 48  # sums of logits, and of margins, or a quarter more than there are tensors
_LARGE = 10**6  # parameters from which a sum runs over few inputs
_FEW = 4


class Changes(NamedTuple):
  """The derivatives of R sums by one tensor t, along directions in it.

  Attributes:
    scaled: along t [R].
    uneven: along t, each entry times a random number [R].
    random: along random numbers [R].
    into: along t in each place of its last axis alone [R, F]; [R, 0] for a scalar.
    out: the same of the axis before that [R, D]; [R, 0] if there is none.
    shift: along the same random numbers in all places of the last axis [R].
    one_sided: along these in the first place alone [R].
  """

  scaled: Any
  uneven: Any
  random: Any
  into: Any
  out: Any
  shift: Any
  one_sided: Any

  @property
  def generic(self) -> float:
    """How much the sums change when every entry is scaled at random: the measure of what counts as none."""
    return float(np.linalg.norm(self.uneven))


class Functionals(NamedTuple):
  """Sums of a network's logits at given parameters.

  Attributes:
    apply_fn: the network.
    params: the parameters, arrays.
    x: the inputs.
    values: the sums [R].
    changes: by each tensor, in the order of the leaves, in float64.
    names: of the tensors, in this order.
    biases: which tensors are biases, in this order.
    num_classes: how many logits an input has.
  """

  apply_fn: ApplyFn
  params: PyTree
  x: ArrayLike
  values: np.ndarray
  changes: list[Changes]
  names: list[str]
  biases: tuple[bool, ...]
  num_classes: int

  @property
  def logits(self) -> np.ndarray:
    """The sums of logits alone."""
    return self.values[:_LOGITS]

  @property
  def unused(self) -> tuple[str, ...]:
    """The names of the tensors on which no sum depends."""
    return tuple(name for name, change in zip(self.names, self.changes, strict=True) if not change.random.any())

  @property
  def margins(self) -> list[Changes]:
    """The changes of the other sums, of margins, which a common shift of an input's logits leaves alone."""
    return jax.tree.map(lambda change: change[_LOGITS:], self.changes)

  @property
  def normals(self) -> PyTree:
    """The random numbers of `Changes`, a tree like the parameters."""
    return jax.tree.map(lambda leaf: jnp.asarray(normal(leaf)), self.params)

  def along(self, direction: PyTree) -> tuple[np.ndarray, ...]:
    """Derivatives along a direction: of further sums [S], and of theirs along each tensor, even and uneven [S, U]."""
    pairs = sums(self.apply_fn, self.params, self.x, max(32, len(self.names) // 2))
    normals = self.normals
    rows = [jax.device_get(_along(self.apply_fn, self.params, *pair, normals, direction)) for pair in pairs]
    return tuple(map(np.stack, zip(*rows, strict=True)))


@full_precision
def functionals(apply_fn: ApplyFn, params: PyTree, x: ArrayLike, *, margins: bool = True) -> Functionals:
  """A few sums of logits, and if wanted more sums of margins than there are tensors.

  Args:
    apply_fn: ``(params, x[K, ...]) -> logits[K, C]``; samples may interact.
    params: zeta, arrays of floats.
    x: inputs [K, ...], finite floats; each takes part in sums of logits.
    margins: whether there are sums of margins.
  """
  params = jax.tree.map(jnp.asarray, params)
  leaves = jax.tree.leaves(params)
  normals = [jnp.asarray(normal(leaf)) for leaf in leaves]
  count = _LOGITS + (max(_MARGINS, len(leaves) * 5 // 4) if margins else 0)
  measured = [jax.device_get(_changes(apply_fn, params, *pair, normals)) for pair in sums(apply_fn, params, x, count)]
  stacked = lambda *rows: np.asarray(np.stack(rows), np.float64)
  values, changes = jax.tree.map(stacked, *measured)
  names, biases = tensor_names(params), bias_tensors(apply_fn, params, jnp.asarray(x))
  num_classes = jax.eval_shape(apply_fn, params, x).shape[1]
  return Functionals(apply_fn, params, x, values, changes, names, biases, num_classes)


def normal(leaf: jax.Array) -> np.ndarray:
  """Random numbers of the shape of a tensor."""
  return np.random.default_rng([2, *leaf.shape]).standard_normal(leaf.shape, np.float32).astype(leaf.dtype)


def large(params: PyTree) -> bool:
  """Whether a network has so many parameters that passes through it are expensive."""
  return sum(leaf.size for leaf in jax.tree.leaves(params)) > _LARGE


def sums(apply_fn: ApplyFn, params: PyTree, x: ArrayLike, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """For each sum, its inputs [m, ...] and the weights [m, C] of their logits.

  The inputs are all K, or for large networks a few in turn. The first sums are of logits; in the others, of margins,
  the weights of each input add up to 0.
  """
  x = np.asarray(x)
  few = max(min(len(x), _FEW), -(-len(x) // _LOGITS)) if large(params) else len(x)
  batches = [x[begin : begin + few] for begin in range(0, len(x) - few + 1, few)]
  logits = jax.eval_shape(apply_fn, params, batches[0])
  random = np.random.default_rng(3)
  for row in range(count):
    weights = random.standard_normal(logits.shape)
    weights -= weights.mean(axis=1, keepdims=True) if row >= _LOGITS else 0.0
    yield batches[row % len(batches)], weights.astype(logits.dtype)


@functools.partial(jax.jit, static_argnames="apply_fn")
def _changes(
  apply_fn: ApplyFn, params: PyTree, x: jax.Array, weights: jax.Array, normals: list[jax.Array]
) -> tuple[jax.Array, list[Changes]]:
  value, gradient = jax.value_and_grad(lambda p: jnp.vdot(apply_fn(p, x), weights))(params)
  return value, [_of_tensor(*tensor) for tensor in zip(*map(jax.tree.leaves, (gradient, params)), normals, strict=True)]


def _of_tensor(gradient: jax.Array, value: jax.Array, random: jax.Array) -> Changes:
  products = gradient * value
  over_all_but = lambda axis: jnp.sum(products, axis=[k for k in range(value.ndim) if k != value.ndim + axis])
  nothing = jnp.zeros(0, products.dtype)
  first = lambda array: array[..., 0] if array.ndim else array
  return Changes(
    jnp.sum(products),
    jnp.vdot(products, random),
    jnp.vdot(gradient, random),
    over_all_but(-1) if value.ndim else nothing,
    over_all_but(-2) if value.ndim > 1 else nothing,
    jnp.vdot(jnp.sum(gradient, axis=-1) if value.ndim else gradient, first(random)),
    jnp.vdot(first(gradient), first(random)),
  )


@functools.partial(jax.jit, static_argnames="apply_fn")
def _along(
  apply_fn: ApplyFn, params: PyTree, x: jax.Array, weights: jax.Array, normals: PyTree, direction: PyTree
) -> tuple[jax.Array, ...]:
  """Derivatives along a direction: of a sum, of its derivatives along each tensor [U] and along each uneven one [U]."""

  def rows(params: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    value, gradient = jax.value_and_grad(lambda p: jnp.vdot(apply_fn(p, x), weights))(params)
    products = [slope * p for slope, p in zip(*map(jax.tree.leaves, (gradient, params)), strict=True)]
    uneven = [jnp.vdot(product, normal) for product, normal in zip(products, jax.tree.leaves(normals), strict=True)]
    return value, jnp.stack([jnp.sum(product) for product in products]), jnp.stack(uneven)

  return jax.jvp(rows, (params,), (direction,))[1]
