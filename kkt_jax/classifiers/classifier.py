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
from kkt_jax.classifiers.decay import decay_of_tensors, DecayLike, WeightDecay


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


# (params, x [M, *input_shape], train) -> Evaluation; relaxed gates may be given as a fourth argument.
Forward = Callable[..., Evaluation]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["params", "statistics", "offset", "initial_params"],
  meta_fields=["forward", "input_shape", "labels", "value_range", "weight_decay"],
)
@dataclasses.dataclass(frozen=True)
class Classifier:
  """A trained classifier Phi(.; zeta); build it with `make_classifier`, which checks its parts.

  It is a pytree with leaves ``params``, ``statistics`` and ``offset``, so it can be an argument of a jitted function.
  Inputs are in the classifier's own units everywhere; `to_unit` maps them to [0, 1].

  Attributes:
    forward: ``(params, x[M, *input_shape], train) -> Evaluation``. In training it is exactly the function that gradient
      descent trained, with batch norm on the statistics of the batch, which it returns; at inference samples do not
      interact, and batch norm uses its own copy of the stored statistics. Features are the output of the last batch
      norm, of which the ReLU is the input of the last layer, if known. `kkt_jax.classifiers.relaxation.relaxed` gives
      it other derivatives.
    params: zeta, a pytree of floating-point arrays.
    input_shape: shape of one input.
    labels: the label that each output stands for, C distinct integers; 0..C-1 by default. Several classifiers share
      one numbering: a classifier of the digits 5-9 has ``labels=(5, 6, 7, 8, 9)``.
    statistics: with batch norm the stored statistics of the training data, a tree like those that ``forward`` returns
      of a batch in training; None without, where samples never interact.
    offset: a constant [*input_shape] that ``forward`` subtracts from its inputs, such as the mean image of the
      training data, if known. It is part of what a classifier reveals.
    value_range: least and greatest value of an input; None if unbounded.
    weight_decay: the strength w of the weight decay that the classifier was trained with, if known: a number, or a
      `WeightDecay` if it differs from tensor to tensor. The gradient of the mean cross-entropy is -w times the tensor
      where training ends; docs/frameworks.md tells what that is in other libraries' names.
    initial_params: the parameters from which it was trained, a tree like ``params``, if known: those of a public
      network that was fine-tuned. Then the data account for the change.
  """

  forward: Forward
  params: PyTree
  input_shape: tuple[int, ...]
  labels: tuple[int, ...]
  statistics: PyTree | None = None
  offset: jax.Array | None = None
  value_range: tuple[float, float] | None = (0.0, 1.0)
  weight_decay: float | None = None
  initial_params: PyTree | None = None

  @property
  def exact_forward(self) -> Forward:
    """``forward`` with its own derivatives, not those of relaxed gates."""
    return getattr(self.forward, "exact", self.forward)

  @functools.cached_property
  def apply_fn(self) -> ApplyFn:
    """``(params, x) -> logits [M, C]`` as trained, from which Lambda is derived."""
    return _Output(self.exact_forward, True, "logits")

  @functools.cached_property
  def predict_fn(self) -> ApplyFn:
    """``(params, x) -> logits [M, C]`` at inference; margins are measured on it."""
    return _Output(self.exact_forward, False, "logits")

  @functools.cached_property
  def statistics_fn(self) -> Callable[[PyTree, jax.Array], PyTree] | None:
    """``(params, x) -> statistics`` of a batch inside the classifier; None without batch norm."""
    return _Output(self.exact_forward, True, "statistics") if self.batch_coupled else None

  @functools.cached_property
  def features_fn(self) -> ApplyFn | None:
    """``(params, x) -> features [M, F]`` at inference; None if they are unknown."""
    features_fn = _Output(self.exact_forward, False, "features")
    return None if result_shape("forward", features_fn, self.params, self.input_shape) is None else features_fn

  @property
  def batch_coupled(self) -> bool:
    """Whether the samples of a batch interact in training, as in batch norm."""
    return self.statistics is not None

  @property
  def decays(self) -> list[float]:
    """The weight decay of each tensor, in the order of the leaves; 1 for all if it is unknown."""
    return jax.tree.leaves(decay_of_tensors(self.weight_decay or 1.0, self.params))

  def with_params(self, params: PyTree | None = None, *, initial_params: PyTree | None = None) -> Self:
    """The same classifier with other parameters, or from another start; None leaves what there is.

    Raises:
      ValueError: they are not of the shapes of ``params``, not finite, or nothing was trained between them.
    """
    params = self.params if params is None else params
    initial_params = self.initial_params if initial_params is None else initial_params
    _checks.check_same_shapes("params", params, "those of the classifier", self.params)
    return dataclasses.replace(self, **_checked_params(params, initial_params))

  @_checks.annotated
  def with_offset(self, offset: ArrayLike) -> Self:
    """The same classifier with a known constant [*input_shape], which it subtracts from its inputs.

    Raises:
      ValueError: ``offset`` has another shape or is not finite.
    """
    _checks.check_shape("offset", offset, self.input_shape, "input_shape")
    _checks.check_finite("offset", offset)
    return dataclasses.replace(self, offset=jnp.asarray(offset))

  @property
  def num_classes(self) -> int:
    """C, the number of outputs."""
    return len(self.labels)

  @_checks.annotated
  @full_precision
  def predict(self, x: jax.Array) -> jax.Array:
    """Logits [M, C] of inputs [M, *input_shape] at inference.

    Raises:
      ValueError: another shape, or integers beyond ``value_range``, as bytes are for inputs up to 1.
    """
    _checks.check_shape("x", x, (*jnp.shape(x)[:1], *self.input_shape), "[M, *input_shape]")
    self._check_range(x)
    return jax.jit(self.predict_fn)(self.params, x)

  @_checks.annotated
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

  @_checks.annotated
  def to_unit(self, x: ArrayLike) -> jax.Array:
    """Inputs mapped from ``value_range`` to [0, 1]; unchanged if there is none.

    Raises:
      ValueError: integers beyond ``value_range``, as bytes are for inputs up to 1.
    """
    self._check_range(x)
    low, high = self.value_range or (0.0, 1.0)
    x = _floating(x)
    return x if (low, high) == (0, 1) else (x - low) / (high - low)

  @_checks.annotated
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


