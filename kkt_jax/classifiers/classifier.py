"""What the library needs of a trained classifier: its functions, its parameters, and what is known of its inputs."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers import _statistics

# The strength of weight decay: one for all tensors, a tree of strengths like the parameters, or a function of the names
# that `kkt_jax.tensor_names` gives; 0 where there is none.
DecayLike = float | PyTree | Callable[[str], float]


class Evaluation(NamedTuple):
  """What one pass through a classifier gives of a batch.

  Attributes:
    logits: [M, C].
    statistics: of the batch inside the classifier, if it stores such.
    features: [M, F], the output of the last batch norm, if it is known.
  """

  logits: jax.Array
  statistics: PyTree | None = None
  features: jax.Array | None = None


class WeightDecay(float):
  """Strengths of weight decay that differ from tensor to tensor; as a number, the greatest.

  Attributes:
    strengths: of every tensor, in the order of the leaves.

  >>> decay = WeightDecay((0.0, 0.01))
  >>> float(decay), decay.strengths, decay == WeightDecay((0.01, 0.01))
  (0.01, (0.0, 0.01), False)
  """

  strengths: tuple[float, ...]

  def __new__(cls, strengths: Sequence[float]) -> Self:
    """The strengths in the order of the leaves."""
    own = super().__new__(cls, max(strengths))
    own.strengths = tuple(map(float, strengths))
    return own

  def __eq__(self, other: object) -> bool:
    """Only those of the same strengths are equal, which jit needs to know."""
    return isinstance(other, WeightDecay) and self.strengths == other.strengths

  def __hash__(self) -> int:
    """That of the strengths."""
    return hash(self.strengths)

  def __reduce__(self) -> tuple[Any, ...]:
    """For copies and pickles."""
    return WeightDecay, (self.strengths,)


def decay_of_tensors(weight_decay: DecayLike, params: PyTree) -> PyTree:
  """The strength of weight decay of every tensor, a tree of scalars like the parameters.

  Raises:
    ValueError: a strength is negative, not finite or no scalar, or none is positive.

  >>> decay_of_tensors(lambda name: 0.1 if name.endswith("kernel") else 0.0, {"kernel": 1.0, "bias": 2.0})
  {'bias': 0.0, 'kernel': 0.1}
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  alike: Any = jax.tree.structure(weight_decay)
  if isinstance(weight_decay, WeightDecay):
    found: list[Any] = list(weight_decay.strengths)
  elif callable(weight_decay):
    found = [weight_decay(name) for name in names]
  elif _is_number(weight_decay):
    _checks.check_positive("weight_decay", weight_decay)
    found = [weight_decay] * len(names)
  elif alike == structure:
    found = jax.tree.leaves(weight_decay)
  else:
    found = []
  if len(found) != len(names) or not all(map(_is_number, found)):
    raise ValueError(
      "weight_decay must be a number, a tree of numbers like params, or a function of the names of tensors, such as"
      f" {names[0]!r}; got {next((own for own in found if not _is_number(own)), weight_decay)!r}."
    )
  for name, own in zip(names, found, strict=True):
    if _checks.concrete((own >= 0) & (own < np.inf)) is False:
      raise ValueError(f"weight_decay must be positive and finite, or 0 where there is none; got {own} for {name!r}.")
  if all(_checks.concrete(own > 0) is False for own in found):
    raise ValueError(f"weight_decay must be positive and finite, at least of one tensor; got {weight_decay!r}.")
  return jax.tree.unflatten(structure, found)


