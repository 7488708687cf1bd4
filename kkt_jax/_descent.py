"""Least squares under bounds by an accelerated projected gradient method, on trees of arrays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kkt_jax._typing import PyTree


def greatest_value(
  operator: Callable[[PyTree], PyTree], start: PyTree, *, num_steps: int, compiled_loop: bool = True
) -> jax.Array:
  """The greatest eigenvalue of a positive semi-definite operator, by power iteration; 1 if it is 0.

  ``compiled_loop`` is that of `accelerated`.

  >>> round(float(greatest_value(lambda v: jnp.array([4.0, 1.0]) * v, jnp.ones(2), num_steps=20)), 4)
  4.0
  """

  size = optax.tree.norm(start)
  unit = jax.tree.map(lambda leaf: leaf / jnp.where(size > 0, size, 1.0), start)
  if compiled_loop:
    _, sizes = jax.lax.scan(lambda vector, _: _power(operator, vector), unit, length=num_steps)
    size = sizes[-1]
  else:
    for _ in range(num_steps):
      unit, size = _compiled_power(operator, unit)
  return jnp.where(size > 0, size, 1.0)


def _power(operator: Callable[[PyTree], PyTree], vector: PyTree) -> tuple[PyTree, jax.Array]:
  image = operator(vector)
  size = optax.tree.norm(image)
  return jax.tree.map(lambda leaf: leaf / jnp.where(size > 0, size, 1.0), image), size


_compiled_power = jax.jit(_power)


def accelerated(
  descend: Callable[[PyTree], PyTree], start: PyTree, *, num_steps: int, compiled_loop: bool = True
) -> PyTree:
  """The point that accelerated projected gradient steps reach (FISTA, Beck and Teboulle 2009).

  The inertia is dropped when it points uphill (O'Donoghue and Candes 2015), which keeps the descent monotone.

  Args:
    descend: one projected gradient step.
    start: where it begins.
    num_steps: iterations, one step each.
    compiled_loop: whether all steps are one program; if not, ``descend`` must be a pytree (`jax.tree_util.Partial`).
      Convolutions are several times slower in a loop that XLA compiles for a CPU.

  >>> accelerated(lambda x: jnp.clip(x - 0.5 * (x - 3.0), 0.0, 1.0), jnp.zeros(2), num_steps=20).tolist()
  [1.0, 1.0]
  """
  carry = (start, start, jnp.ones(()))
  if compiled_loop:
    return jax.lax.scan(lambda carry, _: (_step(descend, carry), None), carry, length=num_steps)[0][0]
  for _ in range(num_steps):
    carry = _compiled_step(descend, carry)
  return carry[0]


def _step(
  descend: Callable[[PyTree], PyTree], carry: tuple[PyTree, PyTree, jax.Array]
) -> tuple[PyTree, PyTree, jax.Array]:
  """One step from the present point, the one ahead of it, and the inertia."""
  now, ahead, inertia = carry
  following = descend(ahead)
  against = jax.tree.map(lambda a, f, n: jnp.sum((a - f) * (f - n)), ahead, following, now)
  inertia = jnp.where(sum(jax.tree.leaves(against)) > 0, 1.0, inertia)
  faster = 0.5 * (1 + jnp.sqrt(1 + 4 * inertia**2))
  ahead = jax.tree.map(lambda f, n: f + (inertia - 1) / faster * (f - n), following, now)
  return following, ahead, faster


_compiled_step = jax.jit(_step)
