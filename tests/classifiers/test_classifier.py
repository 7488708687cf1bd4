"""The classifier contract: what `make_classifier` accepts, what it refuses, and the labels and units of its inputs."""

from example_networks import random_mlp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kkt_jax.classifiers import Evaluation, make_classifier


def linear(w, x):
  return x @ w


def make_linear(**settings):
  return make_classifier(**{"apply_fn": linear, "params": jnp.ones((2, 3)), "input_shape": (2,)} | settings)


def test_labels_are_the_outputs_unless_given():
  assert make_linear().labels == (0, 1, 2)
  classifier = make_linear(labels=np.array([5, 7, 9]), input_shape=[2])
  assert (classifier.num_classes, classifier.labels, classifier.input_shape) == (3, (5, 7, 9), (2,))
  assert all(type(label) is int for label in classifier.labels)  # hashable: they are static under jit
  assert not classifier.batch_coupled


def in_two_modes(w, x, train):
  """A function with batch norm in name only: in training thrice the logits at inference."""
  return Evaluation(x @ w * (3 if train else 1), {"mean": jnp.mean(x, axis=0)})


def test_the_four_functions_are_one_forward_function():
  statistics = {"mean": jnp.array([0.5, 0.5])}
  classifier = make_linear(apply_fn=in_two_modes, statistics=statistics)
  x = jnp.array([[1.0, 2.0]])
  np.testing.assert_allclose(classifier.apply_fn(classifier.params, x), [[9.0, 9.0, 9.0]])  # 3 (1 * 1 + 2 * 1)
  np.testing.assert_allclose(classifier.predict(x), [[3.0, 3.0, 3.0]])
  np.testing.assert_allclose(classifier.statistics_fn(classifier.params, x)["mean"], [1.0, 2.0])
  assert classifier.batch_coupled and classifier.features_fn is None
  plain = make_linear(apply_fn=lambda w, x: Evaluation(linear(w, x), features=2 * x))
  assert not plain.batch_coupled and plain.statistics_fn is None
  np.testing.assert_allclose(plain.features_fn(plain.params, x), [[2.0, 4.0]])
  np.testing.assert_array_equal(plain.apply_fn(plain.params, x), plain.predict(x))


