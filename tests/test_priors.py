"""Priors on generated samples: total variation and the distance of batch-norm statistics, by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import priors


class TotalVariationTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand_in_each_direction(self):
    images = jnp.array([[[0.0, 1.0, 4.0], [2.0, 1.0, 0.0]], [[5.0, 5.0, 5.0], [5.0, 5.0, 5.0]]])
    # down: |2|, |0|, |-4| -> 2; across: 1, 3, 1, 1 -> 1.5; a flat image has none.
    np.testing.assert_allclose(self.variant(priors.total_variation)(images), [3.5, 0.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_channels_are_averaged_not_differenced(self):
    image = jnp.array([[0.0, 1.0, 4.0], [2.0, 1.0, 0.0]])
    images = jnp.stack([image, 3 * image], axis=-1)[None]
    np.testing.assert_allclose(self.variant(priors.total_variation)(images), [7.0])  # (3.5 + 10.5) / 2

  @chex.variants(with_jit=True, without_jit=True)
  def test_flat_image_has_zero_gradient(self):
    gradient = jax.grad(lambda x: jnp.sum(self.variant(priors.total_variation)(x)))(jnp.ones((1, 3, 3)))
    np.testing.assert_array_equal(gradient, jnp.zeros((1, 3, 3)))


@pytest.mark.parametrize("shape", [(4,), (4, 4), (1, 2, 3, 4, 5)])
def test_total_variation_refuses_what_is_no_image(shape):
  with pytest.raises(ValueError, match=r"^x must be images"):
    priors.total_variation(jnp.ones(shape))


class StatisticsDistanceTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_is_the_mean_over_tensors_of_relative_squares(self):
    stored = {"mean": jnp.array([3.0, 4.0]), "var": jnp.array([2.0])}
    statistics = {"mean": jnp.array([3.0, 5.0]), "var": jnp.array([1.0])}
    # mean: 1 / 25; var: 1 / 4.
    distance = self.variant(priors.statistics_distance)(statistics, stored)
    assert float(distance) == pytest.approx((1 / 25 + 1 / 4) / 2, rel=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_stored_zeros_leave_the_plain_square(self):
    distance = self.variant(priors.statistics_distance)({"mean": jnp.array([3.0])}, {"mean": jnp.array([0.0])})
    assert float(distance) == 9.0


def test_statistics_of_another_structure_are_refused():
  with pytest.raises(ValueError, match=r"^statistics must have the tree structure of stored"):
    priors.statistics_distance({"mean": jnp.ones(1)}, {"mean": jnp.ones(1), "var": jnp.ones(1)})