def _is_number(value: Any) -> bool:
  """Whether it is a real number, which strings, None and truth values are not."""
  if isinstance(value, bool | str | Mapping | Sequence | None):
    return False
  return jnp.ndim(value) == 0


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["params", "statistics", "offset", "initial_params"],
  meta_fields=[
    "apply_fn",
    "gradient_fn",
    "predict_fn",
    "statistics_fn",
    "features_fn",
    "evaluate_fn",
    "input_shape",
    "labels",
    "batch_coupled",
    "value_range",
    "weight_decay",
  ],
)
@dataclasses.dataclass(frozen=True)
class Classifier:
  """A trained classifier Phi(.; zeta); build it with `make_classifier`, which checks its parts.

  It is a pytree with leaves ``params``, ``statistics`` and ``offset``, so it can be an argument of a jitted function.
  Inputs are in the classifier's own units everywhere; `to_unit` maps them to [0, 1].

  Attributes:
    apply_fn: ``(params, x[M, *input_shape]) -> logits[M, C]``, exactly the function that gradient descent trained, from
      which Lambda is derived. With batch norm it uses the statistics of the batch.
    params: zeta, a pytree of floating-point arrays.
    input_shape: shape of one input.
    labels: the label that each output stands for, C distinct integers; 0..C-1 by default. Several classifiers share
      one numbering: a classifier of the digits 5-9 has ``labels=(5, 6, 7, 8, 9)``.
    gradient_fn: the same values, with the derivatives that enter the stationarity condition: ``apply_fn`` itself (the
      default), or one with relaxed ReLU gates, which are not quasi-homogeneous
      (`kkt_jax.classifiers.relaxation.relaxed`). Training a generator takes its derivatives, with what gates it has
      relaxed as the recipe says (`kkt_jax.reconstruction.Stationarity`), whatever the other functions are.
    predict_fn: ``(params, x) -> logits`` at inference, where samples do not interact; ``apply_fn`` by default. Margins
      are measured on it. With batch norm it holds its own copy of the stored statistics.
    batch_coupled: whether the samples of a batch interact in ``apply_fn`` (batch norm on batch statistics); if so,
      ``predict_fn`` is required.
    statistics_fn: ``(params, x) -> statistics`` of a batch inside the classifier, or None.
    statistics: the stored statistics of the training data, the tree that ``statistics_fn`` returns, or None.
    features_fn: ``(params, x) -> [M, F]`` at inference: the output of the last batch norm, of which the ReLU is the
      input of the last layer; or None.
    evaluate_fn: ``(params, x) -> Evaluation`` as in training, with the derivatives of ``gradient_fn``: logits,
      statistics and features from one pass, which saves a training step the others. None asks the functions above;
      whoever replaces ``gradient_fn`` replaces it, too.
    offset: a constant [*input_shape] that the functions subtract from their inputs, such as the mean image of the
      training data, if known. It is part of what a classifier reveals.
    value_range: least and greatest value of an input; None if unbounded.
    weight_decay: the strength w of the weight decay that the classifier was trained with, if known: a number, or a
      `WeightDecay` if it differs from tensor to tensor. The gradient of the mean cross-entropy is -w times the tensor
      where training ends; docs/audit.md tells what that is in other libraries' names.
    initial_params: the parameters from which it was trained, a tree like ``params``, if known: those of a public
      network that was fine-tuned. Then the data account for the change.
  """

  apply_fn: ApplyFn
  params: PyTree
  input_shape: tuple[int, ...]
  labels: tuple[int, ...]
  gradient_fn: ApplyFn
  predict_fn: ApplyFn
  batch_coupled: bool = False
  statistics_fn: Callable[[PyTree, jax.Array], PyTree] | None = None
  statistics: PyTree | None = None
  features_fn: ApplyFn | None = None
  evaluate_fn: Callable[[PyTree, jax.Array], Evaluation] | None = None
  offset: jax.Array | None = None
  value_range: tuple[float, float] | None = (0.0, 1.0)
  weight_decay: float | None = None
  initial_params: PyTree | None = None

  @property
  def num_classes(self) -> int:
    """C, the number of outputs."""
    return len(self.labels)

  @full_precision
  def predict(self, x: jax.Array) -> jax.Array:
    """Logits [M, C] of inputs [M, *input_shape] at inference.

    Raises:
      ValueError: integers beyond ``value_range``, as bytes are for inputs up to 1.
    """
    self._check_range(x)
    return jax.jit(self.predict_fn)(self.params, x)

  def classes_of(self, labels: ArrayLike) -> jax.Array:
    """The classes (output indices, 0..C-1) [M] that stand for labels [M].

    An unknown label raises a ValueError; inside a transformation, where values cannot be seen, it becomes C, for which
    optax's losses are NaN.
    """
    xp: Any = jnp
    try:
      labels, xp = np.asarray(labels), np
    except jax.errors.TracerArrayConversionError:
      labels = _checks.integers(labels)
    _checks.check_rank("labels", labels, 1, "[M]")
    hits = labels[:, None] == xp.asarray(self.labels)[None, :]
    classes = xp.where(xp.any(hits, axis=1), xp.argmax(hits, axis=1), self.num_classes)
    if xp is np and np.any(classes == self.num_classes):
      unknown = labels[classes == self.num_classes].min()
      raise ValueError(f"labels must be among the classifier's, {self.labels}; got {unknown}.")
    return jnp.asarray(classes)

  def to_unit(self, x: ArrayLike) -> jax.Array:
    """Inputs mapped from ``value_range`` to [0, 1]; unchanged if there is none.

    Raises:
      ValueError: integers beyond ``value_range``, as bytes are for inputs up to 1.
    """
    self._check_range(x)
    low, high = self.value_range or (0.0, 1.0)
    x = _floating(x)
    return x if (low, high) == (0, 1) else (x - low) / (high - low)

  def from_unit(self, unit: ArrayLike) -> jax.Array:
    """The inverse of `to_unit`."""
    low, high = self.value_range or (0.0, 1.0)
    unit = _floating(unit)
    return unit if (low, high) == (0, 1) else low + (high - low) * unit

  def _check_range(self, x: ArrayLike) -> None:
    """Raises ValueError for integers out of range: floats may leave it, but bytes were meant to be divided by 255."""
    if self.value_range is None or jnp.issubdtype(jnp.result_type(x), jnp.floating) or not np.size(x):
      return
    least, greatest = jnp.min(x), jnp.max(x)
    if _checks.concrete((least >= self.value_range[0]) & (greatest <= self.value_range[1])) is False:
      raise ValueError(
        f"x must be floating point, or integers within value_range, {self.value_range}; got {least} to {greatest} of"
        f" {jnp.result_type(x)}. Bytes are to be divided by 255 first."
      )


