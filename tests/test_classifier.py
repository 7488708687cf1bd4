"""The classifier contract: what `make_classifier` accepts, what it refuses, and how batch coupling is seen."""

from absl.testing import parameterized
import chex
from example_networks import random_mlp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.classifier import make_classifier, samples_interact


def linear(w, x):
  return x @ w


def centred(w, x):
  return w * (x - jnp.mean(x, axis=0, keepdims=True))


def make_linear(**settings):
  return make_classifier(
    **{"apply_fn": linear, "params": jnp.ones((2, 3)), "input_shape": (2,), "labels": (0, 1, 2)} | settings
  )


def test_parts_are_kept_and_counted():
  classifier = make_linear(labels=(5, 7, 9), input_shape=[2])
  assert classifier.num_classes == 3
  assert classifier.labels == (5, 7, 9)
  assert classifier.input_shape == (2,)
  assert not classifier.batch_coupled


def test_numpy_labels_become_hashable_python_ints():
  classifier = make_linear(labels=np.array([4, 2, 8]))
  assert classifier.labels == (4, 2, 8)
  assert all(type(label) is int for label in classifier.labels)


def test_predictions_default_to_apply_fn():
  assert make_linear().predict_fn is linear


def test_prediction_function_is_kept_apart_from_the_trained_one():
  classifier = make_linear(predict_fn=lambda w, x: -linear(w, x))
  x = jnp.array([[1.0, 2.0]])
  np.testing.assert_allclose(classifier.apply_fn(classifier.params, x), [[3.0, 3.0, 3.0]])  # 1 * 1 + 2 * 1
  np.testing.assert_allclose(classifier.predict_fn(classifier.params, x), [[-3.0, -3.0, -3.0]])


@pytest.mark.parametrize("labels", [(), (4,)])
def test_one_class_is_refused(labels):
  with pytest.raises(ValueError, match=r"^labels must hold at least two classes"):
    make_linear(labels=labels)


def test_repeated_labels_are_refused():
  with pytest.raises(ValueError, match=r"^labels must be distinct; got \(0, 1, 0\)"):
    make_linear(labels=(0, 1, 0))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_non_finite_parameters_are_refused_by_their_path(bad):
  params = {"Dense_0": {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3)).at[1, 2].set(bad)}}
  with pytest.raises(ValueError, match=r"^params must be finite; Dense_0/kernel holds"):
    make_linear(apply_fn=lambda p, x: x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None], params=params)


def test_non_finite_bare_array_is_refused():
  with pytest.raises(ValueError, match=r"^params must be finite; the array holds"):
    make_linear(params=jnp.full((2, 3), jnp.nan))


@pytest.mark.parametrize("labels", [(0, 1), (0, 1, 2, 3)])
def test_number_of_logits_must_be_the_number_of_labels(labels):
  with pytest.raises(ValueError, match=rf"^apply_fn must map \[M, 2\] to logits \[M, C\] with C = {len(labels)}"):
    make_linear(labels=labels)


def test_logits_without_a_batch_axis_are_refused():
  with pytest.raises(ValueError, match=r"^apply_fn .*gives shape \(3,\)"):
    make_linear(apply_fn=lambda w, x: jnp.sum(x @ w, axis=0))


def test_predictions_of_another_width_are_refused():
  with pytest.raises(ValueError, match=r"^predict_fn must map"):
    make_linear(predict_fn=lambda w, x: linear(w, x)[:, :2])


def test_batch_coupled_needs_a_prediction_function():
  with pytest.raises(ValueError, match=r"^predict_fn must be given when batch_coupled"):
    make_linear(batch_coupled=True)


@pytest.mark.parametrize("given", [{"statistics_fn": lambda w, x: jnp.mean(x)}, {"statistics": jnp.zeros(())}])
def test_statistics_and_their_function_come_together(given):
  with pytest.raises(ValueError, match=r"^statistics_fn and statistics must be given together"):
    make_linear(**given)


