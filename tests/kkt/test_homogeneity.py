"""Lambda: rows of the equations by hand and by Hessians, every rule, small biases, symmetries, and the scaling check.

Networks are small and functions of plain tuples; equations of one function are compiled once for all its parameters.
"""

import functools

import chex
import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.optimize

from kkt_jax import tensor_names
from kkt_jax.kkt.homogeneity import derivative_equations, DerivativeEquations, scale_params, scaling_error
from kkt_jax.kkt.rates import balanced, given_rates, groups_table, last_layer, least_norm, parameter_groups

ALPHAS = np.linspace(-1.0, 1.0, 5)
WIDTHS = (2, 5, 4, 3)
# Of the three layers (kernel, bias): weights 1/3 each, a bias has the sum of the rates up to its layer.
THIRDS = [1 / 3, 1 / 3, 1 / 3, 2 / 3, 1 / 3, 1.0]


def normal(*shape, seed=0, scale=0.7):
  return jnp.asarray(scale * np.random.default_rng([seed, *shape]).standard_normal(shape))


def inputs(count, *shape):
  return normal(count, *shape, seed=7, scale=1.0)


def layers(widths=WIDTHS, bias=1.0, seed=0):
  """[(kernel, bias), ...] of normal numbers, biases times ``bias``."""
  return [(normal(m, n, seed=seed), bias * normal(n, seed=seed + 1)) for m, n in zip(widths, widths[1:], strict=False)]


def mlp(params, x, activation=jax.nn.relu):
  for k, (kernel, bias) in enumerate(params):
    x = x @ kernel + bias[None]
    x = activation(x) if k < len(params) - 1 else x
  return x


def gelu_mlp(params, x):
  return mlp(params, x, jax.nn.gelu)


def linear_pair(p, x):
  return x @ p["u"] @ p["v"]


@functools.cache
def system(apply_fn):
  return jax.jit(lambda params, x: derivative_equations(apply_fn, params, x))


def solve(apply_fn, params, x, rule=balanced, **settings):
  return rule(system(apply_fn)(params, x), params, **settings)


def rates_of(solution):
  """One rate per tensor, in the order of the leaves."""
  leaves = jax.tree.leaves(solution.rates)
  assert all(np.ptp(leaf) == 0 for leaf in leaves)
  return np.array([float(leaf.reshape(-1)[0]) for leaf in leaves])


def assert_rates(solution, expected, atol=2e-4):
  expected = list(expected.values()) if isinstance(expected, dict) else expected
  np.testing.assert_allclose(rates_of(solution), expected, atol=atol)


def by_hand(rows, values, **settings):
  return DerivativeEquations(jnp.asarray(rows, float), jnp.asarray(values, float), **settings)


# Rows


def test_first_order_rows_by_hand():
  # h = ReLU([2 * 3 + 1, -1 * 3 + 1]) = [7, 0]; logit = 7 * 5 + 0 * 4 + 6 = 41.
  params = [(jnp.array([[2.0, -1.0]]), jnp.array([1.0, 1.0])), (jnp.array([[5.0], [4.0]]), jnp.array([6.0]))]
  equations = derivative_equations(mlp, params, jnp.array([[3.0]]))
  # first kernel: 2 * 3 * 5 (the second gate is closed); its bias: 1 * 5; last kernel: 7 * 5; last bias: 6.
  np.testing.assert_allclose(equations.coefficients[:1], [[30.0, 5.0, 35.0, 6.0]])
  np.testing.assert_allclose(equations.values[:1], [41.0])
  assert equations.biases == (False, True, False, True)


def test_rows_run_over_inputs_then_outputs_and_kernels_alone_have_no_second_order():
  equations = derivative_equations(lambda w, x: x @ w, jnp.array([[2.0, 3.0]]), jnp.array([[1.0], [10.0]]))
  np.testing.assert_allclose(equations.values, [2.0, 3.0, 20.0, 30.0])
  np.testing.assert_allclose(equations.coefficients, [[2.0], [3.0], [20.0], [30.0]])


def test_higher_order_rows_by_hand():
  # logit = u v x with u = 2, v = 5, x = 3. By u: sum_k Lambda_k (zeta_k d2 + [k = u] d) = d, d = v x = 15, hence
  # Lambda_u (2 * 0 + 15) + Lambda_v (5 * 3) = 15.
  params = {"u": jnp.array([[2.0]]), "v": jnp.array([[5.0]])}
  equations = derivative_equations(linear_pair, params, jnp.array([[3.0]]), higher_order=[("u", (0, 0))])
  np.testing.assert_allclose(equations.coefficients, [[30.0, 30.0], [15.0, 15.0]])
  np.testing.assert_allclose(equations.values, [30.0, 15.0])


