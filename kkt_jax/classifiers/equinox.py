"""From an Equinox module to a `Classifier`."""

from collections.abc import Sequence
import dataclasses
import functools
import inspect
from typing import Any

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax._typing import PyTree
from kkt_jax.classifiers._bridges import Bridge, nested
from kkt_jax.classifiers.classifier import Classifier


def from_equinox(
  module: Any,
  state: Any = None,
  *,
  input_shape: Sequence[int],
  channels_first: bool = True,
  labels: Sequence[int] | None = None,
  initial: Any = None,
  **known: Any,
) -> Classifier:
  """A `Classifier` from an Equinox module, called on one sample as ``module(x)`` (tried with 0.13.8).

  All its arrays in floating point are the parameters, named by their paths in the module. Dropout is never on. Batch
  norm uses the statistics of the batch, but at inference. In its mode "ema", Equinox's default, training normalises by
  running averages, through which a derivative by parameters sees 1 - momentum of the batch; so it is here, with
  averages that have arrived at the batch.

  Args:
    module: the module; it stays as it is. With ``state`` it is called as ``module(x, state)`` and returns logits and
      the next state, else as ``module(x)``; an argument ``key`` is None.
    state: its ``equinox.nn.State``, with batch norm.
    input_shape: shape of one input as the module takes it.
    channels_first: whether the first of three axes are channels, as Equinox's convolutions have them; they become the
      last, here and in the data.
    labels: the label of each output; 0..C-1 if None.
    initial: the module from whose parameters it was trained, if known.
    **known: ``value_range``, ``offset`` and ``weight_decay`` of `kkt_jax.from_linen`.

  Returns:
    The `Classifier`.

  Raises:
    ValueError: batch norm without ``state``, or on several axis names; or an argument does not fit, which is named.

  >>> import equinox as eqx
  >>> from_equinox(eqx.nn.Linear(2, 3, key=jax.random.key(0)), input_shape=(2,)).num_classes
  3
  """
  import equinox as eqx

  if not isinstance(module, eqx.Module):
    raise ValueError(f"module must be an equinox.Module; got {type(module).__name__}.")
  norms, axis = _batch_norms(module, state)
  resting = eqx.nn.inference_mode(module)
  tensors, rest = eqx.partition(resting, eqx.is_inexact_array)
  names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tensors)]
  averages = lambda state: {name: _averages(norm, state) for name, norm in norms.items()}
  averaged = any(norm.mode == "ema" for norm in norms.values())

  def variables_of(network: Any) -> dict[str, PyTree]:
    leaves = jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))
    stored = averages(state)
    params = nested(dict(zip(names, leaves, strict=True)))
    return {"params": params} | ({"batch_stats": nested(stored)} if stored else {})

  def built(params: PyTree) -> Any:
    arrays = flatten_dict(params, sep="/")
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(tensors), [arrays[name] for name in names]), rest)

  def batch(network: Any, before: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """Logits [M, C] of a batch, and the state after it."""
    return jax.vmap(lambda x: _called(network, before, x), out_axes=(0, None), axis_name=axis)(x)

  def on_the_batch(params: PyTree, before: Any, running: PyTree, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Logits [M, C], and the statistics of the batch."""
    network = jax.tree_util.tree_map_with_path(
      lambda path, node: _on_batch()(node, running.get(_name(path))) if _is_norm(node) else node,
      built(params),
      is_leaf=_is_norm,
    )
    logits, after = batch(network, before, x)
    return logits, averages(after)

  def run(variables: Any, x: jax.Array, on_batch: bool) -> tuple[jax.Array, PyTree]:
    params, stored = variables["params"], flatten_dict(variables.get("batch_stats", {}), sep="/")
    before = _clone(state)
    for name, norm in norms.items():
      before = _with_averages(norm, before, stored[f"{name}/mean"], stored[f"{name}/var"])
    if not on_batch:
      return batch(built(params), before, x)[0], {}
    arrived: dict[str, Any] = {}
    if averaged:
      arrived = on_the_batch(jax.lax.stop_gradient(params), before, {}, x)[1]
    logits, fresh = on_the_batch(params, before, arrived, x)
    return logits, nested(fresh)

  bridge = Bridge(
    argument="module",
    run=run,
    variables=variables_of(module),
    reference=lambda x: np.stack([_called(resting, state, jnp.asarray(sample))[0] for sample in x]),
    input_shape=input_shape,
    turned=channels_first and len(input_shape) == 3,
  )
  classifier = bridge.classifier(labels, None if initial is None else variables_of(initial), **known)
  stored = {name: pair | {"var": pair["var"] - _excess(norms[name], state)} for name, pair in averages(state).items()}
  return dataclasses.replace(classifier, statistics=nested(stored)) if norms else classifier


def _is_norm(node: Any) -> bool:
  import equinox as eqx

  return isinstance(node, eqx.nn.BatchNorm)


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _batch_norms(module: Any, state: Any) -> tuple[dict[str, Any], str | None]:
  """The layers of batch norm by name, and the axis name of all; raises ValueError if they lack a state or differ."""
  leaves = jax.tree_util.tree_leaves_with_path(module, is_leaf=_is_norm)
  norms = {_name(path): node for path, node in leaves if _is_norm(node)}
  axes = {norm.axis_name for norm in norms.values()}
  if norms and state is None:
    raise ValueError(f"state must be given, for module has batch norm; got None for {sorted(norms)}.")
  if len(axes) > 1 or not all(isinstance(axis, str) for axis in axes):
    raise ValueError(f"module must have batch norm on one axis name; got {sorted(map(str, axes))}.")
  return norms, next(iter(axes), None)


def _called(module: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
  """The logits of one sample, and the state after it."""
  key = {"key": None} if "key" in inspect.signature(type(module).__call__).parameters else {}
  return (module(x, **key), None) if state is None else module(x, _clone(state), **key)


def _clone(state: Any) -> Any:
  """The same state once more, for a State can be set only once."""
  return jax.tree.map(lambda leaf: leaf, state)


def _excess(norm: Any, state: Any) -> float:
  """What mode "batch" adds to variances: their first values, ones, are corrected as if they had been zeros."""
  count = 0 if norm.mode == "ema" else int(state.get(norm.batch_counter))
  return norm.momentum**count / (1 - norm.momentum**count) if count else 0.0


def _averages(norm: Any, state: Any) -> dict[str, jax.Array]:
  """The running statistics that batch norm uses at inference."""
  if norm.mode == "ema":
    mean, var = state.get(norm.ema_state_index)
    return {"mean": mean, "var": var}
  count = state.get(norm.batch_counter)
  share = jnp.where(count == 0, 1, 1 - norm.momentum**count)
  mean, var = state.get(norm.batch_state_index)
  return {"mean": mean / share, "var": var / share}


def _with_averages(norm: Any, state: Any, mean: jax.Array, var: jax.Array) -> Any:
  """The state with these averages; the other cannot be used again."""
  if norm.mode == "ema":
    return state.set(norm.ema_state_index, (mean, var))
  return state.set(norm.batch_state_index, (mean, var)).set(norm.batch_counter, jnp.array(0))


@functools.cache
def _on_batch() -> Any:
  """The class of layers that stand in the place of batch norm in training."""
  import equinox as eqx

  class OnBatch(eqx.nn.StatefulLayer):
    norm: Any
    running: Any  # averages that have arrived at the batch, in mode "ema"

    def __call__(self, x: jax.Array, state: Any, *, key: Any = None, inference: Any = None) -> tuple[jax.Array, Any]:
      axes, norm = tuple(range(1, x.ndim)), self.norm
      wide = lambda v: v.reshape(-1, *[1] * len(axes))
      mean = jax.lax.pmean(jnp.mean(x, axes), norm.axis_name)
      var = jax.lax.pmean(jnp.mean((x - wide(mean)) ** 2, axes), norm.axis_name)
      state = _with_averages(norm, state, mean, var)
      if norm.mode == "ema" and self.running is not None:
        mean = (1 - norm.momentum) * mean + norm.momentum * self.running["mean"]
        var = (1 - norm.momentum) * var + norm.momentum * self.running["var"]
      out = (x - wide(mean)) / jnp.sqrt(wide(var) + norm.eps)
      return (out * wide(norm.weight) + wide(norm.bias) if norm.channelwise_affine else out), state

  return OnBatch
