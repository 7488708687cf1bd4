"""Lambda: rows of the equations by hand and by Hessians, every selection rule, groups, and the scaling check."""

import functools

from absl.testing import parameterized
import chex
from example_networks import inputs, random_conv, random_like, random_mlp, random_residual, to_float64
from flax import linen as nn
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from kkt_jax.homogeneity import (
  derivative_equations,
  DerivativeEquations,
  given_rates,
  groups_table,
  parameter_groups,
  RULES,
  scale_params,
  scaling_error,
  solve_rates,
  tensor_names,
)

ALPHAS = jnp.linspace(-1.0, 1.0, 9)


@jax.jit
def two_layer(p, x):
  """Linear(2, 3)-ReLU-Linear(3, 1) with biases, or without where the tree has none."""
  h = jax.nn.relu(x @ p["first"]["kernel"] + (p["first"]["bias"][None] if "bias" in p["first"] else 0.0))
  return h @ p["last"]["kernel"] + (p["last"]["bias"][None] if "bias" in p["last"] else 0.0)


def two_layer_params():
  return {
    "first": {"bias": jnp.array([0.3, 0.5, -0.2]), "kernel": jnp.array([[1.0, -0.5, 0.7], [0.4, 0.9, -1.1]])},
    "last": {"bias": jnp.array([0.6]), "kernel": jnp.array([[0.8], [-1.2], [0.5]])},
  }


_EQUATIONS = {}


def solve(apply_fn, params, x, rule="balanced", **settings):
  """First-order equations and their solution; equations are kept, since each makes a new compilation."""
  key = (id(apply_fn), x.shape, x.dtype, float(x.sum()), id(jax.tree.leaves(params)[0]))
  if key not in _EQUATIONS:
    _EQUATIONS[key] = (derivative_equations(apply_fn, params, x), apply_fn, params)  # kept alive, so ids stay unique
  return solve_rates(_EQUATIONS[key][0], params, rule=rule, **settings)


def rate_of_each_tensor(solution):
  """{path: rate}; every tensor has one rate."""
  rates = dict(zip(tensor_names(solution.rates), jax.tree.leaves(solution.rates), strict=True))
  for rate in rates.values():
    assert np.ptp(rate) == 0
  return {name: float(rate.reshape(-1)[0]) for name, rate in rates.items()}


def assert_rates(solution, expected, atol=2e-4):
  found = rate_of_each_tensor(solution)
  assert found == pytest.approx(expected, abs=atol)


class DerivativeEquationsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_rows_by_hand(self):
    # h = ReLU([2 * 3 + 1, -1 * 3 + 1]) = [7, 0]; logit = 7 * 5 + 0 * 4 + 6 = 41.
    params = {
      "first": {"bias": jnp.array([1.0, 1.0]), "kernel": jnp.array([[2.0, -1.0]])},
      "last": {"bias": jnp.array([6.0]), "kernel": jnp.array([[5.0], [4.0]])},
    }
    equations = self.variant(lambda p, x: derivative_equations(two_layer, p, x))(params, jnp.array([[3.0]]))
    # bias of the first: 1 * 5 (second gate closed); its kernel: 2 * 3 * 5; last bias: 6; last kernel: 7 * 5.
    np.testing.assert_allclose(equations.coefficients, [[5.0, 30.0, 6.0, 35.0]])
    np.testing.assert_allclose(equations.values, [41.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_rows_run_over_inputs_then_outputs(self):
    params = {"w": jnp.array([[2.0, 3.0]])}
    equations = self.variant(lambda p, x: derivative_equations(lambda p, x: x @ p["w"], p, x))(
      params, jnp.array([[1.0], [10.0]])
    )
    np.testing.assert_allclose(equations.values, [2.0, 3.0, 20.0, 30.0])
    np.testing.assert_allclose(equations.coefficients, [[2.0], [3.0], [20.0], [30.0]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_parameter_rows_by_hand(self):
    params = {"w1": jnp.array([[2.0, -1.0]]), "w2": jnp.array([[5.0], [4.0]])}
    network = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
    rows = self.variant(lambda p, x: derivative_equations(network, p, x, unknowns="parameter"))
    equations = rows(params, jnp.array([[3.0]]))
    # h = [6, 0]: w1 gives 2 * 3 * 5 and 0 (closed gate), w2 gives 5 * 6 and 4 * 0; the logit is 30.
    np.testing.assert_allclose(equations.coefficients, [[30.0, 0.0, 30.0, 0.0]])
    np.testing.assert_allclose(equations.values, [30.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_higher_order_rows_by_hand(self):
    # logit = a b x with a = 2, b = 5, x = 3. By a: sum_k Lambda_k (zeta_k d2 + [k = a] d) = d, d = b x = 15, hence
    # Lambda_a (2 * 0 + 15) + Lambda_b (5 * 3) = 15.
    params = {"a": jnp.array([[2.0]]), "b": jnp.array([[5.0]])}
    network = lambda p, x: x @ p["a"] @ p["b"]
    rows = self.variant(lambda p, x: derivative_equations(network, p, x, higher_order=[("a", (0, 0))]))
    equations = rows(params, jnp.array([[3.0]]))
    np.testing.assert_allclose(equations.coefficients, [[30.0, 30.0], [15.0, 15.0]])
    np.testing.assert_allclose(equations.values, [30.0, 15.0])


@pytest.mark.parametrize("unknowns", ["tensor", "parameter"])
@pytest.mark.parametrize("gate_sharpness", [None, 4.0])
def test_rows_agree_with_explicit_gradients_and_hessians(unknowns, gate_sharpness):
  chosen = [("Dense_0/bias", (1,)), ("Dense_1/kernel", (2, 0)), ("Dense_2/bias", (1,))]
  with jax.enable_x64(True):
    classifier, x, _ = random_mlp(num_samples=3, num_classes=2, hidden=(3, 2), gate_sharpness=gate_sharpness, seed=3)
    params, x = to_float64(classifier.params), to_float64(x)
    equations = derivative_equations(classifier.apply_fn, params, x, unknowns=unknowns, higher_order=chosen)

    zeta, unravel = ravel_pytree(params)
    logits = lambda vector: classifier.apply_fn(unravel(vector), x).reshape(-1)
    derivatives = jax.jit(lambda v: (logits(v), jax.jacfwd(logits)(v), jax.jacfwd(jax.jacfwd(logits))(v)))(zeta)
    phi, gradients, hessians = map(np.asarray, derivatives)
    zeta = np.asarray(zeta)
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(params)])
    owner = np.searchsorted(ends, np.arange(zeta.size), side="right")  # the tensor of each parameter
    summed = np.eye(len(ends))[owner] if unknowns == "tensor" else np.eye(zeta.size)

    coefficients, values = [zeta * gradients @ summed], [phi]
    for path, index in chosen:
      k = tensor_names(params).index(path)
      j = ends[k] - jax.tree.leaves(params)[k].size
      j += np.ravel_multi_index(index, jax.tree.leaves(params)[k].shape)
      # Outer derivative by zeta_j: with relaxed gates the order matters, since they are no function's own derivative.
      row = zeta * hessians[:, :, j] + gradients[:, j, None] * np.eye(zeta.size)[j]
      coefficients.append(row @ summed)
      values.append(gradients[:, j])
    assert np.abs(hessians).max() > 0.1  # so that the second-order part is really compared
    np.testing.assert_allclose(equations.coefficients, np.concatenate(coefficients), atol=1e-10)
    np.testing.assert_allclose(equations.values, np.concatenate(values), atol=1e-10)


def test_parameter_coefficients_sum_to_those_of_their_tensor():
  params, x = two_layer_params(), inputs(5, 2)
  each = derivative_equations(two_layer, params, x, unknowns="parameter").coefficients
  ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(params)])[:-1]
  summed = np.stack([part.sum(axis=1) for part in np.split(np.asarray(each), ends, axis=1)], axis=1)
  np.testing.assert_allclose(derivative_equations(two_layer, params, x).coefficients, summed, rtol=1e-5, atol=1e-6)


class SelectionRulesOnMLPTest(parameterized.TestCase):
  def test_balanced_gives_one_third_to_weights_and_sums_to_biases(self):
    classifier, _, _ = random_mlp()
    solution = solve(classifier.apply_fn, classifier.params, inputs(40, 2))
    assert_rates(
      solution,
      {
        "Dense_0/kernel": 1 / 3,
        "Dense_0/bias": 1 / 3,
        "Dense_1/kernel": 1 / 3,
        "Dense_1/bias": 2 / 3,
        "Dense_2/kernel": 1 / 3,
        "Dense_2/bias": 1.0,
      },
    )
    assert float(solution.target_rate) == pytest.approx(1 / 3, abs=2e-4)
    assert float(solution.residual) < 1e-5

  def test_least_norm_is_the_minimum_over_all_tensors(self):
    # Weights a, b, 1 - a - b; biases a, a + b, 1. The derivatives of 2a^2 + b^2 + (1 - a - b)^2 + (a + b)^2 + 1 vanish:
    # 8a + 4b = 2 and 4a + 6b = 2, hence a = 1/8, b = 1/4, and the last weight has 5/8.
    classifier, _, _ = random_mlp()
    solution = solve(classifier.apply_fn, classifier.params, inputs(40, 2), "least_norm")
    assert_rates(
      solution,
      {
        "Dense_0/kernel": 0.125,
        "Dense_0/bias": 0.125,
        "Dense_1/kernel": 0.25,
        "Dense_1/bias": 0.375,
        "Dense_2/kernel": 0.625,
        "Dense_2/bias": 1.0,
      },
    )
    assert float(solution.target_rate) == pytest.approx(1.0, abs=2e-4)  # the last bias alone
    inside = [bool(leaf.all()) for leaf in jax.tree.leaves(parameter_groups(solution).target)]
    assert dict(zip(tensor_names(solution.rates), inside, strict=True))["Dense_2/bias"]
    assert sum(inside) == 1

  def test_least_norm_agrees_with_numpy_and_scipy(self):
    classifier, _, _ = random_mlp(seed=4)
    with jax.enable_x64(True):
      params = to_float64(classifier.params)
      equations = derivative_equations(classifier.apply_fn, params, to_float64(inputs(40, 2)))
      solution = solve_rates(equations, params, rule="least_norm", rcond=1e-9)
      expected, _, rank, _ = scipy.linalg.lstsq(equations.coefficients, equations.values, cond=1e-9)
    np.testing.assert_allclose(list(rate_of_each_tensor(solution).values()), expected, atol=1e-9)
    assert int(solution.rank) == rank

  def test_balanced_agrees_with_constrained_minimisation(self):
    # An independent optimiser: least sum of squares over the kernels subject to the equations.
    classifier, _, _ = random_mlp(seed=5, hidden=(4,))
    with jax.enable_x64(True):
      params = to_float64(classifier.params)
      equations = derivative_equations(classifier.apply_fn, params, to_float64(inputs(30, 2)))
      solution = solve_rates(equations, params, rcond=1e-9)
      _, triangular = scipy.linalg.qr(np.column_stack([equations.coefficients, equations.values]), mode="economic")
    kernels = np.array([name.endswith("kernel") for name in tensor_names(params)])
    assert list(kernels) == [False, True, False, True]
    # The system has rank 3 (4 unknowns, null space 1): three independent rows stand for all of it.
    basis = scipy.linalg.orth(triangular[:, :4].T, rcond=1e-9)
    assert basis.shape[1] == 3
    feasible = np.linalg.lstsq(triangular[:, :4], triangular[:, 4], rcond=1e-9)[0]
    found = scipy.optimize.minimize(
      lambda rates: np.sum(rates[kernels] ** 2),
      np.zeros(4),
      constraints={"type": "eq", "fun": lambda rates: basis.T @ (rates - feasible)},
      method="SLSQP",
      options={"ftol": 1e-14},
    )
    assert found.success
    np.testing.assert_allclose(list(rate_of_each_tensor(solution).values()), found.x, atol=1e-5)

  @parameterized.parameters(None, "Dense_2")
  def test_last_layer_takes_everything(self, last_layer):
    classifier, _, _ = random_mlp()
    solution = solve(classifier.apply_fn, classifier.params, inputs(40, 2), "last_layer", last_layer=last_layer)
    expected = {name: float(name.startswith("Dense_2")) for name in tensor_names(classifier.params)}
    assert_rates(solution, expected)
    assert float(solution.target_rate) == pytest.approx(1.0, abs=2e-4)
    assert not any(leaf.any() for leaf in jax.tree.leaves(parameter_groups(solution).left_out))

  def test_another_layer_can_be_made_the_last(self):
    # All of the rate on Dense_1: its kernel has 1, its bias 0 + 1, the last bias 0 + 1 + 0.
    classifier, _, _ = random_mlp()
    solution = solve(classifier.apply_fn, classifier.params, inputs(40, 2), "last_layer", last_layer="Dense_1")
    # Minimised is everything but Dense_1: weights a, b, 1 - a - b, biases a, (a + b), 1. a^2 + a^2 + (1 - a - b)^2 is
    # least at a = 0, b = 1.
    assert_rates(
      solution,
      {
        "Dense_0/kernel": 0.0,
        "Dense_0/bias": 0.0,
        "Dense_1/kernel": 1.0,
        "Dense_1/bias": 1.0,
        "Dense_2/kernel": 0.0,
        "Dense_2/bias": 1.0,
      },
    )

  def test_last_layer_is_found_in_natural_order(self):
    params = {f"Dense_{k}": {"kernel": jnp.array([[1.0 + 0.1 * k]])} for k in (2, 9, 10)}
    network = lambda p, x: x @ p["Dense_2"]["kernel"] @ p["Dense_9"]["kernel"] @ p["Dense_10"]["kernel"]
    solution = solve(network, params, inputs(4, 1), "last_layer")
    assert_rates(solution, {"Dense_10/kernel": 1.0, "Dense_2/kernel": 0.0, "Dense_9/kernel": 0.0})

  @parameterized.product(num_layers=[2, 3, 4], use_bias=[True, False])
  def test_null_space_has_one_dimension_less_than_layers(self, num_layers, use_bias):
    classifier, _, _ = random_mlp(hidden=(6, 5, 4)[: num_layers - 1], use_bias=use_bias)
    solution = solve(classifier.apply_fn, classifier.params, inputs(60, 2))
    num_tensors = len(jax.tree.leaves(classifier.params))
    assert int(solution.null_space_dimension) == num_layers - 1
    assert int(solution.rank) == num_tensors - (num_layers - 1)

  @parameterized.parameters("balanced", "least_norm")
  def test_without_biases_both_rules_share_the_rate_evenly(self, rule):
    classifier, _, _ = random_mlp(use_bias=False)
    solution = solve(classifier.apply_fn, classifier.params, inputs(20, 2), rule)
    assert_rates(solution, {f"Dense_{k}/kernel": 1 / 3 for k in range(3)})
    assert all(leaf.all() for leaf in jax.tree.leaves(parameter_groups(solution).target))

  def test_without_biases_the_last_layer_takes_everything(self):
    classifier, _, _ = random_mlp(use_bias=False)
    solution = solve(classifier.apply_fn, classifier.params, inputs(20, 2), "last_layer")
    assert_rates(solution, {"Dense_0/kernel": 0.0, "Dense_1/kernel": 0.0, "Dense_2/kernel": 1.0})

  def test_relaxed_gates_leave_only_the_last_layer(self):
    # The relaxed derivative is not that of the value, so Euler's identity holds below the last layer no more. The last
    # layer is linear and always is an exact solution; it is the only one. Solve for Lambda on exact ReLU.
    relaxed, _, _ = random_mlp(gate_sharpness=5.0)
    x = inputs(40, 2)
    solution = solve(relaxed.gradient_fn, relaxed.params, x)
    assert int(solution.null_space_dimension) == 0
    assert_rates(
      solution, {name: float(name.startswith("Dense_2")) for name in tensor_names(relaxed.params)}, atol=1e-3
    )
    exact = solve(relaxed.apply_fn, relaxed.params, x)
    assert int(exact.null_space_dimension) == 2
    assert float(exact.target_rate) == pytest.approx(1 / 3, abs=2e-4)

  def test_every_rule_solves_the_same_equations_exactly(self):
    classifier, _, _ = random_mlp(seed=2)
    with jax.enable_x64(True):
      params = to_float64(classifier.params)
      equations = derivative_equations(classifier.apply_fn, params, to_float64(inputs(40, 2)))
      for rule in RULES:
        solution = solve_rates(equations, params, rule=rule, rcond=1e-9)
        vector = np.array(list(rate_of_each_tensor(solution).values()))
        np.testing.assert_allclose(equations.coefficients @ vector, equations.values, atol=1e-9)
        assert float(solution.residual) < 1e-10


class HigherOrderTest(parameterized.TestCase):
  CHOSEN = (("Dense_0/kernel", (0, 1)), ("Dense_1/bias", (2,)), ("Dense_2/kernel", (3, 2)))

  def test_rows_hold_for_the_rates_that_first_order_rows_gave(self):
    with jax.enable_x64(True):
      classifier, _, _ = random_mlp()
      params, x = to_float64(classifier.params), to_float64(inputs(40, 2))
      both = derivative_equations(classifier.apply_fn, params, x, higher_order=self.CHOSEN)
      assert both.coefficients.shape == (40 * 3 * (1 + 3), 6)
      first = DerivativeEquations(both.coefficients[:120], both.values[:120])
      higher = both.coefficients[120:]
      assert np.abs(higher).max() > 0.1
      for rule in RULES:
        vector = np.array(list(rate_of_each_tensor(solve_rates(first, params, rule=rule)).values()))
        np.testing.assert_allclose(higher @ vector, both.values[120:], atol=1e-9)

  def test_rows_do_not_remove_the_null_space(self):
    classifier, _, _ = random_mlp()
    x = inputs(40, 2)
    equations = derivative_equations(classifier.apply_fn, classifier.params, x, higher_order=self.CHOSEN)
    for rule in RULES:
      solution = solve_rates(equations, classifier.params, rule=rule)
      assert int(solution.null_space_dimension) == 2
      assert_rates(solution, rate_of_each_tensor(solve(classifier.apply_fn, classifier.params, x, rule)), atol=5e-4)

  def test_rows_alone_count_towards_the_rank(self):
    # One input and one output give one first-order row; the derivative by the bias adds "its rate is 1".
    params = {"bias": jnp.array([3.0]), "w": jnp.array([[2.0]])}
    network = lambda p, x: x @ p["w"] + p["bias"][None]
    x = jnp.array([[5.0]])
    assert int(solve_rates(derivative_equations(network, params, x), params).rank) == 1
    equations = derivative_equations(network, params, x, higher_order=[("bias", (0,))])
    np.testing.assert_allclose(equations.coefficients, [[3.0, 10.0], [1.0, 0.0]])
    np.testing.assert_allclose(equations.values, [13.0, 1.0])
    solution = solve_rates(equations, params)
    assert int(solution.rank) == 2
    assert_rates(solution, {"bias": 1.0, "w": 1.0})

  def test_rows_of_a_batch_coupled_network_hold_too(self):
    with jax.enable_x64(True):
      coupled, x, _ = random_mlp(batch_norm=True, num_samples=30)
      params, x = to_float64(coupled.params), to_float64(x)
      chosen = [("Dense_2/kernel", (1, 1)), ("BatchNorm_1/bias", (0,))]
      equations = derivative_equations(coupled.apply_fn, params, x, higher_order=chosen)
      solution = solve_rates(equations, params)
      assert float(solution.residual) < 1e-4  # the epsilon of batch norm is left


@functools.cache
def tiny_network_by_parameter():
  """Parameters, inputs and equations of Linear(2, 3)-ReLU-Linear(3, 1) in double precision."""
  params, x = to_float64(two_layer_params()), to_float64(inputs(80, 2))
  return params, x, derivative_equations(two_layer, params, x, unknowns="parameter")


class ParameterUnknownsTest(parameterized.TestCase):
  def test_tiny_network_satisfies_the_equations_under_every_rule(self):
    with jax.enable_x64(True):
      params, x, equations = tiny_network_by_parameter()
      assert equations.coefficients.shape == (80, 3 + 6 + 1 + 3)
      error = jax.jit(lambda rates: scaling_error(two_layer, params, rates, x, ALPHAS))
      for rule in RULES:
        solution = solve_rates(equations, params, rule=rule, last_layer="last", rcond=1e-9)
        chex.assert_trees_all_equal_shapes(solution.rates, params)
        vector = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(solution.rates)])
        np.testing.assert_allclose(equations.coefficients @ vector, equations.values, atol=1e-9)
        assert float(solution.residual) < 1e-9
        assert float(error(solution.rates)) < 1e-6

  def test_each_hidden_unit_is_a_null_direction(self):
    # Every hidden unit can be rescaled against its outgoing weight: 3 units, 3 null directions.
    with jax.enable_x64(True):
      params, _, equations = tiny_network_by_parameter()
      solution = solve_rates(equations, params, rcond=1e-9)
      assert int(solution.null_space_dimension) == 3
      assert int(solution.rank) == 13 - 3

  def test_balanced_does_not_count_the_parameters_of_a_unit(self):
    # A unit with rate r on its 2 incoming weights and 1 - r on the outgoing one: 1/2 each, as by tensors.
    with jax.enable_x64(True):
      params, _, equations = tiny_network_by_parameter()
      solution = solve_rates(equations, params, rcond=1e-9)
      np.testing.assert_allclose(solution.rates["first"]["kernel"], np.full((2, 3), 1 / 2), atol=1e-6)
      np.testing.assert_allclose(solution.rates["first"]["bias"], np.full(3, 1 / 2), atol=1e-6)
      np.testing.assert_allclose(solution.rates["last"]["kernel"], np.full((3, 1), 1 / 2), atol=1e-6)
      np.testing.assert_allclose(solution.rates["last"]["bias"], [1.0], atol=1e-6)

  def test_batch_norm_is_refused_with_the_reason(self):
    coupled, x, _ = random_mlp(batch_norm=True)
    with pytest.raises(ValueError, match=r"^apply_fn must treat the samples of a batch independently"):
      derivative_equations(coupled.apply_fn, coupled.params, x, unknowns="parameter")


