"""From a PyTorch module to a `Classifier`, by way of torchax."""

from collections.abc import Mapping, Sequence
import copy
from typing import Any

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax._typing import PyTree
from kkt_jax.classifiers._bridges import Bridge, nested
from kkt_jax.classifiers.classifier import Classifier

_PAIR = "torch 2.13 and torchax 0.0.14.dev20261026"  # tried
_STORED = ("running_mean", "running_var")  # by batch norm


def from_torch(
  module: Any,
  *,
  input_shape: Sequence[int],
  channels_first: bool = True,
  labels: Sequence[int] | None = None,
  initial: Any = None,
  **known: Any,
) -> Classifier:
  """A `Classifier` from a PyTorch module, by torchax (tried with torch 2.13, torchax 0.0.14.dev20261026).

  What ``named_parameters`` names and requires a gradient is the parameters; buffers and frozen tensors are constants.
  The module is called as after ``module.eval()``, so that dropout is off; batch norm uses the statistics of the batch,
  but at inference.

  Args:
    module: an ``torch.nn.Module`` of one input and one output; it stays as it is.
    input_shape: shape of one input as the module takes it.
    channels_first: whether the first of three axes are channels, as PyTorch's convolutions have them; they become the
      last, here and in the data.
    labels: the label of each output; 0..C-1 if None.
    initial: a module of the same architecture with the weights from which it was trained, or its ``state_dict()``, if
      known.
    **known: ``value_range``, ``offset`` and ``weight_decay`` of `kkt_jax.from_linen`.

  Returns:
    The `Classifier`, with copies of the module's numbers on JAX's device.

  Raises:
    ImportError: torchax is not installed, or does not fit to torch.
    ValueError: the module was scripted or compiled, or does in JAX what it does not in PyTorch; or an argument does not
      fit, which is named.
  """
  import torch

  try:
    import torchax
  except Exception as error:  # of another age, it fails in many ways
    raise ImportError(f"from_torch needs torchax, and a torch that it fits to: {_PAIR} do; {error}") from error
  module = _bare(module)
  norms = _batch_norms(module)
  dtype = getattr(torch, jnp.result_type(float).name)
  copied = lambda: copy.deepcopy(module).to("cpu", dtype).eval()
  resting, training = copied(), copied()
  seen = _noted(training, norms)
  states, rested = _extract(torchax, resting)
  trained = _extract(torchax, training)[1]
  names = [name for name, tensor in resting.named_parameters() if tensor.requires_grad]
  running = [f"{name}.{kind}" for name in norms for kind in _STORED]
  constants = {name: value for name, value in states.items() if name not in {*names, *running}}

  def variables_of(given: Any) -> dict[str, PyTree]:
    state = given if isinstance(given, Mapping) else _bare(given).state_dict()
    if lacking := sorted({*names, *running} - {*state}):
      raise ValueError(f"initial must have the tensors of module; it lacks {lacking}.")
    held = {name: jnp.asarray(state[name].detach().to("cpu", dtype).numpy()) for name in (*names, *running)}
    parts = {"params": names, "batch_stats": running}
    return {part: nested({name: held[name] for name in members}, ".") for part, members in parts.items() if members}

  def run(variables: Any, x: jax.Array, on_batch: bool) -> tuple[jax.Array, PyTree]:
    given = constants
    for collection in variables.values():
      given = given | flatten_dict(collection, sep=".")
    if not on_batch:
      return rested(given, x), {}
    seen.clear()
    logits = trained(given, x)
    averages = nested(seen, ".")
    seen.clear()
    return logits, averages

  bridge = Bridge(
    argument="module",
    run=run,
    variables=variables_of(module),
    reference=lambda x: _outputs(resting, x),
    input_shape=input_shape,
    training=lambda x: _outputs_in_training(copied(), x),
    turned=channels_first and len(input_shape) == 3,
  )
  try:
    return bridge.classifier(labels, None if initial is None else variables_of(initial), **known)
  except jax.errors.UnexpectedTracerError as error:
    torchax.default_env().manual_seed(0)  # its generator holds what JAX traced
    raise ValueError("module must draw no random numbers at inference; it does.") from error


