"""The losses, one equation at a time: numbers by hand, explicit loops, both stationarity routes, edges."""

from absl.testing import parameterized
import chex
from example_networks import inputs, random_conv, random_mlp, to_float64
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from kkt_jax import losses
from kkt_jax.conditions import Conditions, max_margin_conditions
from kkt_jax.homogeneity import given_rates


def linear(w, x):
  return x @ w


def multipliers_like(logits_shape, seed=11):
  return jnp.asarray(np.random.default_rng(seed).uniform(size=logits_shape), jnp.float32)


def lagrangian_term(apply_fn, x, y, mu):
  """1/M sum_i sum_{c != y_i} mu_ic (Phi_y(x_i) - Phi_c(x_i)) written out; its gradient is the stationarity sum."""

  def value(p):
    logits = apply_fn(p, x)
    terms = [
      mu[i, c] * (logits[i, int(y[i])] - logits[i, c])
      for i in range(logits.shape[0])
      for c in range(logits.shape[1])
      if c != int(y[i])
    ]
    return sum(terms) / logits.shape[0]

  return value


class MarginsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_margins_are_true_minus_other_and_infinite_at_the_true_class(self):
    found = self.variant(losses.margins)(jnp.array([[3.0, 1.0, 2.5], [0.5, 4.0, -1.0]]), jnp.array([0, 2]))
    # 3 - 1 = 2, 3 - 2.5 = 0.5; -1 - 0.5 = -1.5, -1 - 4 = -5.
    np.testing.assert_allclose(found, [[np.inf, 2.0, 0.5], [-1.5, -5.0, np.inf]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_minimum_margin_skips_true_class(self):
    found = self.variant(losses.runner_up_margin)(jnp.array([[3.0, 1.0, 2.5], [0.5, 4.0, -1.0]]), jnp.array([0, 2]))
    np.testing.assert_allclose(found, [0.5, -5.0])  # a true class in the minimum would give 0 in the first row

  @chex.variants(with_jit=True, without_jit=True)
  def test_runner_up_set_holds_every_tied_class_and_never_the_true_one(self):
    logits = jnp.array([[2.0, 2.0, 2.0], [0.0, 1.0, 3.0], [5.0, 5.0, 1.0]])
    found = self.variant(losses.runner_up_set)(logits, jnp.array([1, 2, 2]))
    np.testing.assert_array_equal(found, [[True, False, True], [False, True, False], [True, True, False]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_tolerance_admits_near_ties(self):
    logits = jnp.array([[9.0, 2.0, 1.75, 1.0]])
    found = self.variant(losses.runner_up_set, static_argnames="tolerance")(logits, jnp.array([0]), tolerance=0.5)
    np.testing.assert_array_equal(found, [[False, True, True, False]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_tied_runners_up_share_the_gradient_of_the_margin(self):
    gradient = jax.grad(lambda logits: self.variant(losses.runner_up_margin)(logits, jnp.array([0]))[0])
    np.testing.assert_allclose(gradient(jnp.array([[4.0, 1.0, 1.0, 0.0]])), [[1.0, -0.5, -0.5, 0.0]])


def test_margins_of_two_classes_and_duplicate_rows():
  np.testing.assert_allclose(
    losses.margins(jnp.array([[1.0, 3.0], [1.0, 3.0]]), jnp.array([1, 1])), [[2.0, np.inf], [2.0, np.inf]]
  )


@pytest.mark.parametrize("function", [losses.margins, losses.runner_up_margin, losses.runner_up_set])
def test_empty_batch_has_no_margins(function):
  assert function(jnp.zeros((0, 3)), jnp.zeros((0,), int)).shape[0] == 0


def test_check_grads_of_the_margin_away_from_ties():
  with jax.enable_x64(True):
    logits = jnp.array([[0.3, -1.2, 0.9], [2.0, 0.1, -0.4]])
    check_grads(lambda v: losses.runner_up_margin(v, jnp.array([0, 2])), (logits,), order=1, modes=("rev",))


MARGIN_FUNCTIONS = {
  "margins": losses.margins,
  "runner_up_margin": losses.runner_up_margin,
  "runner_up_set": losses.runner_up_set,
  "duality_loss": lambda logits, y: losses.duality_loss(logits, y, 0.0, delta=0.1),
}


@pytest.mark.parametrize("function", MARGIN_FUNCTIONS.values(), ids=MARGIN_FUNCTIONS.keys())
@pytest.mark.parametrize(
  ("logits", "y", "message"),
  [
    (jnp.ones((2, 1)), jnp.array([0, 0]), r"^logits must have at least two classes; got shape \(2, 1\)"),
    (jnp.ones(3), jnp.array([0, 0, 0]), r"^logits must have shape \[M, C\]; got shape \(3,\)"),
    (jnp.ones((2, 3, 1)), jnp.array([0, 0]), r"^logits must have shape \[M, C\]"),
    (jnp.ones((2, 3)), jnp.array([0]), r"^y must have shape \[M\] = \(2,\); got shape \(1,\)"),
    (jnp.ones((2, 3)), jnp.array([[0], [1]]), r"^y must have shape \[M\]"),
    (jnp.ones((2, 3)), jnp.array([0.0, 1.0]), r"^y must be integers; got dtype float"),
    (jnp.ones((2, 3)), jnp.array([True, False]), r"^y must be integers; got dtype bool"),
  ],
  ids=["one_class", "vector", "three_axes", "short", "column", "float", "bool"],
)
def test_logits_and_labels_that_do_not_fit_are_refused(function, logits, y, message):
  with pytest.raises(ValueError, match=message):
    function(logits, y)


class UShapeTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_values_of_fig_2(self):
    # alpha = -log 2, so that e^-alpha = 2; the bottom is [2, 2.5].
    margin = jnp.array([-1.0, 0.0, 1.5, 2.0, 2.25, 2.5, 3.0, 10.0])
    found = self.variant(losses.u_shape, static_argnames="delta")(margin, -jnp.log(2.0), delta=0.5)
    # left: 2 - m = 3, 2, 0.5; bottom: 0; right: m - 2.5 = 0.5, 7.5.
    np.testing.assert_allclose(found, [3.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.5, 7.5], atol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_equals_the_formula_of_the_caption(self):
    margin = np.linspace(-3.0, 4.0, 29)
    found = self.variant(losses.u_shape, static_argnames="delta")(jnp.asarray(margin), 0.4, delta=0.25)
    formula = np.maximum(margin - np.exp(-0.4) - 0.25, 0) - np.minimum(margin - np.exp(-0.4), 0)
    np.testing.assert_allclose(found, formula, atol=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_slopes_are_minus_one_zero_and_one_and_zero_at_both_kinks(self):
    u_shape = self.variant(losses.u_shape, static_argnames="delta")
    slope = jax.vmap(jax.grad(lambda m: u_shape(m, 0.0, delta=0.5)))
    np.testing.assert_array_equal(slope(jnp.array([0.9, 1.0, 1.2, 1.5, 1.6])), [-1.0, 0.0, 0.0, 0.0, 1.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_alpha_moves_the_bottom_towards_the_margins(self):
    # d/dalpha e^-alpha = -e^-alpha: below, the value e^-alpha - m falls by e^-alpha; above it rises by as much.
    u_shape = self.variant(losses.u_shape, static_argnames="delta")
    slope = jax.grad(lambda a, m: u_shape(m, a, delta=0.1))
    assert float(slope(0.5, 0.1)) == pytest.approx(-np.exp(-0.5), rel=1e-5)
    assert float(slope(0.5, 3.0)) == pytest.approx(np.exp(-0.5), rel=1e-5)
    assert float(slope(0.5, float(np.exp(-0.5)) + 0.05)) == 0.0


def test_without_a_bottom_the_u_shape_is_an_absolute_value():
  margin = jnp.linspace(-1.0, 3.0, 9)
  np.testing.assert_allclose(losses.u_shape(margin, 0.0, delta=0), jnp.abs(margin - 1.0), atol=1e-6)


@pytest.mark.parametrize("delta", [-0.1, float("nan")])
def test_negative_delta_is_refused(delta):
  with pytest.raises(ValueError, match=r"^delta must be at least 0"):
    losses.u_shape(jnp.ones(2), 0.0, delta=delta)
  with pytest.raises(ValueError, match=r"^delta must be at least 0"):
    losses.duality_loss(jnp.ones((1, 2)), jnp.array([0]), 0.0, delta=delta)


def duality_loop(logits, y, alpha, delta):
  """Eq. 6 before its mean, as the paper writes it."""
  values = []
  for row, label in zip(np.asarray(logits, np.float64), np.asarray(y), strict=True):
    others = [c for c in range(len(row)) if c != label]
    strongest = max(row[c] for c in others)
    total = 0.0
    for c in others:
      if row[c] == strongest:
        gap = row[label] - row[c] - np.exp(-alpha)
        total += max(gap - delta, 0.0) - min(gap, 0.0)
    values.append(total)
  return values


class DualityLossTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_equals_the_loop_over_eq_6_with_ties(self):
    logits = jnp.array(
      [
        [3.0, 1.0, 1.0, 1.0],  # three tied runners-up
        [3.0, 2.75, 0.0, 2.75],  # two, margin too small
        [0.0, 2.0, -1.0, 0.5],  # misclassified
        [1.0, 1.0, 1.0, 1.0],  # all tied, true class too
        [1.5, 0.25, 0.0, 0.0],  # inside the bottom
      ]
    )
    y = jnp.array([0, 0, 3, 2, 0])
    found = self.variant(losses.duality_loss, static_argnames="delta")(logits, y, 0.2, delta=0.5)
    np.testing.assert_allclose(found, duality_loop(logits, y, 0.2, 0.5), rtol=1e-5, atol=1e-6)
    assert found[0] > 0 and found[1] > 0 and found[2] > 0 and found[4] == 0  # every case is really in there

  @chex.variants(with_jit=True, without_jit=True)
  def test_equals_the_loop_on_random_logits(self):
    logits, y = 2.0 * inputs(30, 5), jnp.asarray(np.random.default_rng(1).integers(0, 5, 30))
    found = self.variant(losses.duality_loss, static_argnames="delta")(logits, y, -0.3, delta=0.2)
    np.testing.assert_allclose(found, duality_loop(logits, y, -0.3, 0.2), rtol=1e-5, atol=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_gradient_reaches_every_tied_runner_up_and_the_true_class(self):
    loss = self.variant(losses.duality_loss, static_argnames="delta")
    gradient = jax.grad(lambda v: loss(v, jnp.array([0]), 0.0, delta=0.5)[0])(jnp.array([[5.0, 1.0, 1.0, 0.0]]))
    np.testing.assert_allclose(gradient, [[2.0, -1.0, -1.0, 0.0]])  # two margins of 4, each with slope 1

  @chex.variants(with_jit=True, without_jit=True)
  def test_gradient_is_finite_though_the_true_margin_is_infinite(self):
    loss = self.variant(losses.duality_loss, static_argnames="delta")
    gradient = jax.grad(lambda v, a: jnp.sum(loss(v, jnp.array([0, 1]), a, delta=0.5)), argnums=(0, 1))
    chex.assert_tree_all_finite(gradient(jnp.array([[5.0, 1.0, 0.0], [2.0, 2.0, 2.0]]), 0.3))

  @chex.variants(with_jit=True, without_jit=True)
  def test_relative_form_is_in_units_of_the_wanted_margin(self):
    loss = self.variant(losses.duality_loss, static_argnames=("delta", "relative"))
    # e^-alpha = 2. Margins 6 and 1 are 3 and 1/2 units: 3 - 1 - 0.5 above and 1 - 1/2 below.
    logits, y, alpha = jnp.array([[6.0, 0.0, -9.0], [0.0, 1.0, 0.0]]), jnp.array([0, 1]), -jnp.log(2.0)
    np.testing.assert_allclose(loss(logits, y, alpha, delta=0.5, relative=True)[0], 1.5, rtol=1e-5)
    # Two runners-up are tied in the second row.
    np.testing.assert_allclose(loss(logits, y, alpha, delta=0.5, relative=True)[1], 2 * 0.5, rtol=1e-5)
    by_alpha = jax.grad(lambda a: loss(logits, y, a, delta=0.5, relative=True)[0])(alpha)
    np.testing.assert_allclose(by_alpha, 1.0, rtol=1e-5)  # the unit itself is a constant: 3 - e^(log 2 - alpha') - 0.5


def test_check_grads_of_the_duality_loss_away_from_kinks():
  with jax.enable_x64(True):
    logits = jnp.array([[3.0, 0.5, -1.0], [0.2, 0.4, 1.0]])  # margins 2.5 and -0.6, far from [0.95, 1.05]
    loss = lambda v, a: losses.duality_loss(v, jnp.array([0, 1]), a, delta=0.1)
    check_grads(loss, (logits, jnp.array(0.05)), order=1, modes=("rev",))


def test_duality_loss_of_an_empty_batch_is_empty():
  assert losses.duality_loss(jnp.zeros((0, 3)), jnp.zeros((0,), int), 0.0, delta=0.1).shape == (0,)


class StationaritySumTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.parameters(*losses.ROUTES)
  def test_linear_network_by_hand(self, route):
    x, y = jnp.array([[1.0, 2.0], [3.0, -1.0]]), jnp.array([0, 2])
    mu = jnp.array([[7.0, 0.5, 0.25], [1.0, 2.0, 7.0]])
    found = self.variant(lambda w, x, y, mu: losses.stationarity_sum(linear, w, x, y, mu, route=route))(
      jnp.ones((2, 3)), x, y, mu
    )
    # Sample 0 puts (0.75, -0.5, -0.25) on the classes, sample 1 (-1, -2, 3); the column of class c is
    # 1/2 (a_0c [1, 2] + a_1c [3, -1]): (0.75 - 3, 1.5 + 1), (-0.5 - 6, -1 + 2) and (-0.25 + 9, -0.5 - 3), halved.
    np.testing.assert_allclose(found, [[-1.125, -3.25, 4.375], [1.25, 0.5, -1.75]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_cotangents_of_each_sample_sum_to_zero(self):
    # The parameters are the logits themselves, so the sum is what the logits' gradients are weighted with.
    found = self.variant(lambda p, x, y, mu: losses.stationarity_sum(lambda p, x: p, p, x, y, mu))(
      jnp.zeros((2, 4)), jnp.ones((2, 1)), jnp.array([1, 3]), jnp.array([[1.0, 99.0, 2.0, 3.0], [0.0, 4.0, 0.0, 99.0]])
    )
    np.testing.assert_allclose(found, [[-0.5, 3.0, -1.0, -1.5], [0.0, -2.0, 0.0, 2.0]])  # halves: M = 2
    np.testing.assert_allclose(jnp.sum(found, axis=1), [0.0, 0.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_multiplier_of_the_true_class_is_ignored_even_where_it_is_nan(self):
    x, y = jnp.array([[1.0, 2.0]]), jnp.array([1])
    sums = self.variant(lambda mu: losses.stationarity_sum(linear, jnp.ones((2, 3)), x, y, mu))
    first, second = sums(jnp.array([[1.0, 5.0, 2.0]])), sums(jnp.array([[1.0, jnp.nan, 2.0]]))
    np.testing.assert_array_equal(first, second)
    gradient = jax.grad(lambda mu: jnp.sum(jnp.square(sums(mu))))(jnp.array([[1.0, jnp.nan, 2.0]]))
    chex.assert_tree_all_finite(gradient)
    assert gradient[0, 1] == 0 and gradient[0, 0] != 0


NETWORKS = {
  "mlp": lambda **settings: random_mlp(5, **settings),
  "mlp_without_biases": lambda **settings: random_mlp(5, use_bias=False, **settings),
  "conv": lambda **settings: random_conv(3, **settings),
  "conv_without_biases": lambda **settings: random_conv(3, use_bias=False, **settings),
}


@pytest.mark.parametrize("gate_sharpness", [None, 20.0])
@pytest.mark.parametrize("network", NETWORKS)
def test_both_routes_and_the_written_out_lagrangian_agree(network, gate_sharpness):
  classifier, x, y = NETWORKS[network](gate_sharpness=gate_sharpness)
  mu = multipliers_like((len(y), 3))

  @jax.jit
  def routes(p):
    fast = losses.stationarity_sum(classifier.apply_fn, p, x, y, mu)
    explicit = losses.stationarity_sum(classifier.apply_fn, p, x, y, mu, route="jacobian")
    return fast, explicit, jax.grad(lagrangian_term(classifier.apply_fn, x, np.asarray(y), mu))(p)

  fast, explicit, reference = routes(classifier.params)
  chex.assert_trees_all_close(fast, explicit, rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_close(fast, reference, rtol=1e-4, atol=1e-5)
  assert all(float(jnp.max(jnp.abs(leaf))) > 1e-3 for leaf in jax.tree.leaves(fast))


def test_batch_norm_classifier_works_on_the_vjp_route():
  coupled, x, y = random_mlp(5, batch_norm=True)
  mu = multipliers_like((5, 3))
  fast = jax.jit(lambda p: losses.stationarity_sum(coupled.apply_fn, p, x, y, mu))(coupled.params)
  reference = jax.jit(jax.grad(lagrangian_term(coupled.apply_fn, x, np.asarray(y), mu)))(coupled.params)
  chex.assert_trees_all_close(fast, reference, rtol=1e-4, atol=1e-4)
  inference = jax.jit(jax.grad(lagrangian_term(coupled.predict_fn, x, np.asarray(y), mu)))(coupled.params)
  assert not np.allclose(fast["Dense_1"]["kernel"], inference["Dense_1"]["kernel"], atol=1e-2)


def test_batch_norm_classifier_is_refused_on_the_jacobian_route_with_the_other_named():
  coupled, x, y = random_mlp(5, batch_norm=True)
  with pytest.raises(ValueError, match=r"^apply_fn must treat the samples .*route='vjp'"):
    losses.stationarity_sum(coupled.apply_fn, coupled.params, x, y, jnp.ones((5, 3)), route="jacobian")


def test_memory_of_the_vjp_route_holds_no_jacobian_and_does_not_grow_with_classes():
  def temporaries(num_classes, route):
    classifier, x, y = random_mlp(64, hidden=(64, 64), num_classes=num_classes)
    sums = lambda p, x, y, mu: losses.stationarity_sum(classifier.apply_fn, p, x, y, mu, route=route)
    compiled = jax.jit(sums).lower(classifier.params, x, y, jnp.ones((64, num_classes))).compile()
    size = sum(leaf.size for leaf in jax.tree.leaves(classifier.params))
    return compiled.memory_analysis().temp_size_in_bytes / (4 * 64 * size)  # in units of one float an M x P

  assert temporaries(3, "jacobian") > 2.5  # C = 3 of them: the unit is right
  assert temporaries(3, "vjp") < 0.25
  assert temporaries(30, "vjp") < 0.25


def test_all_multipliers_zero_give_zeros_and_finite_gradients():
  classifier, x, y = random_mlp(4)
  sums = lambda x, mu: losses.stationarity_sum(classifier.apply_fn, classifier.params, x, y, mu)
  for leaf in jax.tree.leaves(sums(x, jnp.zeros((4, 3)))):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
  conditions = Conditions(classifier.params, jax.tree.map(jnp.ones_like, classifier.params))
  loss = lambda x, mu: losses.stationarity_residual(conditions, sums(x, mu)).absolute
  by_x, by_mu = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, jnp.zeros((4, 3)))
  chex.assert_tree_all_finite((by_x, by_mu))
  np.testing.assert_array_equal(by_x, jnp.zeros_like(x))
  assert float(jnp.max(jnp.abs(by_mu))) > 0  # zero multipliers are no dead end by themselves


def test_duplicate_rows_give_the_sum_of_one_of_them():
  x, y, mu = jnp.array([[1.0, 2.0]]), jnp.array([1]), jnp.array([[1.0, 0.0, 3.0]])
  once = losses.stationarity_sum(linear, jnp.ones((2, 3)), x, y, mu)
  thrice = losses.stationarity_sum(linear, jnp.ones((2, 3)), jnp.tile(x, (3, 1)), jnp.tile(y, 3), jnp.tile(mu, (3, 1)))
  np.testing.assert_allclose(thrice, once, rtol=1e-6)
  np.testing.assert_allclose(once, [[-1.0, 4.0, -3.0], [-2.0, 8.0, -6.0]])  # M = 1 by hand: (-1, 1 + 3, -3)


def test_check_grads_of_the_stationarity_loss_by_inputs_and_multipliers():
  with jax.enable_x64(True):
    classifier, x, y = random_mlp(3)
    params, x, mu = to_float64(classifier.params), to_float64(x), to_float64(multipliers_like((3, 3)))
    conditions = max_margin_conditions(params, given_rates(jax.tree.map(lambda _: 1.0, params), params))

    @jax.jit
    def loss(x, mu):
      sums = losses.stationarity_sum(classifier.apply_fn, params, x, y, mu)
      return losses.stationarity_residual(conditions, sums).absolute

    check_grads(loss, (x, mu), order=1, modes=("rev",), eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("route", losses.ROUTES)
@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"x": jnp.ones((0, 2)), "y": jnp.zeros((0,), int), "mu": jnp.ones((0, 3))}, r"^x must hold at least one sample"),
    ({"x": jnp.ones(2)}, r"^x must be a batch of shape"),
    ({"x": jnp.ones((2, 2), int)}, r"^x must be floating point; got dtype int"),
    ({"y": jnp.array([0])}, r"^y must have shape \[M\] = \(2,\)"),
    ({"y": jnp.array([0.0, 1.0])}, r"^y must be integers"),
    ({"mu": jnp.ones(2)}, r"^mu must have shape \[M, C\]; got shape \(2,\)"),
    ({"mu": jnp.ones((2, 2))}, r"^mu must have shape \[M, C\] = \(2, 3\); got shape \(2, 2\)"),
    ({"mu": jnp.ones((1, 3))}, r"^mu must have shape \[M, C\] = \(2, 3\); got shape \(1, 3\)"),
  ],
  ids=["empty", "no_batch", "integers", "short_y", "float_y", "mu_vector", "mu_classes", "mu_samples"],
)
def test_inputs_labels_and_multipliers_that_do_not_fit_are_refused(route, changed, message):
  parts = {"x": jnp.ones((2, 2)), "y": jnp.array([0, 1]), "mu": jnp.ones((2, 3))} | changed
  with pytest.raises(ValueError, match=message):
    losses.stationarity_sum(linear, jnp.ones((2, 3)), **parts, route=route)


def test_unknown_route_is_refused():
  with pytest.raises(ValueError, match=r"^route must be one of 'vjp', 'jacobian'; got 'jvp'"):
    losses.stationarity_sum(
      linear, jnp.ones((2, 3)), jnp.ones((2, 2)), jnp.array([0, 1]), jnp.ones((2, 3)), route="jvp"
    )


def test_nan_logits_reach_the_duality_loss():
  logits = jnp.array([[jnp.nan, 0.0, 1.0], [1.0, jnp.nan, 0.0]])
  assert bool(jnp.all(jnp.isnan(losses.duality_loss(logits, jnp.array([0, 0]), 0.0, delta=0.1))))


def test_sums_of_another_shape_are_named():
  conditions = Conditions({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
  with pytest.raises(ValueError, match=r"^sums must have the shapes of conditions.target, \(2,\) at w; got \(1,\)"):
    losses.stationarity_residual(conditions, {"w": jnp.ones(1)})


CONDITIONS = Conditions(
  target={"a": jnp.array([3.0, 4.0]), "b": jnp.array([0.0]), "c": jnp.array([12.0])},
  mask={"a": jnp.array([1.0, 1.0]), "b": jnp.array([1.0]), "c": jnp.array([0.0])},
)
SUMS = {"a": jnp.array([3.0, 2.0]), "b": jnp.array([1.0]), "c": jnp.array([99.0])}


class ResidualTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_readings_by_hand(self):
    residual = self.variant(losses.stationarity_residual)(CONDITIONS, SUMS)
    # a: (0, 2) -> 4 of 25; b: 1 of 0, measured against the whole, 25; c is left out.
    assert [float(leaf) for leaf in jax.tree.leaves(residual.squared)] == [4.0, 1.0, 0.0]
    assert [float(leaf) for leaf in jax.tree.leaves(residual.target_squared)] == [25.0, 0.0, 0.0]
    assert float(residual.absolute) == pytest.approx(5**0.5)
    assert float(residual.relative) == pytest.approx(5 / 25)
    per_tensor = [float(leaf) for leaf in jax.tree.leaves(residual.relative_per_tensor)]
    assert per_tensor == pytest.approx([4 / 25, 1 / 25, 0.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_gradient_of_absolute_at_exactly_zero_is_zero(self):
    loss = lambda sums: self.variant(losses.stationarity_residual)(CONDITIONS, sums).absolute
    value, gradient = jax.value_and_grad(loss)(CONDITIONS.target)
    assert float(value) == 0.0
    for leaf in jax.tree.leaves(gradient):
      np.testing.assert_array_equal(leaf, np.zeros_like(leaf))

  @chex.variants(with_jit=True, without_jit=True)
  def test_gradient_of_absolute_is_the_unit_vector_and_skips_what_is_left_out(self):
    loss = lambda sums: self.variant(losses.stationarity_residual)(CONDITIONS, sums).absolute
    gradient = jax.grad(loss)(SUMS)
    # (sum - target) / sqrt(5): a (0, -2), b 1, c nothing.
    np.testing.assert_allclose(gradient["a"], [0.0, -2 / 5**0.5], rtol=1e-6)
    np.testing.assert_allclose(gradient["b"], [1 / 5**0.5], rtol=1e-6)
    np.testing.assert_array_equal(gradient["c"], [0.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_zero_target_has_finite_readings_and_gradients(self):
    conditions = Conditions(jax.tree.map(jnp.zeros_like, SUMS), jax.tree.map(jnp.ones_like, SUMS))
    readings = self.variant(
      lambda sums: [
        (r := losses.stationarity_residual(conditions, sums)).absolute,
        r.relative,
        jax.tree.reduce(jnp.add, r.relative_per_tensor),
        losses.cosine_distance(conditions, sums),
      ]
    )
    # |SUMS|^2 = 9 + 4 + 1 + 9801 = 9815; with nothing to measure against the denominator is 1.
    np.testing.assert_allclose(readings(SUMS), [9815**0.5, 9815.0, 9815.0, 1.0], rtol=1e-5)
    for sums in (SUMS, jax.tree.map(jnp.zeros_like, SUMS)):
      chex.assert_tree_all_finite(jax.grad(lambda s: sum(readings(s)))(sums))

  @chex.variants(with_jit=True, without_jit=True)
  def test_residual_passes_through_as_a_pytree(self):
    residual = losses.stationarity_residual(CONDITIONS, SUMS)
    assert float(self.variant(lambda r: r.relative)(residual)) == pytest.approx(0.2)


class CosineDistanceTest(chex.TestCase):
  def distance(self, target, sums):
    conditions = Conditions({"w": jnp.asarray(target)}, {"w": jnp.ones(len(target))})
    return float(self.variant(losses.cosine_distance)(conditions, {"w": jnp.asarray(sums)}))

  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand(self):
    # cos of (3, 4) and (1, 0) is 3/5: 1 - 9/25.
    assert self.distance([3.0, 4.0], [7.0, 0.0]) == pytest.approx(16 / 25, rel=1e-5)
    assert self.distance([3.0, 4.0], [0.3, 0.4]) == pytest.approx(0.0, abs=1e-6)
    assert self.distance([3.0, 4.0], [4.0, -3.0]) == pytest.approx(1.0)
    assert self.distance([3.0, 4.0], [-7.0, 0.0]) == pytest.approx(1 + 9 / 25, rel=1e-5)
    assert self.distance([3.0, 4.0], [-3.0, -4.0]) == pytest.approx(2.0)
    assert self.distance([3.0, 4.0], [0.0, 0.0]) == 1.0

  @chex.variants(with_jit=True, without_jit=True)
  def test_is_the_least_relative_residual_over_positive_scales(self):
    target, sums = np.array([3.0, -1.0, 2.0]), np.array([1.0, 0.5, 2.5])
    scales = np.linspace(0.0, 5.0, 50001)
    residuals = np.sum((target - scales[:, None] * sums) ** 2, axis=1) / np.sum(target**2)
    assert self.distance(target, sums) == pytest.approx(residuals.min(), abs=1e-6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_left_out_parameters_do_not_count(self):
    distance = self.variant(losses.cosine_distance)
    moved = SUMS | {"c": jnp.array([-5.0])}
    # (3, 4, 0) and (3, 2, 1): 17^2 / (25 * 14).
    for sums in (SUMS, moved):
      assert float(distance(CONDITIONS, sums)) == pytest.approx(1 - 17**2 / (25 * 14), rel=1e-5)


def test_scale_of_the_multipliers_does_not_change_the_cosine_distance():
  conditions = Conditions({"w": jnp.array([3.0, -1.0])}, {"w": jnp.ones(2)})
  for scale in (1e-6, 1.0, 1e6):
    distance = losses.cosine_distance(conditions, {"w": scale * jnp.array([1.0, 0.5])})
    assert float(distance) == pytest.approx(1 - 2.5**2 / (10 * 1.25), rel=1e-5)


def test_cosine_distance_has_a_gradient_where_the_sum_points_away():
  conditions = Conditions({"w": jnp.array([3.0, 4.0])}, {"w": jnp.ones(2)})
  gradient = jax.grad(lambda s: losses.cosine_distance(conditions, {"w": s}))
  away = gradient(jnp.array([-1.0, 0.0]))
  # 1 - cos |cos| with cos = (3 a + 4 b) / (5 r): at (-1, 0), d cos / d b = 4/5, |cos| = 3/5, so d/db = -2 * 3/5 * 4/5.
  np.testing.assert_allclose(away, [0.0, -24 / 25], rtol=1e-5, atol=1e-6)
  chex.assert_tree_all_finite(gradient(jnp.zeros(2)))


class BestScaleTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_by_hand_over_masked_parameters(self):
    # <(3, 4, 0), (3, 2, 1)> / (9 + 4 + 1); the left-out 12 and 99 do not count.
    assert float(self.variant(losses.best_scale)(CONDITIONS, SUMS)) == pytest.approx(17 / 14, rel=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_relative_residual_at_the_best_scale_is_the_cosine_distance(self):
    scale = self.variant(losses.best_scale)(CONDITIONS, SUMS)
    relative = lambda k: float(losses.stationarity_residual(CONDITIONS, jax.tree.map(lambda s: k * s, SUMS)).relative)
    assert relative(scale) == pytest.approx(float(losses.cosine_distance(CONDITIONS, SUMS)), rel=1e-4)
    assert relative(0.95 * scale) > relative(scale) < relative(1.05 * scale)

  @chex.variants(with_jit=True, without_jit=True)
  def test_zero_sum_gives_zero_and_an_opposite_one_a_negative_scale(self):
    function = self.variant(losses.best_scale)
    assert float(function(CONDITIONS, jax.tree.map(jnp.zeros_like, SUMS))) == 0.0
    assert float(function(CONDITIONS, jax.tree.map(lambda t: -2 * t, CONDITIONS.target))) == pytest.approx(-0.5)


@pytest.mark.parametrize("function", [losses.stationarity_residual, losses.cosine_distance, losses.best_scale])
def test_sums_of_another_structure_are_refused(function):
  with pytest.raises(ValueError, match=r"^sums must have the tree structure of conditions.target"):
    function(CONDITIONS, {"a": jnp.ones(2)})


class TotalLossTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_eq_7_for_one_classifier_and_eq_13_for_several(self):
    total = self.variant(lambda terms: losses.total_loss(terms, {"stationarity": 1.0, "duality": 0.5, "unused": 9.0}))
    assert float(total({"stationarity": jnp.array(3.0), "duality": jnp.array(4.0)})) == 5.0
    both = {"stationarity": jnp.array([3.0, 1.0]), "duality": jnp.array([4.0, 6.0])}
    assert float(total(both)) == 9.0  # 3 + 1 + 0.5 (4 + 6)

  @chex.variants(with_jit=True, without_jit=True)
  def test_term_of_weight_zero_cannot_spread_a_nan(self):
    total = self.variant(lambda terms: losses.total_loss(terms, {"good": 2.0, "bad": 0.0}))
    value, gradient = jax.value_and_grad(total)({"good": jnp.array(3.0), "bad": jnp.array(jnp.nan)})
    assert float(value) == 6.0
    assert {name: float(g) for name, g in gradient.items()} == {"good": 2.0, "bad": 0.0}


def test_weights_may_be_traced_arrays():
  total = jax.jit(lambda weight: losses.total_loss({"a": jnp.array(3.0), "b": jnp.array(5.0)}, {"a": weight, "b": 2.0}))
  assert float(total(jnp.array(4.0))) == 22.0  # 12 + 10


def test_nan_in_a_term_that_counts_is_not_hidden():
  assert np.isnan(losses.total_loss({"good": jnp.array(1.0), "bad": jnp.array(jnp.nan)}, {"good": 1.0, "bad": 1.0}))


def test_no_terms_sum_to_zero():
  assert float(losses.total_loss({}, {})) == 0.0


def test_term_without_a_weight_is_refused():
  with pytest.raises(ValueError, match=r"^weights must name every term; \['duality'\] are missing"):
    losses.total_loss({"stationarity": jnp.array(1.0), "duality": jnp.array(1.0)}, {"stationarity": 1.0})
