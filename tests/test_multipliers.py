"""Multipliers: not negative, alive at the start, and the classifier's own probabilities."""

import chex
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from kkt_jax.conditions import Conditions
from kkt_jax.losses import stationarity_sum
from kkt_jax.multipliers import (
  from_network,
  from_softmax,
  initial_log_scale,
  on_runner_up,
  shortfall,
  softmax_distance,
)


class FromNetworkTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_relu_is_the_papers_form(self):
    mu = self.variant(from_network, static_argnames="form")(jnp.array([[-2.0, 0.0, 1.5]]), form="relu")
    np.testing.assert_array_equal(mu, [[0.0, 0.0, 1.5]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_softplus_by_hand(self):
    raw = jnp.array([[0.0, 1.0, -1.0]])
    # log(1 + e^r): log 2, log(1 + e), log(1 + 1/e).
    expected = [[np.log(2), np.log(1 + np.e), np.log(1 + 1 / np.e)]]
    np.testing.assert_allclose(self.variant(from_network)(raw), expected, rtol=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_log_scale_is_the_logarithm_of_a_factor(self):
    raw = jnp.array([[0.3, 2.0]])
    function = self.variant(from_network)
    np.testing.assert_allclose(function(raw, log_scale=jnp.log(3.0)), 3 * function(raw), rtol=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_relu_dies_where_softplus_cannot(self):
    raw = jnp.array([[-5.0, -1.0]])
    function = self.variant(from_network, static_argnames="form")
    slope = lambda form: jax.grad(lambda r: jnp.sum(function(r, form=form)))(raw)
    np.testing.assert_array_equal(slope("relu"), [[0.0, 0.0]])
    np.testing.assert_allclose(slope("softplus"), jax.nn.sigmoid(raw), rtol=1e-5)
    assert float(jnp.min(slope("softplus"))) > 0


@pytest.mark.parametrize("form", ["softplus", "relu"])
@pytest.mark.parametrize("log_scale", [-20.0, 0.0, 5.0])
def test_multipliers_are_never_negative_and_finite(form, log_scale):
  raw = jnp.array([[-1e4, -1.0, 0.0, 1e4]])
  mu = from_network(raw, form=form, log_scale=log_scale)
  assert mu.shape == (1, 4)
  assert bool(jnp.all(jnp.isfinite(mu))) and float(jnp.min(mu)) >= 0
  assert float(jnp.max(mu)) > 0


def test_check_grads_of_softplus_and_scale():
  with jax.enable_x64(True):
    raw = jnp.array([[0.3, -2.0], [1.0, 4.0]])
    check_grads(lambda r, s: from_network(r, log_scale=s), (raw, jnp.array(0.4)), order=1)


@pytest.mark.parametrize("form", ["softmax", "exp", "ReLU"])
def test_unknown_form_is_refused(form):
  with pytest.raises(ValueError, match=rf"^form must be one of 'softplus', 'relu'; got '{form}'"):
    from_network(jnp.ones((1, 2)), form=form)


@pytest.mark.parametrize("shape", [(3,), (), (1, 2, 3)])
def test_ranks_other_than_two_are_refused(shape):
  with pytest.raises(ValueError, match=r"^raw must have shape \[M, C\]"):
    from_network(jnp.ones(shape))
  with pytest.raises(ValueError, match=r"^logits must have shape \[M, C\]"):
    from_softmax(jnp.ones(shape))


def test_empty_batch_has_no_multipliers():
  assert from_network(jnp.ones((0, 3))).shape == (0, 3)
  assert from_softmax(jnp.ones((0, 3))).shape == (0, 3)


class FromSoftmaxTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_probabilities_by_hand(self):
    # e^0 : e^log 2 : e^log 5 = 1 : 2 : 5.
    mu = self.variant(from_softmax)(jnp.log(jnp.array([[1.0, 2.0, 5.0]])))
    np.testing.assert_allclose(mu, [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_log_scale_multiplies(self):
    mu = self.variant(from_softmax)(jnp.zeros((2, 2)), log_scale=jnp.log(10.0))
    np.testing.assert_allclose(mu, [[5.0, 5.0], [5.0, 5.0]], rtol=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_huge_logits_do_not_overflow(self):
    np.testing.assert_allclose(self.variant(from_softmax)(jnp.array([[1e30, 0.0]])), [[1.0, 0.0]])


class InitialLogScaleTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_is_the_logarithm_of_the_ratio_of_norms(self):
    target = {"a": jnp.array([3.0]), "b": jnp.array([[0.0, 4.0]])}  # norm 5
    sums = {"a": jnp.array([0.06]), "b": jnp.array([[-0.08, 0.0]])}  # norm 0.1
    conditions = Conditions(target, jax.tree.map(jnp.ones_like, target))
    assert float(self.variant(initial_log_scale)(conditions, sums)) == pytest.approx(np.log(50), rel=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_zero_target_or_zero_sum_gives_zero(self):
    one, zero = {"a": jnp.array([2.0])}, {"a": jnp.array([0.0])}
    function = self.variant(lambda target, sums: initial_log_scale(Conditions(target, {"a": jnp.ones(1)}), sums))
    assert [float(function(*pair)) for pair in ((one, zero), (zero, one), (zero, zero))] == [0.0, 0.0, 0.0]

  def test_parameters_that_are_left_out_do_not_count(self):
    target, sums = {"a": jnp.array([3.0, 100.0])}, {"a": jnp.array([1.0, 5.0])}
    conditions = Conditions(target, {"a": jnp.array([1.0, 0.0])})
    assert float(initial_log_scale(conditions, sums)) == pytest.approx(np.log(3), rel=1e-5)


def test_the_scale_makes_the_first_sum_as_long_as_its_target():
  linear = lambda w, x: x @ w
  x, y, raw = jnp.array([[1.0, 2.0], [0.5, -1.0]]), jnp.array([0, 2]), jnp.array([[0.1, -3.0, 0.4], [2.0, 1.0, 0.0]])
  target, w = jnp.full((2, 3), 40.0), jnp.ones((2, 3))
  sums = lambda log_scale: stationarity_sum(linear, w, x, y, from_network(raw, log_scale=log_scale))
  start = initial_log_scale(Conditions(target, jnp.ones((2, 3))), sums(0.0))
  assert float(jnp.linalg.norm(sums(start))) == pytest.approx(40 * 6**0.5, rel=1e-5)
  assert float(jnp.linalg.norm(sums(0.0))) < 10


class OnRunnerUpTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_only_the_strongest_wrong_class_has_a_multiplier(self):
    logits = jnp.array([[9.0, 1.0, 5.0], [0.0, 2.0, 7.0]])
    # Runner-up of class 0 in the first row: class 2. Of class 1 in the second, which is misclassified: class 2 too.
    mu = self.variant(on_runner_up)(jnp.array([[0.5], [-2.0]]), logits, jnp.array([0, 1]))
    np.testing.assert_array_equal(mu, [[0.0, 0.0, 0.5], [0.0, 0.0, -2.0]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_tied_runners_up_share(self):
    mu = self.variant(on_runner_up)(jnp.array([[3.0]]), jnp.array([[9.0, 4.0, 4.0, 1.0]]), jnp.array([0]))
    np.testing.assert_allclose(mu, [[0.0, 1.5, 1.5, 0.0]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_shortfall_is_the_square_of_what_is_missing(self):
    mu = jnp.array([[0.0, 0.3, 0.0], [0.0, 0.0, -1.0], [0.0, 5.0, 0.0]])
    # 0.5 - 0.3 = 0.2, squared 0.04; 0.5 + 1 = 1.5, squared 2.25; nothing is missing.
    np.testing.assert_allclose(self.variant(shortfall, static_argnums=1)(mu, 0.5), [0.04, 2.25, 0.0], rtol=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_softmax_distance_by_hand(self):
    # Wrong classes only: log mu - log p is 0 and log 2 for the first sample, log 3 and log 3 for the second.
    logits = jnp.log(jnp.array([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]))
    mu = jnp.array([[0.2, 0.6, 9.0], [9.0, 0.9, 0.3]])
    gaps = np.log([1.0, 2.0, 3.0, 3.0])
    distance = self.variant(softmax_distance)
    np.testing.assert_allclose(distance(mu, logits, jnp.array([2, 0])), np.var(gaps), rtol=1e-5)
    np.testing.assert_allclose(distance(5 * mu, logits, jnp.array([2, 0])), np.var(gaps), rtol=1e-5)

  def test_softmax_distance_is_finite_where_a_multiplier_is_0(self):
    value, slope = jax.value_and_grad(softmax_distance)(jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.array([0, 1]))
    assert float(value) == pytest.approx(0.0, abs=1e-6)
    assert bool(jnp.isfinite(slope).all())


def test_the_sum_with_runner_up_multipliers_is_that_of_the_margins_gradient():
  w = jax.random.normal(jax.random.key(0), (4, 3))
  linear = lambda w, x: x @ w
  x, y = jax.random.normal(jax.random.key(1), (6, 4)), jnp.array([0, 1, 2, 0, 1, 2])
  raw = jnp.linspace(-1.0, 2.0, 6)

  def weighed_margin(w):
    logits = linear(w, x)
    others = jnp.where(jnp.arange(3)[None, :] == y[:, None], -jnp.inf, logits)
    return jnp.mean(raw * (logits[jnp.arange(6), y] - jnp.max(others, axis=1)))

  sums = stationarity_sum(linear, w, x, y, on_runner_up(raw[:, None], linear(w, x), y))
  np.testing.assert_allclose(sums, jax.grad(weighed_margin)(w), rtol=1e-5, atol=1e-6)


def test_one_multiplier_a_sample_is_wanted():
  with pytest.raises(ValueError, match=r"raw must have shape .*1"):
    on_runner_up(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.array([0, 1]))
  with pytest.raises(ValueError, match="least must be at least 0"):
    shortfall(jnp.ones((2, 3)), -1.0)
  with pytest.raises(ValueError, match="mu must have the shapes of logits"):
    softmax_distance(jnp.ones((2, 2)), jnp.ones((2, 3)), jnp.array([0, 1]))