def check_classifier(name: str, value: Any) -> None:
  """Raises ValueError unless a value is a `Classifier`."""
  if not isinstance(value, Classifier):
    cure = " Its classifier(variables) makes one." if hasattr(value, "variables_like") else ""
    raise ValueError(f"{name} must be a kkt_jax.Classifier; got {type(value).__name__}.{cure}")


def _floating(x: ArrayLike) -> jax.Array:
  x = jnp.asarray(x)
  return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def _in_32_bits(params: PyTree) -> PyTree:
  """Parameters, in float32 if some have 16 bits, in which ranks cannot be told, and which LAPACK does not know."""
  rough = any(jnp.result_type(leaf).itemsize < 4 for leaf in jax.tree.leaves(params))
  return jax.tree.map(_checks.floats, params) if rough else params


def _range(value_range: Any) -> tuple[float, float]:
  """The least and the greatest value of an input; a ValueError if they are not two numbers in order."""
  try:
    low, high = map(float, () if isinstance(value_range, str) else value_range)
  except (TypeError, ValueError):
    low = high = math.nan
  if not -math.inf < low < high < math.inf:
    raise ValueError(f"value_range must be (least, greatest), two numbers, or None if unbounded; got {value_range}.")
  return low, high


def result_shape(name: str, function: Callable[[PyTree, jax.Array], Any], params: PyTree, input_shape: Any) -> Any:
  """The shapes [M, ...] of what a function of parameters and inputs returns for M = 2; a ValueError if it fails."""
  probe = jax.ShapeDtypeStruct((2, *_checks.sizes("input_shape", input_shape)), jnp.result_type(float))
  try:
    return jax.eval_shape(function, params, probe)
  except Exception as error:  # whatever somebody else's function may raise
    what = f"{name} must take a batch of inputs of input_shape = {tuple(input_shape)}"
    raise ValueError(f"{what}; it raised {type(error).__name__}: {error}") from error


