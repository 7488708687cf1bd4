"""What the last layer tells, against classifiers whose margins and features are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kkt_jax import losses, networks, pretrain, priors
from kkt_jax.last_layer import collapsed_features, collapsed_margin, typical_margin


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


def collapsed_classifier():
  """A small batch-normalised classifier trained far beyond its data's first fit, and its data."""
  x = jax.random.normal(jax.random.key(0), (24, 10))
  y = jnp.arange(24) % 4
  module = networks.MLPClassifier(num_classes=4, hidden=(32, 32), batch_norm=True, init_scale=0.05)
  variables = module.init(jax.random.key(1), x, train=True)
  variables["params"]["BatchNorm_1"]["scale"] *= 0.05

  def trained(params, x):
    return module.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])

  result = pretrain.gradient_descent(
    lambda params, x: trained(params, x)[0],
    variables["params"],
    x,
    y,
    num_steps=3000,
    learning_rate=optax.schedules.exponential_decay(0.5, 2400, 1e-3, transition_begin=600),
    loss_scaled=True,
    steps_per_call=1000,
  )
  variables = {"params": result.params, "batch_stats": trained(result.params, x)[1]["batch_stats"]}
  return networks.from_module(module, variables, input_shape=(10,), labels=range(4)), x, y


def test_a_collapsed_classifier_tells_its_features_and_its_margin():
  classifier, x, y = collapsed_classifier()
  last, norm = classifier.params["Dense_2"], classifier.params["BatchNorm_1"]
  true = losses.runner_up_margin(classifier.predict_fn(classifier.params, x), y)
  told = collapsed_margin(last["kernel"], last["bias"], norm["scale"], norm["bias"])
  np.testing.assert_allclose(told, float(jnp.median(true)), rtol=0.02)
  of_class = collapsed_features(last["kernel"], norm["scale"], norm["bias"])

  def distance(x, y):
    return float(jnp.mean(priors.collapse(classifier.features_fn(classifier.params, x), of_class[y], norm["scale"])))

  assert distance(x, y) < 0.05
  assert distance(x, (y + 1) % 4) > 1  # of another class
  assert distance(jax.random.normal(jax.random.key(2), x.shape), y) > 1  # of the right class, never trained on


@pytest.mark.parametrize(
  ("shapes", "message"),
  [
    (((3,), (2,), (3,), (3,)), r"^kernel"),
    (((3, 1), (1,), (3,), (3,)), r"two columns"),
    (((3, 2), (3,), (3,), (3,)), r"^bias"),
    (((3, 2), (2,), (2,), (3,)), r"^scale"),
    (((3, 2), (2,), (3,), (2,)), r"^shift"),
  ],
)
def test_shapes_that_do_not_fit_are_named(shapes, message):
  with pytest.raises(ValueError, match=message):
    collapsed_margin(*map(jnp.ones, shapes))
