"""The flax networks: the relaxed gate, each classifier against its own formula, batch norm, the multiplier network."""

from absl.testing import parameterized
import chex
from example_networks import inputs, random_conv, random_like, random_mlp
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest

from kkt_jax.networks import ConvClassifier, from_module, MLPClassifier, MultiplierNetwork, relaxed_relu


class RelaxedReluTest(chex.TestCase):
  POINTS = np.array([-3.0, -0.1, 0.0, 0.05, 2.0])

  @chex.variants(with_jit=True, without_jit=True)
  def test_value_is_that_of_relu(self):
    relaxed = self.variant(relaxed_relu, static_argnums=1)
    np.testing.assert_array_equal(relaxed(jnp.array(self.POINTS, jnp.float32), 20.0), np.float32([0, 0, 0, 0.05, 2.0]))

  @chex.variants(with_jit=True, without_jit=True)
  def test_derivative_is_the_sigmoid(self):
    relaxed = self.variant(relaxed_relu, static_argnums=1)
    slope = jax.vmap(jax.grad(lambda x: relaxed(x, 20.0)))(jnp.array(self.POINTS))
    np.testing.assert_allclose(slope, 1 / (1 + np.exp(-20 * self.POINTS)), rtol=1e-4, atol=1e-7)
    _, forward = jax.jvp(lambda x: relaxed(x, 20.0), (jnp.array(self.POINTS),), (jnp.full(5, 3.0),))
    np.testing.assert_allclose(forward, 3 * slope, rtol=1e-5)

  @chex.variants(with_jit=True, without_jit=True)
  def test_second_derivative_is_that_of_the_sigmoid(self):
    relaxed = self.variant(relaxed_relu, static_argnums=1)
    curvature = jax.vmap(jax.grad(jax.grad(lambda x: relaxed(x, 20.0))))(jnp.array(self.POINTS))
    s = 1 / (1 + np.exp(-20 * self.POINTS))
    np.testing.assert_allclose(curvature, 20 * s * (1 - s), rtol=1e-3, atol=1e-5)  # 5 at 0
    exact = jax.vmap(jax.grad(jax.grad(jax.nn.relu)))(jnp.array(self.POINTS))
    np.testing.assert_array_equal(exact, np.zeros(5))  # what the gate is for


def test_huge_preactivations_have_finite_gates():
  gates = jax.vmap(jax.grad(relaxed_relu), in_axes=(0, None))(jnp.array([-1e6, 1e6]), 500.0)
  np.testing.assert_array_equal(gates, [0.0, 1.0])


def test_check_grads_of_the_gate():
  with jax.enable_x64(True):
    check_grads(jax.vmap(jax.grad(lambda x: relaxed_relu(x, 7.0))), (jnp.array([-0.3, 0.1, 0.5]),), order=2)


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
  trained = from_module(module, variables, input_shape=(2,), labels=(0, 1, 2))
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


