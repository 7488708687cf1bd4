"""Multipliers: not negative, alive at the start, and the classifier's own probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.kkt import Conditions, stationarity_sum
from kkt_jax.kkt.multipliers import (
  from_network,
  from_softmax,
  initial_log_scale,
  on_runner_up,
  shortfall,
  softmax_distance,
)


def linear(w, x):
  return x @ w


def test_relu_is_the_papers_form_and_softplus_the_default():
  raw = jnp.array([[-2.0, 0.0, 1.0]])
  np.testing.assert_array_equal(from_network(raw, positive=jax.nn.relu), [[0.0, 0.0, 1.0]])
  # log(1 + e^r), times 3.
  expected = [[3 * np.log(1 + np.exp(-2)), 3 * np.log(2), 3 * np.log(1 + np.e)]]
  np.testing.assert_allclose(from_network(raw, log_scale=jnp.log(3.0)), expected, rtol=1e-5)


def test_relu_dies_and_softplus_cannot():
  raw = jnp.array([[-5.0, -1.0]])
  slope = lambda positive: jax.grad(lambda r: jnp.sum(from_network(r, positive=positive)))(raw)
  np.testing.assert_array_equal(slope(jax.nn.relu), [[0.0, 0.0]])
  np.testing.assert_allclose(slope(jax.nn.softplus), jax.nn.sigmoid(raw), rtol=1e-5)


@pytest.mark.parametrize("positive", [jax.nn.softplus, jax.nn.relu])
@pytest.mark.parametrize("log_scale", [-20.0, 5.0])
def test_multipliers_are_never_negative_and_finite(positive, log_scale):
  mu = from_network(jnp.array([[-1e4, -1.0, 0.0, 1e4]]), positive=positive, log_scale=log_scale)
  assert bool(jnp.all(jnp.isfinite(mu))) and float(jnp.min(mu)) >= 0 and float(jnp.max(mu)) > 0


@pytest.mark.parametrize(("function", "name"), [(from_network, "raw"), (from_softmax, "logits")])
def test_shapes_that_would_broadcast_are_refused(function, name):
  for shape in [(3,), (), (1, 2, 3)]:
    with pytest.raises(ValueError, match=rf"^{name} must have shape \[M, C\]"):
      function(jnp.ones(shape))
  for shape in [(1,), (2,), (2, 1), (5, 2, 2)]:
    with pytest.raises(ValueError, match=r"^log_scale must have shape \(\)"):
      function(jnp.ones((2, 2)), log_scale=jnp.ones(shape))
  assert function(jnp.ones((0, 3))).shape == (0, 3)


def test_softmax_probabilities_by_hand():
  # e^0 : e^log 2 : e^log 5 = 1 : 2 : 5.
  mu = from_softmax(jnp.log(jnp.array([[1.0, 2.0, 5.0]])), log_scale=jnp.log(10.0))
  np.testing.assert_allclose(mu, [[10 / 8, 20 / 8, 50 / 8]], rtol=1e-5)
  np.testing.assert_allclose(from_softmax(jnp.array([[1e30, 0.0]])), [[1.0, 0.0]])  # no overflow


def test_a_large_scale_saves_tiny_probabilities_from_underflow():
  # p = e^-100 / (1 + e^-100), which float32 does not know; times e^90 it is e^-10.
  mu, slope = jax.value_and_grad(lambda v: from_softmax(v, log_scale=90.0)[0, 1])(jnp.array([[100.0, 0.0]]))
  assert float(mu) == pytest.approx(np.exp(-10), rel=1e-4)
  np.testing.assert_allclose(slope, [[-np.exp(-10), np.exp(-10)]], rtol=1e-4)


def test_initial_log_scale_is_the_logarithm_of_the_ratio_of_norms():
  target = {"a": jnp.array([3.0, 100.0]), "b": jnp.array([[0.0, 4.0]])}  # norm 5 without the 100
  sums = {"a": jnp.array([0.06, 7.0]), "b": jnp.array([[-0.08, 0.0]])}  # norm 0.1 without the 7
  conditions = Conditions(target, {"a": jnp.array([1.0, 0.0]), "b": jnp.ones((1, 2))})
  assert float(initial_log_scale(conditions, sums)) == pytest.approx(np.log(50), rel=1e-5)
  tiny = jax.tree.map(lambda leaf: 1e-30 * leaf, sums)  # its square is 0 in float32
  assert float(initial_log_scale(conditions, tiny)) == pytest.approx(np.log(50) + 30 * np.log(10), rel=1e-5)
  zeros = jax.tree.map(jnp.zeros_like, sums)
  for other in (conditions, Conditions(zeros, conditions.mask)):
    assert float(initial_log_scale(other, zeros)) == 0.0
  assert float(initial_log_scale(Conditions(zeros, conditions.mask), sums)) == 0.0


def test_the_scale_makes_the_first_sum_as_long_as_its_target():
  x, classes, w = jnp.array([[70.0, 0.0], [0.0, 60.0]]), jnp.array([0, 1]), jnp.eye(2)  # margins 70 and 60
  sums = lambda log_scale: stationarity_sum(linear, w, x, classes, from_softmax(x, log_scale=log_scale))
  start = initial_log_scale(Conditions(40 * jnp.ones((2, 2)), jnp.ones((2, 2))), sums(0.0))
  assert float(jnp.linalg.norm(sums(start))) == pytest.approx(80, rel=1e-4)  # 40 * 4^.5


def test_only_the_runners_up_have_a_multiplier_and_share_it():
  logits = jnp.array([[9.0, 1.0, 5.0], [0.0, 2.0, 7.0], [9.0, 4.0, 4.0]])
  # Runner-up of class 0 in the first row: class 2. Of class 1 in the second, which is misclassified: class 2 too.
  mu = on_runner_up(jnp.array([[0.5], [-2.0], [3.0]]), logits, jnp.array([0, 1, 0]))
  np.testing.assert_array_equal(mu, [[0.0, 0.0, 0.5], [0.0, 0.0, -2.0], [0.0, 1.5, 1.5]])


def test_the_sum_with_runner_up_multipliers_is_that_of_the_margins_gradient():
  rng = np.random.default_rng(0)
  w, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 3), (6, 4)))
  classes, raw = jnp.array([0, 1, 2, 0, 1, 2]), jnp.linspace(-1.0, 2.0, 6)

  def weighed_margin(w):
    logits = linear(w, x)
    others = jnp.where(jnp.arange(3)[None, :] == classes[:, None], -jnp.inf, logits)
    return jnp.mean(raw * (logits[jnp.arange(6), classes] - jnp.max(others, axis=1)))

  sums = stationarity_sum(linear, w, x, classes, on_runner_up(raw[:, None], linear(w, x), classes))
  np.testing.assert_allclose(sums, jax.jit(jax.grad(weighed_margin))(w), rtol=1e-5, atol=1e-6)


def test_shortfall_is_the_square_of_what_is_missing():
  mu = jnp.array([[0.0, 0.3, 0.0], [0.0, 0.0, -1.0], [0.0, 5.0, 0.0]])
  # 0.5 - 0.3 = 0.2, squared 0.04; 0.5 + 1 = 1.5, squared 2.25; nothing is missing.
  np.testing.assert_allclose(shortfall(mu, least=0.5), [0.04, 2.25, 0.0], rtol=1e-5)


def test_softmax_distance_by_hand():
  # Wrong classes only: log mu - log p is 0 and log 2 for the first sample, log 3 and log 3 for the second.
  logits, classes = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]])), jnp.array([2, 0])
  mu = jnp.array([[0.2, 0.6, 9.0], [9.0, 0.9, 0.3]])
  for factor in (1.0, 5.0):
    np.testing.assert_allclose(softmax_distance(factor * mu, logits, classes), np.var(np.log([1, 2, 3, 3])), rtol=1e-5)


def test_softmax_distance_of_a_sure_classifier_and_of_dead_multipliers():
  sure = jnp.array([[60.0, 0.0, 1.0], [0.0, 55.0, 1.0]])
  # The logits themselves are only known to 4e-6 at this size.
  assert float(softmax_distance(from_softmax(sure), sure, jnp.array([0, 1]))) == pytest.approx(0, abs=1e-8)
  value, slope = jax.value_and_grad(softmax_distance)(jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.array([0, 1]))
  assert float(value) == pytest.approx(0.0, abs=1e-6) and bool(jnp.isfinite(slope).all())


def test_arguments_that_do_not_fit_are_named():
  with pytest.raises(ValueError, match=r"^raw must have shape .*1"):
    on_runner_up(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.array([0, 1]))
  with pytest.raises(ValueError, match=r"^classes must lie in 0\.\.2; got 0\.\.3"):
    on_runner_up(jnp.ones((2, 1)), jnp.ones((2, 3)), jnp.array([0, 3]))
  with pytest.raises(ValueError, match="^least must be at least 0"):
    shortfall(jnp.ones((2, 3)), least=-1.0)
  with pytest.raises(ValueError, match="^mu must have the shapes of logits"):
    softmax_distance(jnp.ones((2, 2)), jnp.ones((2, 3)), jnp.array([0, 1]))


def test_double_precision_is_kept():
  @jax.jit
  def everything(raw):
    classes, ones = jnp.array([0, 1]), jnp.ones((2, 2))
    results = [from_network(raw), from_softmax(raw), on_runner_up(raw[:, :1], raw, classes), shortfall(raw, least=1.0)]
    return results + [softmax_distance(jnp.exp(raw), raw, classes), initial_log_scale(Conditions(raw, ones), ones)]

  with jax.enable_x64(True):
    raw = jnp.asarray([[0.5, -1.0], [2.0, 0.0]], jnp.float64)
    results = everything(raw)
    assert all(value.dtype == jnp.float64 for value in results)
    np.testing.assert_allclose(results[0], np.log1p(np.exp(raw)), rtol=1e-14)
