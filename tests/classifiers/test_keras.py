"""Models of Keras on its JAX backend are the classifiers that they are in Keras."""

import chex
import flax_twin
from flax_twin import X, Y
import jax
import jax.numpy as jnp
import keras
from keras import layers
import numpy as np
import pytest

import kkt_jax


@pytest.fixture(autouse=True)
def _as_keras_computes():
  keras.utils.set_random_seed(0)
  with jax.numpy_rank_promotion("allow"):
    yield


def dense(end=None):
  return keras.Sequential(
    [keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(12, "relu"), layers.Dense(10, activation=end)]
  )


def convolutional(form="channels_last", end=None, momentum=0.5):
  first = form == "channels_first"
  return keras.Sequential(
    [
      keras.Input((1, 8, 8) if first else (8, 8, 1)),
      layers.Conv2D(4, 3, data_format=form, name="conv"),
      layers.BatchNormalization(axis=1 if first else -1, momentum=momentum, name="norm"),
      layers.ReLU(),
      layers.MaxPooling2D(data_format=form),
      layers.GaussianNoise(1.0),
      layers.Flatten(data_format=form),
      layers.Dropout(0.5),
      layers.Dense(10, name="last"),
      *([layers.Softmax()] if end == "softmax" else []),
    ],
    name="cnn",
  )


def residual(end="softmax"):
  inputs = keras.Input((8, 8, 1))
  h = layers.Dense(16)(layers.Flatten()(inputs))
  h = layers.add([h, layers.Dense(16, "gelu")(layers.LayerNormalization()(h))])
  return keras.Model(inputs, layers.Dense(10, end)(layers.BatchNormalization()(h)))


