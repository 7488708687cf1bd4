"""Linen, nnx and plain functions all end in the same `Classifier`, in the units of their own inputs."""

import chex
from example_networks import ConvClassifier, inputs, random_like
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.networks import MLPClassifier
from kkt_jax.subject import from_linen, from_nnx, Subject


class Linen(nn.Module):
  momentum: float = 0.9
  residual: bool = False
  remat: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    norm = (nn.remat(nn.BatchNorm) if self.remat else nn.BatchNorm)(
      use_running_average=not train, momentum=self.momentum
    )
    h = nn.Dense(4)(x)
    return nn.Dense(3)(nn.relu(norm(h) + (h if self.residual else 0.0)))


class Nnx(nnx.Module):
  def __init__(self, rngs, dropout=0.0):
    self.first = nnx.Linear(2, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)
    self.last = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def stored(subject, seed=0):
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.abs(leaf) + 0.5 if path[-1].key in ("scale", "var") else leaf,
    random_like(subject.variables_like(), seed),
  )


def by_hand(x, mean, var, first, norm, last):
  h = x @ first["kernel"] + first["bias"][None]
  h = (h - mean) / np.sqrt(var + 1e-5) * norm["scale"][None] + norm["bias"][None]
  return h, np.maximum(h, 0) @ last["kernel"] + last["bias"][None]


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_batch_norm_trains_on_the_batch_and_predicts_with_what_is_stored(kind):
  subject = (
    Subject.from_linen(Linen(), input_shape=(2,)) if kind == "linen" else Subject.from_nnx(Nnx, input_shape=(2,))
  )
  variables = stored(subject)
  names = ("Dense_0", "BatchNorm_0", "Dense_1") if kind == "linen" else ("first", "norm", "last")
  layers = [variables["params"][name] for name in names]
  classifier = subject.classifier(variables)
  x = inputs(6, 2)
  hidden = np.asarray(x @ layers[0]["kernel"] + layers[0]["bias"][None])
  mean, var = hidden.mean(axis=0), hidden.var(axis=0)
  of_batch_inside, of_batch = by_hand(x, mean[None], var[None], *layers)
  np.testing.assert_allclose(jax.jit(classifier.apply_fn)(classifier.params, x), of_batch, rtol=1e-3, atol=1e-4)
  own = variables["batch_stats"][names[1]]
  features, at_inference = by_hand(x, own["mean"][None], own["var"][None], *layers)
  whole = jax.jit(classifier.evaluate_fn)(classifier.params, x)
  np.testing.assert_allclose(whole.logits, of_batch, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(jax.jit(classifier.predict)(x), at_inference, rtol=1e-3, atol=1e-4)
  statistics = jax.jit(classifier.statistics_fn)(classifier.params, x)[names[1]]  # not their running average
  np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(statistics["var"], var, rtol=1e-3, atol=1e-5)
  chex.assert_trees_all_close(whole.statistics[names[1]], statistics, rtol=1e-5)
  assert classifier.batch_coupled and classifier.num_classes == subject.num_classes == 3
  if kind == "linen":
    np.testing.assert_allclose(classifier.features_fn(classifier.params, x), features, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(whole.features, of_batch_inside, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_statistics_do_not_depend_on_the_momentum(momentum):
  subject = Subject.from_linen(Linen(momentum=momentum), input_shape=(2,))
  variables = stored(subject)
  classifier = subject.classifier(variables)
  x = inputs(6, 2)
  layer = variables["params"]["Dense_0"]
  mean = jnp.mean(x @ layer["kernel"] + layer["bias"][None], axis=0)
  found = classifier.statistics_fn(classifier.params, x)["BatchNorm_0"]["mean"]
  np.testing.assert_allclose(found, mean, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
  ("module", "input_shape", "found"),
  [
    (Linen(remat=True), (2,), True),
    (MLPClassifier(num_classes=4, hidden=(5, 4), batch_norm=True), (2,), True),  # a square last kernel
    (Linen(residual=True), (2,), False),  # the last layer's input is not the batch norm's output alone
    (ConvClassifier(num_classes=3, channels=(2,), batch_norm=True), (4, 4, 1), False),  # features of a window each
    (MLPClassifier(num_classes=3, hidden=(4,)), (2,), False),
  ],
  ids=["remat", "square", "residual", "windows", "no batch norm"],
)
def test_features_are_what_the_last_layer_rectifies_or_none(module, input_shape, found):
  subject = Subject.from_linen(module, input_shape=input_shape)
  classifier = subject.classifier(stored(subject))
  assert (classifier.features_fn is not None) == found
  if found:
    x, last = inputs(6, *input_shape), classifier.params[sorted(classifier.params)[-1]]
    features = classifier.features_fn(classifier.params, x)
    logits = jax.nn.relu(features) @ last["kernel"] + last["bias"][None]
    np.testing.assert_allclose(logits, classifier.predict(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("found", "features_fn"), [(True, lambda w, x: x @ w["a"]), (False, lambda w, x: x @ w["a"] + 1)]
)
def test_features_of_a_plain_function_are_checked_whatever_the_layout_of_its_last_kernel(found, features_fn):
  shapes = {"a": jnp.zeros((2, 4)), "b": jnp.zeros((3, 4))}  # the last one as PyTorch has it
  apply_fn = lambda w, x: jax.nn.relu(x @ w["a"]) @ w["b"].T
  subject = Subject(apply_fn, lambda: shapes, input_shape=(2,), features_fn=features_fn)
  classifier = subject.classifier(random_like(shapes, 0))
  assert (classifier.features_fn is not None) == found
  assert (classifier.evaluate_fn is None) == found  # logits and features are then asked for one by one


def test_a_plain_function_keeps_its_own_units():
  subject = Subject(
    apply_fn=lambda w, x: x @ w["w"],
    init_fn=lambda: {"w": jnp.zeros((2, 3))},
    input_shape=(2,),
    value_range=(-1.0, 3.0),
    offset=jnp.array([1.0, -1.0]),
    weight_decay=0.01,
  )
  w = {"w": jnp.arange(6.0).reshape(2, 3)}
  classifier = subject.classifier(w, labels=(4, 5, 6))
  np.testing.assert_allclose(classifier.predict(jnp.array([[-1.0, 3.0]])), jnp.array([[-1.0, 3.0]]) @ w["w"])
  np.testing.assert_allclose(classifier.offset, [1.0, -1.0])
  assert classifier.labels == (4, 5, 6) and classifier.value_range == (-1.0, 3.0) and classifier.weight_decay == 0.01
  with pytest.raises(ValueError, match="value_range must be"):
    Subject(subject.apply_fn, subject.init_fn, (2,), value_range=(1.0, 1.0)).classifier(w)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_an_offset_is_subtracted_from_every_input(kind):
  x, offset = inputs(6, 2), jnp.array([0.5, -2.0])
  module = Linen()
  variables = module.init(jax.random.key(0), x)
  make = (
    (lambda **own: from_linen(module, variables, **own)) if kind == "linen" else lambda **own: from_nnx(model, **own)
  )
  model = Nnx(nnx.Rngs(0))
  plain, moved = make(input_shape=(2,)), make(input_shape=(2,), offset=offset)
  np.testing.assert_allclose(moved.predict(x + offset[None]), plain.predict(x), rtol=1e-4, atol=1e-5)
  assert float(jnp.abs(moved.predict(x) - plain.predict(x)).max()) > 0.1
  np.testing.assert_array_equal(moved.offset, offset)


def test_modules_come_with_their_numbers():
  x = inputs(6, 2)
  module = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])
  variables = module.init(jax.random.key(0), x)
  classifier = from_linen(module, variables, input_shape=(2,), labels=(7, 8, 9))
  np.testing.assert_array_equal(classifier.predict(x), module.apply(variables, x))
  assert classifier.params is variables["params"] and classifier.labels == (7, 8, 9) and not classifier.batch_coupled
  model = Nnx(nnx.Rngs(0), dropout=0.5)  # with random numbers, which a traced function must not share with it
  classifier = from_nnx(model, input_shape=(2,))
  doubled = jax.tree.map(lambda leaf: 2 * leaf, classifier.params)
  jax.jit(classifier.apply_fn)(doubled, x)  # leaves the model as it is
  model.eval()
  np.testing.assert_allclose(classifier.predict(x), model(x), rtol=1e-6)


class WithConstants(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x) * self.variable("constants", "scale", lambda: jnp.ones(())).value


def test_other_collections_are_constants():
  x = inputs(6, 2)
  variables = WithConstants().init(jax.random.key(0), x)
  variables = {**variables, "constants": {"scale": jnp.array(3.0)}}
  classifier = from_linen(WithConstants(), variables, input_shape=(2,))
  np.testing.assert_allclose(classifier.predict(x), WithConstants().apply(variables, x))
  assert set(classifier.params) == {"Dense_0"}


def test_what_does_not_fit_is_named():
  x = inputs(6, 2)
  variables = Linen().init(jax.random.key(0), x)
  with pytest.raises(ValueError, match=r"^variables must hold 'params' and 'batch_stats' .*got \['params'\]"):
    from_linen(Linen(), {"params": variables["params"]}, input_shape=(2,))
  with pytest.raises(ValueError, match="^variables must hold 'params'; got"):
    from_linen(Linen(), variables["params"], input_shape=(2,))
  with pytest.raises(ValueError, match=r"^apply_fn must take a batch of inputs of input_shape = \(3,\); it raised"):
    from_linen(Linen(), variables, input_shape=(3,))
  with pytest.raises(ValueError, match=r"^module must take a batch of inputs of input_shape = \(3,\); it raised"):
    from_linen(ConvClassifier(num_classes=3), variables, input_shape=(3,))
  with pytest.raises(ValueError, match="^train_fn must return running averages that follow the batch"):
    from_linen(Linen(momentum=1.0), variables, input_shape=(2,))
