"""What the library needs of a trained classifier: a function, its parameters, and how its batch norm is meant."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks

PyTree = Any
ApplyFn = Callable[[PyTree, jax.Array], jax.Array]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["params", "statistics", "offset"],
  meta_fields=[
    "apply_fn",
    "gradient_fn",
    "predict_fn",
    "statistics_fn",
    "features_fn",
    "input_shape",
    "labels",
    "batch_coupled",
  ],
)
@dataclasses.dataclass(frozen=True)
class Classifier:
  """A trained classifier Phi(.; zeta); build it with `make_classifier`, which checks its parts.

  It is a pytree with leaves ``params``, ``statistics`` and ``offset``, so it can be an argument of a jitted function.

  Attributes:
    apply_fn: ``(params, x[M, *input_shape]) -> logits[M, C]``, the function that gradient descent trained, exactly.
      Lambda is derived from it. With batch norm it uses the statistics of the batch.
    gradient_fn: the same values, with the derivatives that enter the stationarity condition: ``apply_fn`` itself, or
      one with relaxed ReLU gates. Lambda must not be derived from relaxed gates: they are not quasi-homogeneous.
    params: zeta, the trained parameters.
    input_shape: shape of one input.
    labels: the label that each output stands for, C of them: the classes that the training data held. Several
      classifiers share one numbering; a classifier of the digits 5-9 has ``labels=(5, 6, 7, 8, 9)``.
    predict_fn: ``(params, x) -> logits`` at inference, where no samples interact. Margins are measured on it. With
      batch norm it holds its own copy of the stored statistics.
    batch_coupled: whether the samples of a batch interact in ``apply_fn`` (batch norm on batch statistics).
    statistics_fn: ``(params, x) -> statistics`` of a batch inside the classifier, or None.
    statistics: the stored statistics of the training data, same tree as ``statistics_fn`` returns, or None.
    features_fn: ``(params, x) -> features [M, F]`` before the last ReLU, at inference, or None.
    offset: a stored preprocessing constant that ``apply_fn`` subtracts from its inputs, such as the mean image of the
      training data, or None. It is part of what a classifier gives away.
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
  features_fn: Callable[[PyTree, jax.Array], jax.Array] | None = None
  offset: jax.Array | None = None

  @property
  def num_classes(self) -> int:
    """C, the number of outputs."""
    return len(self.labels)

  def local_labels(self, y: ArrayLike) -> jax.Array:
    """The output indices [M] that stand for the labels ``y`` [M]; every label must be in ``labels``."""
    return jnp.argmax(jnp.asarray(y)[:, None] == jnp.asarray(self.labels)[None, :], axis=1)