def trained(model, x=X, steps=160):
  """By full-batch descent whose steps shrink to nothing, with Keras's own means."""
  rates = keras.optimizers.schedules.PolynomialDecay(0.1, steps // 2, end_learning_rate=0.0)
  model.compile(keras.optimizers.SGD(rates, 0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
  model.fit(x, Y, epochs=steps, batch_size=len(x), verbose=0)
  return model


@pytest.mark.parametrize(
  "model",
  [dense, convolutional, residual, lambda: dense("softmax"), lambda: convolutional(end="softmax"),
   lambda: convolutional("channels_first")],
  ids=["dense", "convolutional", "residual", "softmax", "softmax layer", "channels first"],
)  # fmt: skip
def test_outputs_are_those_of_keras(model):
  model = model()
  own = kkt_jax.from_keras(model)
  assert own.input_shape == (8, 8, 1)
  turned = model.input_shape == (None, 1, 8, 8)
  theirs = np.asarray(model(X.transpose(0, 3, 1, 2) if turned else X, training=False))
  logits = own.predict(X)
  found = jax.nn.softmax(logits) if np.allclose(theirs.sum(1), 1) else logits
  np.testing.assert_allclose(found, theirs, atol=1e-5)


def test_gradients_are_those_of_keras():
  model = convolutional()
  own = kkt_jax.from_keras(model)

  def theirs(trainable, x):
    return model.stateless_call(trainable, [v.value for v in model.non_trainable_variables], x, training=False)[0]

  expected = jax.jacrev(theirs)([v.value for v in model.trainable_variables], X[:3])
  found = jax.jacrev(own.predict_fn)(own.params, X[:3])
  assert set(kkt_jax.tensor_names(own.params)) == {v.path for v in model.trainable_variables}
  for variable, gradient in zip(model.trainable_variables, expected, strict=True):
    _, layer, name = variable.path.split("/")
    chex.assert_trees_all_close(found["cnn"][layer][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_batch_norm_follows_the_batch_and_its_statistics_hold_where_keras_has_trained():
  model = trained(convolutional())
  before = [v.value for v in model.variables]
  own = kkt_jax.from_keras(model)
  assert own.batch_coupled
  np.testing.assert_allclose(own.statistics["cnn"]["norm"]["var"], model.get_layer("norm").moving_variance.value)
  found = own.statistics_fn(own.params, jnp.asarray(X))
  chex.assert_trees_all_close(found, own.statistics, rtol=1e-4, atol=1e-5)
  h = model.layers[0](X)
  np.testing.assert_allclose(found["cnn"]["norm"]["var"], np.var(h, axis=(0, 1, 2)), rtol=1e-4)
  by_batch = own.apply_fn(own.params, jnp.asarray(X))
  np.testing.assert_allclose(by_batch, own.predict(X), atol=2e-2)
  assert np.abs(own.apply_fn(own.params, X[:5]) - by_batch[:5]).max() > 0.1
  for variable, value in zip(model.variables, before, strict=True):
    np.testing.assert_array_equal(variable.value, value)
  assert all("call" not in vars(layer) for layer in model.layers)


@pytest.mark.slow
def test_the_own_training_data_leave_as_much_as_in_flax():
  """100 digits, batch norm, full batch: trained by Keras, and in flax from the same start with the same steps."""
  model = keras.Sequential(
    [
      keras.Input((8, 8, 1)),
      layers.Flatten(),
      layers.Dense(flax_twin.WIDTH),
      layers.BatchNormalization(momentum=flax_twin.KEPT),
      layers.ReLU(),
      layers.Dense(10),
    ]
  )
  first, norm, last = model.layers[1], model.layers[2], model.layers[4]
  twin = flax_twin.from_flax((first.kernel, first.bias), (norm.gamma, norm.beta), (last.kernel, last.bias), 1e-3)
  loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
  model.compile(keras.optimizers.SGD(flax_twin.RATE), loss)
  model.fit(X, Y, batch_size=len(X), epochs=flax_twin.STEPS, verbose=0, shuffle=False)
  flax_twin.check_residual(kkt_jax.from_keras(model), twin)


def test_frozen_layers_are_constants():
  model = convolutional()
  model.get_layer("norm").trainable = model.get_layer("conv").trainable = False
  own = kkt_jax.from_keras(model)
  assert kkt_jax.tensor_names(own.params) == ["cnn/last/bias", "cnn/last/kernel"]
  assert not own.batch_coupled and own.statistics is None


def test_one_sigmoid_is_two_classes():
  model = keras.Sequential([keras.Input((5,)), layers.Dense(4, "relu"), layers.Dense(1, "sigmoid")])
  own = kkt_jax.from_keras(model, value_range=None)
  x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
  assert own.num_classes == 2
  np.testing.assert_allclose(jax.nn.softmax(own.predict(x))[:, 1:], model(x), atol=1e-6)


def test_a_known_start_and_what_else_is_known():
  start, model = dense(), dense()
  own = kkt_jax.from_keras(model, initial=start, labels=range(5, 15), weight_decay=0.1, offset=0.5 * X[0])
  found = dict(zip(kkt_jax.tensor_names(own.params), jax.tree.leaves(own.initial_params), strict=True))
  pairs = zip(model.trainable_variables, start.trainable_variables, strict=True)
  chex.assert_trees_all_equal(found, {here.path: there.value for here, there in pairs})
  assert (own.labels[0], own.weight_decay) == (5, 0.1)
  np.testing.assert_allclose(own.predict(X[:3]), model(X[:3] - 0.5 * X[0]), atol=1e-5)


class Subclassed(keras.Model):
  def __init__(self, end=None, two=False):
    super().__init__()
    self.last, self.two = layers.Dense(3, end), two

  def call(self, x):
    return (self.last(x), x) if self.two else self.last(x)


def built(model, shape=(1, 4)):
  model(np.zeros(shape, np.float32))
  return model


def several():
  a, b = keras.Input((2,)), keras.Input((2,))
  return keras.Model([a, b], layers.Dense(3)(layers.add([a, b])))


def tokens():
  inputs = keras.Input((4,), dtype="int32")
  return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.Embedding(5, 2)(inputs))))


@pytest.mark.parametrize(
  ("model", "settings", "said"),
  [
    (several, {}, "one input and one output"),
    (tokens, {}, "floating point; .* takes int32"),
    (lambda: keras.Sequential([layers.Dense(3)]), {}, "must be a built keras.Model"),
    (lambda: layers.Dense(3), {}, "must be a built keras.Model; got Dense"),
    (lambda: built(Subclassed()), {}, "input_shape must be given"),
    (lambda: built(Subclassed("softmax")), {"input_shape": (4,)}, "logits, not probabilities"),
    (lambda: built(Subclassed(two=True)), {"input_shape": (4,)}, "one array of logits; it gives a tuple"),
    (lambda: dense("sigmoid"), {}, "one label per sample"),
  ],
  ids=["inputs", "integers", "not built", "layer", "no shape", "subclassed softmax", "outputs", "labels"],
)
def test_what_is_no_such_classifier_is_refused(model, settings, said):
  with pytest.raises(ValueError, match=said):
    kkt_jax.from_keras(model(), **settings)


def test_a_subclassed_model_needs_its_shape_alone():
  model = built(Subclassed())
  x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  np.testing.assert_allclose(kkt_jax.from_keras(model, input_shape=(4,)).predict(x), model(x), atol=1e-5)


def test_another_backend_is_refused(monkeypatch):
  monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
  with pytest.raises(ValueError, match="Set KERAS_BACKEND=jax before"):
    kkt_jax.from_keras(dense())
