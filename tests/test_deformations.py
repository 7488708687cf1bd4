"""Deformations: what is moved where, how far, and what stays as it is."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import deformations

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (3, 12, 10, 2))


def test_nothing_moves_at_size_zero():
  chex.assert_trees_all_equal(deformations.warp(KEY, IMAGES, size=0.0), IMAGES)


def test_a_value_is_read_where_the_displacement_points():
  down, across = np.mgrid[:12, :10].astype(np.float32)
  plane = jnp.asarray(np.stack([down, across], axis=-1))[None]  # each pixel holds its place
  moved = deformations.warp(KEY, plane, size=0.5) - plane
  shift = 0.5 * jnp.moveaxis(deformations.displacements(KEY, 1, 12, 10), 1, -1)
  inside = (slice(None), slice(2, -2), slice(2, -2))  # elsewhere the border is repeated
  chex.assert_trees_all_close(moved[inside], shift[inside], atol=1e-5)


def test_displacements_have_unit_mean_square_are_smooth_and_move_nothing_as_a_whole():
  fields = deformations.displacements(KEY, 4000, 12, 10)
  chex.assert_shape(fields, (4000, 2, 12, 10))
  np.testing.assert_allclose(jnp.mean(jnp.sum(fields**2, axis=1)), 1.0, atol=0.03)
  chex.assert_trees_all_close(jnp.mean(fields, axis=(2, 3)), jnp.zeros((4000, 2)), atol=1e-5)
  assert float(jnp.mean(jnp.diff(fields, axis=2) ** 2)) < 0.05
  assert float(jnp.abs(jnp.corrcoef(fields[:, 0, 0, 0], fields[:, 1, 0, 0])[0, 1])) < 0.06  # axes are independent


def test_sizes_belong_to_images_and_keys_to_draws():
  moved = deformations.warp(KEY, IMAGES, size=jnp.array([0.0, 1.0, 2.0]))
  chex.assert_trees_all_equal(moved[0], IMAGES[0])
  chex.assert_trees_all_close(moved[1], deformations.warp(KEY, IMAGES, size=1.0)[1], atol=1e-6)
  assert jnp.any(moved[1] != deformations.warp(jax.random.key(9), IMAGES, size=1.0)[1])


def test_channels_move_together_and_values_stay_in_their_range():
  grey = jnp.repeat(IMAGES[..., :1], 2, axis=-1)
  moved = deformations.warp(KEY, grey, size=3.0)
  chex.assert_trees_all_equal(moved[..., 0], moved[..., 1])
  assert float(moved.min()) >= float(grey.min()) - 1e-6
  assert float(moved.max()) <= float(grey.max()) + 1e-6


def test_it_is_compiled_and_has_gradients():
  warp = jax.jit(lambda x, size: deformations.warp(KEY, x, size=size))
  chex.assert_trees_all_close(warp(IMAGES, 1.5), deformations.warp(KEY, IMAGES, size=1.5), atol=1e-5)
  for_x, for_size = jax.grad(lambda x, size: jnp.sum(warp(x, size) ** 2), argnums=(0, 1))(IMAGES, 1.5)
  chex.assert_tree_all_finite((for_x, for_size))
  assert float(jnp.abs(for_x).max()) > 0
  assert float(jnp.abs(for_size)) > 0


@pytest.mark.parametrize(
  ("x", "waves", "message"),
  [
    (jnp.ones((4, 4, 1)), 3, r"^x must have shape \[M, H, W, C\]"),
    (jnp.ones((1, 4, 4, 1), int), 3, "^x must be floating point"),
    (jnp.ones((1, 4, 4, 1)), 0, "^waves must be at least 1"),
  ],
)
def test_what_is_no_image_is_named(x, waves, message):
  with pytest.raises(ValueError, match=message):
    deformations.warp(KEY, x, size=1.0, waves=waves)