class BatchNormTest(parameterized.TestCase):
  BALANCED_TARGET = ("BatchNorm_1/scale", "BatchNorm_1/bias", "Dense_2/kernel")

  def test_balanced_rates_sit_on_the_last_normalisation_and_the_last_layer(self):
    coupled, x, _ = random_mlp(batch_norm=True, num_samples=40)
    solution = solve(coupled.apply_fn, coupled.params, x)
    expected = {name: 0.5 if name in self.BALANCED_TARGET else 0.0 for name in tensor_names(coupled.params)}
    assert_rates(solution, expected | {"Dense_2/bias": 1.0}, atol=1e-3)
    assert float(solution.target_rate) == pytest.approx(0.5, abs=1e-3)

  def test_balanced_groups(self):
    coupled, x, _ = random_mlp(batch_norm=True, num_samples=40)
    groups = parameter_groups(solve(coupled.apply_fn, coupled.params, x))
    found = {
      name: [bool(leaf.all()) for leaf in leaves]
      for name, *leaves in zip(
        tensor_names(coupled.params),
        *map(jax.tree.leaves, (groups.target, groups.zero, groups.left_out)),
        strict=True,
      )
    }
    zero = ("Dense_0/kernel", "Dense_0/bias", "BatchNorm_0/scale", "BatchNorm_0/bias", "Dense_1/kernel", "Dense_1/bias")
    assert found == (
      {name: [True, False, False] for name in self.BALANCED_TARGET}
      | {name: [False, True, False] for name in zero}
      | {"Dense_2/bias": [False, False, True]}
    )

  @parameterized.parameters(*RULES)
  def test_scaling_is_exact_for_every_rule(self, rule):
    coupled, x, _ = random_mlp(batch_norm=True, num_samples=40)
    solution = solve(coupled.apply_fn, coupled.params, x, rule)
    logits = coupled.apply_fn(coupled.params, x)
    for alpha in (-1.0, -0.3, 1.0):  # against the size of the logits: single ones come near 0
      moved = coupled.apply_fn(scale_params(coupled.params, solution.rates, alpha), x)
      np.testing.assert_allclose(moved, jnp.exp(alpha) * logits, atol=1e-3 * float(jnp.max(jnp.abs(logits))))

  def test_stored_statistics_change_the_rates(self):
    """At inference the normalisation is affine with fixed constants, so no rescaling hides in it."""
    coupled, x, _ = random_mlp(batch_norm=True, num_samples=40)
    solution = solve(coupled.predict_fn, coupled.params, x)
    assert float(scaling_error(coupled.predict_fn, coupled.params, solution.rates, x, ALPHAS)) < 1e-2
    assert rate_of_each_tensor(solution)["Dense_2/bias"] == pytest.approx(1.0, abs=1e-3)


