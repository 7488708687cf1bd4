"""Relaxed ReLU gates in a network that somebody else wrote.

`kkt_jax.networks.relaxed_relu` says what they are and why the stationarity sum wants them. Here they take the place of
every ReLU of a given function, which is read as JAX sees it: operation by operation.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core
import numpy as np

from kkt_jax import _checks
from kkt_jax.classifier import ApplyFn, PyTree
from kkt_jax.networks import relaxed_relu

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "closed_call": "call_jaxpr"}


def relax_gates(apply_fn: ApplyFn, sharpness: float) -> ApplyFn:
  """The same function with a smooth derivative of every ReLU, ``sigmoid(sharpness * x)``.

  It finds ``jax.nn.relu`` and ``jnp.maximum(x, 0)``, also within functions that are jitted; loops (`jax.lax.scan`) are
  left as they are. So is the maximum with which normalisations guard a variance against rounding, ``max(mean(x^2) -
  mean(x)^2, 0)``: it is no gate, and a small variance would lose half of its derivative.

  Args:
    apply_fn: ``(params, x[M, ...]) -> logits[M, C]``.
    sharpness: k, positive; 20 to 500 are usual.

  Returns:
    A function of the same values.

  Raises:
    ValueError: ``sharpness`` is not positive.

  >>> import jax.numpy as jnp
  >>> relaxed = relax_gates(lambda w, x: jax.nn.relu(w * x), 20.0)
  >>> float(jax.grad(lambda w: relaxed(w, jnp.ones(())))(0.0)), float(relaxed(2.0, jnp.ones(())))  # at the kink
  (0.5, 2.0)
  """
  _checks.check_positive("sharpness", sharpness)

  def relaxed(params: PyTree, x: jax.Array) -> jax.Array:
    closed, shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, x)
    values = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves((params, x)), sharpness)
    return jax.tree.unflatten(jax.tree.structure(shape), values)

  return relaxed


def _evaluate(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any], sharpness: float) -> list[Any]:
  """Runs a program with its ReLUs replaced."""
  values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
  values |= dict(zip(jaxpr.invars, arguments, strict=True))

  def read(atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]

  squares: set[Any] = set()
  variances: set[Any] = set()
  for equation in jaxpr.eqns:
    inputs = [read(atom) for atom in equation.invars]
    gated = _gated_input(equation)
    if gated is not None and equation.invars[gated] in variances:
      gated = None
    if _is_square(equation):
      squares.update(equation.outvars)
    if _subtracts(equation, squares):
      variances.update(equation.outvars)
    inner = equation.params.get(_CALLS.get(equation.primitive.name, ""))
    if gated is not None:
      outputs = [relaxed_relu(inputs[gated], sharpness)]
    elif inner is not None and (equation.primitive.name != "custom_jvp_call" or _holds_gate(inner.jaxpr)):
      outputs = _evaluate(inner.jaxpr, inner.consts, inputs, sharpness)
    else:
      result = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
      outputs = list(result) if equation.primitive.multiple_results else [result]
    values |= dict(zip(equation.outvars, outputs, strict=True))
  return [read(atom) for atom in jaxpr.outvars]


def _gated_input(equation: Any) -> int | None:
  """Which input a maximum with 0 lets through; None where an operation is none."""
  if equation.primitive.name != "max":
    return None
  for index, atom in enumerate(equation.invars):
    if isinstance(atom, core.Literal) and np.ndim(atom.val) == 0 and atom.val == 0:
      return 1 - index
  return None


def _is_square(equation: Any) -> bool:
  name, atoms = equation.primitive.name, equation.invars
  return (
    name == "square"
    or (name == "integer_pow" and equation.params["y"] == 2)
    or (name == "mul" and atoms[0] is atoms[1])
  )


def _subtracts(equation: Any, squares: set[Any]) -> bool:
  """Whether one of the squares is subtracted, as in a variance."""
  subtracted = equation.invars[1] if equation.primitive.name == "sub" else None
  return isinstance(subtracted, core.Var) and subtracted in squares


def _holds_gate(jaxpr: Any) -> bool:
  """Whether a program is a ReLU and nothing else, however it is wrapped: other custom derivatives stay."""
  if len(jaxpr.eqns) != 1:
    return False
  equation = jaxpr.eqns[0]
  inner = equation.params.get(_CALLS.get(equation.primitive.name, ""))
  return _gated_input(equation) is not None or (inner is not None and _holds_gate(inner.jaxpr))
