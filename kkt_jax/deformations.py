"""New images of the kind of given ones: smooth random deformations, a prior that needs no data.

A generator that remembers draws training images. Moved by a little, smoothly, an image is another one and still of its
kind: a person who writes a digit twice bends its strokes. `warp` composes with any generator,
``warp(key, reconstruction.sample(other_key, y), size=1.5)``; its size is a temperature, of which 0 changes nothing.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks
from kkt_jax._precision import full_precision


@_checks.annotated
@full_precision
def warp(key: jax.Array, x: ArrayLike, *, size: ArrayLike, waves: int = 3) -> jax.Array:
  """Bends each image by a smooth random displacement of its own.

  Args:
    key: typed random key.
    x: images [M, H, W, C], floating point.
    size: root mean square length of a displacement in pixels, one number or one for each image [M]; 0 gives ``x``.
    waves: of the cosines that add up to a displacement the greatest number of half waves along a side, at least 1; the
      amplitudes fall like one over one plus the square of it. An image does not move as a whole.

  Returns:
    Images [M, H, W, C], differentiable in ``x`` and ``size``. What is moved in from outside repeats the border.

  Raises:
    ValueError: ``x`` is not a batch of such images, or ``waves`` is below 1.

  >>> x = jnp.zeros((2, 8, 8, 1)).at[:, 3:5, 3:5].set(1.0)
  >>> moved = warp(jax.random.key(0), x, size=1.0)
  >>> moved.shape, bool(jnp.any(moved[0] != moved[1])), bool(jnp.all(warp(jax.random.key(0), x, size=0.0) == x))
  ((2, 8, 8, 1), True, True)
  """
  x = jnp.asarray(x)
  _checks.check_rank("x", x, 4, "[M, H, W, C]")
  _checks.check_batch("x", x)
  height, width = x.shape[1:3]
  lengths = jnp.broadcast_to(jnp.asarray(size, x.dtype), x.shape[:1])
  shift = lengths[:, None, None, None] * displacements(key, x.shape[0], height, width, waves=waves).astype(x.dtype)
  places = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")).astype(x.dtype)
  read = lambda channel, at: jax.scipy.ndimage.map_coordinates(channel, list(at), order=1, mode="nearest")
  return jax.vmap(jax.vmap(read, in_axes=(-1, None), out_axes=-1))(x, places[None] + shift)


@_checks.annotated
def displacements(key: jax.Array, count: int, height: int, width: int, *, waves: int = 3) -> jax.Array:
  """Smooth random fields of displacements, down and to the right: Gaussian, of unit mean square length.

  Args:
    key: typed random key.
    count: M.
    height: H, in pixels.
    width: W.
    waves: see `warp`.

  Returns:
    [M, 2, H, W].

  Raises:
    ValueError: ``waves`` is below 1.

  >>> fields = displacements(jax.random.key(0), 500, 8, 8)
  >>> print(fields.shape, jnp.mean(jnp.sum(fields**2, axis=1)).round(1))
  (500, 2, 8, 8) 1.0
  """
  _checks.check_at_least("waves", waves, 1)
  orders = jnp.arange(waves + 1)
  rows, columns = (jnp.cos(jnp.pi * orders[:, None] * (jnp.arange(n)[None] + 0.5) / n) for n in (height, width))
  amplitudes = (1 / (1 + orders[:, None] ** 2 + orders[None] ** 2)).at[0, 0].set(0.0)
  squares = jnp.mean(rows**2, axis=1)[:, None] * jnp.mean(columns**2, axis=1)[None]
  amplitudes /= jnp.sqrt(2 * jnp.sum(amplitudes**2 * squares))
  drawn = amplitudes[None, None] * jax.random.normal(key, (count, 2, waves + 1, waves + 1))
  return jnp.einsum("mdij,ih,jw->mdhw", drawn, rows, columns)