def _floating(x: ArrayLike) -> jax.Array:
  x = jnp.asarray(x)
  return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def _in_32_bits(params: PyTree) -> PyTree:
  """Parameters, in float32 if some have 16 bits, which determine no ranks and which LAPACK does not take."""
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
class _Output:
  """One of the outputs of ``forward`` as a function; equal if the functions are."""

  forward: Forward
  train: bool
  name: str

  def __call__(self, params: PyTree, x: jax.Array) -> Any:
    return getattr(self.forward(params, x, self.train), self.name)


@dataclasses.dataclass(frozen=True)
class _Forward:
  """``forward`` of somebody's function, which knows of training if there is batch norm; equal if the functions are."""

  apply_fn: Callable[..., Any]
  batch_norm: bool
  one_logit: bool = False

  def __call__(self, params: PyTree, x: jax.Array, train: bool) -> Evaluation:
    output = self.apply_fn(params, x, *[train] if self.batch_norm else [])
    whole = output if isinstance(output, Evaluation) else Evaluation(output)
    if x.shape[0] == 1:  # a function that squeezes has dropped that axis
      whole = whole._replace(logits=whole.logits.reshape(1, -1))
    return whole._replace(logits=lifted_logits(whole.logits)) if self.one_logit else whole


def lifted_logits(logits: jax.Array) -> jax.Array:
  """See `two_logits`."""
  if logits.size != logits.shape[0]:
    return logits
  return logits.reshape(-1, 1) * jnp.array([[-0.5, 0.5]], logits.dtype)


