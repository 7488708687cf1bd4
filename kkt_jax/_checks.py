"""Argument checks shared by the public functions.

Every message names the argument, what it got and what it needs. All of them work under ``jax.jit`` and ``jax.vmap``:
static facts (shapes, dtypes) are always checked, values only where they are known.
"""

from collections.abc import Collection
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax._typing import PyTree


def concrete(condition: ArrayLike) -> bool | None:
  """The truth of a condition, or None inside of jit and vmap, where values are unknown.

  >>> concrete(jnp.array(1.0) > 0), jax.eval_shape(lambda x: {concrete(x > 0): x}, 1.0).keys()
  (True, dict_keys([None]))
  """
  try:
    return bool(condition)
  except jax.errors.ConcretizationTypeError:
    return None


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
  """Raises ValueError unless ``value`` is one of ``choices``."""
  if value not in choices:
    needs = ", ".join(repr(choice) for choice in choices)
    raise ValueError(f"{name} must be one of {needs}; got {value!r}.")


def check_rank(name: str, value: Any, rank: int, axes: str) -> None:
  """Raises ValueError unless ``value`` has ``rank`` axes; ``axes`` names them in the message."""
  if jnp.ndim(value) != rank:
    raise ValueError(f"{name} must have shape {axes}; got shape {jnp.shape(value)}.")


def check_shape(name: str, value: Any, shape: tuple[int, ...], axes: str) -> None:
  """Raises ValueError unless ``value`` has exactly ``shape``; ``axes`` names it in the message."""
  if jnp.shape(value) != shape:
    raise ValueError(f"{name} must have shape {axes} = {shape}; got shape {jnp.shape(value)}.")


def check_batch(name: str, value: Any) -> None:
  """Raises ValueError unless ``value`` is a non-empty batch of floating-point samples."""
  if jnp.ndim(value) < 2:
    raise ValueError(f"{name} must be a batch of shape [M, ...]; got shape {jnp.shape(value)}.")
  if jnp.shape(value)[0] == 0:
    raise ValueError(f"{name} must hold at least one sample; got shape {jnp.shape(value)}.")
  check_floating(name, value)


def check_floating(name: str, value: Any) -> None:
  """Raises ValueError unless ``value`` holds floating-point numbers."""
  if not jnp.issubdtype(_dtype(value), jnp.floating):
    raise ValueError(f"{name} must be floating point; got dtype {_dtype(value)}.")


def check_all_floating(name: str, tree: PyTree) -> None:
  """Raises ValueError naming the first leaf of a pytree that does not hold floating-point numbers."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    check_floating(f"{name}, at {_where(path)},", leaf)


def arrays(name: str, tree: PyTree) -> PyTree:
  """A pytree whose numbers of Python's own are arrays; a ValueError that names a leaf that is not floating point."""
  check_all_floating(name, tree)
  return jax.tree.map(lambda own: own if hasattr(own, "shape") else jnp.asarray(own, jnp.result_type(float)), tree)


def check_labels(name: str, value: Any, num_samples: int) -> None:
  """Raises ValueError unless ``value`` is an integer vector of length ``num_samples``."""
  check_shape(name, value, (num_samples,), "[M]")
  if not jnp.issubdtype(_dtype(value), jnp.integer):
    raise ValueError(f"{name} must be integers; got dtype {_dtype(value)}.")


def integers(value: Any) -> jax.Array:
  """Labels or classes in JAX's own kind of integer; in 8 bits a comparison with 300 classes would wrap around.

  >>> integers(np.array([255], np.uint8)) < 300
  Array([ True], dtype=bool)
  """
  return jnp.asarray(value, jnp.result_type(int))


def floats(value: Any) -> jax.Array:
  """An array, in float32 if it has 16-bit numbers, so that sums of them keep their digits.

  >>> floats(jnp.ones(1, jnp.bfloat16)).dtype
  dtype('float32')
  """
  array = jnp.asarray(value)
  rough = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
  return array.astype(jnp.float32) if rough else array


def _dtype(value: Any) -> Any:
  try:
    return jnp.result_type(value if hasattr(value, "dtype") else jnp.asarray(value))
  except (TypeError, ValueError):  # strings and objects, which JAX does not know
    return np.dtype(object)


def sizes(name: str, value: Any) -> tuple[int, ...]:
  """A sequence of integers, as a tuple; a ValueError that names it if it is none.

  >>> sizes("input_shape", np.array([28, 28, 1]))
  (28, 28, 1)
  """
  try:
    return tuple(operator.index(own) for own in value)
  except TypeError as error:
    raise ValueError(f"{name} must be a sequence of integers; got {value!r}.") from error


def check_label_range(name: str, value: Any, num_classes: int) -> None:
  """Raises ValueError unless the concrete labels lie in 0..num_classes - 1 and hold at least two classes."""
  labels = np.asarray(value)
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(f"{name} must lie in 0..{num_classes - 1}; got {labels.min()}..{labels.max()}.")
  if len(np.unique(labels)) < 2:
    raise ValueError(f"{name} must hold at least two classes; got only class {labels[0]}.")


def check_at_least(name: str, value: Any, bound: float) -> None:
  """Raises ValueError unless the number ``value >= bound``."""
  if concrete(value >= bound) is False:
    raise ValueError(f"{name} must be at least {bound}; got {value}.")


def check_positive(name: str, value: Any) -> None:
  """Raises ValueError unless the number ``value`` is positive and finite."""
  if concrete((value > 0) & (value < np.inf)) is False:
    raise ValueError(f"{name} must be positive and finite; got {value}.")


def check_same_structure(name: str, tree: PyTree, like_name: str, like: PyTree) -> None:
  """Raises ValueError unless two pytrees have the same structure."""
  got: Any = jax.tree.structure(tree)
  needed: Any = jax.tree.structure(like)
  if got != needed:
    raise ValueError(f"{name} must have the tree structure of {like_name}, {needed}; got {got}.")


def check_same_shapes(name: str, tree: PyTree, like_name: str, like: PyTree) -> None:
  """Raises ValueError unless two pytrees have the same structure and the same shapes of leaves."""
  check_same_structure(name, tree, like_name, like)
  for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True):
    if jnp.shape(leaf) != jnp.shape(other):
      needs, got = jnp.shape(other), jnp.shape(leaf)
      raise ValueError(f"{name} must have the shapes of {like_name}, {needs} at {_where(path)}; got {got}.")


def check_finite(name: str, tree: PyTree) -> None:
  """Raises ValueError naming the first leaf of a pytree that is known to hold a NaN or an infinity."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    here = not isinstance(leaf, jax.core.Tracer) and getattr(leaf, "is_fully_addressable", True)
    finite = np.isfinite(np.asarray(leaf)) if here else jnp.isfinite(leaf)  # NumPy compiles nothing
    if concrete(finite.all()) is False:
      raise ValueError(f"{name} must be finite; {_where(path)} holds a NaN or an infinity.")


def check_params(name: str, params: PyTree) -> None:
  """Raises ValueError unless a pytree holds tensors, all of them floating point, finite, and with entries."""
  if not jax.tree.leaves(params):
    raise ValueError(f"{name} must hold at least one tensor; got {params!r}.")
  check_all_floating(name, params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if jnp.size(leaf) == 0:
      raise ValueError(f"{name} must hold no tensor without entries; got shape {jnp.shape(leaf)} at {_where(path)}.")
  check_finite(name, params)


def _where(path: Any) -> str:
  """The path of a leaf, for messages."""
  return jax.tree_util.keystr(path, simple=True, separator="/") or "the array"
