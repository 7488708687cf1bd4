"""Diagnostics against SciPy's non-negative least squares on explicit Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import trained_networks

from kkt_jax.classifiers import make_classifier, relaxation
from kkt_jax.kkt import Conditions, diagnostics, losses, per_sample_jacobians, pretrain, weight_decay_conditions
from kkt_jax.kkt.multipliers import from_softmax


def linear(w, x):
  return x @ w


def network(params, x):
  # tanh, not ReLU: the weight-decay form needs no homogeneity, and small ReLU networks settle on their kinks.
  return jnp.tanh(x @ params["w1"]) @ params["w2"]


def problem():
  """Parameters, 8 samples and their classes."""
  rng = np.random.default_rng(0)
  w1, w2, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 6), (6, 3), (8, 5)))
  return {"w1": w1, "w2": w2}, x, jnp.arange(8) % 3


def test_multipliers_agree_with_scipy_nnls_on_explicit_jacobians():
  params, x, classes = problem()
  # Errors of w1 count fourfold, and one column of w2 is left out.
  mask = {"w1": jnp.full((5, 6), 2.0), "w2": jnp.ones((6, 3)).at[:, 0].set(0.0)}
  conditions = Conditions(params, mask)
  mu = diagnostics.nonnegative_multipliers(network, params, x, classes, conditions, num_steps=3000)

  flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
  jacobians = jax.tree.leaves(jax.jit(per_sample_jacobians, static_argnums=0)(network, params, x))
  jacobians = np.concatenate([np.reshape(leaf, (8, 3, -1)) for leaf in jacobians], axis=2).astype(np.float64)
  pairs = [(i, y, c) for i, y in enumerate(np.asarray(classes)) for c in range(3) if c != y]
  columns = np.stack([flat(mask) * (jacobians[i, y] - jacobians[i, c]) / 8 for i, y, c in pairs], axis=1)
  best, expected = scipy.optimize.nnls(columns, flat(mask) * flat(params))
  assert 0 < np.sum(best == 0) < len(best)  # some of them are active

  sums = losses.stationarity_sum(network, params, x, classes, mu)
  assert float(mu.min()) >= 0
  np.testing.assert_allclose(losses.absolute_residual(conditions, sums), expected, rtol=1e-4)
  np.testing.assert_allclose([mu[i, c] for i, _, c in pairs], best, atol=2e-2 * best.max())


@pytest.mark.parametrize(
  ("target", "mask", "expected"),
  [
    ([6.0, -6.0], [1.0, 1.0], 3.0),  # 3 * (2, -2)
    ([6.0, 100.0], [1.0, 0.0], 3.0),  # the masked entry's target cannot be met, and must not be tried
    ([6.0, -6.0], [2.0, 2.0], 3.0),  # weighed conditions have the same solution
    ([6.0, -2.0], [3.0, 1.0], 2.8),  # 9 (6 - 2 mu)^2 + (2 - 2 mu)^2 is least at 20 mu = 54 + 2
    ([-6.0, 6.0], [1.0, 1.0], 0.0),  # the target points away
  ],
)
def test_multipliers_of_one_sample_by_hand(target, mask, expected):
  conditions = Conditions(target=jnp.array([target]), mask=jnp.array([mask]))
  mu = diagnostics.nonnegative_multipliers(linear, jnp.ones((1, 2)), jnp.array([[2.0]]), jnp.array([0]), conditions)
  np.testing.assert_allclose(mu, [[0.0, expected]], rtol=1e-3)


@pytest.mark.slow
def test_the_residual_of_the_true_data_is_the_gradient_that_training_left():
  # The gradient of cross-entropy + w / 2 |zeta|^2 is w zeta - sum, so that the relative squared residual is exactly
  # (|gradient| / (w |zeta|))^2, wherever training stops.
  params, x, classes = problem()
  cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
  left = jax.grad(lambda p: jnp.mean(cross_entropy(network(p, x), classes)) + 0.01 * optax.tree.norm(p, squared=True))
  classifier, conditions = make_classifier(network, params, (5,)), weight_decay_conditions(params, weight_decay=0.02)
  diagnosis = diagnostics.diagnose(classifier, conditions, x, classes, mu=from_softmax(network(params, x)))
  expected = {
    name: float(jnp.linalg.norm(leaf) / 0.02 / jnp.linalg.norm(params[name])) ** 2
    for name, leaf in left(params).items()
  }
  assert diagnosis.residual_per_tensor == pytest.approx(expected, rel=1e-3)
  assert min(expected.values()) < diagnosis.residual < max(expected.values())


@pytest.mark.slow
def test_converged_weight_decay_classifier_tells_its_data_from_noise():
  params, x, classes = problem()
  result = pretrain.gradient_descent(
    network,
    params,
    x,
    classes,
    pretrain.Descent(num_steps=4000, learning_rate=0.3, weight_decay=0.02, steps_per_call=1000),
  )
  trained = make_classifier(network, result.params, (5,))
  conditions = weight_decay_conditions(result.params, weight_decay=0.02)
  true = diagnostics.diagnose(trained, conditions, x, classes, mu=from_softmax(network(result.params, x)))
  noise = jax.random.uniform(jax.random.key(5), x.shape, minval=-2.0, maxval=2.0)
  random = diagnostics.diagnose(trained, conditions, noise, classes)
  assert true.residual < 1e-4
  assert random.residual > 0.05  # although its multipliers are the best possible
  assert true.accuracy == 1.0


def test_relaxed_gates_of_a_training_are_none_of_what_is_measured():
  examination = trained_networks.examined(trained_networks.batch_norm_classifier)
  x, y = trained_networks.with_batch_norm(0)[2:]
  of = lambda sharpness: relaxation.relaxed(examination.classifier, sharpness)
  exact, relaxed = (diagnostics.diagnose(of(k), examination.conditions, x, y, num_steps=50) for k in (0, 20))
  assert exact == relaxed
  assert exact.residual_exact_gates < 1e-3  # where relaxed gates leave .02


def test_labels_are_mapped_to_the_outputs_that_stand_for_them():
  w = jnp.array([[1.0, -1.0]])
  classifier = make_classifier(linear, w, (1,), labels=(7, 3))
  conditions = Conditions(w, jnp.full_like(w, 2.0))  # weighed conditions have the same residual
  x, labels = jnp.array([[0.5], [-0.5]]), jnp.array([7, 3])
  diagnosis = diagnostics.diagnose(classifier, conditions, x, labels)
  assert diagnosis.median_margin == 1.0  # 0.5 * (1 - -1)
  assert diagnosis.margin_spread == 0.0
  np.testing.assert_allclose(diagnosis.residual, 0.0, atol=1e-6)
  with pytest.raises(ValueError, match="^x must have shape"):
    diagnostics.diagnose(classifier, conditions, jnp.zeros((2, 3)), labels)
  with pytest.raises(ValueError, match="^labels must have shape"):
    diagnostics.diagnose(classifier, conditions, x, labels[:1])
  with pytest.raises(ValueError, match="^labels must .*5"):
    diagnostics.diagnose(classifier, conditions, x, jnp.array([7, 5]))


def test_steps_of_a_convolution_one_by_one_lead_where_one_program_does():
  random = np.random.default_rng(0)
  params = {"c": jnp.asarray(random.normal(size=(3, 3, 1, 2)), jnp.float32)}
  params["d"] = jnp.asarray(random.normal(size=(32, 3)), jnp.float32)

  def network(params, x):
    layout = ("NHWC", "HWIO", "NHWC")
    hidden = jax.lax.conv_general_dilated(x, params["c"], (1, 1), "SAME", dimension_numbers=layout)
    return jax.nn.relu(hidden).reshape(len(x), -1) @ params["d"]

  x, y = jnp.asarray(random.normal(size=(5, 4, 4, 1)), jnp.float32), jnp.array([0, 1, 2, 0, 1])
  conditions = weight_decay_conditions(params)
  solve = lambda x: diagnostics.nonnegative_multipliers(network, params, x, y, conditions, num_steps=50)
  found = solve(x)
  assert float(found.max()) > 0
  np.testing.assert_allclose(found, jax.jit(solve)(x), rtol=1e-4, atol=1e-5)  # traced, so in one program