def test_rows_agree_with_explicit_gradients_and_hessians():
  with jax.enable_x64(True):
    params, x = layers((2, 3, 2, 2), seed=3), inputs(5, 2)
    network = functools.partial(mlp, activation=jnp.tanh)  # second derivatives of every kind
    equations = derivative_equations(network, params, x, higher_order=[("1/0", (2, 0)), ("0/1", (1,))])
    zeta, unravel = ravel_pytree(params)
    logits = lambda vector: network(unravel(vector), x).reshape(-1)
    phi, gradients, hessians = jax.jit(lambda v: (logits(v), jax.jacfwd(logits)(v), jax.hessian(logits)(v)))(zeta)
  zeta, phi, gradients, hessians = map(np.asarray, (zeta, phi, gradients, hessians))
  leaves = jax.tree.leaves(params)
  ends = np.cumsum([leaf.size for leaf in leaves])
  owner = np.searchsorted(ends, np.arange(zeta.size), side="right")  # the tensor of each parameter
  summed = np.eye(len(ends))[owner]

  def along(v):  # d/dv of sum_k Lambda_k zeta_k dPhi/dzeta_k, and of Phi
    return (zeta * (hessians @ v) + gradients * v) @ summed, gradients @ v

  one = np.eye(zeta.size)
  expected = [(zeta * gradients @ summed, phi)]
  # The random direction lies in the biases; the values of its rows reveal it.
  inside = np.isin(owner, [1, 3, 5])
  v = np.zeros(zeta.size)
  v[inside] = np.linalg.lstsq(gradients[:, inside], equations.values[10:20])[0]
  assert min(np.abs(v[inside])) > 1e-3
  for k in (1, 3, 5):  # each tensor's part moves the logits by their own norm
    assert np.linalg.norm(gradients @ (v * (owner == k))) == pytest.approx(np.linalg.norm(phi), rel=1e-6)
  expected += [along(v), along(one[ends[1] + 2 * 2]), along(one[ends[0] + 1])]
  np.testing.assert_allclose(equations.coefficients, np.concatenate([rows for rows, _ in expected]), atol=1e-8)
  np.testing.assert_allclose(equations.values, np.concatenate([values for _, values in expected]), atol=1e-8)
  assert np.abs(hessians).max() > 0.1  # so that the second order is really compared


# Rules on three layers


def test_balanced_gives_one_third_to_kernels_and_sums_to_biases():
  solution = solve(mlp, layers(), inputs(40, 2))
  assert_rates(solution, THIRDS)
  assert float(solution.target_rate) == pytest.approx(1 / 3, abs=2e-4)
  assert float(solution.residual) < 1e-5
  assert (int(solution.rank), int(solution.null_space_dimension)) == (4, 2)
  groups = [int(leaf.reshape(-1)[0]) for leaf in jax.tree.leaves(parameter_groups(solution))]
  assert groups == [0, 0, 0, 1, 0, 1]  # the two faster biases are left out
  assert not any(leaf.any() for leaf in jax.tree.leaves(solution.undetermined))


def test_least_norm_is_the_minimum_over_all_tensors():
  # Weights a, b, 1 - a - b; biases a, a + b, 1. The derivatives of 2a^2 + b^2 + (1 - a - b)^2 + (a + b)^2 + 1 vanish:
  # 8a + 4b = 2 and 4a + 6b = 2, hence a = 1/8, b = 1/4, and the last weight has 5/8.
  solution = solve(mlp, layers(), inputs(40, 2), least_norm)
  assert_rates(solution, [1 / 8, 1 / 8, 1 / 4, 3 / 8, 5 / 8, 1.0])
  assert float(solution.target_rate) == pytest.approx(1.0, abs=2e-4)  # the last bias alone


def test_last_layer_takes_everything_or_another_layer_does():
  solution = solve(mlp, layers(), inputs(40, 2), last_layer, layer="2")
  assert_rates(solution, [0, 0, 0, 0, 1, 1])
  assert float(solution.target_rate) == pytest.approx(1.0, abs=2e-4)
  # Of weights a, b, 1 - a - b and biases a, a + b, 1 all but layer 1: 2a^2 + (1 - a - b)^2 is least at a = 0, b = 1.
  assert_rates(solve(mlp, layers(), inputs(40, 2), last_layer, layer="1"), [0, 0, 1, 1, 0, 1])


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5, 0.0])
@pytest.mark.parametrize("x64", [False, True])
def test_small_biases_have_the_rates_of_any_other(scale, x64):
  with jax.enable_x64(x64):
    solution = solve(mlp, layers(bias=scale), inputs(40, 2))
  assert_rates(solution, THIRDS, atol=1e-12 if x64 else 1e-4)  # double precision comes back from the callback
  assert int(solution.null_space_dimension) == 2
  assert not any(leaf.any() for leaf in jax.tree.leaves(solution.undetermined))


