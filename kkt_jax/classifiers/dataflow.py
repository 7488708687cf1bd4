"""Which parameters a function adds to its data and which it multiplies with them, read from its jaxpr."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from kkt_jax._typing import PyTree

_ADDITIONS = ("add", "sub", "add_any")
_Origin = frozenset[int] | None  # the parameters that a value is made of, or None if it depends on the data


def bias_tensors(apply_fn: Callable[[PyTree, jax.Array], Any], params: PyTree, x: jax.Array) -> tuple[bool, ...]:
  """Whether each parameter tensor is a bias: added to values that depend on ``x``, and combined in no other way.

  What counts is where a tensor, or a value computed from parameters alone, first meets a value that depends on ``x``.

  =============================================================  ====
  tensor                                                         bias
  =============================================================  ====
  bias of a layer, shift of a normalisation, position embedding  yes
  kernel, scale of a normalisation                               no
  gain and direction of a weight normalisation                   no
  added in one place, multiplied in another (tied)               no
  anything else meets the data (maximum, gather, concatenate)    no
  meets no data, or is not used                                  no
  =============================================================  ====

  Args:
    apply_fn: ``(params, x[M, ...]) -> logits[M, C]``; jit, checkpoint, custom derivatives, scan, while and cond may be
      inside.
    params: its parameters.
    x: inputs [M, ...]; only shapes and dtypes count, of both.

  Returns:
    A bool per tensor, in the order of `jax.tree.leaves`.

  >>> import jax.numpy as jnp
  >>> params = [(jnp.ones((2, 3)), jnp.zeros(3)), (jnp.ones((3, 1)), jnp.zeros(1))]
  >>> def mlp(p, x):
  ...   (w1, b1), (w2, b2) = p
  ...   return jax.nn.relu(x @ w1 + b1) @ w2 + b2
  >>> bias_tensors(mlp, params, jnp.ones((5, 2)))
  (False, True, False, True)
  """
  num_tensors = len(jax.tree.leaves(params))
  added: set[int] = set()
  multiplied: set[int] = set()
  origins: list[_Origin] = [frozenset([index]) for index in range(num_tensors)]
  _walk(jax.make_jaxpr(apply_fn)(params, x).jaxpr, [*origins, None], added, multiplied)
  return tuple(index in added - multiplied for index in range(num_tensors))


def _walk(jaxpr: Jaxpr, inputs: Sequence[_Origin], added: set[int], multiplied: set[int]) -> list[_Origin]:
  """The origins of the outputs of ``jaxpr``; what meets the data on the way is put into ``added`` or ``multiplied``."""
  origins: dict[Var, _Origin] = dict(zip(jaxpr.invars, inputs, strict=True))

  def read(atom: Any) -> _Origin:
    return frozenset() if isinstance(atom, Literal) else origins.get(atom, frozenset())  # constants hold no parameter

  for equation in jaxpr.eqns:
    operands = [read(atom) for atom in equation.invars]
    results = [_join(operands)] * len(equation.outvars)
    if None in operands:
      inside = _call(equation, operands, added, multiplied)
      if inside is not None:
        results = inside
      else:
        met = added if equation.primitive.name in _ADDITIONS else multiplied
        met.update(*filter(None, operands))
    origins.update(zip(equation.outvars, results, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _call(equation: JaxprEqn, operands: list[_Origin], added: set[int], multiplied: set[int]) -> list[_Origin] | None:
  """The origins of the results of an equation that calls other jaxprs; None if it is no such call."""
  name, settings = equation.primitive.name, equation.params
  if name == "cond":
    branches = [_walk(branch.jaxpr, operands[1:], added, multiplied) for branch in settings["branches"]]
    if operands[0] is not None:
      return [_join(origins) for origins in zip(*branches, strict=True)]
    for origins in branches:  # the data choose among them
      multiplied.update(*filter(None, origins))
    return [None] * len(branches[0])
  if name in ("scan", "while"):
    body = settings["jaxpr" if name == "scan" else "body_jaxpr"].jaxpr
    skipped = settings.get("cond_nconsts", 0)  # operands: constants of the condition, of the body, what is carried
    # Then, in a scan, what the turns take one after the other; results alike. JAX names their numbers by its version.
    last = len(operands) - _turned(equation.invars[skipped:], body.invars)
    first = last - (len(body.outvars) - _turned(equation.outvars, body.outvars))
    while True:  # with every turn what is carried may come to depend on more
      if name == "while":
        _walk(settings["cond_jaxpr"].jaxpr, operands[:skipped] + operands[first:], added, multiplied)
      results = _walk(body, operands[skipped:], added, multiplied)
      carried = [_join(pair) for pair in zip(operands[first:last], results, strict=False)]
      if carried == operands[first:last]:
        return carried + results[last - first :]
      operands = operands[:first] + carried + operands[last:]
  for called in settings.values():  # jit, checkpoint, custom derivatives, shard_map
    called = getattr(called, "jaxpr", called)
    if isinstance(called, Jaxpr) and len(called.invars) == len(operands):
      return _walk(called, operands, added, multiplied)
  return None


def _turned(outside: Sequence[Any], inside: Sequence[Any]) -> int:
  """How many values of a loop have an axis outside that they lack in each of its turns."""
  return sum(a.aval.ndim != b.aval.ndim for a, b in zip(outside, inside, strict=True))


def _join(origins: Iterable[_Origin]) -> _Origin:
  """The origin of what is made of several values, or is one of them."""
  joined: frozenset[int] = frozenset()
  for origin in origins:
    if origin is None:
      return None
    joined |= origin
  return joined
