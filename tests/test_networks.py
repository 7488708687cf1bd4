"""The flax networks: each classifier against its own formula, batch norm, the multiplier network."""

from absl.testing import parameterized
import chex
from example_networks import ConvClassifier, inputs, random_conv, random_like, random_mlp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.classifiers import from_linen
from kkt_jax.networks import MLPClassifier, MultiplierNetwork


@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp_is_linear_relu_linear_relu_linear(use_bias):
  classifier, x, _ = random_mlp(use_bias=use_bias)
  assert sorted(classifier.params["Dense_0"]) == (["bias", "kernel"] if use_bias else ["kernel"])
  h = np.asarray(x, np.float64)
  for k in range(3):
    layer = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), classifier.params[f"Dense_{k}"])
    h = h @ layer["kernel"] + layer.get("bias", 0.0)
    h = h if k == 2 else np.maximum(h, 0)
  np.testing.assert_allclose(classifier.apply_fn(classifier.params, x), h, rtol=1e-4, atol=1e-5)


def numpy_batch_norm(h, layer, mean, variance):
  return (h - mean) / np.sqrt(variance + 1e-5) * layer["scale"] + layer["bias"]


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_mlp_uses_batch_statistics_to_train_and_stored_ones_to_predict(train):
  coupled, x, _ = random_mlp(batch_norm=True)
  assert coupled.batch_coupled
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), coupled.params)
  h = np.asarray(x, np.float64)
  for k in range(2):
    h = h @ params[f"Dense_{k}"]["kernel"] + params[f"Dense_{k}"]["bias"]
    stored = jax.tree.map(np.asarray, coupled.statistics[f"BatchNorm_{k}"])
    mean, variance = (h.mean(axis=0), h.var(axis=0)) if train else (stored["mean"], stored["var"])
    h = np.maximum(numpy_batch_norm(h, params[f"BatchNorm_{k}"], mean, variance), 0)
  h = h @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
  function = coupled.apply_fn if train else coupled.predict_fn
  np.testing.assert_allclose(function(coupled.params, x), h, rtol=1e-3, atol=1e-4)