def _batch_norms(module: Any) -> list[str]:
  """The names of a module's layers of batch norm; raises ValueError if it is none that can be taken over."""
  import torch

  scripted = lambda network: any(isinstance(inner, torch.jit.ScriptModule) for inner in network.modules())
  if not isinstance(module, torch.nn.Module) or scripted(module):
    raise ValueError(f"module must be a torch.nn.Module that was not scripted; got {type(module).__name__}.")
  norms = {name: bn for name, bn in module.named_modules() if isinstance(bn, torch.nn.modules.batchnorm._BatchNorm)}
  if untracked := [name for name, norm in norms.items() if norm.running_mean is None]:
    raise ValueError(f"module must have batch norm with track_running_stats=True; got False in {untracked}.")
  if old := [name for name, layer in module.named_modules() if any(map(_computes, layer._forward_pre_hooks.values()))]:
    raise ValueError(
      f"module must have weight_norm and spectral_norm of torch.nn.utils.parametrizations; {old} do not."
    )
  return list(norms)


def _noted(module: Any, norms: Sequence[str]) -> dict[str, jax.Array]:
  """The dict into which the module's batch norm, in training from now on, notes the statistics of each batch."""
  seen: dict[str, jax.Array] = {}

  def hook_of(name: str) -> Any:
    def note(_: Any, inputs: Any) -> None:
      x = inputs[0].jax()
      axes = (0, *range(2, x.ndim))
      pair = zip(_STORED, (jnp.mean(x, axes), jnp.var(x, axes, ddof=1)), strict=True)
      seen.update({f"{name}.{kind}": value for kind, value in pair})

    return note

  for name in norms:
    module.get_submodule(name).train().register_forward_pre_hook(hook_of(name))
  return seen


def _outputs(module: Any, x: np.ndarray) -> np.ndarray:
  """What PyTorch gives for inputs."""
  import torch

  with torch.no_grad():
    outputs = module(torch.from_numpy(np.array(x, order="C")).to(getattr(torch, jnp.result_type(float).name)))
  if not isinstance(outputs, torch.Tensor):
    raise ValueError(f"module must give logits alone, in training, too; it gives a {type(outputs).__name__}.")
  return outputs.numpy()


def _outputs_in_training(module: Any, x: np.ndarray) -> np.ndarray | None:
  """What PyTorch gives in training, without dropout; None if it draws other random numbers."""
  import torch

  module.train()
  for layer in module.modules():
    if isinstance(layer, (torch.nn.modules.dropout._DropoutNd, torch.nn.utils.parametrize.ParametrizationList)):
      layer.eval()
  first, second = (_outputs(module, x) for _ in range(2))
  return first if np.array_equal(first, second) else None


def _bare(module: Any) -> Any:
  """The module that ``torch.compile`` or the parallel ones wrap."""
  import torch

  module = getattr(module, "_orig_mod", module)
  parallel = isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel))
  return module.module if parallel else module


def _computes(hook: Any) -> bool:
  """Whether a hook sets a weight before each call, as ``torch.nn.utils.weight_norm`` (not of parametrizations) does."""
  return type(hook).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")


def _extract(torchax: Any, module: Any) -> tuple[dict[str, jax.Array], Any]:
  """All tensors of a module, and the function of them and of inputs [M, ...] that it is, as ``torchax.extract_jax``.

  Not among them is what a parametrization computes from its own tensors, which extract_jax takes for buffers.
  """
  jittable, environment = torchax.interop.JittableModule(module), torchax.default_env()
  for name, layer in module.named_modules():
    for computed in getattr(layer, "parametrizations", {}):
      jittable.buffers.pop(f"{name}.{computed}".lstrip("."))

  def function(states: Any, x: jax.Array) -> jax.Array:
    held, inputs = environment.j2t_iso((states, x))
    with environment:
      return environment.t2j_iso(jittable.functional_call("forward", held, {}, inputs))

  return environment.t2j_copy(jittable.params | jittable.buffers), function