def test_every_rule_agrees_with_an_independent_optimiser():
  with jax.enable_x64(True):
    params = layers(seed=4)
    equations = system(mlp)(params, inputs(40, 2))
    _, triangular = scipy.linalg.qr(np.column_stack([equations.coefficients, equations.values]), mode="economic")
    rows, values = triangular[:, :6], triangular[:, 6]
    feasible, _, rank, _ = scipy.linalg.lstsq(rows, values, cond=1e-9)
    assert rank == 4
    np.testing.assert_allclose(rates_of(least_norm(equations, params)), feasible, atol=1e-9)
    basis = scipy.linalg.orth(rows.T, rcond=1e-9)
    for rule, kernels in ((balanced, [0, 2, 4]), (functools.partial(last_layer, layer="2"), [0, 1, 2, 3])):
      found = scipy.optimize.minimize(
        lambda rates, kernels=kernels: np.sum(rates[np.array(kernels)] ** 2),
        np.zeros(6),
        constraints={"type": "eq", "fun": lambda rates: basis.T @ (rates - feasible)},
        method="SLSQP",
        options={"ftol": 1e-14},
      )
      solution = rule(equations, params)
      np.testing.assert_allclose(rates_of(solution), found.x, atol=1e-5)
      assert float(solution.residual) < 1e-12


def test_biases_can_be_given():
  # u taken for a bias: v alone is balanced, to 0, and u takes the rate.
  params = {"u": normal(2, 3), "v": normal(3, 1)}
  equations = derivative_equations(linear_pair, params, inputs(4, 2), biases={"u": True, "v": False})
  assert equations.biases == (True, False)
  assert_rates(balanced(equations, params), [1, 0])


# Other networks


def test_layers_that_are_only_kernels_share_the_rate_evenly_under_both_rules():
  network = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["bias"]) @ p["b"]  # names mean nothing
  params = {"a": normal(2, 5), "b": normal(4, 3), "bias": normal(5, 4)}
  for rule in (balanced, least_norm):
    assert_rates(solve(network, params, inputs(20, 2), rule), [1 / 3] * 3)
  assert_rates(solve(network, params, inputs(20, 2), last_layer, layer="b"), [0, 1, 0])


def residual_mlp(p, x):
  h = jax.nn.relu(x @ p["w0"] + p["b0"][None])
  h = h + jax.nn.relu(h @ p["w1"] + p["b1"][None]) @ p["w2"] + p["b2"][None]
  return h @ p["w3"] + p["b3"][None]


def test_residual_network_by_hand():
  # h has rate a, the branch must keep it: w1 has r, w2 has -r, w3 has 1 - a. The sum of squares
  # a^2 + 2 r^2 + (1 - a)^2 is least at a = 1/2, r = 0; two free rates a and r, so the null space has dimension 2.
  shapes = {"w0": (2, 5), "w1": (5, 5), "w2": (5, 5), "w3": (5, 3)} | {f"b{k}": (5,) for k in range(3)} | {"b3": (3,)}
  params = {name: normal(*shape, seed=ord(name[1])) for name, shape in shapes.items()}
  solution = solve(residual_mlp, params, inputs(40, 2))
  assert_rates(solution, {"b0": 0.5, "b1": 0.5, "b2": 0.5, "b3": 1, "w0": 0.5, "w1": 0, "w2": 0, "w3": 0.5})
  assert int(solution.null_space_dimension) == 2


@pytest.mark.parametrize("num_branches", [2, 5])
def test_branches_that_are_added_up_have_the_rate_of_one(num_branches):
  # The sum of branches has their common rate a, the last layer 1 - a: half each, however many branches there are.
  params = {f"branch_{k}": normal(2, 3, seed=k) for k in range(num_branches)} | {"last": normal(3, 2)}
  network = lambda p, x: jax.nn.relu(sum(x @ p[f"branch_{k}"] for k in range(num_branches))) @ p["last"]
  equations = derivative_equations(network, params, inputs(40, 2))
  assert_rates(balanced(equations, params), [0.5] * (num_branches + 1))
  share = 1 / (num_branches + 1)  # k a^2 + (1 - a)^2 is least at a = 1 / (k + 1)
  assert_rates(least_norm(equations, params), [share] * num_branches + [1 - share])


def convolutional(p, x):
  dimensions = ("NHWC", "HWIO", "NHWC")
  x = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=dimensions)
  x = jax.nn.relu(x + p["conv_bias"][None, None, None])
  return x.reshape(len(x), -1) @ p["dense"] + p["dense_bias"][None]


def test_convolutional_network_has_the_rates_of_two_layers():
  params = {"conv": normal(3, 3, 1, 2), "conv_bias": normal(2), "dense": normal(32, 3), "dense_bias": normal(3)}
  assert_rates(solve(convolutional, params, inputs(20, 4, 4, 1)), [0.5, 0.5, 0.5, 1.0])