def two_logits(function: ApplyFn) -> ApplyFn:
  """The logits -z / 2 and z / 2 [M, 2] of a function that returns one logit z per sample, [M, 1] or [M].

  The margin of class 1 is then z, and the softmax the sigmoid of z, as in binary cross-entropy. Functions of more
  logits are as they were.

  >>> two_logits(lambda w, x: x @ w)(jnp.array([2.0]), jnp.array([[1.0], [3.0]])).tolist()
  [[-1.0, 1.0], [-3.0, 3.0]]
  """
  return _TwoLogits(function)


@dataclasses.dataclass(frozen=True)
class _TwoLogits:
  """See `two_logits`; equal if the functions are, so that what is compiled for one serves the other."""

  function: ApplyFn

  def __call__(self, params: PyTree, x: jax.Array) -> jax.Array:
    return lifted_logits(self.function(params, x))


@dataclasses.dataclass(frozen=True)
class _OnlyLogits:
  """``evaluate_fn`` of a classifier that has nothing but logits."""

  gradient_fn: ApplyFn

  def __call__(self, params: PyTree, x: jax.Array) -> Evaluation:
    return Evaluation(self.gradient_fn(params, x))


def lifted_logits(logits: jax.Array) -> jax.Array:
  """See `two_logits`."""
  if logits.size != logits.shape[0]:
    return logits
  return logits.reshape(-1, 1) * jnp.array([[-0.5, 0.5]], logits.dtype)


