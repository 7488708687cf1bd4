"""What the weights say: the same for everybody's names and layouts, exact where theory is, and silent where it ends."""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained_networks import (
  batch_norm_classifier,
  examined,
  flax_classifier,
  nameless_classifier,
  with_batch_norm,
  with_weight_decay,
)

import kkt_jax
from kkt_jax import examine
from kkt_jax.analysis import examination, first_layer
from kkt_jax.analysis.first_layer import read_first_layer
from kkt_jax.analysis.probing import Probes
from kkt_jax.analysis.subspace import Subspace
from kkt_jax.classifiers import Evaluation
from kkt_jax.kkt import conditions, losses, pretrain

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def by_flax():
  return examined(flax_classifier)


def random(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# A network of one hidden layer on 20 inputs: the parameters differ, the compiled functions need not.
def mlp(p, x):
  return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]


def mlp_params(kernel, *, width=16):
  return {"w": kernel, "b": random(width, 6), "v": random((width, 3), 2), "c": random(3, 3)}


@slow
def test_a_list_of_tuples_in_pytorchs_layout_says_what_the_flax_module_says(by_flax):
  nameless = examined(nameless_classifier)
  assert (nameless.form, nameless.why) == (by_flax.form, by_flax.why)
  for a, b in ((nameless.margin, by_flax.margin), (nameless.share, by_flax.share)):
    assert a == pytest.approx(b, rel=1e-6)
  np.testing.assert_allclose(nameless.start, by_flax.start, atol=1e-5)
  assert (nameless.first.turned, by_flax.first.turned) == (True, False)
  for name in ("kernel", "bias", "gain", "rank"):
    np.testing.assert_array_equal(getattr(nameless.first, name), getattr(by_flax.first, name))
  assert nameless.subspace is None and by_flax.subspace is None
  (first, first_bias), (last, last_bias) = nameless.roles
  assert (first, first_bias, last, last_bias) == ("first kernel", "other", "kernel", "last bias")
  flax = by_flax.roles
  assert (flax["Dense_0"]["kernel"], flax["Dense_0"]["bias"]) == (first, first_bias)
  assert (flax["Dense_1"]["kernel"], flax["Dense_1"]["bias"]) == (last, last_bias)
  np.testing.assert_array_equal(nameless.last.kernel, by_flax.last.kernel)
  np.testing.assert_array_equal(nameless.last.bias, by_flax.last.bias)
  assert max(nameless.scaling_error, by_flax.scaling_error) < 1e-3
  for (w, b), name in zip(nameless.conditions.target, ("Dense_0", "Dense_1"), strict=True):
    target = by_flax.conditions.target[name]
    np.testing.assert_allclose(w.T, target["kernel"], rtol=1e-6)
    np.testing.assert_allclose(b, target["bias"], rtol=1e-6)


@slow
def test_of_a_network_trained_with_weight_decay_it_says_what_is_true(by_flax):
  module, params, x, y = with_weight_decay(0)
  assert by_flax.form == "weight_decay"
  # The stationarity sum of the data themselves, with the probabilities as multipliers, is the target.
  classifier = by_flax.classifier
  mu = jax.nn.softmax(classifier.predict(x))
  sums = losses.stationarity_sum(classifier.apply_fn, classifier.params, x, y, mu)
  assert float(losses.relative_residual(by_flax.conditions, sums)) < 0.03  # all but the kinks of ReLU
  # Nine drawings, from which nothing is subtracted, span nine dimensions.
  directions, *_ = by_flax.first.factors
  assert directions.shape == (64, 9)
  np.testing.assert_allclose(x @ directions @ directions.T, x, atol=2e-2)
  assert by_flax.subspace is None  # of three classes that may be so few because many samples are fitted alike
  np.testing.assert_allclose(by_flax.start, 0.0, atol=1e-4)
  np.testing.assert_allclose(by_flax.margin, jnp.mean(losses.runner_up_margin(classifier.predict(x), y)), rtol=0.1)
  assert by_flax.share == 1.0
  assert by_flax.class_features is None
  assert not any(jax.tree.leaves(by_flax.free))


