"""Precision, recall, density, coverage and kernel distance: points on a line, and kernel sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import metrics


def line(*points):
  return jnp.array(points)[:, None]


def normal(seed, count):
  return jax.random.normal(jax.random.key(seed), (count, 3))


def one_class(points):
  return jnp.zeros(len(points), int)


def precision_recall(real, generated, k):
  return metrics.precision_recall(real, one_class(real), generated, one_class(generated), k=k)


def test_points_on_a_line_with_the_nearest_neighbour():
  # Real balls: 0 +- 1, 1 +- 1, 3 +- 2, 7 +- 4. Generated balls: 2 +- 0.5, 2.5 +- 0.5, 9 +- 6.5.
  # Generated 2 lies in [0, 2] and [1, 5]; 2.5 in [1, 5]; 9 in [3, 11]: precision 1, density (2 + 1 + 1) / 3.
  # Real 0 and 1 lie in none of [1.5, 2.5], [2, 3], [2.5, 15.5], real 3 and 7 do: recall 1/2.
  # The ball [-1, 1] holds no generated point, the other three do: coverage 3/4.
  scores = precision_recall(line(0.0, 1.0, 3.0, 7.0), line(2.0, 2.5, 9.0), k=1)
  assert scores == pytest.approx({"precision": 1.0, "recall": 0.5, "density": 4 / 3, "coverage": 0.75})
  assert all(type(value) is float for value in scores.values())


def test_points_on_a_line_with_the_second_neighbour():
  # Real balls: 0 +- 3, 1 +- 2, 3 +- 3, so [-3, 3], [-1, 3], [0, 6]. Generated balls: 5 +- 4, 8 +- 3, 9 +- 4, so [1, 9],
  # [5, 11], [5, 13]. Only 5 is in a real ball, one of them: precision 1/3, density 1 / (3 * 2), coverage 1/3.
  # Real 1 (surface) and 3 are in [1, 9]: recall 2/3.
  scores = precision_recall(line(0.0, 1.0, 3.0), line(5.0, 8.0, 9.0), k=2)
  assert scores == pytest.approx({"precision": 1 / 3, "recall": 2 / 3, "density": 1 / 6, "coverage": 1 / 3})


def test_classes_are_kept_apart_and_weigh_equally():
  # Class 0: equal sets. Class 1: far from its own data, though on top of class 0's.
  real = line(0.0, 1.0, 2.0, 50.0, 51.0)
  generated = line(0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 1.5)
  scores = metrics.precision_recall(real, jnp.array([0, 0, 0, 1, 1]), generated, jnp.array([0, 0, 0, 1, 1, 1, 1]), k=1)
  # Class 0: every ball has radius 1; the ends are in 2 balls and the middle in 3: density 7/3.
  assert scores == pytest.approx({"precision": 0.5, "recall": 0.5, "density": 7 / 6, "coverage": 0.5})


def test_a_collapsed_generator_is_precise_without_recall():
  scores = precision_recall(line(0.0, 1.0, 2.0, 3.0), line(1.1, 1.1, 1.1), k=2)
  # Real balls: 0 +- 2, 1 +- 1, 2 +- 1, 3 +- 2, all of which hold 1.1; the generated ones have radius 0.
  assert scores == pytest.approx({"precision": 1.0, "recall": 0.0, "density": 4 / 2, "coverage": 1.0})


def test_duplicates_are_neighbours_of_one_another():
  # All balls are points. They hold their copies and nothing else.
  scores = precision_recall(line(1.0, 1.0, 5.0, 5.0), line(1.0, 1.0, 3.0, 3.0), k=1)
  # Each generated 1 is in two balls: density (2 + 2) / 4.
  assert scores == pytest.approx({"precision": 0.5, "recall": 0.5, "density": 1.0, "coverage": 0.5})


def test_precision_and_recall_change_places_with_the_sets_and_order_does_not_matter():
  real, generated = normal(0, 20), normal(1, 15) + 1
  there, back = precision_recall(real, generated, k=3), precision_recall(generated[::-1], real[::-1], k=3)
  assert (there["precision"], there["recall"]) == (back["recall"], back["precision"])
  assert 0 < there["precision"] < 1


def test_classes_without_enough_neighbours_are_named():
  four, two = line(0.0, 1.0, 2.0, 3.0), line(0.0, 1.0)
  with pytest.raises(ValueError, match=r"^real must hold more than k = 2 samples of every class; got 2 of class 0"):
    precision_recall(two, four, k=2)
  with pytest.raises(
    ValueError, match=r"^generated must hold more than k = 2 samples of every class; got 2 of class 0"
  ):
    precision_recall(four, two, k=2)
  with pytest.raises(ValueError, match=r"^real must hold more .* got 0 of class 1"):
    metrics.precision_recall(two, jnp.array([0, 0]), four, jnp.array([0, 0, 1, 1]), k=1)
  with pytest.raises(ValueError, match="^k must be at least 1; got 0"):
    precision_recall(two, two, k=0)


def test_features_that_are_not_finite_are_named():
  with pytest.raises(ValueError, match="^generated must be finite"):
    precision_recall(line(0.0, 1.0), line(0.0, jnp.nan), k=1)


def test_kernel_distance_of_two_tiny_sets_pair_by_pair():
  a, b = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]), np.array([[2.0, 2.0], [-1.0, 1.0]])
  # Products within a: 0, 1, 2; kernels 1, 1.5^3 = 3.375, 2^3 = 8; mean 12.375 / 3 = 4.125.
  # Within b: -2 + 2 = 0, kernel 1. Between: 2, 4, 4 and -1, 2, 0; kernels 8, 27, 27, 0.125, 8, 1; mean 71.125 / 6.
  assert metrics.kernel_distance(a, b) == pytest.approx(4.125 + 1 - 2 * 71.125 / 6, rel=1e-12)

  def kernel(x, y):
    return (sum(p * q for p, q in zip(x, y, strict=True)) / 2 + 1) ** 3

  within = [
    sum(kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j) / (len(s) * (len(s) - 1))
    for s in (a, b)
  ]
  between = sum(kernel(x, y) for x in a for y in b) / 6
  assert metrics.kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-12)


def test_kernel_distance_is_symmetric_and_does_not_depend_on_order():
  a, b = normal(0, 20), normal(1, 15) + 0.5
  assert metrics.kernel_distance(a, b) == pytest.approx(metrics.kernel_distance(b, a), rel=1e-12)
  assert metrics.kernel_distance(a, b) == pytest.approx(metrics.kernel_distance(a[::-1], b[::-1]), rel=1e-12)


def test_kernel_distance_has_mean_zero_for_one_distribution():
  values = [metrics.kernel_distance(normal(seed, 8), normal(1000 + seed, 8)) for seed in range(60)]
  assert min(values) < 0 < max(values)
  assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5
  assert metrics.kernel_distance(normal(0, 8), normal(1, 8) + 3) > max(values)


def test_kernel_distance_of_a_set_to_itself_is_negative():
  # Points 0 and 1: within 1 and 1, between (1 + 1 + 1 + 8) / 4: 2 - 5.5.
  assert metrics.kernel_distance(line(0.0, 1.0), line(0.0, 1.0)) == -3.5


def test_kernel_distance_names_what_is_missing():
  with pytest.raises(ValueError, match="^a must hold at least two samples"):
    metrics.kernel_distance(normal(0, 1), normal(0, 2))
  with pytest.raises(ValueError, match="^b must hold at least two samples"):
    metrics.kernel_distance(normal(0, 2), normal(0, 1))
  with pytest.raises(ValueError, match="^b must hold samples like a"):
    metrics.kernel_distance(normal(0, 2), normal(0, 2)[:, :2])
  with pytest.raises(ValueError, match=r"^a must have shape \[A, F\]"):
    metrics.kernel_distance(jnp.zeros((2, 2, 2)), jnp.zeros((2, 2, 2)))