def test_gelu_network_is_quasi_homogeneous_in_its_linear_last_layer_only():
  # The last layer is linear, so rates 1 there and 0 elsewhere are exact for any network; nothing else is.
  params, x = layers((2, 5, 3)), inputs(40, 2)
  solution = solve(gelu_mlp, params, x)
  assert int(solution.null_space_dimension) == 0
  assert_rates(solution, [0, 0, 1, 1], atol=1e-3)
  halves = given_rates(jax.tree.map(lambda _: 1 / 2, params), params)
  assert float(scaling_error(gelu_mlp, params, halves.rates, x, ALPHAS)) > 0.1


def test_gelu_of_the_logits_leaves_a_residual():
  params, x = layers((2, 3)), inputs(40, 2)
  network = lambda p, x: jax.nn.gelu(gelu_mlp(p, x))
  solution = solve(network, params, x)
  assert float(solution.residual) > 1e-2
  assert float(scaling_error(network, params, solution.rates, x, ALPHAS)) > 0.1


def norm_mlp(params, x):
  """Dense, batch norm and ReLU, twice, then Dense; batch statistics, epsilon 1e-5."""
  for kernel, bias, scale, shift in params[:-1]:
    x = x @ kernel + bias[None]
    x = (x - x.mean(0, keepdims=True)) * jax.lax.rsqrt(x.var(0, keepdims=True) + 1e-5)
    x = jax.nn.relu(x * scale[None] + shift[None])
  return x @ params[-1][0] + params[-1][1][None]


def norm_params(bias=1.0, scale=1.0):
  hidden = [
    (scale * normal(m, n), bias * normal(n), 1 + 0.3 * normal(n, seed=1), bias * normal(n, seed=2))
    for m, n in ((2, 5), (5, 4))
  ]
  return [*hidden, (normal(4, 3), bias * normal(3))]


@pytest.mark.parametrize(
  ("x64", "bias", "scale"),
  [
    (0, 1, 1),
    (0, 0, 1),
    (0, 0, 0.01),
    pytest.param(1, 1, 1, marks=pytest.mark.slow),
    pytest.param(1, 0, 0.01, marks=pytest.mark.slow),
  ],
)
def test_batch_norm_puts_the_rates_on_the_last_normalisation_and_the_last_layer(x64, bias, scale):
  # Rates before the last normalisation do not matter; its scale and shift and the last kernel share 1.
  with jax.enable_x64(bool(x64)):
    params = norm_params(bias, scale)
    solution = solve(norm_mlp, params, inputs(40, 2))
    groups = [int(leaf.reshape(-1)[0]) for leaf in jax.tree.leaves(parameter_groups(solution))]
    table = groups_table(solution)
  assert_rates(solution, [0, 0, 0, 0, 0, 0, 0.5, 0.5, 0.5, 1], atol=1e-3)
  assert groups == [-1, -1, -1, -1, -1, -1, 0, 0, 0, 1]
  undetermined = [bool(leaf.any()) for leaf in jax.tree.leaves(solution.undetermined)]
  assert undetermined == [False, True, False, False] * 2 + [False, False]  # biases before batch norm
  assert "(5,)    0.000  zero (rate undetermined)" in table


def test_batch_norm_scales_exactly_under_every_rule():
  params, x = norm_params(), inputs(40, 2)
  network = jax.jit(norm_mlp)
  logits = network(params, x)
  for rule in (balanced, least_norm, functools.partial(last_layer, layer="2")):
    rates = solve(norm_mlp, params, x, rule).rates
    for alpha in (-1.0, -0.3, 1.0):  # against the size of the logits: single ones come near 0
      moved = network(scale_params(params, rates, alpha), x)
      np.testing.assert_allclose(moved, jnp.exp(alpha) * logits, atol=1e-3 * float(jnp.max(jnp.abs(logits))))


@pytest.mark.parametrize("rule", [balanced, least_norm, functools.partial(last_layer, layer="2")])
def test_scaling_is_exact_under_every_rule(rule):
  with jax.enable_x64(True):  # in single precision a logit near 0 would show rounding, not an error of Lambda
    params, x = layers(), inputs(40, 2)
    rates = solve(mlp, params, x, rule).rates
    assert float(scaling_error(mlp, params, rates, x, ALPHAS)) < 1e-9


def test_tensors_without_influence_are_undetermined_and_change_nothing():
  network = lambda p, x: mlp(p["layers"], x)
  params = {"layers": layers((2, 5, 3)), "unused": normal(3), "zeros": jnp.zeros((2, 2))}
  solution = solve(network, params, inputs(40, 2))
  assert_rates(solution, [0.5, 0.5, 0.5, 1, 0, 0])
  assert [bool(leaf.any()) for leaf in jax.tree.leaves(solution.undetermined)] == [False] * 4 + [True] * 2