class OtherNetworksTest(parameterized.TestCase):
  def test_residual_network_by_hand(self):
    # h has rate a, the branch must keep it: Dense_1 has r, Dense_2 has -r, Dense_3 has 1 - a. The sum of squares
    # a^2 + 2 r^2 + (1 - a)^2 is least at a = 1/2, r = 0; two free rates a and r, so the null space has dimension 2.
    apply_fn, params, _ = random_residual()
    solution = solve(apply_fn, params, inputs(60, 2))
    assert_rates(
      solution,
      {
        "Dense_0/kernel": 0.5,
        "Dense_0/bias": 0.5,
        "Dense_1/kernel": 0.0,
        "Dense_1/bias": 0.5,
        "Dense_2/kernel": 0.0,
        "Dense_2/bias": 0.5,
        "Dense_3/kernel": 0.5,
        "Dense_3/bias": 1.0,
      },
    )
    assert int(solution.null_space_dimension) == 2

  @parameterized.parameters(1, 2, 5)
  def test_branches_that_are_added_up_have_the_rate_of_one(self, num_branches):
    # The sum of branches has their common rate a, the last layer 1 - a: half each, however many branches there are.
    shapes = {f"branch_{k}": jnp.zeros((2, 3)) for k in range(num_branches)} | {"last": jnp.zeros((3, 2))}
    params = random_like(shapes, seed=num_branches)
    network = lambda p, x: jax.nn.relu(sum(x @ p[f"branch_{k}"] for k in range(num_branches))) @ p["last"]
    solution = solve(network, params, inputs(40, 2))
    assert_rates(solution, dict.fromkeys(params, 0.5))
    least_norm = solve(network, params, inputs(40, 2), "least_norm")  # k a^2 + (1 - a)^2 is least at a = 1 / (k + 1)
    share = 1 / (num_branches + 1)
    assert_rates(least_norm, dict.fromkeys(params, share) | {"last": 1 - share})

  def test_convolutional_network_has_the_rates_of_three_layers(self):
    classifier, x, _ = random_conv(num_samples=30)
    solution = solve(classifier.apply_fn, classifier.params, x)
    assert_rates(
      solution,
      {
        "Conv_0/kernel": 1 / 3,
        "Conv_0/bias": 1 / 3,
        "Conv_1/kernel": 1 / 3,
        "Conv_1/bias": 2 / 3,
        "Dense_0/kernel": 1 / 3,
        "Dense_0/bias": 1.0,
      },
    )
    assert int(solution.null_space_dimension) == 2

  @parameterized.parameters("residual", "conv", "mlp", "mlp_without_biases")
  def test_scaling_error_is_small_for_every_rule(self, network):
    # Double precision: a logit near 0 would otherwise show the rounding of float32, not an error of Lambda.
    with jax.enable_x64(True):
      if network == "residual":
        apply_fn, params, x = random_residual(num_samples=40)
      else:
        classifier, x, _ = (
          random_conv(num_samples=30) if network == "conv" else random_mlp(40, use_bias=network == "mlp")
        )
        apply_fn, params = classifier.apply_fn, classifier.params
      params, x = to_float64(params), to_float64(x)
      error = jax.jit(lambda rates: scaling_error(apply_fn, params, rates, x, ALPHAS))
      equations = derivative_equations(apply_fn, params, x)
      for rule in RULES:
        assert float(error(solve_rates(equations, params, rule=rule).rates)) < 1e-4

  def test_scaling_error_of_fig_3_is_small_in_float32(self):
    module = nn.Sequential([nn.Dense(10), nn.relu, nn.Dense(1)])
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2)))["params"]
    params = random_like(shapes, seed=1)
    apply_fn = jax.jit(lambda p, x: module.apply({"params": p}, x))
    equations = derivative_equations(apply_fn, params, inputs(30, 2))
    x = jnp.array([[1.0, 1.0], [2.0, -1.0], [-0.5, 1.5]])
    assert float(jnp.min(jnp.abs(apply_fn(params, x)))) > 0.1
    error = jax.jit(lambda rates: scaling_error(apply_fn, params, rates, x, ALPHAS))
    for rule in RULES:
      assert float(error(solve_rates(equations, params, rule=rule).rates)) < 1e-4

  def test_gelu_network_is_quasi_homogeneous_in_its_linear_last_layer_only(self):
    # The last layer is linear, so rates 1 there and 0 elsewhere are exact for any network; nothing else is.
    classifier, _, _ = random_mlp()
    x = inputs(40, 2)
    solution = solve(gelu_network, classifier.params, x)
    assert int(solution.null_space_dimension) == 0
    assert_rates(solution, {name: float("2" in name) for name in tensor_names(classifier.params)}, atol=1e-3)
    thirds = given_rates(jax.tree.map(lambda _: 1 / 3, classifier.params), classifier.params)
    assert float(scaling_error(gelu_network, classifier.params, thirds.rates, x, ALPHAS)) > 0.1

  def test_gelu_network_with_gelu_outputs_is_not_quasi_homogeneous(self):
    classifier, _, _ = random_mlp()
    network = lambda p, x: jax.nn.gelu(gelu_network(p, x))
    x = inputs(40, 2)
    solution = solve(network, classifier.params, x)
    assert float(solution.residual) > 1e-2
    assert float(scaling_error(network, classifier.params, solution.rates, x, ALPHAS)) > 0.1