@pytest.mark.parametrize("squeezed", [False, True])
def test_one_logit_is_the_margin_of_class_1(squeezed):
  def one(w, x, train):
    whole = in_two_modes(w, x, train)
    return whole._replace(logits=jnp.squeeze(whole.logits, axis=1)) if squeezed else whole

  params, statistics = jnp.array([[1.0], [2.0]]), {"mean": jnp.zeros(2)}
  classifier = make_classifier(one, params, (2,), statistics=statistics)
  assert (classifier.num_classes, classifier.labels) == (2, (0, 1))
  x = jnp.array([[1.0, 2.0], [0.0, -1.0]])  # z = 5 and -2
  np.testing.assert_allclose(classifier.predict(x), [[-2.5, 2.5], [1.0, -1.0]])
  np.testing.assert_allclose(classifier.apply_fn(classifier.params, x), [[-7.5, 7.5], [3.0, -3.0]])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_in_16_bits_are_taken_in_single_precision(dtype):
  classifier = make_linear(params=jnp.full((2, 3), 0.5, dtype), initial_params=jnp.zeros((2, 3), dtype))
  assert {leaf.dtype for leaf in (classifier.params, classifier.initial_params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("apply_fn", [linear, lambda w, x: (x @ w)[:, 0]])
def test_what_is_compiled_for_one_classifier_serves_another_of_the_same_function(apply_fn):
  traced = []

  @jax.jit
  def use(classifier):
    traced.append(1)
    return classifier.forward(classifier.params, jnp.ones((1, 2)), True).logits

  for value in (1.0, 2.0):
    use(make_linear(apply_fn=apply_fn, params=jnp.full((2, 3), value)))
  assert len(traced) == 1


REFUSED = {
  "huge labels": ({"labels": (0, 1, 2**31)}, r"^labels must be less than 2\^31 in size; got \(0, 1, 2147483648\)"),
  "no logits": ({"apply_fn": lambda w, x: (x @ w)[:, :0]}, r"^apply_fn must return logits .*\(2, 0\)"),
  "repeated labels": ({"labels": (0, 1, 0)}, r"^labels must be 3 distinct integers.*got \(0, 1, 0\)"),
  "too few labels": ({"labels": (0, 1)}, r"^labels must be 3 distinct integers"),
  "too many labels": ({"labels": range(4)}, r"^labels must be 3 distinct integers"),
  "no labels": ({"labels": ()}, r"^labels must be 3 distinct integers"),
  "bare NaN": ({"params": jnp.full((2, 3), jnp.nan)}, r"^params must be finite; .* holds"),
  "integers": ({"params": jnp.ones((2, 3), int)}, r"^params.* must be floating point"),
  "a name": ({"params": {"w": jnp.ones((2, 3)), "name": "mlp"}}, r"^params, at name, must be floating point"),
  "an integer start": ({"initial_params": jnp.ones((2, 3), int)}, r"^initial_params.* must be floating point"),
  "classes": ({"apply_fn": lambda w, x: jnp.argmax(x @ w, axis=1)}, r"^apply_fn must return logits.*got dtype int32"),
  "no axis": ({"input_shape": ()}, r"^input_shape must have an axis; got \(\)"),
  "a number of inputs": ({"input_shape": 2}, r"^input_shape must be a sequence of integers; got 2"),
  "names of classes": ({"labels": ("cat", "dog", "cow")}, r"^labels must be a sequence of integers; got \('cat'"),
  "a range of one": ({"value_range": (1,)}, r"^value_range must be \(least, greatest\)"),
  "a range of channels": ({"value_range": (np.zeros(3), np.ones(3))}, r"^value_range must be \(least, greatest\)"),
  "a range of digits": ({"value_range": "01"}, r"^value_range must be \(least, greatest\)"),
  "no parameters": ({"params": {}}, r"^params must hold"),
  "no batch axis": ({"apply_fn": lambda w, x: jnp.sum(x @ w, axis=0)}, r"^apply_fn must return logits .*\(3,\)"),
  "a tuple": ({"apply_fn": lambda w, x: (x @ w, x)}, r"^apply_fn must return logits .*a tuple"),
  "other inputs": ({"input_shape": (5,)}, r"^apply_fn must take a batch of inputs of input_shape = \(5,\); it raised"),
  "other logits in training": (
    {"apply_fn": lambda w, x, train: Evaluation((x @ w)[:, : 3 - train], {}), "statistics": {}},
    r"^apply_fn must return logits, and features if any, in training as at inference",
  ),
  "features in training only": (
    {"apply_fn": lambda w, x, train: Evaluation(x @ w, {}, x if train else None), "statistics": {}},
    r"^apply_fn must return logits, and features if any, in training as at inference",
  ),
  "no word of training": ({"statistics": {}}, r"^apply_fn must take a batch of inputs .* it raised TypeError"),
  "other statistics": (
    {"apply_fn": in_two_modes, "statistics": {"mean": jnp.zeros(3)}},
    r"^statistics must have the shapes of those of apply_fn in training",
  ),
  "one feature": (
    {"apply_fn": lambda w, x: Evaluation(x @ w, features=x[:, 0])},
    r"^apply_fn must return features \[M, F\]",
  ),
  "empty range": ({"value_range": (1.0, 1.0)}, r"^value_range must be \(least, greatest\)"),
  "infinite range": ({"value_range": (0.0, np.inf)}, r"^value_range must be \(least, greatest\)"),
  "no weight decay": ({"weight_decay": 0.0}, r"^weight_decay must be positive"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_the_name_of_the_argument(name):
  settings, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    make_linear(**settings)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_non_finite_parameters_are_refused_by_their_path(bad):
  params = {"Dense_0": {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3)).at[1, 2].set(bad)}}
  with pytest.raises(ValueError, match=r"^params must be finite; Dense_0/kernel holds"):
    make_linear(apply_fn=lambda p, x: x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None], params=params)


def test_probing_the_shapes_computes_no_logits():
  ran = []

  def apply_fn(w, x):
    jax.debug.callback(lambda: ran.append(1))
    return linear(w, x)

  make_linear(apply_fn=apply_fn)
  jax.effects_barrier()
  assert not ran


def test_labels_become_classes():
  classifier = make_linear(labels=(5, 7, 6))
  for labels in (jnp.array([6, 5, 7, 7]), jnp.array([6, 5, 7, 7], jnp.uint8), np.array([6, 5, 7, 7]), [6, 5, 7, 7]):
    np.testing.assert_array_equal(classifier.classes_of(labels), [2, 0, 1, 1])  # 5, 7, 6 are outputs 0, 1, 2
  assert classifier.classes_of(jnp.zeros((0,), int)).shape == (0,)


def test_an_unknown_label_is_refused_or_where_values_cannot_be_seen_makes_losses_nan():
  classifier = make_linear(labels=(5, 7, 6))
  with pytest.raises(ValueError, match=r"^labels must be among the classifier's, \(5, 7, 6\); got 4"):
    classifier.classes_of(jnp.array([5, 4]))
  classes = jax.jit(classifier.classes_of)(jnp.array([6, 5, 4]))
  np.testing.assert_array_equal(classes, [2, 0, 3])
  loss = optax.losses.softmax_cross_entropy_with_integer_labels(jnp.zeros((3, 3)), classes)
  np.testing.assert_array_equal(jnp.isnan(loss), [False, False, True])


def test_inputs_are_mapped_to_the_unit_interval_and_back():
  classifier = make_linear(value_range=(-1, 3))
  np.testing.assert_allclose(classifier.to_unit(jnp.array([-1.0, 0.0, 3.0])), [0.0, 0.25, 1.0])
  np.testing.assert_allclose(classifier.from_unit(jnp.array([0.0, 0.25, 1.0])), [-1.0, 0.0, 3.0])
  unbounded = make_linear(value_range=None)
  for function in (unbounded.to_unit, unbounded.from_unit):
    np.testing.assert_array_equal(function(jnp.array([-1.0, 3.0])), [-1.0, 3.0])


def test_new_parameters_of_one_classifier_do_not_recompile():
  classifier = make_linear(labels=(5, 6, 7))
  traces = []

  @jax.jit
  def logits(c, x):
    traces.append(1)
    return c.predict(x) * c.num_classes

  x = jnp.array([[1.0, 2.0]])
  np.testing.assert_allclose(logits(classifier, x), [[9.0, 9.0, 9.0]])  # (1 + 2) * 3 classes
  doubled = jax.tree.map(lambda leaf: 2 * leaf, classifier)
  np.testing.assert_allclose(logits(doubled, x), [[18.0, 18.0, 18.0]])
  assert len(traces) == 1


def test_leaves_of_a_classifier_are_its_parameters_and_statistics():
  coupled, _, _ = random_mlp(batch_norm=True)
  expected = len(jax.tree.leaves(coupled.params)) + len(jax.tree.leaves(coupled.statistics))
  assert len(jax.tree.leaves(coupled)) == expected
  assert jax.tree.structure(jax.tree.map(lambda leaf: leaf, coupled)) == jax.tree.structure(coupled)


def test_a_start_must_be_of_the_same_network_and_another_than_the_end():
  params = {"w": jnp.ones((2, 3))}
  make = lambda start: make_classifier(lambda p, x: x @ p["w"], params, (2,), initial_params=start)
  assert make({"w": jnp.zeros((2, 3))}).initial_params is not None
  with pytest.raises(ValueError, match="initial_params must differ from params; nothing was trained"):
    make(params)
  with pytest.raises(ValueError, match="initial_params"):
    make({"w": jnp.zeros((2, 4))})
  with pytest.raises(ValueError, match="initial_params"):
    make({"w": jnp.full((2, 3), jnp.nan)})


def test_an_offset_has_the_shape_of_an_input():
  np.testing.assert_array_equal(make_linear().with_offset(jnp.array([1.0, 2.0])).offset, [1.0, 2.0])
  with pytest.raises(ValueError, match="^offset must have shape input_shape"):
    make_linear().with_offset(jnp.zeros(3))
  with pytest.raises(ValueError, match="^offset must be finite"):
    make_linear().with_offset(jnp.array([1.0, jnp.nan]))


def test_other_parameters_are_those_of_the_same_network():
  own = make_linear(labels=(5, 7, 6)).with_params(jnp.zeros((2, 3)), initial_params=jnp.ones((2, 3)))
  np.testing.assert_array_equal(own.predict(jnp.ones((1, 2))), jnp.zeros((1, 3)))
  assert own.labels == (5, 7, 6)
  with pytest.raises(ValueError, match="^params must have the shapes of those of the classifier"):
    own.with_params(jnp.zeros((2, 4)))
  with pytest.raises(ValueError, match="^initial_params must differ"):
    own.with_params(jnp.ones((2, 3)))


def test_bytes_are_not_taken_for_inputs_up_to_1():
  own = make_classifier(lambda w, x: x @ w, jnp.ones((2, 3)), (2,))
  for function in (own.predict, own.to_unit):
    with pytest.raises(
      ValueError, match=r"^x must be floating point, .* got 3 to 255 of uint8. Bytes are to be divided"
    ):
      function(np.array([[3, 255]], np.uint8))
  np.testing.assert_array_equal(own.to_unit(np.array([[0, 1]])), [[0.0, 1.0]])
  wide = make_classifier(lambda w, x: x @ w, jnp.ones((2, 3)), (2,), value_range=(0, 255))
  np.testing.assert_array_equal(wide.to_unit(np.array([[0, 255]], np.uint8)), [[0.0, 1.0]])


def test_numbers_of_python_s_own_are_parameters():
  scaled = lambda p, x: p["scale"] * (x @ p["kernel"])
  made = make_linear(apply_fn=scaled, params={"kernel": jnp.ones((2, 3)), "scale": 2.0})
  assert made.params["scale"].shape == () and made.params["scale"].dtype == jnp.float32


@pytest.mark.parametrize("logits", [1, 3])
def test_a_function_that_squeezes_its_output_takes_a_batch_of_one(logits):
  params = {"a": jnp.ones((4, 5)), "b": jnp.linspace(-1, 1, 5 * logits).reshape(5, logits)}
  plain = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
  wanted, squeezed = (
    make_classifier(fn, params, (4,)) for fn in (plain, lambda p, x: jnp.tanh(x @ p["a"]).squeeze() @ p["b"].squeeze())
  )
  x = jnp.linspace(0, 1, 12).reshape(3, 4)
  for batch in (x, x[:1]):
    np.testing.assert_array_equal(squeezed.predict(batch), wanted.predict(batch))
