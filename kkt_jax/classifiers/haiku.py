"""From a transformed Haiku function to a `Classifier`."""

from collections.abc import Mapping, Sequence
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax._typing import PyTree
from kkt_jax.classifiers._bridges import Bridge
from kkt_jax.classifiers.classifier import Classifier

_SWITCHES = {"is_training": False, "train": False, "training": False, "deterministic": True}  # at inference
_AVERAGES = {"mean": "/~/mean_ema", "var": "/~/var_ema"}  # of hk.BatchNorm, below its own name


def from_haiku(
  transformed: Any,
  params: Mapping[str, Any],
  state: Mapping[str, Any] | None = None,
  *,
  input_shape: Sequence[int],
  train_argument: str | None = None,
  labels: Sequence[int] | None = None,
  initial: Mapping[str, Any] | None = None,
  **known: Any,
) -> Classifier:
  """A `Classifier` from a function that Haiku transformed (tried with 0.0.17).

  It is called as at inference, so that dropout is off; ``hk.BatchNorm`` in it uses the statistics of the batch, but at
  inference.

  Args:
    transformed: the result of ``hk.transform`` or ``hk.transform_with_state``, of a function of one batch, [M, ...].
    params: its parameters.
    state: its state, with ``hk.transform_with_state``.
    input_shape: shape of one input.
    train_argument: the name of the argument that switches the function to training, if it is none of ``is_training``,
      ``train``, ``training`` and ``deterministic`` (which is False in training).
    labels: the label of each output; 0..C-1 if None.
    initial: the parameters from which it was trained, if known.
    **known: ``value_range``, ``offset`` and ``weight_decay`` of `kkt_jax.from_linen`.

  Returns:
    The `Classifier`.

  Raises:
    ValueError: ``state`` is missing or not needed; or an argument does not fit, which is named.

  >>> import haiku as hk
  >>> linear = hk.transform(lambda x: hk.Linear(3)(x))
  >>> from_haiku(linear, linear.init(jax.random.key(0), jnp.zeros((1, 2))), input_shape=(2,)).num_classes
  3
  """
  import haiku as hk

  stateful = isinstance(transformed, hk.TransformedWithState)
  if not stateful and not isinstance(transformed, hk.Transformed):
    raise ValueError(f"transformed must be the result of hk.transform; got {type(transformed).__name__}.")
  if stateful != (state is not None):
    raise ValueError(f"state must be given with hk.transform_with_state, and only then; got {type(state).__name__}.")
  state = state or {}
  rng = [None] if "rng" in inspect.signature(transformed.apply).parameters else []

  def call(params: Any, state: Any, x: jax.Array, switch: Mapping[str, bool]) -> tuple[jax.Array, Any]:
    if stateful:
      return transformed.apply(params, state, *rng, x, **switch)
    return transformed.apply(params, *rng, x, **switch), {}

  names = {train_argument: _SWITCHES.get(train_argument, False)} if train_argument else _SWITCHES
  probe = jax.ShapeDtypeStruct((2, *input_shape), jnp.result_type(float))
  switches = ({name: on} for name, on in names.items())
  switch = next((candidate for candidate in switches if _takes(call, candidate, params, state, probe)), {})
  layers = sorted({name.rpartition("/~/")[0] for name in state})
  layers = [name for name in layers if all(f"{name}{end}" in state for end in _AVERAGES.values())]

  def averages(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {kind: state[f"{name}{end}"]["average"] for kind, end in _AVERAGES.items()} for name in layers}

  def on_batch(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if not isinstance(context.module, hk.BatchNorm) or context.method_name != "__call__":
      return next_call(*args, **kwargs)
    bound = inspect.signature(hk.BatchNorm.__call__).bind(context.module, *args, **kwargs).arguments
    bound["is_training"] = True
    return next_call(**{name: value for name, value in bound.items() if name != "self"})

  def run(variables: Any, x: jax.Array, batch: bool) -> tuple[jax.Array, PyTree]:
    before = dict(state)
    for name, stored in variables.get("batch_stats", {}).items():
      for kind, end in _AVERAGES.items():
        fresh = jax.tree.map(jnp.zeros_like, dict(state[f"{name}{end}"]))  # the next average is the batch's own value
        before[f"{name}{end}"] = {**fresh, "average": stored[kind]}
    if not batch:
      return call(variables["params"], before, x, switch)[0], {}
    with hk.intercept_methods(on_batch):
      logits, after = call(variables["params"], before, x, switch)
    return logits, averages(after)

  variables_of = lambda tree: {"params": tree} | ({"batch_stats": averages(state)} if layers else {})
  bridge = Bridge(
    argument="transformed",
    run=run,
    variables=variables_of(params),
    reference=lambda x: np.asarray(call(params, state, jnp.asarray(x), switch)[0]),
    input_shape=input_shape,
  )
  return bridge.classifier(labels, None if initial is None else variables_of(initial), **known)


def _takes(call: Any, switch: Mapping[str, bool], params: PyTree, state: PyTree, probe: Any) -> bool:
  """Whether the function has such an argument."""
  try:
    jax.eval_shape(lambda params, state, x: call(params, state, x, switch), params, state, probe)
  except TypeError as error:
    if next(iter(switch)) in str(error):
      return False
    raise
  return True