@pytest.mark.parametrize("rank", [1, 7, 12, 13, 25])
def test_a_span_is_recognised_exactly(rank):
  data, mixed = random((40, rank)), random((rank, 32), 1)
  classifier = kkt_jax.make_classifier(mlp, mlp_params(data @ mixed, width=32), (40,))
  probes = jax.random.uniform(jax.random.key(0), (3, 40))
  start, first, subspace, place, _ = read_first_layer(Probes(classifier, probes))
  assert first.rank == rank
  basis = first.factors[0]
  np.testing.assert_allclose(basis @ basis.T @ data, data, atol=1e-4)
  if rank > 12:  # more than three classes leave of samples that are fitted alike
    np.testing.assert_allclose(subspace.basis @ subspace.basis.T, basis @ basis.T, atol=1e-5)
  else:
    assert subspace is None
  np.testing.assert_allclose(start, 0.0, atol=1e-5)
  assert jax.tree.leaves(classifier.params)[place] is classifier.params["w"]
  assert (first.place, first.turned, first.gain) == (place, False, 1.0)
  np.testing.assert_array_equal(first.kernel, classifier.params["w"])
  np.testing.assert_array_equal(first.bias, classifier.params["b"])


@pytest.mark.parametrize(
  ("strengths", "rank", "sharp"),
  [
    (np.ones(16), 0, False),  # every direction is filled
    (np.r_[np.ones(8), np.full(8, 1e-3)], 0, False),  # what follows the fall is not nothing
    (np.r_[np.ones(8), np.full(8, 1e-5)], 8, True),
    (np.r_[np.geomspace(1, 1e-3, 8), np.full(8, 1e-6)], 8, True),
    (np.r_[np.geomspace(1, 1e-3, 8), np.full(8, 5e-5)], 8, False),  # a fall that may be chance
    (np.r_[np.geomspace(1, 2e-6, 8), np.full(8, 3e-8)], 8, True),  # it ends in rounding errors
    (np.r_[np.geomspace(1, 3e-7, 12), np.zeros(4)], 12, False),  # down to rounding errors
    (np.r_[np.geomspace(1, 1e-3, 8), np.full(8, 3e-4)], 0, False),  # no fall that is steep
    (np.r_[np.ones(15), 1e-6], 0, False),  # as a normalisation leaves it
    (np.zeros(16), 0, False),
  ],
)
def test_a_fall_of_the_singular_values_must_be_steep_and_end_in_almost_nothing(strengths, rank, sharp):
  left, right = (np.linalg.qr(np.asarray(random((size, 16), size), np.float64))[0] for size in (20, 16))
  values = np.linalg.svd((left * strengths) @ right.T, compute_uv=False)
  assert first_layer._fall(values) == (rank, sharp)


def test_without_a_sharp_fall_there_must_be_many_directions_for_each_class():
  left, right = (np.linalg.qr(np.asarray(random((size, 60), size), np.float64))[0] for size in (80, 60))
  of = lambda rank: (left * np.r_[np.geomspace(1, 1e-3, rank), np.full(60 - rank, 5e-5)]) @ right.T
  assert first_layer._span(of(24), num_classes=3) == (24, None)
  rank, directions = first_layer._span(of(25), num_classes=3)
  assert (rank, directions.basis.shape) == (25, (80, 25))


def test_a_span_above_a_floor_of_noise_is_recognised_and_said_to_be_blurred():
  kernel = random((20, 5)) @ random((5, 16), 1) + 5e-3 * random((20, 16), 2)
  of = lambda directions: Subspace(jnp.zeros(20), *directions)
  rank, directions = first_layer._span(kernel)
  subspace = of(directions)
  assert rank == 0  # of the kernel it cannot be told
  assert subspace.basis.shape == (20, 5)
  assert subspace.blur == pytest.approx(5e-3 * 15**0.5, rel=0.3)
  said = examination._blurred(subspace)
  assert "those that stand out of noise (what is left of the initialisation, or rounding)" in said
  assert f"the faintest by {subspace.blur / subspace.singular_values[-1]:.2g} of its length" in said
  rank, cliff = first_layer._span(random((20, 5)) @ random((5, 16), 1))
  assert (rank, cliff.basis.shape, cliff.blur, examination._blurred(of(cliff))) == (5, (20, 5), 0, "")
  assert first_layer._span(kernel, noise=False) == (0, None)


def in_balance(kernel, **changes):
  """Parameters of `mlp` that weight decay could have left: as long before each hidden unit as behind it."""
  params = mlp_params(kernel, width=kernel.shape[1]) | changes
  v = params["v"] - jnp.mean(params["v"], axis=1, keepdims=True)  # nothing that moves all logits alike
  factor = jnp.sqrt(jnp.linalg.norm(v, axis=1) / jnp.hypot(jnp.linalg.norm(kernel, axis=0), params["b"]))
  own = {"w": kernel * factor[None], "b": params["b"] * factor, "v": v / factor[:, None]}
  return own | {"c": params["c"] - jnp.mean(params["c"])}


