"""The targets of the stationarity condition, on problems whose KKT point is known in closed form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from kkt_jax.kkt.conditions import Conditions, max_margin_conditions, weigh_tensors, weight_decay_conditions
from kkt_jax.kkt.homogeneity import derivative_equations
from kkt_jax.kkt.losses import duality_loss, runner_up_margin, stationarity_residual, stationarity_sum
from kkt_jax.kkt.multipliers import from_softmax
from kkt_jax.kkt.rates import balanced, given_rates


def linear(w, x):
  return x @ w


# Hard-margin SVM: x_0 = (3, 4) of class 0 and x_1 = -x_0 of class 1, logits x W without bias, W = [w_0 w_1].
# Both constraints read (w_0 - w_1) . (3, 4) >= 1. The least |W|^2 has w_0 = -w_1 = (3, 4) / (2 * 25) = (0.06, 0.08).
# Stationarity of the column w_0: w_0 = mu_0 (3, 4) - mu_1 (-3, -4) = (mu_0 + mu_1) (3, 4), so mu_0 + mu_1 = 0.02;
# the column w_1 is the same with the opposite sign. Split evenly: mu = 0.01 each.
SVM_X = jnp.array([[3.0, 4.0], [-3.0, -4.0]])
SVM_Y = jnp.array([0, 1])
SVM_W = jnp.array([[0.06, -0.06], [0.08, -0.08]])
SVM_MU = jnp.array([[0.0, 0.01], [0.01, 0.0]])


def test_groups_by_hand():
  params = {"slow": jnp.array([2.0]), "target": jnp.array([3.0, -5.0]), "fast": jnp.array([7.0])}
  solution = given_rates({"slow": 0.0, "target": 0.5, "fast": 1.0}, params, target_rate=0.5)
  for function in (max_margin_conditions, jax.jit(max_margin_conditions)):
    conditions = function(params, solution)
    np.testing.assert_allclose(conditions.target["target"], [1.5, -2.5])  # 0.5 zeta
    np.testing.assert_array_equal(conditions.target["slow"], [0.0])
    np.testing.assert_array_equal(conditions.target["fast"], [0.0])
    assert [float(conditions.mask[name][0]) for name in ("slow", "target", "fast")] == [1.0, 1.0, 0.0]


def test_alpha_and_number_of_samples_by_hand():
  # Lambda-bar / N = lambda e^(alpha (2 lambda - 1)) / N = 2 e^(3 alpha) / 4; alpha = log 2 gives 2 * 8 / 4 = 4.
  params = {"w": jnp.array([1.0, 5.0])}
  conditions = max_margin_conditions(params, given_rates({"w": 2.0}, params), alpha=jnp.log(2.0), num_samples=4)
  np.testing.assert_allclose(conditions.target["w"], [4.0, 20.0], rtol=1e-5)
  half = max_margin_conditions(params, given_rates({"w": 0.5}, params), alpha=3.0)  # alpha does not matter at 1/2
  np.testing.assert_allclose(half.target["w"], [0.5, 2.5])


def test_no_gradient_flows_into_the_target():
  def total(params, alpha):
    made = max_margin_conditions(params, given_rates({"w": 1.0}, params), alpha=alpha)
    return jnp.sum(made.target["w"]) + jnp.sum(weight_decay_conditions(params).target["w"])

  by_params, by_alpha = jax.grad(total, argnums=(0, 1))({"w": jnp.array([1.0, 2.0])}, 0.3)
  np.testing.assert_array_equal(by_params["w"], [0.0, 0.0])
  assert float(by_alpha) == 0.0


def test_given_groups_are_used():
  params = {"a": jnp.array([2.0]), "b": jnp.array([3.0]), "c": jnp.array([5.0])}
  groups = {"a": jnp.array([0]), "b": jnp.array([1]), "c": jnp.array([-1])}
  conditions = max_margin_conditions(params, given_rates(dict.fromkeys("abc", 1.0), params), groups=groups)
  assert [float(conditions.target[name][0]) for name in "abc"] == [2.0, 0.0, 0.0]
  assert [float(conditions.mask[name][0]) for name in "abc"] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(("rate", "value"), [(1.0, 0.0), (0.0, 1.0)])
def test_an_empty_target_is_refused(rate, value):
  params = {"w": jnp.full(2, value), "b": jnp.ones(1)}
  with pytest.raises(ValueError, match=r"^solution must have a target group with parameters other than 0.*got target"):
    max_margin_conditions(params, given_rates({"w": rate, "b": -1.0}, params))
  jax.jit(max_margin_conditions)(params, given_rates({"w": rate, "b": -1.0}, params))  # values are unknown there


@pytest.mark.parametrize(
  ("params", "needs"),
  [
    ({}, "must hold at least one tensor"),
    ({"w": jnp.array([jnp.nan])}, "must be finite; w holds"),
    ({"w": jnp.array([2])}, "at w, must be floating point; got dtype int"),
    ({"w": jnp.ones((0, 2))}, "must hold no tensor without entries"),
  ],
  ids=["empty", "nan", "integers", "zero size"],
)
def test_parameters_without_conditions_are_refused(params, needs):
  solution = given_rates({"w": 1.0}, {"w": jnp.ones(1)})
  for function in (lambda params: max_margin_conditions(params, solution), weight_decay_conditions):
    with pytest.raises(ValueError, match=f"^params,? {needs}"):
      function(params)


def test_linear_svm_in_closed_form():
  conditions = max_margin_conditions(SVM_W, given_rates(jnp.array(1.0), SVM_W), num_samples=2)
  residual = lambda mu: stationarity_residual(conditions, stationarity_sum(linear, SVM_W, SVM_X, SVM_Y, mu))
  assert float(residual(SVM_MU).absolute) < 1e-7
  # Another split of the multipliers between the two supports is a KKT point as well: only their sum counts.
  assert float(residual(jnp.array([[0.0, 0.015], [0.005, 0.0]])).absolute) < 1e-7
  # The opposite sign (the bracket of Eqs. 2a, 3a and 4): |t - (-t)|^2 / |t|^2 = 4.
  assert float(residual(-SVM_MU).relative) == pytest.approx(4.0, rel=1e-5)
  assert float(residual(2 * SVM_MU).relative) == pytest.approx(1.0, rel=1e-5)
  assert float(residual(0 * SVM_MU).relative) == pytest.approx(1.0, rel=1e-5)


def test_linear_svm_is_feasible_and_tight():
  np.testing.assert_allclose(runner_up_margin(linear(SVM_W, SVM_X), SVM_Y), [1.0, 1.0], rtol=1e-6)
  assert float(jnp.max(duality_loss(linear(SVM_W, SVM_X), SVM_Y, 0.0, delta=1e-6))) < 1e-6


def test_linear_svm_holds_for_a_scaled_network_with_its_alpha():
  # zeta = e^-alpha zeta-tilde has margin e^-alpha and Lambda-bar = e^alpha, with the same multipliers.
  alpha = 0.7
  scaled = jnp.exp(-alpha) * SVM_W
  conditions = max_margin_conditions(scaled, given_rates(jnp.array(1.0), scaled), alpha=alpha, num_samples=2)
  sums = stationarity_sum(linear, scaled, SVM_X, SVM_Y, SVM_MU)
  assert float(stationarity_residual(conditions, sums).absolute) < 1e-7
  without = max_margin_conditions(scaled, given_rates(jnp.array(1.0), scaled), num_samples=2)
  assert float(stationarity_residual(without, sums).relative) > 0.5  # (1 - e^0.7)^2 = 1.03


def test_solved_rate_of_the_svm_is_one():
  network = lambda p, x: linear(p["kernel"], x)
  solution = balanced(derivative_equations(network, {"kernel": SVM_W}, SVM_X), {"kernel": SVM_W})
  conditions = max_margin_conditions({"kernel": SVM_W}, solution, num_samples=2)
  sums = stationarity_sum(network, {"kernel": SVM_W}, SVM_X, SVM_Y, SVM_MU)
  assert float(stationarity_residual(conditions, sums).relative) < 1e-6


def test_svm_with_a_loose_sample_against_scipy():
  """The primal is solved by scipy; the multipliers then come from non-negative least squares on the supports."""
  x = np.array([[1.0, 0.2], [0.5, 1.5], [-1.0, 0.3], [-4.0, -3.0]])
  y = np.array([0, 0, 1, 1])
  margin = lambda w: np.array([row @ (w.reshape(2, 2)[:, k] - w.reshape(2, 2)[:, 1 - k]) for row, k in zip(x, y)])
  found = scipy.optimize.minimize(
    lambda w: 0.5 * w @ w,
    np.array([1.0, -1.0, 0.0, 0.0]),
    jac=lambda w: w,
    constraints={"type": "ineq", "fun": lambda w: margin(w) - 1},
    method="SLSQP",
    options={"ftol": 1e-15, "maxiter": 200},
  )
  assert found.success
  assert margin(found.x)[3] > 1.5  # the last sample is no support
  with jax.enable_x64(True):
    w = jnp.asarray(found.x.reshape(2, 2))
    one_hot = [jnp.zeros((4, 2)).at[i, 1 - y[i]].set(1.0) for i in range(4)]
    sums = jax.jit(lambda mu: stationarity_sum(linear, w, jnp.asarray(x), jnp.asarray(y), mu))
    columns = [np.ravel(sums(mu)) for mu in one_hot]
    conditions = max_margin_conditions(w, given_rates(jnp.array(1.0), w), num_samples=4)
    supports = np.flatnonzero(margin(found.x) < 1 + 1e-6)  # complementary slackness: the others have mu = 0
    assert 0 < len(supports) < 4
    matrix = np.stack([columns[i] for i in supports], axis=1)
    weights, norm = scipy.optimize.nnls(matrix, np.ravel(conditions.target))
    assert norm < 1e-6 and weights.max() > 1e-3
    mu = sum(weight * one_hot[i] for weight, i in zip(weights, supports, strict=True))
    residual = stationarity_residual(conditions, sums(mu))
    assert float(residual.absolute) < 1e-6


def test_two_layer_linear_network_in_closed_form():
  # Logits (u v x, -u v x), x = 1 of class 0: margin 2 u v >= 1, rates 1/2. The least u^2 + v^2 has u = v = 1 / sqrt 2.
  # Stationarity: u / 2 = mu d(2 u v)/du = 2 mu v, so mu = 1/4.
  params = {"u": jnp.array([[0.5**0.5]]), "v": jnp.array([[0.5**0.5]])}
  network = lambda p, x: (x @ p["u"] @ p["v"]) * jnp.array([[1.0, -1.0]])
  x, y = jnp.array([[1.0]]), jnp.array([0])
  solution = balanced(derivative_equations(network, params, jnp.array([[1.0], [-2.0]])), params)
  assert float(solution.target_rate) == pytest.approx(0.5, abs=1e-5)
  conditions = max_margin_conditions(params, solution)
  residual = lambda mu: stationarity_residual(conditions, stationarity_sum(network, params, x, y, mu))
  assert float(residual(jnp.array([[0.0, 0.25]])).absolute) < 1e-6
  assert float(residual(jnp.array([[0.0, -0.25]])).relative) == pytest.approx(4.0, rel=1e-4)


@pytest.mark.parametrize("num_samples", [0, -3])
def test_number_of_samples_below_one_is_refused(num_samples):
  with pytest.raises(ValueError, match=r"^num_samples must be at least 1"):
    max_margin_conditions(SVM_W, given_rates(jnp.array(1.0), SVM_W), num_samples=num_samples)


def test_target_of_weight_decay_is_the_decay_times_every_parameter():
  params = {"a": jnp.array([2.0, -4.0]), "b": jnp.array([[3.0]])}
  made = weight_decay_conditions(params, weight_decay=0.25)
  np.testing.assert_allclose(made.target["a"], [0.5, -1.0])
  np.testing.assert_allclose(made.target["b"], [[0.75]])
  chex.assert_trees_all_equal(made.mask, jax.tree.map(jnp.ones_like, params))
  traced = jax.jit(lambda p, w: weight_decay_conditions(p, weight_decay=w))(params, 0.25)
  chex.assert_trees_all_close(traced, made)


def cross_entropy(apply_fn, x, y):
  """Mean cross-entropy, written out."""
  return lambda p: -jnp.mean(jnp.log(jax.nn.softmax(apply_fn(p, x)))[jnp.arange(len(y)), y])


def test_softmax_classifier_trained_with_weight_decay_satisfies_its_condition():
  weight_decay = 0.1
  with jax.enable_x64(True):
    x = jnp.array([[1.0, 0.5], [0.8, 1.0], [-1.0, 0.7], [-0.6, 1.2], [0.1, -1.0], [0.4, -0.7], [0.2, 0.1]])
    y = jnp.array([0, 0, 1, 1, 2, 2, 1])
    loss = lambda w: cross_entropy(linear, x, y)(w) + 0.5 * weight_decay * jnp.sum(w**2)
    step = lambda _, w: w - 0.5 * jax.grad(loss)(w)
    # Convex with curvature at least 0.1: each step of 0.5 shrinks the gradient by 0.95 or more; 0.95^1000 = 5e-23.
    w = jax.lax.fori_loop(0, 1000, step, jnp.zeros((2, 3)))
    conditions = weight_decay_conditions(w, weight_decay=weight_decay)

    def residual(w, mu):
      return stationarity_residual(conditions, stationarity_sum(linear, w, x, y, mu))

    exact = residual(w, from_softmax(linear(w, x)))
    assert float(exact.absolute) < 1e-6
    assert float(exact.relative) < 1e-9
    # mu = p / w belongs to the target zeta.
    free = stationarity_sum(linear, w, x, y, from_softmax(linear(w, x), log_scale=-np.log(weight_decay)))
    assert float(stationarity_residual(weight_decay_conditions(w), free).absolute) < 1e-6
    # Not a property of any weights or multipliers:
    assert float(residual(w, jnp.full((7, 3), 1 / 3)).relative) > 0.1
    halfway = 0.5 * w
    sums = stationarity_sum(linear, halfway, x, y, from_softmax(linear(halfway, x)))
    made = weight_decay_conditions(halfway, weight_decay=weight_decay)
    assert float(stationarity_residual(made, sums).relative) > 0.1


@pytest.mark.parametrize("batch_norm", [False, True])
def test_sum_with_softmax_multipliers_is_minus_the_gradient_of_cross_entropy(batch_norm):
  random = np.random.default_rng(1)
  params = {name: jnp.asarray(random.normal(size=shape)) for name, shape in (("u", (2, 4)), ("v", (4, 3)))}
  x, y = jnp.asarray(random.normal(size=(6, 2))), jnp.arange(6) % 3

  def network(p, x):
    h = x @ p["u"]
    h = (h - h.mean(0, keepdims=True)) / h.std(0, keepdims=True) if batch_norm else h
    return jax.nn.relu(h) @ p["v"]

  sums = stationarity_sum(network, params, x, y, from_softmax(network(params, x)))
  gradient = jax.grad(cross_entropy(network, x, y))(params)
  chex.assert_trees_all_close(sums, jax.tree.map(jnp.negative, gradient), rtol=1e-3, atol=1e-5)
  assert float(jnp.max(jnp.abs(gradient["u"]))) > 1e-2


@pytest.mark.parametrize("weight_decay", [0.0, -0.1, float("nan"), float("inf")])
def test_weight_decay_must_be_positive_and_finite(weight_decay):
  with pytest.raises(ValueError, match=r"^weight_decay must be positive and finite; got"):
    weight_decay_conditions(SVM_W, weight_decay=weight_decay)


def test_conditions_are_an_argument_and_a_result_of_a_jitted_function():
  made = weight_decay_conditions({"w": jnp.array([2.0])})
  doubled = jax.jit(lambda c: jax.tree.map(lambda leaf: 2 * leaf, c))(made)
  assert isinstance(doubled, Conditions)
  np.testing.assert_array_equal(doubled.target["w"], [4.0])
  np.testing.assert_array_equal(doubled.mask["w"], [2.0])


def test_weighed_tensors_count_their_squared_errors_so_often():
  conditions = Conditions({"a": jnp.array([3.0]), "b": jnp.array([1.0])}, {"a": jnp.ones(1), "b": jnp.ones(1)})
  sums = {"a": jnp.array([1.0]), "b": jnp.array([0.0])}
  squared = stationarity_residual(weigh_tensors(conditions, {"a": 5.0}), sums).squared
  np.testing.assert_allclose([squared["a"], squared["b"]], [5 * 2.0**2, 1.0], rtol=1e-6)
  chex.assert_trees_all_equal(weigh_tensors(conditions, {}), conditions)
  chex.assert_trees_all_equal(weigh_tensors(conditions, {"a": 5.0, "b": 2.0}).mask["b"], jnp.sqrt(jnp.array([2.0])))


def test_weights_may_be_a_tree_or_named():
  ones = [(jnp.ones(1), jnp.ones(2))]
  conditions = Conditions(ones, ones)
  tree = weigh_tensors(conditions, [(4.0, 9.0)])
  chex.assert_trees_all_equal(tree.mask, [(jnp.array([2.0]), jnp.array([3.0, 3.0]))])
  chex.assert_trees_all_equal(weigh_tensors(conditions, {"0/0": 4.0, "0/1": 9.0}), tree)


@pytest.mark.parametrize(
  ("weights", "needs"),
  [
    ({"c": 1.0}, r"^weights must name tensors of the conditions, \['a', 'b'\], or be a tree like them; got \['c'\]"),
    ([1.0], r"^weights must name tensors of the conditions, \['a', 'b'\], or be a tree like them; got \[1.0\]"),
    ({"a": -2.0}, r"^weights\['a'\] must be at least 0; got -2.0"),
    ({"a": float("nan")}, r"^weights\['a'\] must be at least 0; got nan"),
    ({"a": float("inf")}, r"^weights\['a'\] must be finite"),
    ({"a": jnp.ones(2)}, r"^weights\['a'\] must have shape \(\)"),
  ],
  ids=["unknown", "other tree", "negative", "nan", "infinite", "no scalar"],
)
def test_weights_that_weigh_nothing_are_refused(weights, needs):
  with pytest.raises(ValueError, match=needs):
    weigh_tensors(weight_decay_conditions({"a": jnp.ones(2), "b": jnp.ones(1)}), weights)
