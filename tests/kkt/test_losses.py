"""The losses, one equation at a time: numbers by hand, explicit loops, a naive formula, edges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.kkt import Conditions, losses, multipliers, per_sample_jacobians, symmetries, weight_decay_conditions
from kkt_jax.kkt.multipliers import from_softmax

PARAMS = {"w": jnp.ones((2, 3)), "v": jnp.ones(3)}
MEASURES = {
  "cosine_distance": losses.cosine_distance,
  "absolute_residual": losses.absolute_residual,
  "squared_residual": losses.squared_residual,
  "relative_residual": losses.relative_residual,
  "mean_relative_residual": losses.mean_relative_residual,
}


def linear(w, x):
  return x @ w


def normal(*shape, seed=7):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def relu_network(p, x):
  return jax.nn.relu(x @ p["w1"] + p["b1"][None]) @ p["w2"] + p["b2"][None]


def coupled_network(p, x):
  """Batch norm on batch statistics: every logit depends on every sample."""
  h = x @ p["w1"]
  h = (h - h.mean(0, keepdims=True)) / jnp.sqrt(h.var(0, keepdims=True) + 1e-5) + p["b1"][None]
  return jax.nn.relu(h) @ p["w2"] + p["b2"][None]


def problem(num_samples=5, width=4, num_classes=3):
  params = {
    "w1": normal(2, width, seed=1),
    "b1": normal(width, seed=2),
    "w2": normal(width, num_classes, seed=3),
    "b2": normal(num_classes, seed=4),
  }
  mu = jnp.asarray(np.random.default_rng(5).uniform(size=(num_samples, num_classes)), jnp.float32)
  return params, normal(num_samples, 2, seed=6), jnp.arange(num_samples) % num_classes, mu


# Margins


def test_margins_are_true_minus_other_and_infinite_at_the_true_class():
  logits, classes = jnp.array([[3.0, 1.0, 2.5], [0.5, 4.0, -1.0]]), jnp.array([0, 2])
  # 3 - 1 = 2, 3 - 2.5 = 0.5; -1 - 0.5 = -1.5, -1 - 4 = -5.
  np.testing.assert_allclose(losses.margins(logits, classes), [[np.inf, 2.0, 0.5], [-1.5, -5.0, np.inf]])
  np.testing.assert_allclose(losses.runner_up_margin(logits, classes), [0.5, -5.0])
  np.testing.assert_array_equal(losses.is_true_class(logits, [0, 2]), [[True, False, False], [False, False, True]])


def test_runner_up_set_holds_every_tied_class_and_never_the_true_one():
  logits = jnp.array([[2.0, 2.0, 2.0], [0.0, 1.0, 3.0], [5.0, 5.0, 1.0]])
  found = losses.runner_up_set(logits, jnp.array([1, 2, 2]))
  np.testing.assert_array_equal(found, [[True, False, True], [False, True, False], [True, True, False]])
  near = losses.runner_up_set(jnp.array([[9.0, 2.0, 1.75, 1.0]]), jnp.array([0]), tolerance=0.5)
  np.testing.assert_array_equal(near, [[False, True, True, False]])


def test_tied_runners_up_share_the_gradient_of_the_margin():
  gradient = jax.grad(lambda logits: losses.runner_up_margin(logits, jnp.array([0]))[0])
  np.testing.assert_allclose(gradient(jnp.array([[4.0, 1.0, 1.0, 0.0]])), [[1.0, -0.5, -0.5, 0.0]])


MARGIN_FUNCTIONS = {
  "margins": losses.margins,
  "runner_up_margin": losses.runner_up_margin,
  "runner_up_set": losses.runner_up_set,
  "duality_loss": lambda logits, classes: losses.duality_loss(logits, classes, 0.0, delta=0.1),
  "stationarity_sum": lambda logits, classes: losses.stationarity_sum(
    lambda p, x: p, logits, jnp.ones((jnp.shape(logits)[0], 1)), classes, jnp.ones(jnp.shape(logits))
  ),
  "stationarity_sum_from_jacobians": lambda logits, classes: losses.stationarity_sum_from_jacobians(
    logits, classes, jnp.ones(jnp.shape(logits))
  ),
}


@pytest.mark.parametrize("function", MARGIN_FUNCTIONS.values(), ids=MARGIN_FUNCTIONS.keys())
def test_logits_and_classes_that_do_not_fit_are_refused(function):
  for logits, classes, message in [
    (jnp.ones((2, 1)), jnp.array([0, 0]), r"^logits must have at least two classes; got shape \(2, 1\)"),
    (jnp.ones((2, 3)), jnp.array([0]), r"^classes must have shape \[M\] = \(2,\); got shape \(1,\)"),
    (jnp.ones((2, 3)), jnp.array([[0], [1]]), r"^classes must have shape \[M\]"),
    (jnp.ones((2, 3)), jnp.array([0.0, 1.0]), r"^classes must be integers; got dtype float"),
    (jnp.ones((2, 3)), jnp.array([True, False]), r"^classes must be integers; got dtype bool"),
    (jnp.ones((2, 3)), jnp.array([0, 3]), r"^classes must lie in 0\.\.2; got 0\.\.3"),
    (jnp.ones((2, 3)), jnp.array([-1, 2]), r"^classes must lie in 0\.\.2; got -1\.\.2"),
    (jnp.ones((2, 3)), np.array([0, 2**32]), r"^classes must lie in 0\.\.2; got 0\.\.4294967296"),
  ]:
    with pytest.raises(ValueError, match=message):
      function(logits, classes)


@pytest.mark.parametrize("name", ["margins", "runner_up_margin", "runner_up_set", "duality_loss"])
def test_logits_of_another_rank_are_refused_and_an_empty_batch_is_not(name):
  function = MARGIN_FUNCTIONS[name]
  for shape in [(3,), (3, 3, 1)]:
    with pytest.raises(ValueError, match=r"^logits must have shape \[M, C\]; got shape \(3,"):
      function(jnp.ones(shape), jnp.array([0, 0, 0]))
  assert function(jnp.zeros((0, 3)), jnp.zeros((0,), int)).shape[0] == 0


def test_classes_may_be_hidden_by_a_transformation():
  logits, classes = jnp.array([[3.0, 1.0], [0.0, 4.0]]), jnp.array([0, 1])
  np.testing.assert_array_equal(jax.jit(losses.runner_up_margin)(logits, classes), [2.0, 4.0])
  np.testing.assert_array_equal(
    jax.vmap(losses.runner_up_margin)(logits[:, None], classes[:, None]), jnp.array([[2.0], [4.0]])
  )


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.uint16, jnp.int16])
@pytest.mark.parametrize("function", MARGIN_FUNCTIONS.values(), ids=MARGIN_FUNCTIONS.keys())
def test_classes_in_few_bits_are_those_of_many(function, dtype):
  classes = jnp.array([100, int(jnp.iinfo(dtype).max) % 300], dtype)
  logits = normal(2, 300)
  chex.assert_trees_all_equal(function(logits, classes), function(logits, classes.astype(jnp.int32)))


# Duality


def test_u_shape_is_the_function_of_fig_2():
  # alpha = -log 2, so that e^-alpha = 2; the bottom is [2, 2.5].
  margin = jnp.array([-1.0, 0.0, 1.5, 2.0, 2.25, 2.5, 3.0, 10.0])
  found = losses.u_shape(margin, -jnp.log(2.0), delta=0.5)
  # left: 2 - m = 3, 2, 0.5; bottom: 0; right: m - 2.5 = 0.5, 7.5.
  np.testing.assert_allclose(found, [3.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.5, 7.5], atol=1e-6)
  margin = np.linspace(-3.0, 4.0, 29)
  caption = np.maximum(margin - np.exp(-0.4) - 0.25, 0) - np.minimum(margin - np.exp(-0.4), 0)
  np.testing.assert_allclose(losses.u_shape(jnp.asarray(margin), 0.4, delta=0.25), caption, atol=1e-6)
  np.testing.assert_allclose(losses.u_shape(margin, 0.0, delta=0), np.abs(margin - 1.0), atol=1e-6)


def test_slopes_of_the_u_shape():
  slope = jax.vmap(jax.grad(lambda m: losses.u_shape(m, 0.0, delta=0.5)))
  np.testing.assert_array_equal(slope(jnp.array([0.9, 1.0, 1.2, 1.5, 1.6])), [-1.0, 0.0, 0.0, 0.0, 1.0])  # 0 at kinks
  # d/dalpha e^-alpha = -e^-alpha: below, the value e^-alpha - m falls by e^-alpha; above it rises by as much.
  slope = jax.grad(lambda a, m: losses.u_shape(m, a, delta=0.1))
  for margin, expected in [(0.1, -np.exp(-0.5)), (3.0, np.exp(-0.5)), (np.exp(-0.5) + 0.05, 0.0)]:
    assert float(slope(0.5, margin)) == pytest.approx(expected, rel=1e-5)


def duality_loop(logits, classes, alpha, delta):
  """Eq. 6 before its mean, as the paper writes it."""
  values = []
  for row, label in zip(np.asarray(logits, np.float64), np.asarray(classes), strict=True):
    others = [c for c in range(len(row)) if c != label]
    strongest = max(row[c] for c in others)
    total = 0.0
    for c in others:
      if row[c] == strongest:
        gap = row[label] - row[c] - np.exp(-alpha)
        total += max(gap - delta, 0.0) - min(gap, 0.0)
    values.append(total)
  return values


def test_duality_loss_equals_the_loop_over_eq_6():
  by_hand = [
    [3.0, 1.0, 1.0, 1.0],  # three tied runners-up
    [3.0, 2.75, 0.0, 2.75],  # two, margin too small
    [0.0, 2.0, -1.0, 0.5],  # misclassified
    [1.0, 1.0, 1.0, 1.0],  # all tied, true class too
    [1.5, 0.25, 0.0, 0.0],  # inside the bottom
  ]
  logits = jnp.concatenate([jnp.array(by_hand), 2.0 * normal(30, 4)])
  classes = jnp.concatenate([jnp.array([0, 0, 3, 2, 0]), jnp.arange(30) % 4])
  found = losses.duality_loss(logits, classes, 0.2, delta=0.5)
  np.testing.assert_allclose(found, duality_loop(logits, classes, 0.2, 0.5), rtol=1e-5, atol=1e-5)
  assert found[0] > 0 and found[1] > 0 and found[2] > 0 and found[4] == 0  # every case is really in there


def test_gradient_of_the_duality_loss_reaches_every_tied_runner_up_the_true_class_and_alpha():
  loss = lambda v, a: losses.duality_loss(v, jnp.array([0]), a, delta=0.5)[0]
  by_logits, by_alpha = jax.grad(loss, argnums=(0, 1))(jnp.array([[5.0, 1.0, 1.0, 0.0]]), 0.3)
  np.testing.assert_allclose(by_logits, [[2.0, -1.0, -1.0, 0.0]])  # two margins of 4, each with slope 1
  assert float(by_alpha) == pytest.approx(2 * np.exp(-0.3), rel=1e-5)  # both are above the bottom
  everything = jax.grad(loss, argnums=(0, 1))(jnp.array([[2.0, 2.0, 2.0]]), 0.3)
  assert all(bool(jnp.all(jnp.isfinite(part))) for part in everything)  # though the true class has margin infinity


def test_relative_duality_loss_is_in_units_of_the_wanted_margin():
  # e^-alpha = 2. Margins 6 and 1 are 3 and 1/2 units: 3 - 1 - 0.5 above and 1 - 1/2 below, twice, for two are tied.
  logits, classes, alpha = jnp.array([[6.0, 0.0, -9.0], [0.0, 1.0, 0.0]]), jnp.array([0, 1]), -jnp.log(2.0)
  loss = lambda a: losses.duality_loss(logits, classes, a, delta=0.5, relative=True)
  np.testing.assert_allclose(loss(alpha), [1.5, 2 * 0.5], rtol=1e-5)
  # The unit itself is a constant: 3 - e^(log 2 - alpha') - 0.5 and e^(log 2 - alpha') - 1/2, twice.
  np.testing.assert_allclose(jax.jacobian(loss)(alpha), [1.0, -2.0], rtol=1e-5)


def test_arguments_of_the_duality_loss_that_do_not_fit_are_refused():
  logits, classes = jnp.ones((3, 3)), jnp.array([0, 1, 2])
  for delta in (-0.1, float("nan")):
    with pytest.raises(ValueError, match=r"^delta must be at least 0"):
      losses.duality_loss(logits, classes, 0.0, delta=delta)
  for shape in [(3,), (3, 1), (1,), (5, 3, 3)]:  # they would broadcast
    with pytest.raises(ValueError, match=r"^alpha must have shape \(\); got shape"):
      losses.duality_loss(logits, classes, jnp.zeros(shape), delta=0.1)


def test_nan_logits_reach_the_duality_loss():
  logits = jnp.array([[jnp.nan, 0.0, 1.0], [1.0, jnp.nan, 0.0]])
  assert bool(jnp.all(jnp.isnan(losses.duality_loss(logits, jnp.array([0, 0]), 0.0, delta=0.1))))


# The stationarity sum


def test_stationarity_sum_of_a_linear_network_by_hand():
  x, classes = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.array([0, 2])
  mu = jnp.array([[7.0, 0.5, 0.25], [1.0, 2.0, 7.0]])
  found = losses.stationarity_sum(linear, jnp.ones((2, 3)), x, classes, mu)
  # Sample 0 puts (0.75, -0.5, -0.25) on the classes, sample 1 (-1, -2, 3); the column of class c is
  # 1/2 (a_0c [1, 2] + a_1c [3, -1]): (0.75 - 3, 1.5 + 1), (-0.5 - 6, -1 + 2) and (-0.25 + 9, -0.5 - 3), halved.
  np.testing.assert_allclose(found, [[-1.125, -3.25, 4.375], [1.25, 0.5, -1.75]])
  thrice = losses.stationarity_sum(linear, jnp.ones((2, 3)), *(jnp.concatenate([v] * 3) for v in (x, classes, mu)))
  np.testing.assert_allclose(thrice, found, rtol=1e-6)  # a mean: duplicates change nothing


def test_multiplier_of_the_true_class_is_ignored_even_if_it_is_nan():
  x, classes = jnp.array([[1.0, 2.0]]), jnp.array([1])
  sums = lambda mu: losses.stationarity_sum(linear, jnp.ones((2, 3)), x, classes, mu)
  np.testing.assert_array_equal(sums(jnp.array([[1.0, 5.0, 2.0]])), sums(jnp.array([[1.0, jnp.nan, 2.0]])))
  gradient = jax.grad(lambda mu: jnp.sum(jnp.square(sums(mu))))(jnp.array([[1.0, jnp.nan, 2.0]]))
  assert bool(jnp.all(jnp.isfinite(gradient))) and gradient[0, 1] == 0 and gradient[0, 0] != 0


@pytest.mark.parametrize("network", [relu_network, coupled_network])
def test_stationarity_sum_is_the_gradient_of_the_written_out_lagrangian(network):
  params, x, classes, mu = problem()

  def lagrangian(p):
    logits = network(p, x)
    pairs = [(i, y, c) for i, y in enumerate(np.asarray(classes)) for c in range(3) if c != y]
    return sum(mu[i, c] * (logits[i, y] - logits[i, c]) for i, y, c in pairs) / 5

  found = jax.jit(lambda p, y: losses.stationarity_sum(network, p, x, y, mu))(params, classes)
  expected = jax.jit(jax.grad(lagrangian))(params)
  for name, leaf in found.items():
    np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(leaf))) > 1e-3


def test_sum_from_jacobians_equals_the_one_without():
  params, x, classes, mu = problem()
  jacobians = per_sample_jacobians(relu_network, params, x)
  found = losses.stationarity_sum_from_jacobians(jacobians, classes, mu)
  expected = losses.stationarity_sum(relu_network, params, x, classes, mu)
  for name, leaf in found.items():
    np.testing.assert_allclose(leaf, expected[name], rtol=1e-4, atol=1e-5)


def test_memory_of_the_sum_holds_no_jacobian_and_does_not_grow_with_classes():
  def temporaries(num_classes, explicit):
    params, x, classes, mu = problem(64, 64, num_classes)

    def sums(p, mu):
      if not explicit:
        return losses.stationarity_sum(relu_network, p, x, classes, mu)
      return losses.stationarity_sum_from_jacobians(per_sample_jacobians(relu_network, p, x), classes, mu)

    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    compiled = jax.jit(sums).lower(params, mu).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * 64 * size)  # in units of M x P floats

  if jax.__version_info__ >= (0, 10):  # older ones do not count them
    assert temporaries(3, explicit=True) > 2.5  # C = 3 of them: the unit is right
  assert temporaries(3, explicit=False) < 1
  assert temporaries(30, explicit=False) < 1


def test_all_multipliers_zero_give_zeros_and_finite_gradients():
  params, x, classes, mu = problem()
  conditions = Conditions(params, jax.tree.map(jnp.ones_like, params))

  @jax.jit
  def loss(x, mu):
    sums = losses.stationarity_sum(relu_network, params, x, classes, mu)
    return losses.absolute_residual(conditions, sums), sums

  (by_x, by_mu), sums = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, 0 * mu)
  assert not any(leaf.any() for leaf in jax.tree.leaves(sums)) and not by_x.any()
  assert bool(jnp.all(jnp.isfinite(by_mu))) and by_mu.any()  # zero multipliers are no dead end by themselves


def test_inputs_and_multipliers_that_do_not_fit_are_refused():
  good = {"x": jnp.ones((2, 2)), "classes": jnp.array([0, 1]), "mu": jnp.ones((2, 3))}
  empty = {"x": jnp.ones((0, 2)), "classes": jnp.zeros((0,), int), "mu": jnp.ones((0, 3))}
  for changed, message in [
    (empty, r"^x must hold at least one sample"),
    ({"x": jnp.ones(2)}, r"^x must be a batch of shape"),
    ({"x": jnp.ones((2, 2), int)}, r"^x must be floating point; got dtype int"),
    ({"mu": jnp.ones(2)}, r"^mu must have shape \[M, C\] = \(2, 3\); got shape \(2,\)"),
    ({"mu": jnp.ones((2, 2))}, r"^mu must have shape \[M, C\] = \(2, 3\); got shape \(2, 2\)"),
    ({"mu": jnp.ones((1, 3))}, r"^mu must have shape \[M, C\] = \(2, 3\); got shape \(1, 3\)"),
  ]:
    with pytest.raises(ValueError, match=message):
      losses.stationarity_sum(linear, jnp.ones((2, 3)), **(good | changed))
  with pytest.raises(ValueError, match=r"^mu must have shape \[M, C\] = \(2, 3\); got shape \(1, 3\)"):
    losses.stationarity_sum_from_jacobians(jnp.ones((2, 3, 4)), good["classes"], jnp.ones((1, 3)))


# Residuals

CONDITIONS = Conditions(
  target={"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0]), "c": jnp.array([12.0])},
  mask={"a": jnp.array([1.0, 1.0]), "b": jnp.array([1.0]), "c": jnp.array([0.0])},
)
SUMS = {"a": jnp.array([3.0, 2.0]), "b": jnp.array([1.0]), "c": jnp.array([99.0])}


def test_residuals_by_hand():
  residual = losses.stationarity_residual(CONDITIONS, SUMS)
  # a: (0, 2) -> 4 of 25; b: 1 of 0, measured against the whole, 25; c is left out.
  assert [float(leaf) for leaf in jax.tree.leaves(residual.squared)] == pytest.approx([4.0, 1.0, 0.0])
  assert [float(leaf) for leaf in jax.tree.leaves(residual.relative_per_tensor)] == pytest.approx([4 / 25, 1 / 25, 0.0])
  values = {
    "absolute_residual": 5**0.5,
    "squared_residual": 5.0,
    "relative_residual": 5 / 25,
    "mean_relative_residual": (4 / 25 + 1 / 25) / 2,  # c has no weight
    "cosine_distance": 1 - 17**2 / (25 * 14),  # (3, 4, 0) and (3, 2, 1)
  }
  for name, measure in MEASURES.items():
    assert float(measure(CONDITIONS, SUMS)) == pytest.approx(values[name], rel=1e-5)
  assert float(residual.absolute) == pytest.approx(5**0.5)
  assert float(residual.relative) == pytest.approx(5 / 25)


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_left_out_may_be_far_larger_than_the_rest(name):
  large = SUMS | {"c": jnp.array([1e15])}
  assert float(MEASURES[name](CONDITIONS, large)) == pytest.approx(float(MEASURES[name](CONDITIONS, SUMS)), rel=1e-5)


def test_mean_over_tensors_weighs_each_by_the_greatest_of_its_squared_mask():
  weights = {"a": 2.0, "b": 5.0, "c": 0.5}
  target = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0]), "c": jnp.array([1.0, 100.0])}
  mask = {"a": jnp.ones(2), "b": jnp.ones(1), "c": jnp.array([1.0, 0.0])}  # half of c is left out
  sums = {"a": jnp.array([3.0, 2.0]), "b": jnp.array([1.0]), "c": jnp.array([4.0, 7.0])}
  weighed = Conditions(target, {name: weights[name] ** 0.5 * leaf for name, leaf in mask.items()})
  # a: 4 / 25; b: 1 of 0, against the whole target, 9 + 16 + 1; c: 9 / 1.
  expected = (2 * 4 / 25 + 5 * 1 / 26 + 0.5 * 9) / 7.5
  assert float(losses.mean_relative_residual(weighed, sums)) == pytest.approx(expected, rel=1e-5)
  nothing = Conditions(target, jax.tree.map(jnp.zeros_like, mask))
  assert float(losses.mean_relative_residual(nothing, sums)) == 0.0


def naive(name, conditions, sums):
  """The measures as their formulas stand, in float32, without any care for size."""
  flat = lambda tree: jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])
  mask, target, total = flat(conditions.mask), flat(conditions.target), flat(sums)
  target, total = mask * target, mask * total
  squared, size = jnp.sum((target - total) ** 2), jnp.sum(target**2)
  cosine = jnp.sum(target * total) / jnp.sqrt(size * jnp.sum(total**2))
  parts = zip(*map(jax.tree.leaves, (conditions.mask, conditions.target, sums)), strict=True)
  per_tensor = [jnp.sum((m * (t - s)) ** 2) / jnp.sum((m * t) ** 2) for m, t, s in parts]
  return {
    "cosine_distance": 1 - cosine * jnp.abs(cosine),
    "absolute_residual": jnp.sqrt(squared),
    "squared_residual": squared,
    "relative_residual": squared / size,
    "mean_relative_residual": (4 * per_tensor[0] + per_tensor[1]) / 5,  # the first has mask 2
  }[name]


@pytest.mark.parametrize("name", MEASURES)
def test_values_and_gradients_are_those_of_the_naive_formula(name):
  target = {"a": normal(4, seed=0), "b": normal(3, 2, seed=1)}
  conditions = Conditions(target, {"a": jnp.full(4, 2.0), "b": jnp.ones((3, 2))})
  for sign in (1.0, -1.0):
    sums = jax.tree.map(lambda t: sign * t + 0.5 * normal(*t.shape, seed=2), target)
    found = jax.jit(jax.value_and_grad(lambda s: MEASURES[name](conditions, s)))(sums)
    expected = jax.jit(jax.value_and_grad(lambda s: naive(name, conditions, s)))(sums)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_safe_at_zero_and_pass_a_nan_on(name):
  measure = MEASURES[name]
  zeros = jax.tree.map(jnp.zeros_like, SUMS)
  nothing = Conditions(zeros, jax.tree.map(jnp.ones_like, SUMS))
  for conditions, sums in [(CONDITIONS, CONDITIONS.target), (CONDITIONS, zeros), (nothing, SUMS), (nothing, zeros)]:
    value, gradient = jax.value_and_grad(measure, argnums=1)(conditions, sums)
    assert bool(jnp.isfinite(value)) and all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in gradient.values())
    if sums is CONDITIONS.target:  # a perfect fit
      assert float(value) == pytest.approx(0, abs=1e-6)
      assert all(float(jnp.max(jnp.abs(leaf))) < 1e-6 for leaf in gradient.values())
    assert not gradient["c"].any() or conditions is nothing  # what is left out has none
  assert np.isnan(measure(CONDITIONS, SUMS | {"b": jnp.array([jnp.nan])}))


def test_residual_of_a_zero_target_is_measured_against_1():
  nothing = Conditions(jax.tree.map(jnp.zeros_like, SUMS), jax.tree.map(jnp.ones_like, SUMS))
  # |SUMS|^2 = 9 + 4 + 1 + 9801 = 9815
  assert float(losses.relative_residual(nothing, SUMS)) == pytest.approx(9815, rel=1e-5)
  assert float(losses.mean_relative_residual(nothing, SUMS)) == pytest.approx(9815 / 3, rel=1e-5)
  assert float(losses.cosine_distance(nothing, SUMS)) == 1.0


def test_cosine_distance_by_hand():
  conditions = Conditions({"w": jnp.array([3.0, 4.0])}, {"w": jnp.ones(2)})
  # cos of (3, 4) and (1, 0) is 3/5: 1 - 9/25.
  cases = {(7, 0): 16 / 25, (0.3, 0.4): 0, (4, -3): 1, (-3, -4): 2, (0, 0): 1}
  for sums, distance in cases.items():
    sums = {"w": jnp.array(sums, jnp.float32)}
    assert float(losses.cosine_distance(conditions, sums)) == pytest.approx(distance, abs=1e-6)


def test_cosine_distance_has_a_gradient_if_the_sum_points_away():
  conditions = Conditions(jnp.array([3.0, 4.0]), jnp.ones(2))
  away = jax.grad(lambda s: losses.cosine_distance(conditions, s))(jnp.array([-1.0, 0.0]))
  # 1 - cos |cos| with cos = (3 a + 4 b) / (5 r): at (-1, 0), d cos / d b = 4/5, |cos| = 3/5, so d/db = -2 * 3/5 * 4/5.
  np.testing.assert_allclose(away, [0.0, -24 / 25], rtol=1e-5, atol=1e-6)


def test_relative_residual_at_the_best_scale_is_the_cosine_distance():
  scale = 17 / 14  # <target, sum> / |sum|^2
  relative = lambda k: float(losses.relative_residual(CONDITIONS, jax.tree.map(lambda s: k * s, SUMS)))
  assert relative(scale) == pytest.approx(float(losses.cosine_distance(CONDITIONS, SUMS)), rel=1e-4)
  assert relative(0.95 * scale) > relative(scale) < relative(1.05 * scale)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-10, 1e25])
def test_sums_of_any_size_have_the_right_value_and_gradient(size):
  # (3, 4) against size * (1, 0); float32 loses the squares below 1e-22 and above 1e19.
  large, small = Conditions(jnp.array([3.0, 4.0]), jnp.ones(2)), Conditions(size * jnp.array([3.0, 4.0]), jnp.ones(2))
  sums, tilted = size * jnp.array([1.0, 0.0]), jnp.array([0.0, -24 / 25])
  for conditions in (large, small):
    value, gradient = jax.value_and_grad(lambda s: losses.cosine_distance(conditions, s))(sums)
    assert float(value) == pytest.approx(16 / 25, rel=1e-5)
    np.testing.assert_allclose(np.float64(gradient) * size, tilted, rtol=1e-5, atol=1e-6)
  # The error is (2, 4) in these units, of length 20^.5: its direction is the gradient.
  value, gradient = jax.value_and_grad(lambda s: losses.absolute_residual(small, s))(sums)
  assert float(value) == pytest.approx(20**0.5 * size, rel=1e-5)
  np.testing.assert_allclose(gradient, [-2 / 20**0.5, -4 / 20**0.5], rtol=1e-5)
  for measure in (losses.relative_residual, losses.mean_relative_residual):
    value, gradient = jax.value_and_grad(lambda s: measure(small, s))(sums)
    assert float(value) == pytest.approx(20 / 25, rel=1e-5)
    np.testing.assert_allclose(np.float64(gradient) * size, [-4 / 25, -8 / 25], rtol=1e-5)


def test_softmax_multipliers_of_a_sure_classifier_keep_their_gradient():
  # Margins of 60 logits: multipliers of 1e-26, whose sum has a square that float32 does not know.
  x, classes = jnp.array([[60.0, 0.0], [1.0, 60.0]]), jnp.array([0, 1])
  w = jnp.array([[1.0, 0.0], [0.0, 1.0]])
  conditions = Conditions(w, jnp.ones_like(w))

  def distance(x, log_scale):
    return losses.cosine_distance(
      conditions, losses.stationarity_sum(linear, w, x, classes, from_softmax(x @ w, log_scale=log_scale))
    )

  (tiny, by_x), (usual, same) = (jax.value_and_grad(distance)(x, log_scale) for log_scale in (0.0, 60.0))
  assert float(tiny) == pytest.approx(float(usual), rel=1e-5) and float(tiny) < 0.9
  np.testing.assert_allclose(by_x, same, rtol=1e-4, atol=1e-6)
  assert float(jnp.max(jnp.abs(by_x))) > 1e-3


@pytest.mark.parametrize("function", [*MEASURES.values(), losses.stationarity_residual])
def test_sums_that_do_not_fit_are_refused(function):
  with pytest.raises(ValueError, match=r"^sums must have the tree structure of conditions.target"):
    function(CONDITIONS, {"a": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"^sums must have the shapes of conditions.target, \(2,\) at a; got \(1,\)"):
    function(CONDITIONS, SUMS | {"a": jnp.ones(1)})


def everything_of_logits(logits, classes, mu):
  return [
    losses.margins(logits, classes),
    losses.duality_loss(logits, classes, jnp.asarray(0.125, logits.dtype), delta=0.1, relative=True),
    losses.cotangent(logits, classes, mu),
    multipliers.from_softmax(logits),
    multipliers.on_runner_up(mu[:, :1], logits, classes),
    multipliers.softmax_distance(mu, logits, classes),
    multipliers.shortfall(mu, least=1.0),
  ]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_numbers_in_16_bits_are_computed_with_in_single_precision(dtype):
  params, x, classes, mu = problem(num_samples=300)
  rough = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, x, mu, normal(300, 3)))
  same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rough)

  def everything(params, x, mu, logits):
    sums = losses.stationarity_sum(relu_network, params, x, classes, mu)
    conditions = Conditions(params, jax.tree.map(jnp.ones_like, params))
    measures = [measure(conditions, params) for measure in MEASURES.values()]
    return sums, measures, everything_of_logits(logits, classes, mu)

  chex.assert_trees_all_equal(everything(*rough), everything(*same))  # dtypes, too


def test_types_may_meet_when_promotion_is_strict():
  params, x, classes, mu = problem()
  with jax.numpy_dtype_promotion("strict"):
    everything_of_logits(normal(5, 3).astype(jnp.bfloat16), classes.astype(jnp.uint8), mu)
    sums = losses.stationarity_sum(relu_network, params, x, classes.astype(jnp.uint8), mu.astype(jnp.bfloat16))
    for measure in MEASURES.values():
      measure(Conditions(params, jax.tree.map(lambda leaf: jnp.ones_like(leaf, jnp.bfloat16), params)), sums)


def test_double_precision_is_kept():
  def everything(params, x, mu):
    classes, logits = jnp.array([0, 1, 2, 0, 1]), relu_network(params, x)
    conditions = Conditions(params, jax.tree.map(jnp.ones_like, params))
    sums = losses.stationarity_sum(relu_network, params, x, classes, mu)
    explicit = losses.stationarity_sum_from_jacobians(per_sample_jacobians(relu_network, params, x), classes, mu)
    others = [losses.duality_loss(logits, classes, jnp.array(0.1), delta=0.1)]
    return sums, explicit, [measure(conditions, sums) for measure in MEASURES.values()] + others

  with jax.enable_x64(True):
    params, x, _, mu = problem()
    results = jax.jit(everything)(*jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, x, mu)))
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(results))
    for one, other in zip(*map(jax.tree.leaves, results[:2]), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
  "function",
  [
    lambda p, x, y: losses.stationarity_sum(lambda p, x: x @ p["w"], p, x, y, jnp.ones((4, 3))),
    lambda p, x, y: per_sample_jacobians(lambda p, x: x @ p["w"], p, x),
    lambda p, x, y: symmetries.least_residual(lambda p, x: x @ p["w"], p, weight_decay_conditions(PARAMS), x),
  ],
)
@pytest.mark.parametrize("wrong", [jnp.ones(3, int), "mlp"])
def test_parameters_that_are_no_floats_are_named(function, wrong):
  x, y = normal(4, 2), jnp.arange(4) % 3
  with pytest.raises(ValueError, match="^params, at v, must be floating point; got (dtype int32|a str)"):
    function({**PARAMS, "v": wrong}, x, y)
  function({**PARAMS, "v": 2.0}, x, y)  # a number of Python's own


@pytest.mark.parametrize(
  ("end", "got"), [(lambda z: jnp.round(z).astype(int), "int32"), (lambda z: (z, None), "a tuple")]
)
def test_outputs_without_a_derivative_are_refused(end, got):
  with pytest.raises(ValueError, match=f"^gradient_fn must return logits .* in floating point; got {got}"):
    losses.stationarity_sum(lambda w, x: end(x @ w), PARAMS["w"], normal(4, 2), jnp.arange(4) % 3, jnp.ones((4, 3)))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_classes_out_of_range_that_jit_hides_make_their_rows_nan(wrong):
  logits, classes = normal(2, 3), jnp.array([0, wrong])
  for function in (losses.runner_up_margin, lambda z, y: losses.duality_loss(z, y, 0.0, delta=0.1)):
    np.testing.assert_array_equal(jnp.isnan(jax.jit(function)(logits, classes)), [False, True])
  weights = jax.jit(lambda y: losses.cotangent(logits, y, jnp.ones((2, 3))))(classes)
  np.testing.assert_array_equal(jnp.isnan(weights), [[False] * 3, [True] * 3])
  with pytest.raises(ValueError, match=r"^classes must lie in 0..2; got"):
    multipliers.softmax_distance(jnp.ones((2, 3)), logits, classes)