@pytest.mark.slow
def test_higher_order_rows_are_satisfied_and_do_not_remove_the_null_space():
  with jax.enable_x64(True):
    params, x = layers(), inputs(40, 2)
    chosen = (("0/0", (0, 1)), ("1/1", (2,)), ("2/0", (3, 2)))
    equations = derivative_equations(mlp, params, x, higher_order=chosen)
    assert equations.coefficients.shape == (40 * 3 * (2 + 3), 6)
    assert np.abs(equations.coefficients[240:]).max() > 0.1
    rates = rates_of(solve(mlp, params, x))
    np.testing.assert_allclose(equations.coefficients @ rates, equations.values, atol=1e-9)
    solution = balanced(equations, params)
    assert_rates(solution, THIRDS, atol=1e-9)
    assert int(solution.null_space_dimension) == 2


def test_one_input_leaves_a_larger_null_space():
  params = {"u": normal(1, 2), "v": normal(2, 1), "w": normal(1, 1)}
  network = lambda p, x: x @ p["u"] @ p["v"] + x**2 @ p["w"]
  solution = balanced(derivative_equations(network, params, jnp.array([[1.3]])), params)
  assert (int(solution.rank), int(solution.null_space_dimension)) == (1, 2)
  assert float(solution.residual) < 1e-5


# The solver, on equations by hand

PARAMS = {"b": jnp.array([1.0]), "v": jnp.array([2.0]), "w": jnp.array([3.0])}
BIAS = {"biases": (True, False, False)}


def test_inconsistent_equations_leave_their_residual():
  # rate = 1 and rate = 3: least squares gives 2, error (1, -1), |error| / |values| = sqrt(2) / sqrt(10).
  solution = balanced(by_hand([[1.0], [1.0]], [1.0, 3.0]), {"w": jnp.array([2.0])})
  assert_rates(solution, {"w": 2.0})
  assert float(solution.residual) == pytest.approx((2 / 10) ** 0.5, rel=1e-5)
  assert int(solution.null_space_dimension) == 0


@pytest.mark.parametrize("repeats", [1, 7])
def test_fewer_equations_than_unknowns_and_repeated_ones(repeats):
  # v + w = 1 alone: they share it, the free bias gets 0.
  solution = balanced(by_hand([[0.0, 1.0, 1.0]] * repeats, [1.0] * repeats, **BIAS), PARAMS)
  assert_rates(solution, [0, 0.5, 0.5])
  assert (int(solution.rank), int(solution.null_space_dimension)) == (1, 2)


def test_all_zero_equations_give_zero_rates():
  solution = least_norm(by_hand(np.zeros((4, 3)), np.zeros(4)), PARAMS)
  assert_rates(solution, [0, 0, 0])
  assert (int(solution.rank), int(solution.null_space_dimension), float(solution.residual)) == (0, 3, 0.0)


def test_rates_that_the_equations_fix_are_left_alone_by_every_rule():
  for rule in (balanced, least_norm, functools.partial(last_layer, layer="w")):
    assert_rates(rule(by_hand(np.eye(3), [0.25, -0.5, 2.0], **BIAS), PARAMS), [0.25, -0.5, 2.0])


def test_balanced_ignores_the_rate_of_biases():
  # b = 10 v and v + w = 1: over the kernels alone 1/2, 1/2; over all tensors 101 v = w.
  equations = by_hand([[1.0, -10.0, 0.0], [0.0, 1.0, 1.0]], [0.0, 1.0], **BIAS)
  solution = balanced(equations, PARAMS)
  assert_rates(solution, [5.0, 0.5, 0.5])
  assert float(solution.target_rate) == pytest.approx(0.5, abs=1e-5)  # the faster bias does not count
  assert_rates(least_norm(equations, PARAMS), [10 / 102, 1 / 102, 101 / 102], atol=1e-5)
  # Least over b and v alone: both 0, so w has 1.
  assert_rates(last_layer(equations, PARAMS, layer="w"), [0, 0, 1], atol=1e-5)


def test_columns_are_divided_by_their_size_before_the_rank_is_decided():
  # The first column is small because its tensor is (size 1e-3), or because of a symmetry (size 1e3).
  rows, values = [[1e-4, 0.0], [0.0, 1.0]], [2e-4, 1.0]
  params = {"v": jnp.ones(1), "w": jnp.ones(1)}
  small = least_norm(by_hand(rows, values, sizes=jnp.array([1e-3, 1.0])), params)
  symmetry = least_norm(by_hand(rows, values, sizes=jnp.array([1e3, 1.0])), params)
  # 100 is nothing beside 1e9: the first rate is undetermined.
  nothing = least_norm(by_hand([[1e2, 0.0], [0.0, 1e9]], [2e2, 1e9], sizes=jnp.array([1e2, 1e9])), params)
  assert_rates(small, [2.0, 1.0])
  assert_rates(symmetry, [0.0, 1.0])
  assert_rates(nothing, [0.0, 1.0])
  assert [bool(leaf[0]) for leaf in jax.tree.leaves(nothing.undetermined)] == [True, False]
  assert [int(solution.rank) for solution in (small, symmetry, nothing)] == [2, 1, 1]


