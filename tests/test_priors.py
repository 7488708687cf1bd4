"""Priors on generated samples: numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import priors


def test_total_variation_by_hand_in_each_direction():
  images = jnp.array([[[0.0, 3.0, 7.0], [4.0, 0.0, 1.0], [9.0, 9.0, 9.0]], [[5.0] * 3] * 3])
  # (down, across): (4, 3), (-3, 4), (5, -4), (9, 1); a flat image has none.
  expected = (5 + 5 + 41**0.5 + 82**0.5) / 4
  np.testing.assert_allclose(priors.total_variation(images), [expected, 0.0], atol=2e-3)


def test_channels_are_averaged_not_differenced():
  image = jnp.array([[0.0, 3.0], [4.0, 0.0]])  # length 5
  images = jnp.stack([image, 3 * image], axis=-1)[None]
  np.testing.assert_allclose(priors.total_variation(images), [10.0], atol=2e-3)


def test_a_round_disc_costs_less_than_its_bounding_box():
  # What the anisotropic one cannot tell: it measures the box around a convex shape.
  rows, columns = np.mgrid[:40, :40] - 19.5
  disc = np.clip(15 - np.sqrt(rows**2 + columns**2), 0, 1)
  box = np.clip(15 - np.maximum(np.abs(rows), np.abs(columns)), 0, 1)
  disc_value, box_value = priors.total_variation(jnp.asarray(np.stack([disc, box])))
  assert disc_value < 0.9 * box_value


def test_out_of_range_counts_the_excess_only():
  x = jnp.array([[[0.0, 1.0], [0.5, 3.0]], [[-1.0, -3.0], [0.0, 0.0]]])
  np.testing.assert_allclose(priors.out_of_range(x), [1.0, 2.5])  # 2^2 / 4 and (1 + 9) / 4
  np.testing.assert_allclose(priors.out_of_range(x, low=-3.0, high=3.0), [0.0, 0.0])
  np.testing.assert_allclose(jax.grad(lambda x: priors.out_of_range(x).sum())(x)[0], [[0.0, 0.0], [0.0, 1.0]])


@pytest.mark.parametrize("shape", [(4, 4), (1, 2, 3, 4, 5), (2, 1, 5), (2, 5, 1, 3)])
def test_total_variation_refuses_what_is_no_image(shape):
  with pytest.raises(ValueError, match=r"^x must be images"):
    priors.total_variation(jnp.ones(shape))


@pytest.mark.parametrize("shape", [(2, 4, 3, 1), (2, 3, 5, 2), (1, 2, 2)])
def test_the_gradient_of_total_variation_is_that_of_finite_differences(shape):
  x = np.random.default_rng(0).normal(size=shape)
  with jax.enable_x64(True):
    total = lambda x: jnp.vdot(jnp.arange(1.0, shape[0] + 1), priors.total_variation(x))
    gradient, step = jax.jit(jax.grad(total))(jnp.asarray(x)), 1e-6
    for place in np.ndindex(*shape):
      moved = step * (place == np.indices(shape).T).all(-1).T
      np.testing.assert_allclose((total(x + moved) - total(x - moved)) / (2 * step), gradient[place], atol=1e-8)
    along = lambda amount: jax.grad(total)(jnp.asarray(x + amount * x**2))
    np.testing.assert_allclose(
      jax.jvp(jax.grad(total), (x,), (x**2,))[1], (along(step) - along(-step)) / (2 * step), atol=1e-6
    )


def test_a_flat_image_has_no_gradient_of_total_variation():
  gradient = jax.grad(lambda x: priors.total_variation(x)[0])(jnp.ones((1, 3, 3)))
  np.testing.assert_array_equal(gradient, 0.0)


def test_total_variation_refuses_integers():
  with pytest.raises(ValueError, match=r"^x must be floating point"):
    priors.total_variation(jnp.ones((1, 3, 3), jnp.uint8))


def test_binarisation_is_zero_for_black_and_white_and_a_quarter_for_grey():
  x = jnp.array([[0.0, 1.0, 1.0], [0.5, 0.5, 0.5], [-3.0, 2.0, 0.5]])  # out of range counts as clipped
  np.testing.assert_allclose(priors.binarisation(x), [0.0, 0.25, 0.25 / 3], rtol=1e-6)


def test_statistics_of_the_same_data_have_no_distance_and_others_the_known_one():
  stored = {"a": {"mean": jnp.array([1.0, 2.0]), "var": jnp.array([4.0, 4.0])}}
  assert float(priors.statistics_distance(stored, stored)) == 0.0
  # means are off by 2 and 0, in deviations 1 and 0: mean of squares 1/2; deviations 2 against 6: (3 - 1)^2 = 4, half.
  moved = {"a": {"mean": jnp.array([3.0, 2.0]), "var": jnp.array([36.0, 4.0])}}
  np.testing.assert_allclose(priors.statistics_distance(moved, stored), 0.5 + 2.0, rtol=1e-4)


def test_statistics_of_several_layers_add_up():
  layer = {"mean": jnp.array([0.0]), "var": jnp.array([1.0])}
  moved = {"mean": jnp.array([1.0]), "var": jnp.array([1.0])}
  one = priors.statistics_distance({"a": moved, "b": layer}, {"a": layer, "b": layer})
  two = priors.statistics_distance({"a": moved, "b": moved}, {"a": layer, "b": layer})
  np.testing.assert_allclose(two, 2 * one, rtol=1e-6)


def test_statistics_of_another_tree_are_named():
  with pytest.raises(ValueError, match="statistics must have the tree structure of stored"):
    priors.statistics_distance({"a": {"mean": jnp.ones(1)}}, {"a": {"mean": jnp.ones(1), "var": jnp.ones(1)}})


def test_equal_samples_have_finite_gradients():
  gradient = jax.grad(lambda x: priors.repulsion(x, jnp.zeros(3, int), bandwidth=0.3))(jnp.ones((3, 2)))
  assert bool(jnp.all(jnp.isfinite(gradient)))


def test_repulsion_is_the_kernel_averaged_over_pairs_of_one_label():
  x, y = jnp.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), jnp.array([0, 0, 1])
  np.testing.assert_allclose(priors.repulsion(x, y, bandwidth=5.0), np.exp(-25 / 50), rtol=1e-5)
  assert float(priors.repulsion(x, jnp.array([0, 1, 2]), bandwidth=5.0)) == 0.0


def test_bad_scales_are_named():
  x, y = jnp.ones((2, 2)), jnp.zeros(2, int)
  with pytest.raises(ValueError, match="bandwidth must be positive"):
    priors.repulsion(x, y, bandwidth=0.0)


def test_double_precision_is_kept():
  @jax.jit
  def everything(x):
    labels, layer = jnp.array([0, 0]), {"mean": x[0], "var": jnp.ones(2)}
    return [
      priors.out_of_range(x),
      priors.total_variation(x[None]),
      priors.binarisation(x),
      priors.statistics_distance(layer, layer),
      priors.collapse(x, x, jnp.ones(2)),
      priors.repulsion(x, labels, bandwidth=1.0),
      priors.contrast(x, x),
    ]

  with jax.enable_x64(True):
    results = everything(jnp.asarray([[0.2, 1.5], [0.5, -1.0]], jnp.float64))
    assert all(value.dtype == jnp.float64 for value in results)
    np.testing.assert_allclose(results[0], [0.5**2 / 2, 1 / 2], rtol=1e-14)


def test_contrast_is_low_where_views_of_one_sample_agree_and_differ_from_all_others():
  x = jax.random.normal(jax.random.key(0), (6, 40))
  alike, mixed = priors.contrast(x, 3 * x), priors.contrast(x, jnp.roll(x, 1, axis=0))  # lengths do not count
  assert float(alike) < 0.01 < 1.0 < float(mixed)
  same = priors.contrast(jnp.ones((6, 40)), jnp.ones((6, 40)))
  np.testing.assert_allclose(same, np.log(11), rtol=1e-5)  # nothing tells the partner from the other ten


def test_contrast_by_hand():
  first, second = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
  c, total = np.sqrt(0.5), np.log
  expected = [
    total(np.exp(1) + np.exp(0) + np.exp(c)) - 1,  # the views of the first: (1, 0) with (1, 0)
    total(np.exp(c) + np.exp(0) + np.exp(0)) - c,  # (0, 1) with (1, 1)
    total(np.exp(1) + np.exp(0) + np.exp(c)) - 1,
    total(np.exp(c) + np.exp(c) + np.exp(c)) - c,
  ]
  np.testing.assert_allclose(priors.contrast(first, second, temperature=1.0), np.mean(expected), rtol=1e-5)


def test_contrast_of_dead_features_has_finite_gradients():
  gradient = jax.grad(lambda x: priors.contrast(x, x))(jnp.zeros((3, 4)))
  assert bool(jnp.all(jnp.isfinite(gradient)))


def test_contrast_refuses_views_of_other_samples():
  with pytest.raises(ValueError, match="second must have the shape"):
    priors.contrast(jnp.ones((2, 3)), jnp.ones((3, 3)))