@jax.jit
def gelu_network(p, x):
  """The three layers of `random_mlp` with GELU."""
  for k in range(3):
    x = x @ p[f"Dense_{k}"]["kernel"] + p[f"Dense_{k}"]["bias"][None]
    x = x if k == 2 else jax.nn.gelu(x)
  return x


class SolverTest(parameterized.TestCase):
  PARAMS = {"bias": jnp.array([1.0]), "w1": jnp.array([2.0]), "w2": jnp.array([3.0])}

  def test_inconsistent_equations_leave_their_residual(self):
    # rate = 1 and rate = 3: least squares gives 2, error (1, -1), |error| / |values| = sqrt(2) / sqrt(10).
    equations = DerivativeEquations(jnp.array([[1.0], [1.0]]), jnp.array([1.0, 3.0]))
    solution = solve_rates(equations, {"w": jnp.array([2.0])})
    assert_rates(solution, {"w": 2.0})
    assert float(solution.residual) == pytest.approx((2 / 10) ** 0.5, rel=1e-5)
    assert int(solution.null_space_dimension) == 0

  def test_fewer_equations_than_unknowns(self):
    # w1 + w2 = 1 alone: the weights share it, the free bias gets 0.
    solution = solve_rates(DerivativeEquations(jnp.array([[0.0, 1.0, 1.0]]), jnp.array([1.0])), self.PARAMS)
    assert_rates(solution, {"bias": 0.0, "w1": 0.5, "w2": 0.5})
    assert (int(solution.rank), int(solution.null_space_dimension)) == (1, 2)

  def test_repeated_equations_do_not_raise_the_rank(self):
    row = DerivativeEquations(jnp.array([[0.0, 1.0, 1.0]] * 7), jnp.ones(7))
    solution = solve_rates(row, self.PARAMS)
    assert (int(solution.rank), int(solution.null_space_dimension)) == (1, 2)
    assert_rates(solution, {"bias": 0.0, "w1": 0.5, "w2": 0.5})

  def test_all_zero_equations_give_zero_rates(self):
    solution = solve_rates(DerivativeEquations(jnp.zeros((4, 3)), jnp.zeros(4)), self.PARAMS)
    assert_rates(solution, {"bias": 0.0, "w1": 0.0, "w2": 0.0})
    assert (int(solution.rank), int(solution.null_space_dimension)) == (0, 3)
    assert float(solution.residual) == 0.0

  def test_rates_that_the_equations_fix_are_left_alone_by_every_rule(self):
    fixed = DerivativeEquations(jnp.eye(3), jnp.array([0.25, -0.5, 2.0]))
    for rule in ("balanced", "least_norm"):
      assert_rates(solve_rates(fixed, self.PARAMS, rule=rule), {"bias": 0.25, "w1": -0.5, "w2": 2.0})

  def test_balanced_ignores_the_size_of_biases(self):
    # bias = 10 w1 and w1 + w2 = 1: over the weights alone 1/2, 1/2; over all tensors 101 w1 = w2.
    equations = DerivativeEquations(jnp.array([[1.0, -10.0, 0.0], [0.0, 1.0, 1.0]]), jnp.array([0.0, 1.0]))
    balanced = solve_rates(equations, self.PARAMS)
    assert_rates(balanced, {"bias": 5.0, "w1": 0.5, "w2": 0.5})
    assert float(balanced.target_rate) == pytest.approx(0.5, abs=1e-5)  # the faster bias does not count
    least_norm = solve_rates(equations, self.PARAMS, rule="least_norm")
    assert_rates(least_norm, {"bias": 10 / 102, "w1": 1 / 102, "w2": 101 / 102}, atol=1e-5)

  @parameterized.parameters(*range(6))
  def test_balanced_has_the_least_greatest_rate_and_then_the_least_norm(self, seed):
    # An independent optimiser: a linear program, then a constrained minimisation.
    random = np.random.default_rng(seed)
    num_unknowns = int(random.integers(2, 7))
    rows = random.normal(size=(int(random.integers(1, num_unknowns)), num_unknowns))
    values = random.normal(size=len(rows))
    params = {f"w{k}": jnp.array([1.0]) for k in range(num_unknowns)}
    solution = solve_rates(DerivativeEquations(jnp.asarray(rows), jnp.asarray(values)), params)
    found = np.array(list(rate_of_each_tensor(solution).values()))
    greatest = scipy.optimize.linprog(
      np.append(np.zeros(num_unknowns), 1.0),
      A_ub=np.block([[s * np.eye(num_unknowns), -np.ones((num_unknowns, 1))] for s in (1, -1)]),
      b_ub=np.zeros(2 * num_unknowns),
      A_eq=np.column_stack([rows, np.zeros(len(rows))]),
      b_eq=values,
      bounds=(None, None),
    ).fun
    np.testing.assert_allclose(rows @ found, values, atol=1e-4)
    assert np.abs(found).max() == pytest.approx(greatest, rel=1e-3)
    flattest = scipy.optimize.minimize(
      lambda rates: np.sum(rates**2),
      found,
      bounds=[(-greatest * 1.001, greatest * 1.001)] * num_unknowns,
      constraints={"type": "eq", "fun": lambda rates: rows @ rates - values},
      method="SLSQP",
    )
    assert np.sum(found**2) <= flattest.fun + 2e-3 * max(1.0, flattest.fun)

  def test_scales_before_a_normalisation_do_not_move_for_a_trace_of_the_greatest_rate(self):
    # The rate of "free" matters by 1e-5 only, as that of a kernel before batch norm does for its epsilon.
    equations = DerivativeEquations(jnp.array([[1e-5, 1.0, 1.0]]), jnp.array([1.0]))
    params = {"free": jnp.array([1.0]), "w1": jnp.array([1.0]), "w2": jnp.array([1.0])}
    assert_rates(solve_rates(equations, params), {"free": 0.0, "w1": 0.5, "w2": 0.5}, atol=1e-3)

  def test_equations_that_are_not_numbers_give_rates_that_are_not(self):
    solution = solve_rates(DerivativeEquations(jnp.full((2, 3), jnp.nan), jnp.ones(2)), self.PARAMS)
    assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(solution.rates))

  def test_network_of_biases_only_is_balanced_over_them(self):
    params = {"a": {"bias": jnp.array([1.0])}, "b": {"bias": jnp.array([1.0])}}
    solution = solve_rates(DerivativeEquations(jnp.array([[1.0, 1.0]]), jnp.array([1.0])), params)
    assert_rates(solution, {"a/bias": 0.5, "b/bias": 0.5})
    assert float(solution.target_rate) == pytest.approx(0.5, abs=1e-6)

  def test_rcond_decides_which_equations_count(self):
    # Singular values 1 and 1e-3: the second equation, w2 = 5, is heard only below rcond = 1e-3.
    equations = DerivativeEquations(jnp.array([[1.0, 0.0], [0.0, 1e-3]]), jnp.array([1.0, 5e-3]))
    params = {"w1": jnp.array([1.0]), "w2": jnp.array([1.0])}
    heard, ignored = solve_rates(equations, params, rcond=1e-4), solve_rates(equations, params, rcond=1e-2)
    assert_rates(heard, {"w1": 1.0, "w2": 5.0}, atol=1e-3)
    assert_rates(ignored, {"w1": 1.0, "w2": 0.0}, atol=1e-3)
    assert (int(heard.rank), int(ignored.rank)) == (2, 1)

  def test_duplicate_inputs_change_nothing(self):
    params, x = two_layer_params(), inputs(20, 2)
    once = solve(two_layer, params, x)
    twice = solve(two_layer, params, jnp.concatenate([x, x]))
    assert_rates(twice, rate_of_each_tensor(once), atol=1e-4)
    assert int(twice.rank) == int(once.rank)

  def test_one_input_leaves_a_larger_null_space(self):
    solution = solve(two_layer, two_layer_params(), inputs(1, 2))  # one row, four tensors
    assert (int(solution.rank), int(solution.null_space_dimension)) == (1, 3)
    assert float(solution.residual) < 1e-5


class RateSolutionIsAPytreeTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_equations_to_solution_in_one_function(self):
    params, x = two_layer_params(), inputs(40, 2)
    solution = self.variant(lambda p, x: solve_rates(derivative_equations(two_layer, p, x), p))(params, x)
    assert_rates(solution, {"first/bias": 0.5, "first/kernel": 0.5, "last/bias": 1.0, "last/kernel": 0.5})

  def test_solution_is_an_argument_and_a_result_of_a_jitted_function(self):
    params = two_layer_params()
    solution = solve(two_layer, params, inputs(40, 2))
    doubled = jax.jit(lambda s: jax.tree.map(lambda leaf: 2 * leaf, s))(solution)
    assert type(doubled) is type(solution)
    assert float(doubled.target_rate) == pytest.approx(2 * float(solution.target_rate))
    assert int(doubled.rank) == 2 * int(solution.rank)
    chex.assert_trees_all_close(doubled.rates, jax.tree.map(lambda leaf: 2 * leaf, solution.rates))

  @chex.variants(with_jit=True, without_jit=True)
  def test_groups_split_a_tensor_where_its_rates_differ(self):
    params = {"w": jnp.ones(4)}
    solution = given_rates({"w": jnp.array([0.0, 0.4995, 0.5, 0.7])}, params, target_rate=0.5)
    groups = self.variant(lambda s: parameter_groups(s))(solution)
    np.testing.assert_array_equal(groups.target["w"], [False, True, True, False])  # 0.4995 is within 1e-3
    np.testing.assert_array_equal(groups.zero["w"], [True, False, False, False])
    np.testing.assert_array_equal(groups.left_out["w"], [False, False, False, True])