@pytest.mark.parametrize("build", [random_mlp, random_conv], ids=["mlp", "conv"])
def test_gates_shape_the_gradient_function_but_neither_values_nor_anything_else(build):
  relaxed, x, _ = build(gate_sharpness=20.0)
  exact, _, _ = build()
  np.testing.assert_allclose(relaxed.gradient_fn(relaxed.params, x), exact.apply_fn(exact.params, x), rtol=1e-5)
  gradient = lambda function: jax.jit(jax.grad(lambda p: jnp.sum(function(p, x)[:, 0])))(exact.params)
  for name in ("apply_fn", "predict_fn"):
    chex.assert_trees_all_close(gradient(getattr(relaxed, name)), gradient(exact.apply_fn), rtol=1e-5, atol=1e-6)
  differences = jax.tree.map(
    lambda a, b: float(jnp.max(jnp.abs(a - b))), gradient(relaxed.gradient_fn), gradient(exact.apply_fn)
  )
  assert max(jax.tree.leaves(differences)) > 1e-3


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_low_precision_shapes_the_gradient_function_alone(batch_norm):
  module = MLPClassifier(num_classes=3, hidden=(5, 4), batch_norm=batch_norm)
  exact, x, _ = random_mlp(batch_norm=batch_norm)
  variables = {"params": exact.params} | ({"batch_stats": exact.statistics} if batch_norm else {})
  rough = from_module(module.clone(dtype=jnp.bfloat16), variables, input_shape=x.shape[1:], labels=(0, 1, 2))
  for name in ("apply_fn", "predict_fn"):
    np.testing.assert_allclose(
      getattr(rough, name)(rough.params, x), getattr(exact, name)(exact.params, x), rtol=1e-5, atol=1e-6
    )
  gradients = []
  for classifier in (rough, exact):
    logits, pull_back = jax.vjp(lambda params, fn=classifier.gradient_fn: fn(params, x), classifier.params)
    gradients.append(jnp.concatenate([g.ravel() for g in jax.tree.leaves(pull_back(logits))]))
    assert logits.dtype == gradients[-1].dtype == x.dtype
  error = float(jnp.linalg.norm(gradients[0] - gradients[1]) / jnp.linalg.norm(gradients[1]))
  assert 1e-4 < error < 0.05  # of 8 bits


@pytest.mark.parametrize("batch_norm", [False, True])
def test_offset_is_subtracted_from_every_input(batch_norm):
  module = MLPClassifier(num_classes=3, hidden=(5, 4), batch_norm=batch_norm)
  plain, x, _ = random_mlp(batch_norm=batch_norm)
  variables = {"params": plain.params} | ({"batch_stats": plain.statistics} if batch_norm else {})
  moved = from_module(module, variables, input_shape=(2,), labels=(0, 1, 2), offset=jnp.array([0.5, -2.0]))
  x_moved = x + jnp.array([[0.5, -2.0]])
  for name in ("apply_fn", "predict_fn"):
    expected = getattr(plain, name)(plain.params, x)
    np.testing.assert_allclose(getattr(moved, name)(plain.params, x_moved), expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(getattr(moved, name)(plain.params, x), expected, atol=1e-2) or (
      batch_norm and name == "apply_fn"  # batch norm removes a constant shift by itself
    )


class FromModuleTest(parameterized.TestCase):
  def test_labels_must_count_the_outputs(self):
    module = MLPClassifier(num_classes=3, hidden=(4,))
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"^apply_fn must map .*C = 2 labels"):
      from_module(module, variables, input_shape=(2,), labels=(0, 1))

  def test_nan_weights_are_refused_by_name(self):
    module = MLPClassifier(num_classes=3, hidden=(4,))
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2)))
    variables["params"]["Dense_1"]["bias"] = jnp.array([0.0, jnp.nan, 0.0])
    with pytest.raises(ValueError, match=r"^params must be finite; Dense_1/bias"):
      from_module(module, variables, input_shape=(2,), labels=(0, 1, 2))

  def test_classifier_without_batch_norm_keeps_no_statistics(self):
    classifier, _, _ = random_mlp()
    assert classifier.statistics is None and classifier.statistics_fn is None and not classifier.batch_coupled

  def test_features_are_the_last_batch_norms_output_at_inference(self):
    classifier, x, _ = random_mlp(batch_norm=True)
    features = classifier.features_fn(classifier.params, x)
    last = classifier.params["Dense_2"]
    logits = np.maximum(features, 0) @ np.asarray(last["kernel"]) + np.asarray(last["bias"])
    np.testing.assert_allclose(logits, classifier.predict_fn(classifier.params, x), rtol=1e-4, atol=1e-5)

  def test_whole_classifier_passes_through_jit(self):
    coupled, x, _ = random_mlp(batch_norm=True)
    logits = jax.jit(lambda c, x: c.predict_fn(c.params, x))(coupled, x)
    np.testing.assert_allclose(logits, coupled.predict_fn(coupled.params, x), rtol=1e-4, atol=1e-5)


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
