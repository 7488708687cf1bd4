"""Names of the tensors of a pytree."""

import collections

import jax

from kkt_jax._typing import PyTree


def tensor_names(params: PyTree) -> list[str]:
  """The path of every parameter tensor, in the order of `jax.tree.leaves`.

  Raises:
    ValueError: two tensors have the same path, such as ``{"a/b": ...}`` beside ``{"a": {"b": ...}}``.

  >>> tensor_names({"Dense_0": {"bias": 0.0, "kernel": 0.0}})
  ['Dense_0/bias', 'Dense_0/kernel']
  """
  paths = jax.tree_util.tree_leaves_with_path(params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
  twice = sorted(name for name, count in collections.Counter(names).items() if count > 1)
  if twice:
    raise ValueError(f"params must have a path of its own for every tensor; got several tensors at {twice}.")
  return names
