"""Linen, nnx and plain functions all end in the same `Classifier`, in the units of their own inputs."""

import dataclasses
import pathlib

import chex
from example_networks import ConvClassifier, inputs, random_like
from flax import core, nnx
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from kkt_jax import priors
from kkt_jax.classifiers import _statistics, from_linen, from_nnx, make_classifier, read_weights, Subject
from kkt_jax.networks import MLPClassifier


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
  whole = jax.jit(classifier.forward, static_argnums=2)(classifier.params, x, True)
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
  both = lambda w, x: (apply_fn(w, x), features_fn(w, x))
  classifier = Subject(apply_fn, lambda: shapes, input_shape=(2,), features_fn=both).classifier(random_like(shapes, 0))
  assert (classifier.features_fn is not None) == found
  x = jnp.ones((3, 2))
  for train in (False, True):  # the same, without batch norm
    whole = classifier.forward(classifier.params, x, train)
    np.testing.assert_array_equal(whole.logits, apply_fn(classifier.params, x))
    assert (whole.features is not None) == found and whole.statistics is None


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
  chex.assert_trees_all_equal(classifier.params, variables["params"])
  assert classifier.labels == (7, 8, 9) and not classifier.batch_coupled
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


def test_frozen_variables_are_taken_and_a_state_of_training_or_spectral_norm_is_named():
  module = nn.Dense(3)
  variables = module.init(jax.random.key(0), jnp.zeros((1, 4)))
  x = jnp.linspace(0, 1, 8).reshape(2, 4)
  for given in (core.freeze(variables), {"params": core.freeze(variables["params"])}):
    classifier = from_linen(module, given, input_shape=(4,))
    np.testing.assert_array_equal(classifier.predict(x), module.apply(variables, x))
  frozen = Subject(module.apply, lambda: core.freeze(variables), (4,))
  np.testing.assert_array_equal(frozen.classifier(variables).predict(x), module.apply(variables, x))
  for other, got in ((object(), "a object"), (None, "a NoneType"), (variables["params"], r"\['bias', 'kernel'\]")):
    with pytest.raises(ValueError, match=f"^variables must hold 'params'; got {got}"):
      from_linen(module, other, input_shape=(4,))

  class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      return nn.SpectralNorm(nn.Dense(3))(x, update_stats=train)

  with pytest.raises(ValueError, match="^batch_stats must hold a mean and a variance .* got 'Dense_0/kernel/sigma'"):
    Subject.from_linen(Spectral(), input_shape=(4,))


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
  with pytest.raises(ValueError, match="^input_shape must be a sequence of integers; got 3"):
    from_linen(nn.Dense(3), {"params": {}}, input_shape=3)
  with pytest.raises(ValueError, match="^module must be a flax linen module, an instance; got <class"):
    from_linen(nn.Dense, {"params": {}}, input_shape=(3,))
  with pytest.raises(ValueError, match="^model must be a flax nnx module, an instance; got Dense"):
    from_nnx(nn.Dense(3), input_shape=(3,))
  with pytest.raises(ValueError, match="^init_fn must be a function; got a dict"):
    Subject(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, (3,))
  with pytest.raises(ValueError, match="^train_fn must return running averages that follow the batch"):
    from_linen(Linen(momentum=1.0), variables, input_shape=(2,))


# Batch norm in plain functions, by the names of PyTorch and Keras.

PYTORCH, KERAS = ("running_mean", "running_var"), ("moving_mean", "moving_variance")


def torch_network(v, x, train, *, names=PYTORCH, unbiased=True, dropout=False):
  """Linear, batch norm, ReLU, linear; a state_dict's names and layout."""
  a, norm, b = v["0"], v["1"], v["3"]
  h = x @ a["weight"].T + a["bias"][None]
  mean, var = (h.mean(0), h.var(0)) if train else (norm[names[0]], norm[names[1]])
  z = jax.nn.relu((h - mean[None]) / jnp.sqrt(var[None] + 1e-5) * norm["weight"][None] + norm["bias"][None])
  if dropout and train:
    z = jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, z.shape), 2 * z, 0.0)
  var = var * len(x) / (len(x) - 1) if unbiased else var
  changed = {own: 0.9 * norm[own] + 0.1 * new for own, new in zip(names, (mean, var), strict=True)}
  return z @ b["weight"].T + b["bias"][None], {"1": changed}


def state_dict(names=PYTORCH, counter=False):
  draw = lambda seed, *shape: inputs(shape[0], *shape[1:], seed=seed)
  norm = {"weight": draw(3, 4) ** 2 + 0.5, "bias": draw(4, 4), names[0]: draw(5, 4), names[1]: draw(6, 4) ** 2 + 0.5}
  norm |= {"num_batches_tracked": jnp.array(100)} if counter else {}
  layers = {
    name: {"weight": draw(seed, *s), "bias": draw(seed + 7, s[0])}
    for name, seed, s in (("0", 1, (4, 2)), ("3", 2, (3, 4)))
  }
  return {**layers, "1": norm}