@pytest.mark.parametrize(("rank", "told"), [(12, False), (15, True)])
def test_directions_that_stand_out_because_classes_do_are_no_span_of_the_data(rank, told):
  kernel = random((40, rank)) @ random((rank, 32), 1)
  noisy = kernel + 5e-3 * random((40, 32), 2)
  for own, held in ((kernel, rank), (noisy, 0)):
    classifier = kkt_jax.make_classifier(mlp, in_balance(own), (40,))  # of three classes
    found = examine(classifier, form="weight_decay")
    assert found.bound < 1e-6 and found.first.rank == held
    assert (found.subspace is not None) == told
    if told:
      assert found.subspace.dimension == rank and (found.subspace.blur > 0) == (held == 0)
      assert f"They reveal an input subspace of {rank} of 40 dimensions" in str(found)
    elif held:
      assert (
        f"The first layer has rank {rank} of 40, which is not taken for the input subspace: with 3 classes so"
        " few are left where many samples are fitted alike."
      ) in str(found)


@pytest.mark.parametrize("decayed", [True, False])
def test_a_bias_that_is_made_of_the_data_tells_a_sample_from_a_brighter_one(decayed):
  x = jax.random.uniform(jax.random.key(0), (15, 40))
  signals = random((15, 32), 1)
  bias = jnp.sum(signals, axis=0) + (0 if decayed else 0.1 * random(32, 2))
  found = examine(kkt_jax.make_classifier(mlp, in_balance(x.T @ signals, b=bias), (40,), weight_decay=0.1))
  if not decayed:
    assert found.first.normal is None and found.subspace.dimension == 15
    assert not found.tells_mean and "how bright they are" not in str(found)
    return
  assert found.first.rank == 15 and found.subspace.dimension == 14
  subspace = found.subspace
  np.testing.assert_allclose(subspace.points(subspace.coordinates(x)), x, atol=1e-3)
  lengths = jnp.linalg.norm(1.1 * x - subspace.origin[None], axis=1)
  assert float((subspace.distance(1.1 * x) * lengths).min()) > 0.05
  np.testing.assert_array_equal(found.origin, subspace.origin)
  assert found.tells_mean
  assert "The first layer's bias tells how bright they are." in str(found)
  least, number = subspace.required_active(), 40
  assert f"A sample with {least} of {number} values at an end of their range can be one of them by no chance." in str(
    found
  )


class Convolution(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (3, 3))(x))
    return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize("before", [lambda x: jnp.tanh(3 * x), lambda x: x @ random((20, 20), 5)])
def test_data_that_go_through_something_else_first_leave_no_span(before):
  params = mlp_params(random((20, 3)) @ random((3, 16), 1))
  classifier = kkt_jax.make_classifier(lambda p, x: mlp(p, before(x)), params, (20,))
  probes = jax.random.uniform(jax.random.key(0), (3, 20))
  assert read_first_layer(Probes(classifier, probes)) == (None, None, None, None, 1.0)


def test_a_first_layer_needs_no_bias_and_its_inputs_may_be_scaled_one_by_one():
  mean, kernel = random(40, 3), random((40, 15)) @ random((15, 32), 1)
  params = [kernel, random((32, 3), 2)]

  def apply_fn(p, x):
    x = x - mean[None]
    return jax.nn.relu(x / jnp.linalg.norm(x, axis=1)[:, None] @ p[0]) @ p[1]

  classifier = kkt_jax.make_classifier(apply_fn, params, (40,))
  probes = Probes(classifier, jax.random.uniform(jax.random.key(0), (3, 40)))
  start, first, subspace, place, _ = read_first_layer(probes)
  np.testing.assert_allclose(start, mean, atol=1e-4)
  assert (subspace.dimension, place) == (15, 0)
  assert first.bias is None and first.normal is None


@pytest.mark.slow
def test_a_network_without_dense_first_layer_has_no_span_and_prints():
  module = Convolution()
  found = examine(
    kkt_jax.from_linen(module, module.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1))), input_shape=(4, 4, 1))
  )
  assert found.subspace is None and found.start is None
  assert found.share == 1.0
  np.testing.assert_array_equal(found.origin, 0.5)
  assert "first kernel" not in jax.tree.leaves(found.roles)
  assert jax.tree.leaves(found.roles).count("last bias") == 1
  said = str(found)
  assert "The input subspace is not identifiable from the first layer." in said
  assert "What the network subtracts from its inputs is not revealed." in said
  assert "They do not reveal the margin of the data." in said