def make_classifier(
  apply_fn: Callable[..., Any],
  params: PyTree,
  input_shape: Sequence[int],
  *,
  labels: Sequence[int] | None = None,
  statistics: PyTree | None = None,
  value_range: tuple[float, float] | None = (0.0, 1.0),
  weight_decay: DecayLike | None = None,
  initial_params: PyTree | None = None,
) -> Classifier:
  """Checks the parts of a classifier, which are described in `Classifier`, and puts them together.

  Functions that return one logit per sample, [M, 1] or [M], make a classifier of two classes: see `two_logits`.
  Parameters in 16 bits are taken in float32. What JAX compiles belongs to the functions: of many classifiers with one
  architecture, give all the same functions, not new ones each time.

  Args:
    apply_fn: ``(params, x[M, *input_shape]) -> logits [M, C]``, or an `Evaluation` with features, too; with batch norm
      ``(params, x, train) -> Evaluation``, in training with the statistics of the batch.
    params: zeta, a pytree of floating-point arrays.
    input_shape: shape of one input.
    labels: the label of each output; 0..C-1 if None.
    statistics: what batch norm has stored of the training data; None without batch norm.
    value_range: least and greatest value of an input; None if unbounded.
    weight_decay: the strength in training, if known: a number, a tree of numbers like ``params``, or a function of the
      names of tensors (``lambda name: 0.01 if name.endswith("kernel") else 0.0``).
    initial_params: the parameters from which it was trained, if known.

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
  if not (input_shape := _checks.sizes("input_shape", input_shape)):
    raise ValueError("input_shape must have an axis; got (). Numbers are vectors of one value, (1,).")
  checked = _checked_params(params, initial_params)
  forward, num_classes = _checked_forward(apply_fn, checked["params"], input_shape, statistics)
  if value_range is not None:
    value_range = _range(value_range)
  if weight_decay is not None:
    strengths = jax.tree.leaves(decay_of_tensors(weight_decay, checked["params"]))
    weight_decay = strengths[0] if all(strength == strengths[0] for strength in strengths) else WeightDecay(strengths)
  return Classifier(
    **checked,
    forward=forward,
    input_shape=input_shape,
    labels=_checked_labels(labels, num_classes),
    statistics=statistics,
    value_range=value_range,
    weight_decay=weight_decay,
  )


def _checked_params(params: PyTree, initial_params: PyTree | None) -> dict[str, PyTree]:
  """``params`` and ``initial_params``, in float32 if some have 16 bits; a ValueError if they are none."""
  params = _checks.arrays("params", params)
  _checks.check_params("params", params)
  if isinstance(params, Mapping) and (running := _statistics.split(params, frozenset())[1]):
    raise ValueError(
      f"params must hold no running statistics of batch norm, which are no parameters; got"
      f" {_statistics.some_names(running)}. kkt_jax.Subject with a train_fn takes them, see docs/audit.md."
    )
  params = _in_32_bits(params)
  if initial_params is not None:
    initial_params = _checks.arrays("initial_params", initial_params)
    _checks.check_params("initial_params", initial_params)
    initial_params = _in_32_bits(initial_params)
    _checks.check_same_shapes("initial_params", initial_params, "params", params)
    pairs = zip(*map(jax.tree.leaves, (initial_params, params)), strict=True)
    if all(bool(jnp.array_equal(a, b)) for a, b in pairs):
      raise ValueError("initial_params must differ from params; nothing was trained.")
  return {"params": params, "initial_params": initial_params}


def _checked_labels(labels: Sequence[int] | None, num_classes: int) -> tuple[int, ...]:
  """C distinct integers, 0..C-1 if None; a ValueError otherwise."""
  labels = tuple(range(num_classes)) if labels is None else _checks.sizes("labels", labels)
  if max(map(abs, labels), default=0) >= 2**31:
    raise ValueError(f"labels must be less than 2^31 in size; got {labels}.")
  if len(set(labels)) != num_classes or len(labels) != num_classes:
    raise ValueError(f"labels must be {num_classes} distinct integers, one per logit of apply_fn; got {labels}.")
  return labels


def _checked_forward(
  apply_fn: Callable[..., Any], params: PyTree, input_shape: tuple[int, ...], statistics: PyTree | None
) -> tuple[Forward, int]:
  """``forward`` of somebody's function, and C; a ValueError if it does not give what `Classifier` needs."""
  forward = _Forward(apply_fn, statistics is not None)
  shape_of = lambda train: result_shape("apply_fn", lambda p, x: forward(p, x, train), params, input_shape)
  whole = shape_of(False)
  if not jnp.issubdtype(getattr(whole.logits, "dtype", jnp.float32), jnp.floating):
    raise ValueError(f"apply_fn must return logits, in floating point; got dtype {whole.logits.dtype}.")
  if getattr(whole.logits, "shape", None) in ((2,), (2, 1)):
    forward = dataclasses.replace(forward, one_logit=True)
    whole = shape_of(False)
  logits, features = whole.logits, whole.features
  if getattr(logits, "ndim", None) != 2 or logits.shape[0] != 2 or not logits.shape[1]:
    got = getattr(logits, "shape", None) or f"a {type(logits).__name__}"
    raise ValueError(f"apply_fn must return logits [M, C], one array; for M = 2 it returns {got}.")
  if features is not None and getattr(features, "ndim", None) != 2:
    raise ValueError("apply_fn must return features [M, F], one array, or None.")
  if statistics is not None:
    _checks.check_finite("statistics", statistics)
    trained = shape_of(True)
    if getattr(trained.logits, "shape", None) != logits.shape or (trained.features is None) != (features is None):
      raise ValueError("apply_fn must return logits, and features if any, in training as at inference.")
    _checks.check_same_shapes("statistics", statistics, "those of apply_fn in training", trained.statistics)
  return forward, logits.shape[1]
