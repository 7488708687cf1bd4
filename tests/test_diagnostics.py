"""Diagnostics against SciPy's non-negative least squares on explicit Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from kkt_jax import diagnostics, losses, pretrain
from kkt_jax.classifier import make_classifier
from kkt_jax.conditions import Conditions, weight_decay_conditions
from kkt_jax.jacobians import per_sample_jacobians
from kkt_jax.multipliers import from_softmax
from kkt_jax.networks import from_module, MLPClassifier


def small_problem():
  module = MLPClassifier(num_classes=3, hidden=(6,))
  x = jax.random.normal(jax.random.key(1), (8, 5))
  y = jnp.arange(8) % 3
  variables = module.init(jax.random.key(0), x)
  return from_module(module, variables, input_shape=(5,), labels=(0, 1, 2)), x, y


def test_multipliers_agree_with_scipy_nnls_on_explicit_jacobians():
  classifier, x, y = small_problem()
  conditions = weight_decay_conditions(classifier.params)
  mu = diagnostics.nonnegative_multipliers(classifier.apply_fn, classifier.params, x, y, conditions, num_steps=5000)

  jacobians = jnp.concatenate(
    [
      leaf.reshape(8, 3, -1)
      for leaf in jax.tree.leaves(per_sample_jacobians(classifier.apply_fn, classifier.params, x))
    ],
    axis=2,
  )
  columns = [(jacobians[i, y[i]] - jacobians[i, c]) / 8 for i in range(8) for c in range(3) if c != y[i]]
  target = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(conditions.target)])
  _, expected = scipy.optimize.nnls(np.stack(columns, axis=1).astype(np.float64), np.asarray(target, np.float64))

  sums = losses.stationarity_sum(classifier.apply_fn, classifier.params, x, y, mu)
  residual = losses.stationarity_residual(conditions, sums)
  assert float(mu.min()) >= 0
  np.testing.assert_allclose(residual.absolute, expected, rtol=1e-3)


def test_multipliers_respect_the_mask():
  # The masked entry's target cannot be met, and must not be tried: 3 * (2, -2) meets the first entry alone.
  conditions = Conditions(target=jnp.array([[6.0, 100.0]]), mask=jnp.array([[1.0, 0.0]]))
  mu = diagnostics.nonnegative_multipliers(
    lambda w, x: x @ w, jnp.ones((1, 2)), jnp.array([[2.0]]), jnp.array([0]), conditions
  )
  np.testing.assert_allclose(mu, [[0.0, 3.0]], rtol=1e-3)


def test_multipliers_are_zero_where_the_target_points_away():
  conditions = Conditions(target=jnp.array([[-6.0, 6.0]]), mask=jnp.ones((1, 2)))
  mu = diagnostics.nonnegative_multipliers(
    lambda w, x: x @ w, jnp.ones((1, 2)), jnp.array([[2.0]]), jnp.array([0]), conditions
  )
  np.testing.assert_array_equal(mu, 0.0)


def test_the_residual_of_the_true_data_is_the_gradient_that_training_left():
  # The gradient of cross-entropy + w / 2 |zeta|^2 is w zeta - sum, so that the relative squared residual is exactly
  # (|gradient| / (w |zeta|))^2, wherever training stops.
  classifier, x, y = small_problem()
  weight_decay = 0.02
  result = pretrain.gradient_descent(
    classifier.apply_fn, classifier.params, x, y, num_steps=50, learning_rate=0.3, weight_decay=weight_decay
  )
  trained = make_classifier(classifier.apply_fn, result.params, (5,), labels=(0, 1, 2))
  conditions = weight_decay_conditions(result.params, weight_decay=weight_decay)
  diagnosis = diagnostics.diagnose(trained, conditions, x, y, mu=from_softmax(trained.apply_fn(result.params, x)))
  np.testing.assert_allclose(diagnosis.residual, (result.relative_gradient / weight_decay) ** 2, rtol=1e-3)
  assert set(diagnosis.residual_per_tensor) == {"Dense_0/bias", "Dense_0/kernel", "Dense_1/bias", "Dense_1/kernel"}


def test_converged_weight_decay_classifier_tells_its_data_from_noise():
  # tanh, not ReLU: the weight-decay form needs no homogeneity, and small ReLU networks settle on their kinks.
  def apply_fn(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]

  x, y = jax.random.normal(jax.random.key(1), (8, 5)), jnp.arange(8) % 3
  keys = jax.random.split(jax.random.key(0))
  params = {"w1": jax.random.normal(keys[0], (5, 6)), "w2": jax.random.normal(keys[1], (6, 3))}
  result = pretrain.gradient_descent(apply_fn, params, x, y, num_steps=4000, learning_rate=0.3, weight_decay=0.02)
  trained = make_classifier(apply_fn, result.params, (5,), labels=(0, 1, 2))
  conditions = weight_decay_conditions(result.params, weight_decay=0.02)
  true = diagnostics.diagnose(trained, conditions, x, y, mu=from_softmax(apply_fn(result.params, x)))
  noise = jax.random.uniform(jax.random.key(5), x.shape, minval=-2.0, maxval=2.0)
  random = diagnostics.diagnose(trained, conditions, noise, y)
  assert true.residual < 1e-4
  assert random.residual > 0.05  # although its multipliers are the best possible
  assert true.accuracy == 1.0


def test_labels_are_mapped_to_the_outputs_that_stand_for_them():
  w = jnp.array([[1.0, -1.0]])
  classifier = make_classifier(lambda w, x: x @ w, w, (1,), labels=(7, 3))
  conditions = Conditions(w, jnp.ones_like(w))
  diagnosis = diagnostics.diagnose(classifier, conditions, jnp.array([[0.5], [-0.5]]), jnp.array([7, 3]))
  assert diagnosis.median_margin == 1.0  # 0.5 * (1 - -1)
  assert diagnosis.margin_spread == 0.0
  np.testing.assert_allclose(diagnosis.residual, 0.0, atol=1e-6)


def test_samples_of_another_shape_and_unknown_labels_are_named():
  classifier, x, y = small_problem()
  conditions = weight_decay_conditions(classifier.params)
  with pytest.raises(ValueError, match="x must have shape"):
    diagnostics.diagnose(classifier, conditions, jnp.zeros((8, 3)), y)
  with pytest.raises(ValueError, match=r"y must hold labels of the classifier.*\[5\]"):
    diagnostics.diagnose(classifier, conditions, x, jnp.full(8, 5))