def test_stored_statistics_are_those_of_the_last_batch_exactly():
  coupled, x, _ = random_mlp(batch_norm=True)
  statistics = coupled.statistics_fn(coupled.params, x)
  chex.assert_trees_all_equal_structs(statistics, coupled.statistics)
  h = np.asarray(x) @ np.asarray(coupled.params["Dense_0"]["kernel"]) + np.asarray(coupled.params["Dense_0"]["bias"])
  np.testing.assert_allclose(statistics["BatchNorm_0"]["mean"], h.mean(axis=0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(statistics["BatchNorm_0"]["var"], h.var(axis=0), rtol=1e-4, atol=1e-5)


def test_predictions_with_the_batch_s_own_statistics_are_the_training_logits():
  module = MLPClassifier(num_classes=3, hidden=(5, 4), batch_norm=True)
  coupled, x, _ = random_mlp(batch_norm=True)
  variables = {"params": coupled.params, "batch_stats": coupled.statistics_fn(coupled.params, x)}
  trained = from_linen(module, variables, input_shape=(2,))
  expected = coupled.apply_fn(coupled.params, x)
  np.testing.assert_allclose(trained.predict_fn(trained.params, x), expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(trained.apply_fn(trained.params, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_conv_classifier_is_two_strided_convolutions_and_a_linear_layer(use_bias):
  classifier, x, _ = random_conv(use_bias=use_bias)
  h = x
  for k in range(2):
    layer = classifier.params[f"Conv_{k}"]
    h = jax.lax.conv_general_dilated(h, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = jnp.maximum(h + (layer["bias"][None, None, None] if use_bias else 0.0), 0)
  assert h.shape == (3, 1, 1, 3)  # 4 x 4 -> 2 x 2 -> 1 x 1
  layer = classifier.params["Dense_0"]
  expected = h.reshape(3, -1) @ layer["kernel"] + (layer["bias"][None] if use_bias else 0.0)
  np.testing.assert_allclose(classifier.apply_fn(classifier.params, x), expected, rtol=1e-4, atol=1e-5)


def test_conv_classifier_with_batch_norm_predicts_each_sample_alone():
  coupled, x, _ = random_conv(batch_norm=True)
  together = coupled.predict_fn(coupled.params, x)
  np.testing.assert_allclose(coupled.predict_fn(coupled.params, x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
  assert not np.allclose(coupled.apply_fn(coupled.params, x[:2])[0], coupled.apply_fn(coupled.params, x)[0], atol=1e-3)


def test_classifier_without_batch_norm_keeps_no_statistics():
  classifier, _, _ = random_mlp()
  assert classifier.statistics is None and classifier.statistics_fn is None and not classifier.batch_coupled


class InitialisationTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 0.01)
  def test_kernels_are_kaiming_times_the_scale_and_biases_are_zero(self, init_scale):
    module = MLPClassifier(num_classes=10, hidden=(200, 200), init_scale=init_scale)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 300)))["params"]
    for name, fan_in in (("Dense_0", 300), ("Dense_1", 200)):
      # Standard deviation sqrt(2 / fan_in), from at least 40,000 numbers: within 1 percent or so.
      assert float(jnp.std(params[name]["kernel"])) == pytest.approx(init_scale * (2 / fan_in) ** 0.5, rel=0.02)
      np.testing.assert_array_equal(params[name]["bias"], np.zeros(200))

  def test_convolutions_count_the_window_in_their_fan_in(self):
    module = ConvClassifier(num_classes=3, channels=(64, 64), init_scale=0.5)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    expected = 0.5 * (2 / (9 * 64)) ** 0.5  # 3 x 3 window of 64 channels; 36,864 numbers
    assert float(jnp.std(params["Conv_1"]["kernel"])) == pytest.approx(expected, rel=0.02)


class MultiplierNetworkTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.module = MultiplierNetwork(num_outputs=3, num_labels=5, num_classifiers=2, hidden=(16, 16))
    self.x = inputs(6, 2, 2)
    self.y, self.t = jnp.array([0, 1, 2, 3, 4, 0]), jnp.array([0, 1, 0, 1, 0, 1])
    self.variables = jax.jit(self.module.init)(jax.random.key(1), self.x, self.y, self.t)

  def test_input_is_the_flat_sample_with_both_one_hot_codes(self):
    assert self.variables["params"]["Dense_0"]["kernel"].shape == (4 + 5 + 2, 16)
    assert self.module.apply(self.variables, self.x, self.y, self.t).shape == (6, 3)

  def test_starts_alive_near_its_bias_for_every_input(self):
    raw = self.module.apply(self.variables, self.x, self.y, self.t)
    np.testing.assert_allclose(raw, np.ones((6, 3)), atol=0.5)
    assert float(jnp.std(raw)) > 0
    other = MultiplierNetwork(num_outputs=3, num_labels=5, num_classifiers=2, hidden=(16, 16), initial_bias=7.0)
    bias = other.init(jax.random.key(1), self.x, self.y, self.t)["params"]["Dense_2"]["bias"]
    np.testing.assert_array_equal(bias, [7.0, 7.0, 7.0])

  def test_depends_on_sample_label_and_classifier(self):
    variables = {"params": random_like(self.variables["params"], 3)}
    apply = jax.jit(lambda x, y, t: self.module.apply(variables, x, y, t))
    raw = apply(self.x, self.y, self.t)
    for changed in ((self.x + 1, self.y, self.t), (self.x, (self.y + 1) % 5, self.t), (self.x, self.y, 1 - self.t)):
      assert float(jnp.min(jnp.max(jnp.abs(apply(*changed) - raw), axis=1))) > 1e-3  # for each sample

  def test_samples_do_not_interact(self):
    variables = {"params": random_like(self.variables["params"], 3)}
    raw = self.module.apply(variables, self.x, self.y, self.t)
    alone = self.module.apply(variables, self.x[2:3], self.y[2:3], self.t[2:3])
    np.testing.assert_allclose(alone, raw[2:3], rtol=1e-4, atol=1e-5)
