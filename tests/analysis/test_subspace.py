"""The subspace as one object: its coordinates, its facts, its checks, and under jit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.analysis import AnalysisCriteria, Subspace
from kkt_jax.criteria import Criteria

ORIGIN = jnp.array([[0.1, 0.5], [0.9, 0.3]])


def plane():
  basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (4, 2)))[0]
  return Subspace(ORIGIN, basis, jnp.array([2.0, 1.0]), blur=0.5)


def test_points_have_the_coordinates_that_they_are_made_of_and_no_distance():
  subspace, c = plane(), jax.random.normal(jax.random.key(1), (3, 2))
  x = subspace.points(c)
  assert x.shape == (3, 2, 2)
  np.testing.assert_allclose(subspace.coordinates(x), c, atol=1e-6)
  np.testing.assert_allclose(subspace.distance(x), 0.0, atol=1e-6)
  normal = jnp.linalg.qr(jnp.concatenate([subspace.basis, jnp.eye(4)], axis=1))[0][:, 2].reshape(1, 2, 2)
  np.testing.assert_allclose(subspace.distance(ORIGIN[None] + normal), 1.0, rtol=1e-5)


def test_in_float64_it_computes_with_all_digits():
  subspace, c = plane(), np.random.default_rng(0).normal(size=(3, 2))
  double = subspace.in_float64
  x = double.points(c)
  assert isinstance(x, np.ndarray) and x.dtype == np.float64 and double.in_float64.origin.dtype == np.float64
  np.testing.assert_allclose(x, subspace.points(jnp.asarray(c, jnp.float32)), atol=1e-6)
  gram = np.asarray(double.basis.T @ double.basis)
  np.testing.assert_allclose(double.coordinates(x), c @ gram, atol=1e-12)


def test_it_goes_through_jit_and_back_with_its_criteria():
  criteria = AnalysisCriteria(moves=0.1)
  subspace = dataclasses.replace(plane(), criteria=criteria)
  moved = jax.jit(lambda own: dataclasses.replace(own, origin=own.origin + 1.0))(subspace)
  assert moved.criteria == criteria
  np.testing.assert_allclose(moved.origin, ORIGIN + 1.0)
  np.testing.assert_array_equal(moved.basis, subspace.basis)
  assert len(jax.tree.leaves(subspace)) == 4
  assert jax.tree.map(lambda leaf: None, subspace).basis is None  # whatever JAX puts there


def test_an_image_is_a_blend_of_samples_and_one_value_is_none():
  around_image, around_grey = plane(), Subspace.whole(jnp.full((2, 2), 0.5))
  assert around_image.holds_mean and around_image.most_samples == 3
  assert not around_grey.holds_mean and around_grey.most_samples == around_grey.dimension == 4


def test_values_that_do_not_move_are_not_free_and_do_not_count():
  basis = jnp.array([[0.6], [1e-4], [0.8], [-0.8e-3]])
  subspace = Subspace(ORIGIN, basis, jnp.ones(1))
  assert subspace.free_coordinates.tolist() == [True, False, False, False]  # the third moves with the first
  assert subspace.required_active(Criteria(beyond=2.0)) == 1 + 2
  apart = dataclasses.replace(subspace, criteria=AnalysisCriteria(together=2.0, moves=0.0))
  assert apart.free_coordinates.all() and apart.required_active(Criteria(beyond=2.0)) == 1 + 8


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"basis": jnp.ones((3, 2))}, r"basis must have shape \[D, r\] = \(4, 2\); got shape \(3, 2\)"),
    ({"basis": jnp.ones(4)}, r"basis must have shape \[D, r\]; got shape \(4,\)"),
    ({"singular_values": jnp.ones(3)}, r"singular_values must have shape \[r\] = \(2,\)"),
    ({"origin": ORIGIN.at[0, 0].set(jnp.nan)}, "origin must be finite"),
    ({"blur": np.inf}, "blur must be finite"),
  ],
)
def test_what_does_not_fit_is_refused_when_it_is_made(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(plane(), **changes)
