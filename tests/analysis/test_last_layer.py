"""What the last layer reveals, against classifiers whose margins and features are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kkt_jax import priors
from kkt_jax.analysis.last_layer import LastLayer
from kkt_jax.kkt import losses, pretrain
from kkt_jax.kkt.multipliers import from_softmax


def typical_margin(kernel, **settings):
  return LastLayer(kernel, jnp.zeros(kernel.shape[1])).typical_margin(**settings)


@pytest.mark.parametrize(("num_classes", "margin"), [(2, 5.0), (2, 1.5), (5, 3.0)])
def test_margin_of_a_symmetric_classifier(num_classes, margin):
  # One sample per class, all orthogonal: W = q (I - 1 / C), and every sample has the margin q to each of k = C - 1
  # wrong classes, of probability p = 1 / (k + e^q) each. Off the diagonal the stationarity says w q / C = p / C.
  k = num_classes - 1
  weight_decay = 1 / (margin * (k + math.exp(margin)))
  x, classes = jnp.eye(num_classes), jnp.arange(num_classes)
  w = margin * (x - 1 / num_classes)
  sums = losses.stationarity_sum(lambda w, x: x @ w, w, x, classes, from_softmax(w))
  np.testing.assert_allclose(sums, weight_decay * w, rtol=1e-4)  # it is stationary
  np.testing.assert_allclose(typical_margin(w, weight_decay=weight_decay, competitors=k), margin, rtol=1e-4)
  np.testing.assert_allclose(
    typical_margin(np.asarray(w), weight_decay=weight_decay),
    typical_margin(w, weight_decay=weight_decay, competitors=num_classes / 2),
    rtol=1e-6,
  )


def kernel_of(wanted, num_classes):
  """A kernel with |W|^2 = wanted."""
  return jnp.full((1, num_classes), (wanted / num_classes) ** 0.5)


def test_margin_is_the_greater_solution_also_at_many_classes():
  # k = 1000: q k / (k + e^q) is 4.2 at q = 6.130 (and at 4.7); its peak, 4.42, is at 5.42 < log k = 6.9.
  margin = typical_margin(kernel_of(4.2, 1000), weight_decay=1.0, competitors=1000)
  assert margin == pytest.approx(6.130, abs=1e-3)
  # k = 1: q / (1 + e^q) is 50 e^-50 at q = 50.
  tiny = typical_margin(kernel_of(50 * math.exp(-50), 2), weight_decay=1.0, competitors=1)
  assert tiny == pytest.approx(50, rel=1e-5)


def test_weights_that_no_margin_explains_have_none():
  # k = 5: the peak is 1.8146 * 5 / (5 + e^1.8146) = 0.8146.
  assert typical_margin(kernel_of(0.8145, 5), weight_decay=1.0, competitors=5) == pytest.approx(1.8146, abs=0.03)
  assert math.isnan(typical_margin(kernel_of(0.8147, 5), weight_decay=1.0, competitors=5))
  assert math.isnan(typical_margin(kernel_of(1e6, 5), weight_decay=1.0))
  assert math.isnan(typical_margin(jnp.zeros((2, 3)), weight_decay=1.0))


def test_collapsed_margin_is_the_median_of_those_of_the_classes():
  # Unit k belongs to class k: weights s_k (2, -1, -1), standardised (2, -1, -1) / 2^.5. Its class has the features
  # 2^.5 e_k, logits 2^.5 s_k (2, -1, -1) and the margin 3 * 2^.5 s_k.
  kernel = jnp.array([[1.0], [2.0], [4.0]]) * (3 * jnp.eye(3) - 1)
  layer = LastLayer(kernel, jnp.zeros(3), jnp.ones(3), jnp.zeros(3))
  np.testing.assert_allclose(layer.collapsed_features, 2**0.5 * (1.5 * np.eye(3) - 0.5), rtol=1e-5)
  assert layer.collapsed_margin == pytest.approx(3 * 2**0.5 * 2, rel=1e-5)


@pytest.mark.slow
def test_a_collapsed_classifier_reveals_its_features_and_its_margin():
  # Two layers with batch norm, trained far beyond the first fit of their data.
  x, classes = jax.random.normal(jax.random.key(0), (16, 10)), jnp.arange(16) % 4
  keys = jax.random.split(jax.random.key(1), 3)
  sizes = zip(keys, [(10, 16), (16, 16), (16, 4)], strict=True)
  params = {
    "kernels": [0.05 * (2 / shape[0]) ** 0.5 * jax.random.normal(key, shape) for key, shape in sizes],
    "scales": [jnp.ones(16), jnp.full(16, 0.05)],
    "shifts": [jnp.zeros(16), jnp.zeros(16)],
    "bias": jnp.zeros(4),
  }

  def normalised(p, layer, x, moments=None):
    mean, var = (x.mean(0), x.var(0)) if moments is None else moments
    return (x - mean[None]) / jnp.sqrt(var + 1e-5)[None] * p["scales"][layer][None] + p["shifts"][layer][None]

  def features(p, x, moments=(None, None)):
    hidden = jax.nn.relu(normalised(p, 0, x @ p["kernels"][0], moments[0]))
    return normalised(p, 1, hidden @ p["kernels"][1], moments[1])

  result = pretrain.gradient_descent(
    lambda p, x: jax.nn.relu(features(p, x)) @ p["kernels"][2] + p["bias"][None],
    params,
    x,
    classes,
    pretrain.Descent(
      num_steps=1000,
      learning_rate=optax.schedules.exponential_decay(0.5, 800, 1e-3, transition_begin=200),
      loss_scaled=True,
      steps_per_call=1000,
    ),
  )
  params = result.params
  kernel, scale, shift = (params[name][-1] for name in ("kernels", "scales", "shifts"))
  layer = LastLayer(kernel, params["bias"], scale, shift)
  np.testing.assert_allclose(layer.collapsed_margin, np.median(result.margins), rtol=0.02)
  of_class = layer.collapsed_features
  first = x @ params["kernels"][0]
  second = jax.nn.relu(normalised(params, 0, first)) @ params["kernels"][1]
  stored = [(h.mean(0), h.var(0)) for h in (first, second)]

  @jax.jit
  def distance(x, classes):
    return jnp.mean(priors.collapse(features(params, x, stored), of_class[classes], scale))

  assert distance(x, classes) < 0.1
  assert distance(x, (classes + 1) % 4) > 1  # of another class
  assert distance(jax.random.normal(jax.random.key(2), x.shape), classes) > 1  # of the right class, never trained on