@pytest.mark.parametrize("tolerance", [1e-6, 1e-3, 0.3])
def test_each_parameter_is_in_exactly_one_group(tolerance):
  rates = {"w": jnp.linspace(0.0, 1.0, 100)}  # none lies on a boundary, where rounding decides
  groups = parameter_groups(given_rates(rates, rates, target_rate=0.5), tolerance=tolerance)
  np.testing.assert_array_equal(groups.target["w"] * 1 + groups.zero["w"] * 1 + groups.left_out["w"] * 1, np.ones(100))


def test_tolerance_widens_the_target_group():
  rates = {"w": jnp.array([0.1, 0.3, 0.5])}
  solution = given_rates(rates, rates)
  np.testing.assert_array_equal(parameter_groups(solution, tolerance=0.25).target["w"], [False, True, True])


class GivenRatesTest(parameterized.TestCase):
  def test_scalars_spread_over_their_tensor_and_the_greatest_is_the_target(self):
    params = two_layer_params()
    solution = given_rates({"first": {"bias": 0.5, "kernel": 0.5}, "last": {"bias": 1.0, "kernel": 0.5}}, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(solution.rates, params)
    assert_rates(solution, {"first/bias": 0.5, "first/kernel": 0.5, "last/bias": 1.0, "last/kernel": 0.5})
    assert float(solution.target_rate) == 1.0

  def test_target_rate_can_be_given(self):
    assert float(given_rates({"w": 1.0}, {"w": jnp.ones(2)}, target_rate=0.25).target_rate) == 0.25

  def test_target_rate_zero_is_not_taken_for_missing(self):
    assert float(given_rates({"w": 1.0}, {"w": jnp.ones(2)}, target_rate=0.0).target_rate) == 0.0

  def test_nothing_was_solved(self):
    solution = given_rates({"w": 1.0}, {"w": jnp.ones(2)})
    assert np.isnan(solution.residual)
    assert int(solution.rank) == -1

  def test_hand_made_rates_pass_the_scaling_check_and_wrong_ones_fail(self):
    params, x = two_layer_params(), jnp.array([[1.0, 1.0], [2.0, -1.0]])
    right = given_rates({"first": {"bias": 0.3, "kernel": 0.3}, "last": {"bias": 1.0, "kernel": 0.7}}, params)
    wrong = given_rates({"first": {"bias": 0.3, "kernel": 0.3}, "last": {"bias": 0.7, "kernel": 0.7}}, params)
    assert float(scaling_error(two_layer, params, right.rates, x, ALPHAS)) < 1e-5
    assert float(scaling_error(two_layer, params, wrong.rates, x, ALPHAS)) > 1e-2


class ScalingTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_scale_params_multiplies_each_by_its_own_power(self):
    params = {"a": jnp.array([2.0, 3.0]), "b": jnp.array([[5.0]])}
    rates = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([[2.0]])}
    scaled = self.variant(scale_params)(params, rates, jnp.log(2.0))
    np.testing.assert_allclose(scaled["a"], [2.0, 6.0], rtol=1e-6)  # 2 * 2^0, 3 * 2^1
    np.testing.assert_allclose(scaled["b"], [[20.0]], rtol=1e-6)  # 5 * 2^2

  @chex.variants(with_jit=True, without_jit=True)
  def test_error_by_hand(self):
    # logit w x with rate 2 instead of 1: e^(2a) / e^a - 1 = e^a - 1; over a = log 2, log 1/2 the worst is 1.
    error = self.variant(lambda p, r, x, a: scaling_error(lambda p, x: x @ p, p, r, x, a))(
      jnp.array([[3.0]]), jnp.array([[2.0]]), jnp.array([[1.0], [-4.0]]), jnp.log(jnp.array([2.0, 0.5]))
    )
    assert float(error) == pytest.approx(1.0, rel=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_zero_logits_count_by_their_absolute_difference(self):
    # logit w + b with w = 1, b = -1, rates 1 and 0: at a = log 3 it is 3 - 1 = 2 where 0 is expected.
    network = lambda p, x: x * (p["w"] + p["b"])[None, :]
    error = self.variant(lambda p, r, x, a: scaling_error(network, p, r, x, a))(
      {"w": jnp.array([1.0]), "b": jnp.array([-1.0])},
      {"w": jnp.array([1.0]), "b": jnp.array([0.0])},
      jnp.ones((1, 1)),
      jnp.log(jnp.array([3.0])),
    )
    assert float(error) == pytest.approx(2.0, rel=1e-5)


def test_groups_table_text():
  params = {
    "Dense_0": {"bias": jnp.ones(4), "kernel": jnp.ones((2, 4))},
    "Dense_1": {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))},
  }
  rates = {"Dense_0": {"bias": 0.5, "kernel": 0.5}, "Dense_1": {"bias": 1.0, "kernel": -0.0001}}
  assert groups_table(given_rates(rates, params, target_rate=0.5)) == "\n".join(
    [
      "tensor          shape    rate  condition",
      "Dense_0/bias    (4,)    0.500  target",
      "Dense_0/kernel  (2, 4)  0.500  target",
      "Dense_1/bias    (3,)    1.000  left out",
      "Dense_1/kernel  (4, 3)  0.000  zero",
    ]
  )