def torch_subject(variables, input_shape=(2,), **own):
  network = lambda v, x, train: torch_network(v, x, train, **own)
  return Subject(
    lambda v, x: network(v, x, False)[0], lambda: variables, input_shape, train_fn=lambda v, x: network(v, x, True)
  )


@pytest.mark.parametrize(
  ("names", "unbiased"),
  [(PYTORCH, True), (KERAS, False), (("mean", "var"), False), (("ema_mean", "ema_variance"), False)],
  ids=["PyTorch", "Keras", "flax", "own names"],
)
def test_running_statistics_among_parameters_are_recognised_by_their_names(names, unbiased, caplog):
  variables, x = state_dict(names, counter=True), inputs(6, 2)
  own = torch_subject(variables, names=names, unbiased=unbiased).classifier(variables)
  assert jax.tree.map(jnp.shape, own.params["1"]) == {"weight": (4,), "bias": (4,)} and own.batch_coupled
  assert sum(leaf.size for leaf in jax.tree.leaves(own.params)) == 8 + 4 + 8 + 12 + 3
  np.testing.assert_array_equal(own.statistics["1"]["var"], variables["1"][names[1]])
  np.testing.assert_allclose(own.predict(x), torch_network(variables, x, False, names=names)[0], rtol=1e-5)
  of_batch = lambda p: torch_network({**p, "1": {**variables["1"], **p["1"]}}, x, True, names=names)[0]
  np.testing.assert_allclose(own.apply_fn(own.params, x), of_batch(own.params), rtol=1e-5)
  squared = lambda function: jax.grad(lambda p: jnp.sum(jnp.square(function(p))))(own.params)
  chex.assert_trees_all_close(squared(lambda p: own.apply_fn(p, x)), squared(of_batch), rtol=1e-4, atol=1e-5)
  h = np.asarray(x @ variables["0"]["weight"].T + variables["0"]["bias"][None])
  found = own.statistics_fn(own.params, x)["1"]
  np.testing.assert_allclose(found["var"], h.var(axis=0, ddof=1 if unbiased else 0), rtol=1e-4)
  np.testing.assert_allclose(found["mean"], h.mean(axis=0), rtol=1e-4, atol=1e-5)
  assert jnp.isfinite(priors.statistics_distance({"1": found}, own.statistics))  # which knows mean and var
  assert not caplog.records  # the variances are as the names say


@pytest.mark.parametrize(("names", "unbiased", "said"), [(PYTORCH, False, "biased"), (KERAS, True, "unbiased")])
def test_variances_of_the_other_kind_than_their_names_say_are_told(names, unbiased, said, caplog):
  variables = state_dict(names)
  torch_subject(variables, names=names, unbiased=unbiased).classifier(variables)
  (record,) = caplog.records
  assert record.getMessage().startswith(f"train_fn returns {said} variances for '1/{names[1]}'; by its name")


def test_running_statistics_are_taken_from_flat_names_and_from_collections_all_the_same():
  nested, x = state_dict(), inputs(6, 2)
  flat = {f"{layer}.{name}": leaf for layer, own in nested.items() for name, leaf in own.items()}
  tree = lambda v: {
    layer: {n.partition(".")[2]: leaf for n, leaf in v.items() if n.startswith(layer)} for layer in "013"
  }

  def flat_network(v, x, train):
    logits, changed = torch_network(tree(v), x, train)
    return logits, v | {f"1.{name}": leaf for name, leaf in changed["1"].items()}  # all variables

  subject = Subject(
    lambda v, x: flat_network(v, x, False)[0], lambda: flat, (2,), train_fn=lambda v, x: flat_network(v, x, True)
  )
  own, expected = subject.classifier(flat), torch_subject(nested).classifier(nested)
  assert sorted(own.params) == sorted(name for name in flat if "running" not in name)
  chex.assert_trees_all_close(own.statistics, expected.statistics)
  chex.assert_trees_all_close(own.statistics_fn(own.params, x), expected.statistics_fn(expected.params, x))
  params, statistics = _statistics.split(state_dict(counter=True))
  whole = lambda v: _statistics.merge(v["params"], v["batch_stats"])
  subject = Subject(
    lambda v, x: torch_network(whole(v), x, False)[0],
    lambda: {"params": params, "batch_stats": statistics},
    (2,),
    train_fn=lambda v, x: torch_network(whole(v), x, True),
  )
  own = subject.classifier({"params": params, "batch_stats": statistics})
  chex.assert_trees_all_close(own.statistics, expected.statistics)
  np.testing.assert_allclose(own.predict(x), expected.predict(x))