def make_classifier(
  apply_fn: ApplyFn,
  params: PyTree,
  input_shape: Sequence[int],
  *,
  labels: Sequence[int],
  gradient_fn: ApplyFn | None = None,
  predict_fn: ApplyFn | None = None,
  batch_coupled: bool = False,
  statistics_fn: Callable[[PyTree, jax.Array], PyTree] | None = None,
  statistics: PyTree | None = None,
  features_fn: Callable[[PyTree, jax.Array], jax.Array] | None = None,
  offset: ArrayLike | None = None,
) -> Classifier:
  """Checks the parts of a classifier and puts them together.

  Args:
    apply_fn: ``(params, x[M, *input_shape]) -> logits[M, C]``.
    params: zeta.
    input_shape: shape of one input.
    labels: the label of each output, distinct, at least two.
    gradient_fn: ``apply_fn`` with other derivatives; ``apply_fn`` where None.
    predict_fn: inference; ``apply_fn`` where None. Required when ``batch_coupled``.
    batch_coupled: whether samples interact in ``apply_fn``.
    statistics_fn: statistics of a batch inside the classifier.
    statistics: their stored values; given together with ``statistics_fn``.
    features_fn: features before the last ReLU, at inference.
    offset: the preprocessing constant that ``apply_fn`` and ``predict_fn`` subtract from their inputs, if any.

  Returns:
    A `Classifier`.

  Raises:
    ValueError: fewer than two labels, repeated labels, non-finite parameters, logits of another shape than
      [M, C], or parts that do not belong together. The message names the argument.

  >>> import jax.numpy as jnp
  >>> linear = make_classifier(lambda w, x: x @ w, jnp.ones((2, 3)), (2,), labels=(0, 1, 2))
  >>> linear.num_classes
  3
  """
  labels = tuple(operator.index(label) for label in labels)
  input_shape = tuple(int(size) for size in input_shape)
  if len(labels) < 2:
    raise ValueError(f"labels must hold at least two classes; got {labels}.")
  if len(set(labels)) != len(labels):
    raise ValueError(f"labels must be distinct; got {labels}.")
  if batch_coupled and predict_fn is None:
    raise ValueError("predict_fn must be given when batch_coupled is True: margins are measured at inference.")
  if (statistics_fn is None) != (statistics is None):
    raise ValueError("statistics_fn and statistics must be given together; got only one of them.")
  if offset is not None:
    _checks.check_shape("offset", offset, input_shape, "input_shape")
  _checks.check_finite("params", params)
  functions = {"apply_fn": apply_fn, "gradient_fn": gradient_fn or apply_fn, "predict_fn": predict_fn or apply_fn}
  for name, function in functions.items():
    probe = jax.ShapeDtypeStruct((2, *input_shape), jnp.result_type(float))
    logits = jax.eval_shape(function, params, probe)
    if logits.shape != (2, len(labels)):
      raise ValueError(
        f"{name} must map [M, {', '.join(map(str, input_shape))}] to logits [M, C] with C = {len(labels)} labels;"
        f" for M = 2 it gives shape {logits.shape}."
      )
  return Classifier(
    params=params,
    input_shape=input_shape,
    labels=labels,
    **functions,
    batch_coupled=batch_coupled,
    statistics_fn=statistics_fn,
    statistics=statistics,
    features_fn=features_fn,
    offset=None if offset is None else jnp.asarray(offset),
  )


def samples_interact(apply_fn: ApplyFn, params: PyTree, x: ArrayLike) -> bool:
  """Whether the first sample's logits change when another sample joins it.

  Args:
    apply_fn: ``(params, x[M, ...]) -> logits[M, C]``.
    params: its parameters.
    x: inputs [M, ...], floating point. The sample that joins is the last one moved by 1, so M = 1 is enough.

  Returns:
    A Python bool. Under `jax.jit`, where values are unknown, made-up values of the same shapes are tried instead; only
    a function that closes over traced values cannot be judged, and the answer is then False.

  >>> import jax.numpy as jnp
  >>> x = jnp.array([[1.0], [3.0]])
  >>> samples_interact(lambda w, x: w * x, 2.0, x)
  False
  >>> samples_interact(lambda w, x: w * (x - x.mean()), 2.0, x)
  True
  """
  try:
    return _first_logits_change(apply_fn, params, jnp.asarray(x))
  except jax.errors.ConcretizationTypeError:
    pass

  def made_up(leaf: Any) -> jax.Array:
    shape, dtype = jnp.shape(leaf), jnp.result_type(leaf)
    return jnp.sin(1.0 + jnp.arange(math.prod(shape)).reshape(shape)).astype(dtype)

  try:
    with jax.ensure_compile_time_eval():
      return _first_logits_change(apply_fn, jax.tree.map(made_up, params), made_up(x))
  except jax.errors.ConcretizationTypeError:
    return False


def _first_logits_change(apply_fn: ApplyFn, params: PyTree, x: jax.Array) -> bool:
  alone = apply_fn(params, x[:1])[0]
  together = apply_fn(params, jnp.concatenate([x[:1], x[-1:] + 1.0]))[0]
  size = jnp.maximum(jnp.max(jnp.abs(alone)), jnp.max(jnp.abs(together)))
  close = (jnp.abs(alone - together) <= 1e-3 * size) | (jnp.isnan(alone) & jnp.isnan(together))
  return not bool(jnp.all(close))
