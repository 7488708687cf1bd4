"""What the first layer reveals, against the data themselves: their moments and their subspace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.analysis.first_layer import FirstLayer, input_moments
from kkt_jax.analysis.noise import directions_above_noise, noise_floor


def layer(width=64, seed=0):
  x = jax.random.normal(jax.random.key(seed), (50, 3)) @ jnp.array([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.5, 0.3]])
  x = x + jnp.array([[1.0, -2.0, 5.0]])
  kernel = jax.random.normal(jax.random.key(seed + 1), (3, width))
  bias = jax.random.normal(jax.random.key(seed + 2), (width,))
  return x, kernel, bias, x @ kernel + bias[None]


def test_moments_are_those_of_the_data():
  x, kernel, bias, outputs = layer()
  mean, covariance = input_moments(kernel, bias, outputs.mean(0), outputs.var(0))
  np.testing.assert_allclose(mean, x.mean(0), rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(covariance, np.cov(np.asarray(x).T, bias=True), rtol=1e-2, atol=1e-2)


def test_equations_that_contradict_each_other_count_in_units_of_their_own_variance():
  # One input of variance s through weights 1 and 100, of stored variance 1 and 20,000: the least of
  # (s / 1 - 1)^2 + (10,000 s / 20,000 - 1)^2 is at 5/4 s = 3/2. Unscaled, the second would say 2 alone.
  kernel = jnp.array([[1.0, 100.0]])
  _, covariance = input_moments(kernel, jnp.zeros(2), jnp.zeros(2), jnp.array([1.0, 2e4]))
  np.testing.assert_allclose(covariance, [[1.2]], rtol=1e-5)


def test_eigenvalues_of_the_covariance_are_at_least_1e_6():
  # Variances 1, 1 and 5 of x1, x2 and x1 + x2: covariance (5 - 1 - 1) / 2, eigenvalues 1 + 3/2 and 1 - 3/2.
  kernel = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
  _, covariance = input_moments(kernel, jnp.zeros(3), jnp.zeros(3), jnp.array([1.0, 1.0, 5.0]))
  np.testing.assert_allclose(covariance, [[1.25, 1.25], [1.25, 1.25]], rtol=1e-4)
  np.testing.assert_allclose(np.linalg.eigvalsh(np.asarray(covariance, np.float64)), [1e-6, 2.5], rtol=1e-4, atol=5e-7)


def test_a_layer_too_narrow_for_the_covariance_is_named():
  _, kernel, bias, outputs = layer(width=5)
  with pytest.raises(ValueError, match="kernel must have at least .* 6 outputs for D = 3; got 5"):
    input_moments(kernel, bias, outputs.mean(0), outputs.var(0))


def test_statistics_of_another_layer_are_named():
  _, kernel, bias, outputs = layer()
  with pytest.raises(ValueError, match="var must have shape"):
    input_moments(kernel, bias, outputs.mean(0), jnp.ones(3))


# Subspaces above what a small random initialisation leaves.


def planted(shape, rank, *, noise, seed=0):
  """Noise, and the columns of a matrix that was added to it."""
  random = np.random.default_rng(seed)
  data = random.normal(size=(shape[0], rank))
  return noise * random.normal(size=shape) + data @ random.normal(size=(rank, shape[1])), data


def floor_of(kernel):
  return noise_floor(np.linalg.svd(kernel, compute_uv=False), kernel.shape)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (80, 80), (300, 200)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_what_stands_out_of_noise_is_counted_and_the_noise_measured(shape, rank):
  floor = floor_of(planted(shape, rank, noise=1e-3)[0])
  assert floor.rank == rank
  assert floor.deviation == pytest.approx(1e-3, rel=0.04)


def test_any_independent_entries_will_do():
  random = np.random.default_rng(0)
  entries = random.uniform(-1e-3, 1e-3, size=(60, 90))  # of variance 1e-6 / 3
  floor = floor_of(entries + planted((60, 90), 5, noise=0)[0])
  assert (floor.rank, round(floor.deviation, 5)) == (5, 0.00058)


@pytest.mark.parametrize(
  "kernel",
  [
    planted((60, 90), 0, noise=1.0)[0],  # nothing was learned
    planted((60, 90), 5, noise=1.0)[0],  # weights that stayed near their start
    planted((60, 90), 58, noise=1e-3)[0],  # as many samples as dimensions
    planted((60, 90), 5, noise=0)[0],  # a cliff
    np.diag(np.geomspace(1, 1e-6, 60)),  # an even fall
    np.diag(np.r_[np.ones(8), np.full(52, 1e-3)]),  # a floor that is no noise
    np.zeros((60, 90)),
  ],
)
def test_without_a_floor_of_noise_there_is_none(kernel):
  assert floor_of(kernel) is None
  assert directions_above_noise(kernel) is None


def test_noise_is_mistaken_for_data_once_in_a_thousand_times():
  kernels = [planted((40, 60), 3, noise=1e-3, seed=seed)[0] for seed in range(200)]
  floors = [floor_of(kernel) for kernel in kernels]
  assert sum(floor is None or floor.rank != 3 for floor in floors) <= 4


def test_the_blur_is_the_angle_with_the_true_subspace():
  kernel, data = planted((200, 300), 20, noise=0.02)
  subspace = directions_above_noise(kernel)
  true = np.linalg.qr(data)[0]
  angles = np.linalg.norm(subspace.basis - true @ (true.T @ subspace.basis), axis=0)
  np.testing.assert_allclose(angles, subspace.blur / subspace.singular_values, rtol=0.2)
  assert subspace.blur == pytest.approx(0.02 * 180**0.5, rel=0.02)


def test_inputs_that_never_vary_blur_nothing():
  kernel, data = planted((200, 300), 20, noise=0.02)
  kernel[:80] -= data[:80] @ np.linalg.lstsq(data, kernel, rcond=None)[0]  # 80 rows of the initialisation
  subspace = directions_above_noise(kernel)
  assert subspace.basis.shape == (200, 20)
  np.testing.assert_allclose(subspace.basis[:80], 0, atol=1e-6)
  assert subspace.blur == pytest.approx(0.02 * (200 - 80 - 20) ** 0.5, rel=0.05)


@pytest.mark.parametrize("around", ["mean", "black"])
def test_a_bias_that_is_almost_in_the_row_space_tells_no_brightness_of_data_around_their_mean(around):
  # Offsets from the mean add up to 0, so that no normal has 1 on each. What the bias adds to 30 directions is small:
  # .0007 of its length is outside of the kernel's row space, as was measured of 250 digits.
  rng = np.random.default_rng(0)
  x = rng.uniform(size=(30, 60))
  start = x.mean(axis=0) if around == "mean" else np.zeros(60)
  rank = 29 if around == "mean" else 30
  signals = rng.normal(size=(30, 100)) * 10 ** rng.uniform(-3, 0, size=(30, 1))
  _, _, rows = np.linalg.svd((x - start).T @ signals, full_matrices=False)
  bias = signals.sum(axis=0)
  outside = bias - bias @ rows[:rank].T @ rows[:rank]
  if around == "mean":
    signals -= (1 - 7e-4 * np.linalg.norm(bias) / np.linalg.norm(outside)) * outside / len(x)
  layer = FirstLayer((x - start).T @ signals, start, 0, False, 1.0, signals.sum(axis=0), rank, 1.0)
  if around == "mean":
    assert layer.normal is None
  else:
    np.testing.assert_allclose((x - start) @ layer.normal, 1.0, atol=1e-6)