@slow
def test_it_prints_what_it_found(by_flax):
  lines = str(by_flax).splitlines()
  # (64 + 1) * 64 + (64 + 1) * 3 numbers.
  assert lines[0] == "4,355 parameters, 3 classes, no batch norm."
  assert lines[1] == (
    "They are examined as weights trained to convergence with weight decay, because their weight decay is known, 0.01."
    f" They do not tell whether that is right; up to {by_flax.most_weight_decay:.2g} it can be."
  )
  assert lines[2] == (
    "At least 0.00% of the stationarity target is unreachable by any training set (so data are not excluded; the limit"
    " is 5%)."
  )
  assert lines[3] == (
    "The first layer has rank 9 of 64, which is not taken for the input subspace: with 3 classes so few are"
    " left where many samples are fitted alike."
  )
  assert lines[4] == "The network subtracts nothing from its inputs."
  assert lines[5].startswith("The data have a typical margin of 5.")


class TestUnits:
  """What a network subtracts, in inputs of any range."""

  @staticmethod
  def classifier(value_range, before, **settings):
    params = in_balance(random((40, 15)) @ random((15, 32), 1))
    settings |= {"value_range": value_range, "weight_decay": 0.1}
    return kkt_jax.make_classifier(lambda p, x: mlp(p, before(x)), params, (40,), **settings)

  @pytest.mark.slow
  def test_a_stored_mean_is_found_in_the_own_units_and_samples_start_there(self):
    mean = jnp.linspace(-0.5, 0.9, 40)
    found = examine(self.classifier((-1.0, 1.0), lambda x: x - mean[None]))
    np.testing.assert_allclose(found.start, mean, atol=1e-4)
    np.testing.assert_allclose(found.origin, (mean + 1) / 2, atol=1e-4)
    assert float(found.probes.min()) < -0.9 and float(found.probes.max()) > 0.9
    assert found.subspace.dimension == 15
    assert "subtracts an image from its inputs, taken for the mean of the data" in str(found)

  @pytest.mark.slow
  def test_without_a_range_inputs_are_normal_and_a_given_offset_is_believed(self):
    offset = jnp.full(40, 7.0)
    found = examine(self.classifier(None, lambda x: jnp.tanh(x - offset[None])).with_offset(offset))
    assert abs(float(found.probes.mean())) < 0.2 and float(jnp.abs(found.probes).max()) > 2
    np.testing.assert_array_equal(found.start, offset)
    np.testing.assert_array_equal(found.origin, offset)
    assert found.subspace is None

  @pytest.mark.parametrize(("high", "shift", "scale"), [(1.0, 0.0, 1.0), (255.0, 127.5, 60.0), (65535.0, 3e4, 6e3)])
  def test_inputs_that_are_scaled_too_are_taken_apart(self, high, shift, scale):
    classifier = self.classifier((0.0, high), lambda x: (x - shift) / scale)
    x = classifier.from_unit(jax.random.uniform(jax.random.key(0), (3, 40)))
    start, first, subspace, _, _ = read_first_layer(Probes(classifier, x))
    np.testing.assert_allclose(start / high, shift / high, atol=1e-4)
    assert subspace.dimension == 15
    assert first.gain == pytest.approx(1 / scale, rel=1e-3)


@slow
def test_batch_norm_reveals_the_margin_and_the_features_of_each_class():
  _, variables, x, y = with_batch_norm(0)
  found = examined(batch_norm_classifier)
  assert found.form == "max_margin" and "batch norm undoes the scale" in found.why
  classifier = found.classifier
  margins = losses.runner_up_margin(classifier.predict(x), y)
  np.testing.assert_allclose(found.margin, jnp.median(margins), rtol=1e-2)
  features, scale = found.class_features
  np.testing.assert_array_equal(scale, variables["params"]["BatchNorm_0"]["scale"])
  own = classifier.features_fn(classifier.params, x)
  assert float(jnp.linalg.norm(own - features[y])) < 0.05 * float(jnp.linalg.norm(own - jnp.mean(own, axis=0)[None]))
  assert "3 classes, batch norm." in str(found)