def test_running_statistics_are_never_counted_as_parameters_in_silence():
  variables = state_dict()
  inference = lambda v, x: torch_network(v, x, False)[0]
  with pytest.raises(
    ValueError, match=r"^params must hold no running statistics .* got '1/running_mean', '1/running_var'"
  ):
    make_classifier(inference, variables, (2,))
  with pytest.raises(
    ValueError, match=r"^train_fn must be given for the batch norm .* '1/running_mean', '1/running_var'"
  ):
    Subject(inference, lambda: variables, (2,)).classifier(variables)
  params, frozen = _statistics.split(variables)  # as the message says
  own = lambda v, x: inference(_statistics.merge(v["params"], v["constants"]), x)
  stored = {"params": params, "constants": frozen}
  classifier = Subject(own, lambda: stored, (2,)).classifier(stored)
  assert not classifier.batch_coupled and set(classifier.params["1"]) == {"weight", "bias"}
  lone = {"mean": jnp.ones((2, 3)), "w": jnp.ones((2, 3))}  # no pair: parameters
  assert set(make_classifier(lambda p, x: (x - 1) @ (p["w"] + p["mean"]), lone, (2,)).params) == {"mean", "w"}


def test_a_train_fn_that_is_another_function_is_refused():
  variables = state_dict()
  with pytest.raises(ValueError, match="^train_fn must give the logits that apply_fn gives .* Is dropout"):
    torch_subject(variables, dropout=True).classifier(variables)
  subject = dataclasses.replace(
    torch_subject(variables), train_fn=lambda v, x: (v["3"]["bias"][None] + jnp.zeros((len(x), 1)), {})
  )
  with pytest.raises(ValueError, match=r"^train_fn must .* train_fn must return \(logits, batch_stats\)"):
    subject.classifier(variables)
  strange = {"params": {"w": jnp.ones((2, 3))}, "batch_stats": {"sigma": jnp.ones(3)}}
  with pytest.raises(ValueError, match="^batch_stats must hold a mean and a variance .*'running_mean'.*; got 'sigma'"):
    Subject(
      lambda v, x: x @ v["params"]["w"], lambda: strange, (2,), train_fn=lambda v, x: (x @ v["params"]["w"], v)
    ).classifier(strange)