def test_norms_are_least_in_the_rates_and_not_in_the_scaled_columns():
  # 3 v + w = 10: the least v^2 + w^2 is (3, 1); with columns scaled to 1 it would be v = 5/3, w = 5.
  equations = by_hand([[0.0, 3.0, 1.0]], [10.0], sizes=jnp.array([1.0, 3.0, 1.0]))
  params = {"b": jnp.ones(1), "x": {"v": jnp.ones(1), "w": jnp.ones(1)}}
  for rule in (least_norm, functools.partial(last_layer, layer="x")):  # minimised: all, or b alone and then all
    assert_rates(rule(equations, params), [0.0, 3.0, 1.0], atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_balanced_has_the_least_greatest_rate_and_then_the_least_norm(seed):
  # An independent optimiser: a linear program, then a constrained minimisation.
  random = np.random.default_rng(seed)
  num_unknowns = 4
  rows = random.normal(size=(1 + seed % 3, num_unknowns))
  values = random.normal(size=len(rows))
  params = {f"w{k}": jnp.array([1.0]) for k in range(num_unknowns)}
  missing = 3 - len(rows)  # rows of zeros, for one shape
  found = rates_of(balanced(by_hand(np.pad(rows, ((0, missing), (0, 0))), np.pad(values, (0, missing))), params))
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
  assert np.sum(found**2) <= flattest.fun + 4e-3 * max(1.0, flattest.fun)


def test_no_rate_grows_for_a_trace_of_the_greatest():
  # The rate of b matters by 1e-5 only, as that of a kernel before batch norm does for its epsilon.
  assert_rates(balanced(by_hand([[1e-5, 1.0, 1.0]], [1.0]), PARAMS), [0, 0.5, 0.5], atol=1e-3)


def test_equations_count_from_the_root_of_eps_and_not_below_one_in_a_million():
  params = {"v": jnp.array([1.0]), "w": jnp.array([1.0])}
  ranks = {}
  for x64 in (False, True):
    with jax.enable_x64(x64):
      sizes = (1e-3, 1e-4, 1e-5, 1e-7)  # the root of eps is 3e-4 in single and 1e-8 in double precision
      ranks[x64] = [int(least_norm(by_hand([[1.0, 0.0], [0.0, size]], [1.0, size]), params).rank) for size in sizes]
  assert ranks == {False: [2, 1, 1, 1], True: [2, 2, 2, 1]}


def test_equations_that_are_not_numbers_give_rates_that_are_not():
  equations = by_hand(np.full((2, 3), np.nan), np.ones(2), **BIAS)
  assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(least_norm(equations, PARAMS).rates))
  with pytest.raises(ValueError, match=r"^params must have a tensor of the target rate, nan, (.|\n)*biases="):
    balanced(equations, PARAMS)


# Transformations and precision


def test_equations_and_solution_under_jit_vmap_and_grad():
  widths, x = (2, 5, 3), inputs(40, 2)
  each = [layers(widths, seed=seed, bias=bias) for seed, bias in ((0, 1.0), (5, 0.0))]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
  solutions = jax.jit(jax.vmap(lambda p: balanced(derivative_equations(mlp, p, x), p)))(stacked)
  for k, params in enumerate(each):
    own = jax.tree.map(lambda leaf, k=k: leaf[k], solutions)
    chex.assert_trees_all_close(own, solve(mlp, params, x), rtol=1e-3, atol=2e-4)
    assert_rates(own, [0.5, 0.5, 0.5, 1])

  def loss(x):  # rates are constants: what is left is d/dx of x / 2
    rates = solve(linear_pair, {"u": jnp.ones((2, 1)), "v": jnp.ones((1, 1))}, x).rates
    return jnp.sum(rates["u"][0, 0] * x)

  np.testing.assert_allclose(jax.grad(loss)(inputs(4, 2)), np.full((4, 2), 0.5), atol=1e-4)
  residual = lambda rows: least_norm(DerivativeEquations(rows, jnp.array([1.0, 3.0])), {"w": jnp.ones(1)}).residual
  np.testing.assert_array_equal(jax.grad(residual)(jnp.ones((2, 1))), np.zeros((2, 1)))


def test_sixteen_bits_are_computed_with_in_float32():
  params, x = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (layers(), inputs(40, 2)))
  assert_rates(solve(mlp, params, x), THIRDS)