@slow
def test_batch_norm_by_other_names_reveals_the_same():
  _, variables, *_ = with_batch_norm(0)
  params, kept = variables["params"], variables["batch_stats"]["BatchNorm_0"]
  # In another order: the last kernel, of as many rows as there are pixels, comes before the first.
  renamed = {
    "a": params["Dense_0"]["bias"],
    "b": params["BatchNorm_0"]["bias"],
    "c": params["BatchNorm_0"]["scale"],
    "x": params["Dense_1"],
    "z": params["Dense_0"]["kernel"],
  }

  def normalised(p, x, stored=True):
    h = x @ p["z"] + p["a"][None]
    mean, var = (kept["mean"], kept["var"]) if stored else (jnp.mean(h, axis=0), jnp.var(h, axis=0))
    return (h - mean[None]) * jax.lax.rsqrt(var[None] + 1e-5) * p["c"][None] + p["b"][None]

  last = lambda p, h: jax.nn.relu(h) @ p["x"]["kernel"] + p["x"]["bias"][None]
  plain = kkt_jax.make_classifier(
    lambda p, x, train: Evaluation(last(p, normalised(p, x, not train)), {}, normalised(p, x, not train)),
    renamed,
    (64,),
    statistics={},
  )
  found, expected = examine(plain), examined(batch_norm_classifier)
  assert found.form == expected.form
  assert found.margin == pytest.approx(expected.margin, rel=1e-6)
  np.testing.assert_array_equal(found.last.scale, renamed["c"])
  np.testing.assert_array_equal(found.last.shift, renamed["b"])
  np.testing.assert_allclose(found.class_features[0], expected.class_features[0], rtol=1e-5)
  roles = {
    "a": "other",
    "b": "other",
    "c": "other",
    "x": {"bias": "last bias", "kernel": "kernel"},
    "z": "first kernel",
  }
  assert found.roles == roles


class TestForm:
  """Two layers without biases: rescaling a hidden unit leaves the function alone, not the balance."""

  @staticmethod
  def params(balanced):
    w, v = random((4, 8)), random((8, 3), 1)
    v = v - jnp.mean(v, axis=1, keepdims=True)  # no sum of differences of logits moves all logits alike
    if balanced:  # |w_j| = |v_j| for each hidden unit, as weight decay brings about
      factor = jnp.sqrt(jnp.linalg.norm(v, axis=1) / jnp.linalg.norm(w, axis=0))
      w, v = w * factor[None], v / factor[:, None]
    return {"w": w, "v": v}

  @staticmethod
  def examined(params, activation=jax.nn.relu, **settings):
    apply_fn = lambda p, x: activation(x @ p["w"]) @ p["v"]
    return examine(kkt_jax.make_classifier(apply_fn, params, (4,)), **settings)

  @pytest.mark.slow
  def test_layers_in_balance_fit_weight_decay_and_layers_out_of_it_fit_nothing(self):
    balanced, other = self.examined(self.params(True)), self.examined(self.params(False))
    assert balanced.form == "weight_decay" and "in the balance that weight decay brings about" in balanced.why
    assert balanced.bound < 1e-6
    assert "neither form fits" in other.why
    assert min(other.bounds.values()) > 0.1 and "too much" in str(other)

  def test_a_network_that_is_not_quasi_homogeneous_can_only_have_had_weight_decay(self):
    found = self.examined(self.params(True), jnp.cos)
    assert found.form == "weight_decay" and "nothing before the last layer is quasi-homogeneous" in found.why

  def test_a_form_that_is_asked_for_is_taken_and_another_refused(self):
    found = self.examined(self.params(True), form="max_margin")
    assert (found.form, found.why) == ("max_margin", "it was asked for")
    expected = conditions.max_margin_conditions(found.classifier.params, found.rates)
    jax.tree.map(np.testing.assert_array_equal, found.conditions, expected)
    with pytest.raises(ValueError, match=r"form must be one of .*; got 'sharp'"):
      examine(found.classifier, form="sharp")


