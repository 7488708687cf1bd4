"""Least squares under bounds by an accelerated projected gradient method, on trees of arrays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from kkt_jax._typing import PyTree


def greatest_value(operator: Callable[[PyTree], PyTree], start: PyTree, *, num_steps: int) -> jax.Array:
  """The greatest eigenvalue of a positive semi-definite operator, by power iteration; 1 if it is 0.

  >>> round(float(greatest_value(lambda v: jnp.array([4.0, 1.0]) * v, jnp.ones(2), num_steps=20)), 4)
  4.0
  """

  def step(vector: PyTree, _: None) -> tuple[PyTree, jax.Array]:
    image = operator(vector)
    size = optax.tree.norm(image)
    return jax.tree.map(lambda own: own / jnp.where(size > 0, size, 1.0), image), size

  size = optax.tree.norm(start)
  unit = jax.tree.map(lambda own: own / jnp.where(size > 0, size, 1.0), start)
  _, sizes = jax.lax.scan(step, unit, length=num_steps)
  return jnp.where(sizes[-1] > 0, sizes[-1], 1.0)


def accelerated(descend: Callable[[PyTree], PyTree], start: PyTree, *, num_steps: int) -> PyTree:
  """Where projected gradient steps lead to, accelerated (FISTA, Beck and Teboulle 2009).

  The inertia is dropped when it points uphill (O'Donoghue and Candes 2015), which keeps the descent monotone.

  Args:
    descend: one projected gradient step.
    start: where it begins.
    num_steps: iterations, one step each.

  >>> accelerated(lambda x: jnp.clip(x - 0.5 * (x - 3.0), 0.0, 1.0), jnp.zeros(2), num_steps=20).tolist()
  [1.0, 1.0]
  """

  def step(carry: tuple[PyTree, PyTree, jax.Array], _: None) -> tuple[tuple[PyTree, PyTree, jax.Array], None]:
    now, ahead, inertia = carry
    following = descend(ahead)
    against = jax.tree.map(lambda a, f, n: jnp.sum((a - f) * (f - n)), ahead, following, now)
    inertia = jnp.where(sum(jax.tree.leaves(against)) > 0, 1.0, inertia)
    faster = 0.5 * (1 + jnp.sqrt(1 + 4 * inertia**2))
    ahead = jax.tree.map(lambda f, n: f + (inertia - 1) / faster * (f - n), following, now)
    return (following, ahead, faster), None

  (end, _, _), _ = jax.lax.scan(step, (start, start, jnp.ones(())), length=num_steps)
  return end