def test_probing_the_shapes_computes_no_logits():
  ran = []

  def apply_fn(w, x):
    jax.debug.callback(lambda: ran.append(1))
    return linear(w, x)

  make_linear(apply_fn=apply_fn)
  jax.effects_barrier()
  assert not ran


class LocalLabelsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_labels_become_output_indices(self):
    classifier = make_linear(labels=(5, 7, 6))
    local = self.variant(classifier.local_labels)(jnp.array([6, 5, 7, 7]))
    np.testing.assert_array_equal(local, [2, 0, 1, 1])  # 5, 7, 6 are outputs 0, 1, 2


def test_local_labels_take_numpy_and_a_batch_of_one():
  np.testing.assert_array_equal(make_linear(labels=(5, 7, 6)).local_labels(np.array([7])), [1])


def test_local_labels_of_an_empty_batch_are_empty():
  assert make_linear().local_labels(jnp.zeros((0,), int)).shape == (0,)


def test_classifier_is_an_argument_of_a_jitted_function():
  classifier = make_linear(labels=(5, 6, 7))
  logits = jax.jit(lambda c, x: c.apply_fn(c.params, x) * c.num_classes)(classifier, jnp.array([[1.0, 2.0]]))
  np.testing.assert_allclose(logits, [[9.0, 9.0, 9.0]])  # (1 + 2) * 3 classes


def test_new_parameters_of_one_classifier_do_not_recompile():
  classifier = make_linear()
  traces = []

  @jax.jit
  def logits(c, x):
    traces.append(1)
    return c.apply_fn(c.params, x)

  x = jnp.array([[1.0, 2.0]])
  logits(classifier, x)
  doubled = jax.tree.map(lambda leaf: 2 * leaf, classifier)
  np.testing.assert_allclose(logits(doubled, x), [[6.0, 6.0, 6.0]])
  assert len(traces) == 1


def test_leaves_of_a_classifier_are_its_parameters_and_statistics():
  coupled, _, _ = random_mlp(batch_norm=True)
  expected = len(jax.tree.leaves(coupled.params)) + len(jax.tree.leaves(coupled.statistics))
  assert len(jax.tree.leaves(coupled)) == expected
  assert jax.tree.structure(jax.tree.map(lambda leaf: leaf, coupled)) == jax.tree.structure(coupled)


class SamplesInteractTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 5)
  def test_batch_mean_couples_even_a_batch_of_one(self, num_samples):
    assert samples_interact(centred, 2.0, jnp.linspace(0.0, 1.0, num_samples)[:, None]) is True

  @parameterized.parameters(1, 2, 5)
  def test_a_linear_map_does_not_couple(self, num_samples):
    assert samples_interact(linear, jnp.ones((1, 3)), jnp.linspace(0.0, 1.0, num_samples)[:, None]) is False

  def test_duplicate_rows_still_show_the_coupling(self):
    assert samples_interact(centred, 2.0, jnp.ones((4, 1)))

  def test_batch_norm_is_seen_on_batch_statistics_only(self):
    coupled, x, _ = random_mlp(batch_norm=True)
    assert samples_interact(coupled.apply_fn, coupled.params, x)
    assert not samples_interact(coupled.predict_fn, coupled.params, x)

  def test_interaction_is_seen_under_jit_too(self):
    @jax.jit
    def traced(w, x):
      assert samples_interact(centred, w, x) is True
      assert samples_interact(lambda w, x: w * x, w, x) is False
      return x

    traced(2.0, jnp.array([[1.0], [3.0]]))

  def test_a_function_that_closes_over_traced_values_cannot_be_judged(self):
    @jax.jit
    def traced(w, x):
      assert samples_interact(lambda _, x: centred(w, x), 2.0, x) is False
      return x

    traced(2.0, jnp.array([[1.0], [3.0]]))

  def test_tiny_logits_hide_nothing(self):
    assert samples_interact(centred, 1e-6, jnp.array([[1.0], [3.0]])) is True

  def test_nan_in_the_inputs_is_no_interaction(self):
    assert samples_interact(lambda w, x: w * x, 2.0, jnp.array([[jnp.nan], [3.0]])) is False
