"""Argument checks shared by the public functions.

Every message names the argument, what it got and what it needs. All of them work under ``jax.jit`` and ``jax.vmap``:
static facts (shapes, dtypes) are always checked, values only where they are known.
"""

from collections.abc import Callable, Collection
import functools
import inspect
import operator
from typing import Any, get_args, get_origin, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax._errors import InputError
from kkt_jax._typing import PyTree

_P = ParamSpec("_P")
_R = TypeVar("_R")


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
    got = f"dtype {value.dtype}" if isinstance(value, jax.Array | np.ndarray) else f"a {type(value).__name__}"
    raise ValueError(f"{name} must be floating point; got {got}.")


def check_all_floating(name: str, tree: PyTree) -> None:
  """Raises ValueError naming the first leaf of a pytree that does not hold floating-point numbers."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    check_floating(f"{name}, at {_where(path)},", leaf)


def arrays(name: str, tree: PyTree) -> PyTree:
  """A pytree of arrays, from what can be made ones; a ValueError that names a leaf that is not floating point."""
  check_all_floating(name, tree)
  known = lambda leaf: isinstance(leaf, jax.Array | np.ndarray)
  return jax.tree.map(lambda leaf: leaf if known(leaf) else jnp.asarray(leaf, jnp.result_type(float)), tree)


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
    return jnp.result_type(value if isinstance(value, jax.Array | np.ndarray | np.generic) else jnp.asarray(value))
  except (TypeError, ValueError):  # strings and objects, which JAX does not know
    return np.dtype(object)


def sizes(name: str, value: Any) -> tuple[int, ...]:
  """A sequence of integers, as a tuple; a ValueError that names it if it is none.

  >>> sizes("input_shape", np.array([28, 28, 1]))
  (28, 28, 1)
  """
  try:
    return tuple(operator.index(size) for size in value)
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


def annotated(function: Callable[_P, _R]) -> Callable[_P, _R]:
  """Decorates a function to check that arguments are of the kinds that their annotations name: arrays, keys, functions.

  What is of another kind than its annotation says would else fail somewhere inside, with a message of JAX or NumPy that
  names neither the argument nor what it needs.

  Raises:
    InputError: it names the argument, what it got and what it needs.

  >>> @annotated
  ... def doubled(x: ArrayLike, times: int = 2) -> Any:
  ...   return times * np.asarray(x)
  >>> doubled("a")
  Traceback (most recent call last):
  kkt_jax._errors.InputError: x must be an array of numbers; got 'a'.
  """
  parameters = inspect.signature(function).parameters
  kinds = {name: kind for name, parameter in parameters.items() if (kind := _kind(name, parameter))}

  @functools.wraps(function)
  def looked_at(*args: _P.args, **kwargs: _P.kwargs) -> _R:
    given = dict(zip(parameters, args, strict=False)) | kwargs  # what is missing or too much Python says best
    for name, value in given.items():
      if name in kinds and not kinds[name][1](value):
        got = type(value).__name__ if kinds[name][0].startswith("a kkt_jax.") else f"{value!r:.60}"
        cure = " Its classifier(variables) makes one." if hasattr(value, "variables_like") else ""
        raise InputError(f"{name} must be {kinds[name][0]}; got {got}.{cure}")
    return function(*args, **kwargs)

  return looked_at


def _kind(name: str, parameter: inspect.Parameter) -> tuple[str, Callable[[Any], bool]] | None:
  """What an argument must be, in words and as a test; None if anything will do."""
  annotation, optional = parameter.annotation, False
  fits: Callable[[Any], bool]
  if annotation not in (ArrayLike, ArrayLike | None) and type(None) in get_args(annotation):
    rest = [kind for kind in get_args(annotation) if kind is not type(None)]
    annotation, optional = (rest[0] if len(rest) == 1 else None), True
  optional = optional or annotation == ArrayLike | None
  if name == "key" and annotation is jax.Array:
    what, fits = "a random key, as jax.random.key(0) is", _is_key
  elif annotation in (ArrayLike, ArrayLike | None, jax.Array):
    what, fits = "an array of numbers", is_numbers
  elif annotation is int:
    what, fits = "an integer", lambda value: hasattr(value, "__index__") and np.ndim(value) == 0
  elif annotation is str:
    what, fits = "a string", lambda value: isinstance(value, str)
  elif annotation is float:
    what, fits = "a number", lambda value: is_numbers(value) and np.ndim(value) == 0
  elif get_origin(annotation) is Callable or annotation is Callable:
    what, fits = "a function", callable
  elif isinstance(annotation, type) and annotation.__module__.startswith("kkt_jax"):
    what, fits = f"a kkt_jax.{annotation.__name__}", lambda value: isinstance(value, annotation)
  else:
    return None
  return what, lambda value: (optional and value is None) or fits(value)


def is_numbers(value: Any) -> bool:
  """Whether a value is an array of numbers, or can be made one."""
  try:
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    return bool(jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_))
  except jax.errors.TracerArrayConversionError:  # rows inside of jit
    return True
  except (TypeError, ValueError):  # rows of different lengths
    return False


def _is_key(value: Any) -> bool:
  dtype = getattr(value, "dtype", np.dtype(object))
  legacy = dtype == jnp.uint32 and jnp.shape(value)[-1:] == (2,)
  return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key)) or legacy
