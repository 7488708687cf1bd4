"""From a Keras model on its JAX backend to a `Classifier`."""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import inspect
from typing import Any

from flax.traverse_util import flatten_dict
import jax
import numpy as np

from kkt_jax._typing import PyTree
from kkt_jax.classifiers._bridges import Bridge, nested
from kkt_jax.classifiers.classifier import Classifier

_PROBABILITIES = ("softmax", "sigmoid")


def from_keras(
  model: Any,
  *,
  input_shape: Sequence[int] | None = None,
  labels: Sequence[int] | None = None,
  initial: Any = None,
  **known: Any,
) -> Classifier:
  """A `Classifier` from a Keras 3 model on the JAX backend, whichever backend it was saved by (tried with 3.15.1).

  Trainable variables are the parameters, named by their paths; frozen ones are constants. Batch norm uses the
  statistics of the batch, but at inference; dropout, noise and augmentation are never on. A softmax, or the sigmoid of
  one output, that the last layer ends with is taken off. Images whose channels come first are turned.

  Args:
    model: a built model of one input, floating point, and one output; it stays as it is.
    input_shape: shape of one input as the model takes it; needed where the model does not tell.
    labels: the label of each output; 0..C-1 if None.
    initial: a model of the same architecture with the weights from which it was trained, if known.
    **known: ``value_range``, ``offset`` and ``weight_decay`` of `kkt_jax.from_linen`.

  Returns:
    The `Classifier`.

  Raises:
    ValueError: Keras runs on another backend, the model has several inputs or outputs, or integer ones, or gives
      probabilities that cannot be taken off, or batch norm with ``renorm``; the message names it.
  """
  import keras

  input_shape = _checked_shape(model, input_shape)
  layers = list(model._flatten_layers())
  norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]
  if renormalised := [norm.name for norm in norms if getattr(norm, "renorm", False)]:
    raise ValueError(f"model must have no batch norm with renorm=True; got {renormalised}.")
  end = _ending(model)
  trainable, others = model.trainable_variables, model.non_trainable_variables
  names = {id(norm.moving_mean): f"{_path(norm)}/mean" for norm in norms}
  names |= {id(norm.moving_variance): f"{_path(norm)}/var" for norm in norms}
  constants = [tensor.value for tensor in others]
  resting = {"training": False} if "training" in inspect.signature(model.call).parameters else {}

  def variables_of(model: Any) -> dict[str, PyTree]:
    pairs = zip(model.non_trainable_variables, others, strict=True)
    stored = {names[id(here)]: there.value for there, here in pairs if id(here) in names}
    params = nested({here.path: there.value for there, here in zip(model.trainable_variables, trainable, strict=True)})
    return {"params": params} | ({"batch_stats": nested(stored)} if stored else {})

  def run(variables: Any, x: jax.Array, on_batch: bool) -> tuple[jax.Array, PyTree]:
    params, stored = (flatten_dict(variables.get(part, {}), sep="/") for part in ("params", "batch_stats"))
    values = [stored.get(names.get(id(tensor), ""), value) for tensor, value in zip(others, constants, strict=True)]
    with contextlib.ExitStack() as stack:
      for norm in norms if on_batch else []:
        stack.enter_context(_replaced(norm, "call", functools.partial(_on_batch, norm)))
      if end:
        stack.enter_context(_replaced(*end[1:]))
      logits, changed = model.stateless_call([params[tensor.path] for tensor in trainable], values, x, **resting)
    changed = {names[id(tensor)]: value for tensor, value in zip(others, changed, strict=True) if id(tensor) in names}
    return logits, nested(changed)

  bridge = Bridge(
    argument="model",
    run=run,
    variables=variables_of(model),
    reference=lambda x: np.asarray(model(x, **resting)),
    input_shape=input_shape,
    turned=len(input_shape) == 3 and any(getattr(layer, "data_format", "") == "channels_first" for layer in layers),
    probabilities=bool(end),
  )
  return bridge.classifier(labels, None if initial is None else variables_of(initial), **known)


def _checked_shape(model: Any, input_shape: Sequence[int] | None) -> Sequence[int]:
  """The shape of one input; raises ValueError for a model that cannot be taken over."""
  import keras

  if keras.backend.backend() != "jax":
    raise ValueError(
      f"model must run on Keras's JAX backend; got {keras.backend.backend()!r}. Set KERAS_BACKEND=jax before keras is"
      " imported, and load the model again."
    )
  if not isinstance(model, keras.Model) or not model.built:
    raise ValueError(f"model must be a built keras.Model; got {type(model).__name__}.")
  inputs = getattr(model, "inputs", None) or []
  if len(inputs) > 1 or len(getattr(model, "outputs", None) or [0]) > 1:
    raise ValueError(f"model must have one input and one output; {model.name!r} has several.")
  if inputs and not keras.backend.is_float_dtype(inputs[0].dtype):
    raise ValueError(f"model must take inputs in floating point; {model.name!r} takes {inputs[0].dtype}.")
  input_shape = inputs[0].shape[1:] if input_shape is None and inputs else input_shape
  if input_shape is None or None in input_shape:
    raise ValueError(f"input_shape must be given, for {model.name!r} does not tell it; got {input_shape}.")
  return input_shape


def _path(norm: Any) -> str:
  """The path of a layer, which is in those of its variables."""
  return norm.moving_mean.path.rpartition("/")[0]


def _on_batch(norm: Any, inputs: Any, training: Any = None, mask: Any = None) -> Any:
  """Batch norm as in training, in a model that is at inference."""
  return type(norm).call(norm, inputs, training=True, mask=mask)


@contextlib.contextmanager
def _replaced(layer: Any, name: str, value: Any) -> Iterator[None]:
  """An attribute of a layer replaced for a while, behind the back of what Keras tracks."""
  before = vars(layer).copy()
  vars(layer)[name] = value
  try:
    yield
  finally:
    if name in before:
      vars(layer)[name] = before[name]
    else:
      del vars(layer)[name]


def _ending(model: Any) -> tuple[str, Any, str, Any] | None:
  """The softmax or sigmoid at the end: its name, its layer, and the attribute and value that take it off; or None."""
  import keras

  end = model
  while isinstance(end, keras.Model) and getattr(end, "outputs", None):
    end = end.outputs[0]._keras_history.operation
  ending = getattr(getattr(end, "activation", None), "__name__", ""), end, "activation", keras.activations.linear
  if ending[0] not in _PROBABILITIES:
    ending = type(end).__name__.lower(), end, "call", lambda x, *_, **__: x
  if ending[0] == "sigmoid" and model.outputs[0].shape[-1] != 1:
    raise ValueError(f"model must tell one label per sample; {model.name!r} ends in a sigmoid of several outputs.")
  return ending if ending[0] in _PROBABILITIES else None