def make_classifier(
  apply_fn: ApplyFn,
  params: PyTree,
  input_shape: Sequence[int],
  *,
  labels: Sequence[int] | None = None,
  gradient_fn: ApplyFn | None = None,
  predict_fn: ApplyFn | None = None,
  batch_coupled: bool = False,
  statistics_fn: Callable[[PyTree, jax.Array], PyTree] | None = None,
  statistics: PyTree | None = None,
  features_fn: ApplyFn | None = None,
  evaluate_fn: Callable[[PyTree, jax.Array], Evaluation] | None = None,
  offset: ArrayLike | None = None,
  value_range: tuple[float, float] | None = (0.0, 1.0),
  weight_decay: DecayLike | None = None,
  initial_params: PyTree | None = None,
) -> Classifier:
  """Checks the parts of a classifier, which are described in `Classifier`, and puts them together.

  ``weight_decay`` may also be a tree of numbers like ``params``, or a function of the names of tensors
  (``lambda name: 0.01 if name.endswith("kernel") else 0.0``).

  Functions that return one logit per sample, [M, 1] or [M], make a classifier of two classes: see `two_logits`.
  Parameters in 16 bits are taken in float32. What JAX compiles belongs to the functions: of many classifiers with one
  architecture, give all the same functions, not new ones each time.

  Returns:
    A `Classifier`.

  Raises:
    ValueError: labels that are repeated or of another number, parameters that are not finite or not floating point,
      functions that fail on such inputs or give other shapes, or parts that do not belong together. The message names
      the argument.

  >>> linear = make_classifier(lambda w, x: x @ w, jnp.ones((2, 3)), (2,))
  >>> linear.num_classes, linear.labels
  (3, (0, 1, 2))
  """
  input_shape = _checks.sizes("input_shape", input_shape)
  _checks.check_params("params", params)
  if isinstance(params, Mapping) and (running := _statistics.split(params, frozenset())[1]):
    raise ValueError(
      f"params must hold no running statistics of batch norm, which are no parameters; got"
      f" {_statistics.some_names(running)}. kkt_jax.Subject with a train_fn takes them, see docs/audit.md."
    )
  params = _in_32_bits(_checks.arrays("params", params))
  if initial_params is not None:
    _checks.check_params("initial_params", initial_params)
    initial_params = _in_32_bits(_checks.arrays("initial_params", initial_params))
  shape_of = functools.partial(result_shape, params=params, input_shape=input_shape)
  logits = shape_of("apply_fn", apply_fn)
  if not jnp.issubdtype(getattr(logits, "dtype", jnp.float32), jnp.floating):
    raise ValueError(f"apply_fn must return logits, in floating point; got dtype {logits.dtype}.")
  if getattr(logits, "shape", None) in ((2,), (2, 1)):
    lifted = {own: two_logits(own) for own in (apply_fn, gradient_fn, predict_fn) if own is not None}
    apply_fn = lifted[apply_fn]
    gradient_fn, predict_fn = (None if own is None else lifted[own] for own in (gradient_fn, predict_fn))
    logits = shape_of("apply_fn", apply_fn)
  if getattr(logits, "ndim", None) != 2 or logits.shape[0] != 2 or not logits.shape[1]:
    got = getattr(logits, "shape", None) or f"a {type(logits).__name__}"
    raise ValueError(f"apply_fn must return logits [M, C], one array; for M = 2 it returns {got}.")
  num_classes = logits.shape[1]
  labels = tuple(range(num_classes)) if labels is None else _checks.sizes("labels", labels)
  if max(map(abs, labels), default=0) >= 2**31:
    raise ValueError(f"labels must be less than 2^31 in size; got {labels}.")
  if len(set(labels)) != num_classes or len(labels) != num_classes:
    raise ValueError(f"labels must be {num_classes} distinct integers, one per logit of apply_fn; got {labels}.")

  functions = {"gradient_fn": gradient_fn or apply_fn, "predict_fn": predict_fn or apply_fn}
  for name, function in functions.items():
    if function is not apply_fn and getattr(shape_of(name, function), "shape", None) != logits.shape:
      raise ValueError(f"{name} must return logits [M, C] as apply_fn does, one array.")
  if batch_coupled and predict_fn is None:
    raise ValueError("predict_fn must be given when batch_coupled is True: margins are measured at inference.")
  if (statistics_fn is None) != (statistics is None):
    raise ValueError("statistics_fn and statistics must be given together; got only one of them.")
  if statistics_fn is not None:
    _checks.check_finite("statistics", statistics)
    of_batch = shape_of("statistics_fn", statistics_fn)
    _checks.check_same_shapes("statistics", statistics, "the result of statistics_fn", of_batch)
  if features_fn is not None and getattr(shape_of("features_fn", features_fn), "ndim", None) != 2:
    raise ValueError("features_fn must return features [M, F], one array.")
  apart = batch_coupled or functions["predict_fn"] is not apply_fn or statistics_fn or features_fn
  if evaluate_fn is None and not apart:
    evaluate_fn = _OnlyLogits(functions["gradient_fn"])
  elif evaluate_fn is not None:
    whole = shape_of("evaluate_fn", evaluate_fn)
    if not isinstance(whole, Evaluation) or whole.logits.shape != logits.shape:
      raise ValueError("evaluate_fn must return an Evaluation whose logits [M, C] are those of apply_fn.")
    _checks.check_same_shapes("statistics", statistics, "those of evaluate_fn", whole.statistics)
  if offset is not None:
    _checks.check_shape("offset", offset, input_shape, "input_shape")
    _checks.check_finite("offset", offset)
  if value_range is not None:
    value_range = _range(value_range)
  if weight_decay is not None:
    strengths = jax.tree.leaves(decay_of_tensors(weight_decay, params))
    weight_decay = strengths[0] if all(own == strengths[0] for own in strengths) else WeightDecay(strengths)
  if initial_params is not None:
    _checks.check_same_shapes("initial_params", initial_params, "params", params)
    pairs = zip(*map(jax.tree.leaves, (initial_params, params)), strict=True)
    if all(bool(jnp.array_equal(a, b)) for a, b in pairs):
      raise ValueError("initial_params must differ from params; nothing was trained.")
  return Classifier(
    apply_fn=apply_fn,
    params=params,
    input_shape=input_shape,
    labels=labels,
    **functions,
    batch_coupled=batch_coupled,
    statistics_fn=statistics_fn,
    statistics=statistics,
    features_fn=features_fn,
    evaluate_fn=evaluate_fn,
    offset=None if offset is None else jnp.asarray(offset),
    value_range=value_range,
    weight_decay=weight_decay,
    initial_params=initial_params,
  )