class TestLeftOut:
  """Three layers, the second of which kept its large start, while the others grew by as much from next to nothing."""

  @staticmethod
  def examined(first=1.0, **settings):
    w, c, v = random((4, 8)), 20 * random((8, 8), 1), random((8, 3), 2)
    v = v - jnp.mean(v, axis=1, keepdims=True)
    params = {"w": first * w / jnp.linalg.norm(w), "b": jnp.zeros(8), "c": c, "v": v / jnp.linalg.norm(v)}
    apply_fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["c"]) @ p["v"]
    return examine(kkt_jax.make_classifier(apply_fn, params, (4,)), **settings)

  @slow
  def test_a_tensor_that_kept_its_start_is_left_out_and_named(self):
    found = self.examined()
    assert list(found.left_out) == ["c"]
    assert found.left_out["c"] > 0.9
    assert found.bound < 1e-6  # |w| = |v|
    assert found.form == "max_margin" and "which weight decay would have undone" in found.why
    np.testing.assert_array_equal(found.conditions.mask["c"], 0.0)
    np.testing.assert_array_equal(found.conditions.mask["w"], 1.0)
    said = str(found)
    assert "Left out, because no training set could have caused them: c (100% of everything)." in said
    assert "At least 0.00% of the rest is unreachable by any training set (so data are not excluded" in said

  @slow
  def test_nothing_is_left_out_if_what_remains_would_not_fit_or_would_say_nothing(self):
    found = self.examined(first=5.0)  # out of balance with the last layer: of w alone, or v alone, nothing can be said
    assert found.left_out == {}
    assert found.bound > 0.9
    np.testing.assert_array_equal(found.conditions.mask["c"], 1.0)
    assert found.why.startswith("neither form fits, and one as little as the other")
    assert "Left out" not in str(found)


class TestKnownStart:
  """A network that went on from a known start: only the change is made of the data."""

  @staticmethod
  def trained(num_steps=20, num_samples=15, **settings):
    x, y = random((num_samples, 40), 7), jnp.arange(num_samples) % 3
    first = mlp_params(random((40, 32)) / 6, width=32)
    settings = {"num_steps": num_steps, "learning_rate": 0.1} | settings
    last = pretrain.gradient_descent(mlp, first, x, y, pretrain.Descent(**settings)).params
    return x, first, kkt_jax.make_classifier(mlp, last, (40,), value_range=None, initial_params=first)

  @pytest.mark.parametrize("momentum", [0.0, 0.9])
  def test_the_change_of_the_first_kernel_tells_the_span(self, momentum):
    x, _, classifier = self.trained(momentum=momentum)
    _, first, subspace, _, left = read_first_layer(Probes(classifier, random((3, 40), 8)))
    assert left == pytest.approx(1.0, abs=1e-5)
    assert first.rank == subspace.dimension == 15  # samples
    np.testing.assert_allclose(x @ subspace.basis @ subspace.basis.T, x, atol=0.02)

  def test_with_batch_norm_it_is_a_span_of_differences_and_told_around_a_mean_only(self):
    _, _, classifier = self.trained()
    coupled = dataclasses.replace(classifier, statistics={})
    assert read_first_layer(Probes(coupled, random((3, 40), 8)))[2] is None
    mean = random((1, 40), 9)
    centred = dataclasses.replace(coupled, forward=lambda p, x, train: Evaluation(mlp(p, x if train else x - mean)))
    assert read_first_layer(Probes(centred, random((3, 40), 8)))[2].dimension == 15

  def test_what_weight_decay_left_of_the_start_is_found_and_taken_away(self):
    x, first, classifier = self.trained(weight_decay=0.1)
    _, _, subspace, _, left = read_first_layer(Probes(classifier, random((3, 40), 8)))
    assert left == pytest.approx(0.99**20, abs=1e-5)  # each step leaves 1 - .1 * .1 of it
    assert subspace.dimension == 15
    np.testing.assert_allclose(x @ subspace.basis @ subspace.basis.T, x, atol=0.02)

  @slow
  def test_the_conditions_are_those_of_the_change(self):
    _, first, classifier = self.trained(weight_decay=0.1)
    found = examine(classifier)
    assert found.form == "change" and "their start is known, of which 0.8179 times" in found.why
    expected = jax.tree.map(lambda a, b: a - 0.99**20 * b, classifier.params, first)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.conditions.target, expected)
    assert list(found.bounds) == ["change"]
    assert found.explained

  def test_an_unknown_start_has_no_change(self):
    classifier = kkt_jax.make_classifier(mlp, mlp_params(random((20, 16))), (20,))
    with pytest.raises(ValueError, match="form must not be 'change' for a classifier without initial_params"):
      examine(classifier, form="change")


def test_weight_decay_leaves_no_condition_on_what_has_no_scale():
  normalised = lambda p, x: (x @ p["a"]) / jnp.linalg.norm(x @ p["a"], axis=1)[:, None] @ p["b"]
  params = {"a": random((4, 5)), "b": random((5, 3), 1)}
  found = examine(kkt_jax.make_classifier(normalised, params, (4,), weight_decay=0.1))
  assert found.free == {"a": True, "b": False}
  np.testing.assert_array_equal(found.conditions.mask["a"], 0.0)
  np.testing.assert_array_equal(found.conditions.mask["b"], 1.0)
  np.testing.assert_allclose(found.conditions.target["b"], 0.1 * params["b"], rtol=1e-6)