def test_groups_table_shows_a_range_and_every_condition_of_a_split_tensor():
  params = {"w": jnp.ones(3)}
  table = groups_table(given_rates({"w": jnp.array([0.0, 0.5, 1.0])}, params, target_rate=0.5))
  assert table.splitlines()[1] == "w       (3,)   0.000..1.000  left out/target/zero"


def test_tensor_names_follow_the_order_of_the_leaves():
  params = two_layer_params()
  assert tensor_names(params) == ["first/bias", "first/kernel", "last/bias", "last/kernel"]
  shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
  assert shapes == [(3,), (2, 3), (1,), (3, 1)]


@pytest.mark.parametrize(
  ("x", "needs"),
  [
    (jnp.ones(2), r"a batch of shape \[M, \.\.\.\]"),
    (jnp.ones((0, 2)), "at least one sample"),
    (jnp.ones((3, 2), int), "floating point; got dtype int"),
  ],
  ids=["no_batch", "empty", "integers"],
)
def test_inputs_that_are_no_batch_of_floats_are_refused(x, needs):
  with pytest.raises(ValueError, match=f"^x must .*{needs}"):
    derivative_equations(two_layer, two_layer_params(), x)
  with pytest.raises(ValueError, match=f"^x must .*{needs}"):
    scaling_error(two_layer, two_layer_params(), two_layer_params(), x, ALPHAS)


def test_unknown_choices_are_refused():
  params = two_layer_params()
  with pytest.raises(ValueError, match=r"^unknowns must be one of 'tensor', 'parameter'; got 'layer'"):
    derivative_equations(two_layer, params, inputs(2, 2), unknowns="layer")
  with pytest.raises(ValueError, match=r"^rule must be one of 'balanced', 'least_norm', 'last_layer'; got 'fair'"):
    solve(two_layer, params, inputs(2, 2), "fair")


@pytest.mark.parametrize("rcond", [0.0, -1e-4, float("nan")])
def test_rcond_must_be_positive(rcond):
  with pytest.raises(ValueError, match=r"^rcond must be positive"):
    solve(two_layer, two_layer_params(), inputs(2, 2), rcond=rcond)


def test_last_layer_that_names_nothing_is_refused_with_the_choices():
  with pytest.raises(ValueError, match=r"^last_layer must be .*got 'Dense'.*last/kernel"):
    solve(two_layer, two_layer_params(), inputs(2, 2), "last_layer", last_layer="Dense")


def test_last_layer_does_not_match_by_prefix_of_a_name():
  with pytest.raises(ValueError, match=r"^last_layer must be .*got 'las'"):
    solve(two_layer, two_layer_params(), inputs(2, 2), "last_layer", last_layer="las")


def test_columns_must_stand_for_the_tensors_or_the_parameters():
  equations = DerivativeEquations(jnp.ones((2, 5)), jnp.ones(2))
  with pytest.raises(
    ValueError, match=r"^equations must have one column for each of the 4 tensors or 13 param.* got 5"
  ):
    solve_rates(equations, two_layer_params())


@pytest.mark.parametrize("path", ["first", "kernel", "first/kernel/", "First/kernel"])
def test_higher_order_path_must_exist(path):
  with pytest.raises(ValueError, match=rf"^higher_order must name tensors .*got '{path}'"):
    derivative_equations(two_layer, two_layer_params(), inputs(2, 2), higher_order=[(path, (0, 0))])


@pytest.mark.parametrize("index", [(2, 0), (0, 3), (-1, 0), (0,), (0, 0, 0), ()])
def test_higher_order_index_must_exist(index):
  with pytest.raises(ValueError, match=r"^higher_order must hold an index into shape \(2, 3\)"):
    derivative_equations(two_layer, two_layer_params(), inputs(2, 2), higher_order=[("first/kernel", index)])


def test_rates_of_another_structure_are_refused():
  with pytest.raises(ValueError, match=r"^rates must have the tree structure of params"):
    given_rates({"v": 1.0}, {"w": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"^rates must have the tree structure of params"):
    scaling_error(two_layer, two_layer_params(), {"w": 1.0}, inputs(2, 2), ALPHAS)


def test_alphas_must_be_a_vector():
  with pytest.raises(ValueError, match=r"^alphas must have shape \[A\]; got shape \(\)"):
    scaling_error(two_layer, two_layer_params(), two_layer_params(), inputs(2, 2), 0.5)
