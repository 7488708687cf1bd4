"""The typical margin, against classifiers whose margins are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax import pretrain
from kkt_jax.last_layer import typical_margin


@pytest.mark.parametrize("num_classes", [2, 5])
def test_margin_of_a_symmetric_classifier(num_classes):
  # One sample a class, all orthogonal: every sample has the same margin to every wrong class.
  x, y = jnp.eye(num_classes), jnp.arange(num_classes)
  result = pretrain.gradient_descent(
    lambda w, x: x @ w, jnp.zeros((num_classes,) * 2), x, y, num_steps=4000, learning_rate=1.0, weight_decay=0.01
  )
  assert np.ptp(result.margins) < 1e-3
  margin = typical_margin(result.params, weight_decay=0.01, competitors=num_classes - 1)
  np.testing.assert_allclose(margin, result.margins[0], rtol=1e-3)
  assert typical_margin(result.params, weight_decay=0.01) <= margin * (1 + 1e-6)  # fewer competitors


def test_margin_of_an_impossibly_large_layer_stays_finite():
  assert 1 <= typical_margin(jnp.full((4, 3), 100.0), weight_decay=1.0) < 3


@pytest.mark.parametrize(
  ("kernel", "weight_decay", "message"),
  [(jnp.ones(3), 0.1, r"^kernel"), (jnp.ones((3, 1)), 0.1, r"two columns"), (jnp.ones((3, 2)), 0.0, r"^weight_decay")],
)
def test_bad_arguments_are_named(kernel, weight_decay, message):
  with pytest.raises(ValueError, match=message):
    typical_margin(kernel, weight_decay=weight_decay)


def test_margin_works_on_jax_and_numpy_arrays():
  kernel = jax.random.normal(jax.random.key(0), (8, 4))
  assert typical_margin(kernel, weight_decay=0.01) == typical_margin(np.asarray(kernel), weight_decay=0.01)