class TestSilence:
  """Where the weights say nothing, or outputs are no logits, nothing is claimed."""

  @staticmethod
  def network(p, x):
    return jax.nn.relu(x @ p["w"]) @ p["v"]

  @staticmethod
  def descended(loss, params, *, num_steps, learning_rate, weight_decay=0.0):
    step = lambda own, g: own - learning_rate * (g + weight_decay * own)
    body = lambda _, own: jax.tree.map(step, own, jax.grad(loss)(own))
    return jax.jit(lambda own: jax.lax.fori_loop(0, num_steps, body, own))(params)

  def test_two_classes_leave_few_directions_which_are_not_taken_for_those_of_the_data(self):
    x, y = jax.random.uniform(jax.random.key(0), (12, 30)), jnp.arange(12) % 2
    loss = lambda p: -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(self.network(p, x)), y[:, None], axis=1))
    start = {"w": 0.05 * random((30, 64)), "v": 0.05 * random((64, 2), 1)}
    params = self.descended(loss, start, num_steps=20000, learning_rate=0.3, weight_decay=5e-3)
    found = examine(kkt_jax.make_classifier(self.network, params, (30,), weight_decay=5e-3))
    assert found.explained and found.first.rank < 10
    assert found.subspace is None and found.share == 1.0
    assert (
      f"The first layer has rank {found.first.rank} of 30, which is not taken for the input subspace: with 2"
      " classes so few are left where many samples are fitted alike."
    ) in str(found)

  @slow
  def test_the_random_rows_of_a_merged_low_rank_adapter_are_not_taken_for_data(self):
    x, y = jnp.asarray(random((60, 200), 9) > 0.8, jnp.float32), jnp.arange(60) % 10
    base = {"w": 0.1 * random((200, 64)), "v": 0.2 * random((64, 10), 1)}
    merged = lambda own: base | {"w": base["w"] + own["a"] @ own["b"]}
    loss = lambda own: (
      -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(self.network(merged(own), x)), y[:, None], axis=1))
    )
    start = {"a": 0.1 * random((200, 8), 2), "b": jnp.zeros((8, 64))}
    adapter = self.descended(loss, start, num_steps=2000, learning_rate=0.1)
    found = examine(kkt_jax.make_classifier(self.network, merged(adapter), (200,), initial_params=base))
    assert found.first.rank == 8
    assert found.subspace is None
    assert "The first layer has rank 8 of 200, which is not taken for the input subspace" in str(found)

  def test_where_weight_decay_leaves_no_condition_everything_is_out_of_reach(self):
    unit = lambda a, axis: a / jnp.linalg.norm(a + 1e-12, axis=axis, keepdims=True)
    cosine = lambda p, x: 8 * unit(jax.nn.relu(x @ p["w"]), 1) @ unit(p["v"], 0)
    params = {"w": random((20, 64)), "v": random((64, 3), 1)}
    found = examine(kkt_jax.make_classifier(cosine, params, (20,), weight_decay=0.1))
    assert all(jax.tree.leaves(found.free))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found.conditions.mask))
    assert found.bound == 1.0 and found.subspace is None
    assert (
      "At least 100.00% of the stationarity target is unreachable by any training set (too much; the limit is 5%)."
      in str(found)
    )

  @pytest.mark.parametrize("end", [jax.nn.softmax, lambda z: jax.nn.sigmoid(z[:, 0])], ids=["softmax", "sigmoid"])
  def test_probabilities_are_refused(self, end):
    params = {"w": random((20, 64)), "v": random((64, 3), 1)}
    classifier = kkt_jax.make_classifier(lambda p, x: end(self.network(p, x)), params, (20,))
    with pytest.raises(ValueError, match=r"classifier must return logits; its outputs are in \[0, 1\].*Leave out the"):
      examine(classifier)

  def test_probabilities_of_several_labels_are_refused(self):
    params = {"w": random((20, 64)), "v": random((64, 3), 1)}
    classifier = kkt_jax.make_classifier(lambda p, x: jax.nn.sigmoid(self.network(p, x)), params, (20,))
    with pytest.raises(ValueError, match=r"classifier must return logits; its outputs are in \[0, 1\]"):
      examine(classifier)

  @pytest.mark.parametrize(
    ("before", "message"),
    [
      (
        lambda x: x - jnp.mean(x, axis=0, keepdims=True),
        "classifier must give each input its own logits .* batch norm",
      ),
      (lambda x: x * jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), "classifier must give each input its own"),
      (lambda x: jnp.log(x - 0.5), "classifier must give finite logits"),
    ],
    ids=["batch mean", "dropout", "not finite"],
  )
  def test_logits_that_are_not_those_of_their_input_are_refused(self, before, message):
    params = {"w": random((20, 64)), "v": random((64, 3), 1)}
    classifier = kkt_jax.make_classifier(lambda p, x: self.network(p, before(x)), params, (20,))
    with pytest.raises(ValueError, match=message):
      examine(classifier)

  def test_a_function_of_other_parameters_is_refused(self):
    params = {"w": random((20, 64)), "v": random((64, 3), 1)}
    classifier = kkt_jax.make_classifier(lambda p, x: self.network(params, x), params, (20,))
    with pytest.raises(ValueError, match="apply_fn must compute the logits from params"):
      examine(classifier)

  def test_what_is_no_classifier_is_refused(self):
    with pytest.raises(ValueError, match=r"^classifier must be a kkt_jax.Classifier; got Subject. Its classifier\("):
      examine(kkt_jax.Subject(mlp, lambda: mlp_params(random((20, 16))), (20,)))

  def test_logits_in_16_bits_are_said_to_be(self):
    params = in_balance(random((20, 16)))
    classifier = kkt_jax.make_classifier(lambda p, x: mlp(p, x).astype(jnp.bfloat16), params, (20,))
    assert "The function computes in 16 bits" in str(examine(classifier, form="weight_decay"))

  def test_a_weight_decay_that_no_data_bear_is_refused_and_of_others_it_is_said_that_weights_do_not_tell(self):
    # Three classes: w |V|^2 is at most W(2 / e) = .4631, the peak of 2 q / (2 + e^q), at q = 1.4631.
    params = in_balance(random((20, 16)))
    sizes = {name: float(np.sum(np.square(own))) for name, own in params.items()}
    most = 0.463056 / sizes["v"]
    given = lambda decay: examine(kkt_jax.make_classifier(mlp, params, (20,), weight_decay=decay))
    found = given(0.9 * most)
    assert found.most_weight_decay == pytest.approx(most, rel=1e-4) and found.explained
    assert f"They do not tell whether that is right; up to {most:.2g} it can be." in str(found)
    found = given(10 * most)
    # Of the last kernel at most a tenth can be reached: .9^2 of it is left.
    assert found.bound == pytest.approx(0.81 * sizes["v"] / sum(sizes.values()), rel=1e-3) and not found.explained
    assert f"That is too much: where training ends, such a last layer has had {most:.2g} at most." in str(found)
    assert given(1.1 * most).explained

  def test_a_network_whose_units_are_dead_is_refused(self):
    params = mlp_params(random((20, 16))) | {"b": jnp.full(16, -1e4)}
    with pytest.raises(ValueError, match="classifier must tell inputs apart; .* its units are dead"):
      examine(kkt_jax.make_classifier(mlp, params, (20,)))

  @pytest.mark.parametrize("form", ["weight_decay", "max_margin"])
  def test_a_tensor_that_the_function_never_uses_is_named_and_has_no_condition(self, form):
    params = in_balance(random((20, 16))) | {"position": random((5, 5), 7)}
    found = examine(kkt_jax.make_classifier(mlp, params, (20,)), form=form)
    assert found.unused == ("position",)
    np.testing.assert_array_equal(found.conditions.mask["position"], 0.0)
    for used in "wv":
      np.testing.assert_array_equal(found.conditions.mask[used], 1.0)
    assert "position" not in found.left_out
    assert "The function never uses position." in str(found)
    if form == "weight_decay":
      assert found.bound < 1e-6  # what is not used is no fault of the data

  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
  def test_weights_that_were_rounded_to_16_bits_are_said_to_be(self, dtype):
    params = in_balance(random((40, 15)) @ random((15, 32), 1))
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), params)
    said = "They are rounded to 16 bits, which hides whatever is fainter."
    whole, found = (examine(kkt_jax.make_classifier(mlp, own, (40,)), form="weight_decay") for own in (params, rounded))
    assert said not in str(whole) and whole.first.rank == 15
    assert said in str(found)
    assert found.first.rank == 0 and found.subspace is None  # no direction can be told from rounding
    ones = kkt_jax.make_classifier(mlp, jax.tree.map(jnp.ones_like, params), (40,))
    assert not Probes(ones, whole.probes).rounded  # which tells nothing