def test_solution_is_an_argument_and_a_result_of_a_jitted_function():
  solution = solve(mlp, layers(), inputs(40, 2))
  doubled = jax.jit(lambda s: jax.tree.map(lambda leaf: 2 * leaf, s))(solution)
  assert type(doubled) is type(solution)
  assert float(doubled.target_rate) == pytest.approx(2 * float(solution.target_rate))
  chex.assert_trees_all_close(doubled.rates, jax.tree.map(lambda leaf: 2 * leaf, solution.rates))


# Groups, given rates, scaling


@pytest.mark.parametrize("tolerance", [1e-3, 0.25])
def test_groups_by_hand(tolerance):
  rates = {"w": jnp.array([0.0, 0.3, 0.4995, 0.5, 0.7, 0.8])}
  groups = parameter_groups(given_rates(rates, rates, target_rate=0.5), tolerance=tolerance)["w"]
  assert groups.tolist() == ([-1, -1, 0, 0, 1, 1] if tolerance == 1e-3 else [-1, 0, 0, 0, 0, 1])


def test_given_rates_spread_over_their_tensor_and_the_greatest_is_the_target():
  params = layers((2, 3, 1))
  solution = given_rates([(0.5, 0.5), (0.5, 1.0)], params)
  chex.assert_trees_all_equal_shapes_and_dtypes(solution.rates, params)
  assert_rates(solution, [0.5, 0.5, 0.5, 1.0])
  assert float(solution.target_rate) == 1.0
  assert np.isnan(solution.residual) and int(solution.rank) == -1  # nothing was solved
  for rate in (0.25, 0.0):
    assert float(given_rates({"w": 1.0}, {"w": jnp.ones(2)}, target_rate=rate).target_rate) == rate


def test_scale_params_multiplies_each_by_its_own_power():
  params = {"u": jnp.array([2.0, 3.0]), "v": jnp.array([[5.0]])}
  scaled = scale_params(params, {"u": jnp.array([0.0, 1.0]), "v": jnp.array([[2.0]])}, jnp.log(2.0))
  np.testing.assert_allclose(scaled["u"], [2.0, 6.0], rtol=1e-6)  # 2 * 2^0, 3 * 2^1
  np.testing.assert_allclose(scaled["v"], [[20.0]], rtol=1e-6)  # 5 * 2^2


@pytest.mark.parametrize("x", [[[1.0], [-4.0]], [[-4.0]], [[2.0]]], ids=["both signs", "negative", "positive"])
def test_scaling_error_by_hand_whatever_the_sign_of_the_logits(x):
  # logit w x with rate 2 instead of 1: e^(2a) / e^a - 1 = e^a - 1; over a = log 2, log 1/2 the worst is 1.
  alphas = np.log([2, 0.5])
  error = scaling_error(lambda p, x: x @ p, jnp.array([[3.0]]), jnp.array([[2.0]]), jnp.array(x), alphas)
  assert float(error) == pytest.approx(1.0, rel=1e-5)


def test_zero_logits_count_by_their_absolute_difference():
  # logit w + b with w = 1, b = -1, rates 1 and 0: at a = log 3 it is 3 - 1 = 2 where 0 is expected.
  params, rates = {"b": jnp.array([-1.0]), "w": jnp.array([1.0])}, {"b": jnp.array([0.0]), "w": jnp.array([1.0])}
  network = lambda p, x: x * (p["w"] + p["b"])[None, :]
  error = scaling_error(network, params, rates, jnp.ones((1, 1)), jnp.log(jnp.array([3.0])))
  assert float(error) == pytest.approx(2.0, rel=1e-5)


def test_groups_table_text():
  params = {"first": {"bias": jnp.ones(4), "kernel": jnp.ones((2, 4))}, "last": {"bias": jnp.ones(3), "w": jnp.ones(3)}}
  rates = {"first": {"bias": 0.5, "kernel": -0.0001}, "last": {"bias": 1.0, "w": jnp.array([0.0, 0.5, 1.0])}}
  assert groups_table(given_rates(rates, params, target_rate=0.5)) == "\n".join(
    [
      "tensor        shape           rate  condition",
      "first/bias    (4,)           0.500  target",
      "first/kernel  (2, 4)         0.000  zero",
      "last/bias     (3,)           1.000  left out",
      "last/w        (3,)    0.000..1.000  zero/target/left out",
    ]
  )


def test_tensor_names_follow_the_order_of_the_leaves_and_are_distinct():
  assert tensor_names([(1.0, 2.0), {"a": 3.0}]) == ["0/0", "0/1", "1/a"]
  with pytest.raises(ValueError, match=r"^params must have a path of its own for every tensor; got .*\['a/b'\]"):
    tensor_names({"a/b": 1.0, "a": {"b": 2.0}})


# What is refused


