"""Training on many devices: generated samples split along one axis of a mesh, large parameters along the other.

A `kkt_jax.reconstruction.Problem` with a mesh splits every batch of generated samples over its axis ``"data"``. All
else follows from that under `jax.jit`: each device generates its share, runs the classifier on it, and adds up its own
part of the stationarity sum; the parts are added across devices before the norm is taken (Eq. 5), and so are the
gradients of theta and eta. Nothing that grows with the number of samples crosses devices. Batch norm sees the whole
batch: its means and variances cross as well.

The axis ``"model"`` is for classifiers larger than a device: `split_parameters` lays out their tensors along it.

The devices may belong to several processes (`jax.distributed`), each of which runs the same program. What they start
from is then what process 0 has.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from kkt_jax import _checks
from kkt_jax._typing import PyTree

DATA, MODEL = "data", "model"


def device_mesh(devices: Sequence[Any] | None = None, *, model: int = 1) -> Mesh:
  """Devices as a grid with the axes ``"data"`` and ``"model"``.

  Args:
    devices: the devices, of all processes; all of them if None.
    model: devices that share one copy of the split parameters; must divide their number.

  Returns:
    A `jax.sharding.Mesh` of shape [len(devices) / model, model].

  Raises:
    ValueError: ``model`` is below 1 or does not divide the number of devices.

  >>> dict(device_mesh(jax.devices()[:1]).shape)
  {'data': 1, 'model': 1}
  """
  devices = jax.devices() if devices is None else devices
  _checks.check_at_least("model", model, 1)
  if len(devices) % model:
    raise ValueError(f"model must divide the number of devices, {len(devices)}; got {model}.")
  return Mesh(np.asarray(devices).reshape(-1, model), (DATA, MODEL))


def replicated(mesh: Mesh) -> NamedSharding:
  """The layout of an array with a whole copy on every device of the mesh."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
  """A pytree of arrays with a copy on every device of the mesh; of several processes, the first one's arrays."""
  return _laid_out(tree, lambda leaf: replicated(mesh))


def split_parameters(tree: PyTree, mesh: Mesh) -> PyTree:
  """A pytree of arrays, each split over the mesh axis ``"model"`` along its longest axis that divides evenly.

  Give it a classifier, whose leaves are its parameters, and its conditions, which are as large. Tensors without such an
  axis are copied to every device.

  Args:
    tree: the arrays; of several processes, the first one's are taken.
    mesh: from `device_mesh`.

  Returns:
    The same tree, laid out anew.

  >>> mesh = device_mesh(jax.devices()[:1])
  >>> split_parameters({"kernel": np.ones((2, 6))}, mesh)["kernel"].sharding.spec == PartitionSpec(None, "model")
  True
  """
  parts = mesh.shape[MODEL]

  def sharding(leaf: Any) -> NamedSharding:
    shape = np.shape(leaf)
    even = [axis for axis, length in enumerate(shape) if length and length % parts == 0]
    spec: list[str | None] = [None] * len(shape)
    if even:
      spec[max(even, key=lambda axis: shape[axis])] = MODEL
    return NamedSharding(mesh, PartitionSpec(*spec))

  return _laid_out(tree, sharding)


def split_samples(tree: PyTree, mesh: Mesh) -> PyTree:
  """Inside `jax.jit`: arrays [M, ...] with their samples split over the mesh axis ``"data"``, evenly or not."""
  return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, PartitionSpec(DATA)))


def fetch(tree: PyTree) -> PyTree:
  """A pytree of arrays on one device of this process, from one with a whole copy of each array on every device."""
  return jax.tree.map(lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, tree)


def is_first_process() -> bool:
  """Whether this is the process that writes and talks, the first of several. Does not initialise any device."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def from_first_process(tree: PyTree) -> PyTree:
  """The first process's values of a pytree of arrays, as NumPy arrays; every process must call it."""
  host: PyTree = jax.tree.map(np.asarray, tree)
  return host if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(host)


def to_data(tree: PyTree) -> PyTree:
  """A pytree of arrays, with the numbers of random keys in place of the keys."""
  return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def from_data(tree: PyTree, like: PyTree) -> PyTree:
  """What `to_data` was given: random keys where ``like`` has them."""
  return jax.tree.map(
    lambda leaf, key: jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(key)) if _is_key(key) else leaf,
    tree,
    like,
  )


def _laid_out(tree: PyTree, sharding: Callable[[Any], NamedSharding]) -> PyTree:
  data = from_first_process(to_data(tree))
  return from_data(jax.tree.map(lambda leaf: jax.device_put(leaf, sharding(leaf)), data), tree)


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