def test_the_network_of_pytorch_in_the_documentation_is_what_it_says(tmp_path):
  """The code of docs/audit.md, from a state_dict as PyTorch stores it, against flax."""
  page = (pathlib.Path(__file__).parents[2] / "docs" / "audit.md").read_text()
  (code,) = [
    block.partition("```")[0] for block in page.split("```python\n") if "running_var" in block.partition("```")[0]
  ]
  space = {}
  exec(code, space)
  subject = space["classifier"]()
  variables = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.abs(leaf) + 0.5 if path[-1].key == "running_var" else leaf,
    random_like(subject.variables_like(), 0, scale=0.1),
  )
  names = {f"{layer}.{name}": np.asarray(leaf) for layer, own in variables.items() for name, leaf in own.items()}
  save_file(names | {"1.num_batches_tracked": np.array(7)}, tmp_path / "weights.safetensors")
  own = subject.classifier(read_weights(tmp_path / "weights.safetensors", subject.variables_like()))
  assert own.num_classes == 10 and set(own.params["1"]) == {"weight", "bias"}

  class Flax(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
      h = nn.Conv(16, (3, 3), strides=2, padding=1)(x)
      h = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.0)(h))
      return nn.Dense(10)(jnp.transpose(h, (0, 3, 1, 2)).reshape(len(x), -1))

  conv, norm, last = variables["0"], variables["1"], variables["5"]
  params = {
    "Conv_0": {"kernel": jnp.transpose(conv["weight"], (2, 3, 1, 0)), "bias": conv["bias"]},
    "BatchNorm_0": {"scale": norm["weight"], "bias": norm["bias"]},
    "Dense_0": {"kernel": last["weight"].T, "bias": last["bias"]},
  }
  stored = {
    "params": params,
    "batch_stats": {"BatchNorm_0": {"mean": norm["running_mean"], "var": norm["running_var"]}},
  }
  x = jnp.abs(inputs(5, 28, 28, 1))
  np.testing.assert_allclose(own.predict(x), Flax().apply(stored, x), rtol=1e-3, atol=1e-4)
  logits, changed = Flax().apply(stored, x, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(own.apply_fn(own.params, x), logits, rtol=1e-3, atol=1e-4)
  count, biased = 5 * 14 * 14, changed["batch_stats"]["BatchNorm_0"]["var"]
  np.testing.assert_allclose(own.statistics_fn(own.params, x)["1"]["var"], biased * count / (count - 1), rtol=1e-4)


# Dropout beside batch norm, and the names of what switches both.


LINEN = """
class Switched(nn.Module):
  {field}rate: float = 0.5

  @nn.compact
  def __call__(self, x{argument}):
    average = {average}
    x = nn.relu(nn.BatchNorm(use_running_average=average, momentum=0.0)(nn.Dense(4)(x)))
    return nn.Dense(3)(nn.Dropout(self.rate, deterministic=average)(x))
"""


def linen_with(switch, *, attribute):
  """A class of modules with batch norm and dropout that one name switches, in training as it comes."""
  reverse = switch in ("deterministic", "use_running_average")
  average = f"{'' if reverse else 'not '}{'self.' if attribute else ''}{switch}"
  field, argument = (f"{switch}: bool = {not reverse}\n  ", "") if attribute else ("", f", {switch}")
  space = {"nn": nn, "__name__": __name__}
  exec(LINEN.format(field=field, argument=argument, average=average), space)
  return space["Switched"]


@pytest.mark.parametrize("attribute", [False, True], ids=["argument", "attribute"])
@pytest.mark.parametrize("switch", ["train", "training", "is_training", "deterministic", "use_running_average", "mine"])
def test_batch_norm_is_switched_to_the_batch_and_dropout_is_not_on(switch, attribute):
  made, x = linen_with(switch, attribute=attribute), inputs(6, 2)
  known = {"train_argument": "mine"} if switch == "mine" else {}
  subject = Subject.from_linen(made(), input_shape=(2,), **known)
  variables = stored(subject)
  own = subject.classifier(variables)
  names = ("Dense_0", "BatchNorm_0", "Dense_1")
  layers = [variables["params"][name] for name in names]
  h = np.asarray(x @ layers[0]["kernel"] + layers[0]["bias"][None])
  of_batch = by_hand(x, h.mean(axis=0)[None], h.var(axis=0)[None], *layers)[1]
  np.testing.assert_allclose(own.apply_fn(own.params, x), of_batch, rtol=1e-3, atol=1e-4)
  averages = variables["batch_stats"]["BatchNorm_0"]
  inference = by_hand(x, averages["mean"][None], averages["var"][None], *layers)[1]
  np.testing.assert_allclose(own.predict(x), inference, rtol=1e-3, atol=1e-4)


def test_what_switches_a_module_is_asked_for_by_its_name():
  for attribute in (False, True):
    with pytest.raises(ValueError, match=r"^module has batch norm, .* name it by train_argument|^module must take"):
      Subject.from_linen(linen_with("mine", attribute=attribute)(), input_shape=(2,))
  with pytest.raises(ValueError, match="^train_argument must name an argument or attribute of module; got 'other'"):
    Subject.from_linen(nn.Dense(3), input_shape=(2,), train_argument="other")


class Noisy(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
    return nn.Dense(3)(x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x)


class NoisyNnx(Nnx):
  def __call__(self, x):
    return super().__call__(x) + jax.random.normal(self.dropout.rngs(), (len(x), 3))


class SwitchedNnx(Nnx):
  def __init__(self, rngs):
    super().__init__(rngs, dropout=0.5)
    self.training = True

  def __call__(self, x, *, deterministic):
    h = self.first(x)
    h = self.norm(h, use_running_average=not self.training)
    return self.last(self.dropout(nnx.relu(h), deterministic=deterministic))


def test_other_random_numbers_than_those_of_dropout_are_refused():
  with pytest.raises(ValueError, match=r"^module must draw no random numbers in training but for nn\.Dropout"):
    Subject.from_linen(Noisy(), input_shape=(2,))
  with pytest.raises(ValueError, match=r"module must draw no random numbers but for nnx\.Dropout"):
    from_nnx(NoisyNnx(nnx.Rngs(0)), input_shape=(2,))


@pytest.mark.parametrize("kind", [lambda rngs: Nnx(rngs, dropout=0.5), SwitchedNnx], ids=["module", "own switches"])
def test_batch_norm_of_nnx_is_switched_to_the_batch_and_dropout_is_not_on(kind):
  subject, x = Subject.from_nnx(kind, input_shape=(2,)), inputs(6, 2)
  variables = stored(subject)
  own = subject.classifier(variables)
  layers = [variables["params"][name] for name in ("first", "norm", "last")]
  h = np.asarray(x @ layers[0]["kernel"] + layers[0]["bias"][None])
  of_batch = by_hand(x, h.mean(axis=0)[None], h.var(axis=0)[None], *layers)[1]
  np.testing.assert_allclose(own.apply_fn(own.params, x), of_batch, rtol=1e-3, atol=1e-4)
  averages = variables["batch_stats"]["norm"]
  inference = by_hand(x, averages["mean"][None], averages["var"][None], *layers)[1]
  np.testing.assert_allclose(own.predict(x), inference, rtol=1e-3, atol=1e-4)