def test_balanced_never_takes_the_last_bias_in_silence():
  with pytest.raises(ValueError, match=r"^equations must have a tensor that is no bias.*biases="):
    balanced(by_hand([[1.0]], [1.0], biases=(True,)), {"b": jnp.ones(1)})
  # The kernel of the target rate is 0 everywhere: an empty target.
  equations, params = by_hand([[1.0, 0.0], [0.0, 1.0]], [1.0, 0.5]), {"v": jnp.zeros(1), "w": jnp.ones(1)}
  with pytest.raises(ValueError, match=r"^params must have a tensor of the target rate, 1, (.|\n)*biases="):
    balanced(equations, params)
  with pytest.raises(ValueError, match=r"^params must have a tensor of the target rate, -inf"):
    balanced(by_hand([[0.0, 1.0]], [1.0], sizes=jnp.array([0.0, 1.0]), biases=(False, True)), params)


@pytest.mark.parametrize(
  ("params", "needs"),
  [
    ({}, "at least one tensor"),
    ({"w": jnp.ones((2, 1), int)}, "floating point; got dtype int"),
    ({"w": jnp.ones((2, 0))}, r"no tensor without entries; got shape \(2, 0\) at w"),
    ({"w": jnp.full((2, 1), jnp.nan)}, "finite; w holds a NaN"),
    ({"a/b": jnp.ones((2, 1)), "a": {"b": jnp.ones(1)}}, "a path of its own for every tensor"),
  ],
  ids=["empty", "integers", "zero size", "nan", "colliding names"],
)
def test_parameters_that_cannot_be_solved_for_are_refused(params, needs):
  with pytest.raises(ValueError, match=rf"^params.* must .*{needs}"):
    derivative_equations(lambda p, x: x @ p["w"], params, inputs(3, 2))


@pytest.mark.parametrize(
  ("x", "needs"),
  [
    (jnp.ones(2), r"a batch of shape \[M, \.\.\.\]"),
    (jnp.ones((0, 2)), "at least one sample"),
    (jnp.ones((3, 2), int), "floating point; got dtype int"),
  ],
  ids=["no batch", "empty", "integers"],
)
def test_inputs_that_are_no_batch_of_floats_are_refused(x, needs):
  for call in (derivative_equations, lambda f, p, x: scaling_error(f, p, p, x, ALPHAS)):
    with pytest.raises(ValueError, match=f"^x must .*{needs}"):
      call(mlp, layers(), x)


@pytest.mark.parametrize("layer", ["Dense", "Dense_", "kernel", ""])
def test_layer_must_be_the_whole_path_of_one(layer):
  params = {"Dense_1": {"kernel": jnp.ones(1)}, "Dense_10.weight": jnp.ones(1)}
  with pytest.raises(ValueError, match=rf"^layer must be the path of a layer; got '{layer}', .*Dense_1/kernel"):
    last_layer(by_hand([[1.0, 1.0]], [1.0]), params, layer=layer)
  assert_rates(last_layer(by_hand([[1.0, 1.0]], [1.0]), params, layer="Dense_10"), [0, 1])
  assert_rates(last_layer(by_hand([[1.0, 1.0]], [1.0]), params, layer="Dense_1"), [1, 0])


def test_columns_must_stand_for_the_tensors():
  with pytest.raises(ValueError, match=r"^equations must have one column for each of the 4 tensors of params; got 5"):
    least_norm(by_hand(np.ones((2, 5)), np.ones(2)), layers((2, 3, 1)))


@pytest.mark.parametrize("path", ["0", "0/0/", "2/0"])
def test_higher_order_path_must_exist(path):
  with pytest.raises(ValueError, match=rf"^higher_order must name tensors .*got '{path}'"):
    derivative_equations(mlp, layers((2, 3, 1)), inputs(2, 2), higher_order=[(path, (0, 0))])


@pytest.mark.parametrize("index", [(2, 0), (0, 3), (-1, 0), (0,), ()])
def test_higher_order_index_must_exist(index):
  with pytest.raises(ValueError, match=r"^higher_order must hold an index into shape \(2, 3\)"):
    derivative_equations(mlp, layers((2, 3, 1)), inputs(2, 2), higher_order=[("0/0", index)])


def test_trees_of_another_structure_are_refused():
  with pytest.raises(ValueError, match=r"^rates must have the tree structure of params"):
    given_rates({"v": 1.0}, {"w": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"^rates must have the tree structure of params"):
    scaling_error(mlp, layers(), {"w": 1.0}, inputs(2, 2), ALPHAS)
  with pytest.raises(ValueError, match=r"^biases must have the tree structure of params"):
    derivative_equations(mlp, layers(), inputs(2, 2), biases=[True])
  with pytest.raises(ValueError, match=r"^rates\['w'\] must have shape"):
    given_rates({"w": jnp.ones(3)}, {"w": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"^alphas must have shape \[A\]; got shape \(\)"):
    scaling_error(mlp, layers(), layers(), inputs(2, 2), 0.5)
