"""What is of another kind than an argument must be is refused by the name of the argument, on every public face."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kkt_jax
from kkt_jax import deformations, kkt, membership, metrics, priors
from kkt_jax._errors import InputError
from kkt_jax.kkt import losses, multipliers
from kkt_jax.reconstruction import stages

KINDS = {
  "text": "a",
  "none": None,
  "object": object(),
  "texts": np.array(["a", "b", "c"]),
  "ragged": [[1, 2], [3]],
  "mapping": {"a": "b"},
  "function": len,
}


def normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def network(params, x):
  return jnp.maximum(x @ params["w"], 0) @ params["v"]


class Parts(NamedTuple):
  """A classifier and what is known of it."""

  classifier: kkt_jax.Classifier
  examination: kkt_jax.Examination
  reconstruction: kkt_jax.Reconstruction
  conditions: kkt.Conditions


@functools.cache
def parts():
  params = {"w": jnp.asarray(normal(2, 3)), "v": jnp.asarray(normal(3, 2))}
  classifier = kkt_jax.make_classifier(network, params, (2,), value_range=None)
  recipe = kkt_jax.Recipe(schedule=kkt_jax.reconstruction.Schedule(steps=2))
  made = kkt_jax.reconstruct([classifier], recipe)
  return Parts(classifier, made.examinations[0], made, kkt.weight_decay_conditions(params))


IMAGES, POINTS, LOGITS, Y = np.abs(normal(3, 16, 16, 1)) % 1, normal(3, 2), normal(3, 2), np.array([0, 1, 0])
KEY, MU = jax.random.key(0), np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], np.float32)
SCORES = {"members": [0.9, 0.8], "others": [0.5, 0.2], "allowed": (0.0, 0.1)}

# Functions and methods of `Parts`, by name, with arguments that are right.
CALLS = {
  "roc": (metrics.roc, SCORES),
  "conformal_p_values": (metrics.conformal_p_values, {"scores": [0.9], "others": [0.5]}),
  "q_values": (metrics.q_values, {"p_values": [0.1, 0.2]}),
  "retrieval": (metrics.retrieval, {"training_scores": normal(5), "distractor_scores": normal(5)}),
  "pairwise_distance": (metrics.pairwise_distance, {"a": POINTS, "b": POINTS}),
  "pairwise_ssim": (metrics.pairwise_ssim, {"a": IMAGES, "b": IMAGES}),
  "pairwise_mse": (metrics.pairwise_mse, {"a": IMAGES, "b": IMAGES}),
  "ssim": (metrics.ssim, {"a": IMAGES, "b": IMAGES, "data_range": 1.0}),
  "kernel_distance": (metrics.kernel_distance, {"a": POINTS, "b": POINTS}),
  "within_class_distance": (metrics.within_class_distance, {"features": POINTS, "labels": Y}),
  "total_variation": (priors.total_variation, {"x": IMAGES}),
  "repulsion": (priors.repulsion, {"x": POINTS, "labels": Y, "bandwidth": 1.0}),
  "contrast": (priors.contrast, {"first": POINTS, "second": POINTS}),
  "warp": (deformations.warp, {"key": KEY, "x": IMAGES, "size": 1.0, "waves": 2}),
  "margins": (losses.margins, {"logits": LOGITS, "classes": Y}),
  "duality_loss": (losses.duality_loss, {"logits": LOGITS, "classes": Y, "alpha": 0.0, "delta": 0.1}),
  "from_softmax": (multipliers.from_softmax, {"logits": LOGITS}),
  "examine": (kkt_jax.examine, {"seed": 0}),
  "start": (stages.start, {"seed": 0}),
  "Samples": (kkt_jax.Samples, {"x": POINTS, "y": Y}),
}
METHODS = {
  "sample": ({"key": KEY, "y": Y}, lambda own: own.reconstruction.sample),
  "choose_classifiers": ({"key": KEY, "y": Y}, lambda own: own.reconstruction.choose_classifiers),
  "predict": ({"x": POINTS}, lambda own: own.classifier.predict),
  "classes_of": ({"labels": Y}, lambda own: own.classifier.classes_of),
  "with_offset": ({"offset": normal(2)}, lambda own: own.classifier.with_offset),
  "scores": ({"x": POINTS}, lambda own: functools.partial(membership.scores, own.examination)),
  "audit": ({"seed": 0}, lambda own: functools.partial(kkt_jax.audit, own.classifier)),
}
CASES = [(name, argument) for name, (_, own) in CALLS.items() for argument in own]
CASES += [(name, argument) for name, (own, _) in METHODS.items() for argument in own]
FIRST = {"examine": lambda own: (own.classifier,), "start": lambda own: ([own.classifier],)}


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_another_kind_is_refused_by_name(name, argument):
  right = CALLS[name][1] if name in CALLS else METHODS[name][0]
  function = CALLS[name][0] if name in CALLS else METHODS[name][1](parts())
  before = FIRST[name](parts()) if name in FIRST else ()
  if name not in ("audit", "start"):
    function(*before, **right)
  for kind, wrong in KINDS.items():
    with pytest.raises(ValueError, match=rf"^{argument}\b.*must .*; got") as refused:
      function(*before, **right | {argument: wrong})
    assert type(refused.value) in (ValueError, InputError), (kind, refused)


@pytest.mark.parametrize(
  ("function", "arguments", "message"),
  [
    (metrics.roc, SCORES | {"members": [0.1, np.nan]}, "members must be a vector of at least one score without NaN"),
    (metrics.roc, SCORES | {"allowed": (1.0,)}, "allowed must hold shares, each at least 0 and less than 1"),
    (metrics.q_values, {"p_values": [np.nan]}, "p_values must be a vector of numbers from 0 to 1"),
    (lambda x: membership.scores(parts().examination, x), {"x": np.full((3, 2), np.nan)}, "x must be finite"),
    (lambda x: parts().classifier.predict(x), {"x": normal(3, 4)}, r"x must have shape \[M, \*input_shape\]"),
    (lambda y: kkt.relative_residual(y, {}), {"y": "a"}, "conditions must be a kkt_jax.Conditions; got str"),
    (lambda f: kkt.per_sample_jacobians(f, {}, POINTS), {"f": 3}, "apply_fn must be a function; got 3"),
  ],
)
def test_values_and_objects_that_do_not_fit_are_refused_by_name(function, arguments, message):
  with pytest.raises(ValueError, match=message):
    function(**arguments)


def test_parameters_of_another_shape_than_those_of_init_fn_are_refused():
  subject = kkt_jax.Subject(network, lambda: {"w": jnp.zeros((2, 3)), "v": jnp.zeros((3, 2))}, (2,))
  with pytest.raises(ValueError, match=r"variables must have the shapes of what init_fn returns, \(3, 2\) at v; got"):
    subject.classifier({"w": jnp.ones((2, 3)), "v": jnp.ones((3, 4))})


def test_rows_that_are_traced_are_an_array_too():
  rows = [LOGITS[0], LOGITS[1]]
  traced = jax.jit(lambda own: losses.margins(own, Y[:2]))(rows)
  np.testing.assert_allclose(traced, losses.margins(LOGITS[:2], Y[:2]), rtol=1e-6)


def test_what_is_missing_or_too_much_is_said_with_the_name_of_the_function():
  with pytest.raises(TypeError, match=r"^margins\(\) missing 1 required positional argument: 'classes'"):
    losses.margins(LOGITS)
  with pytest.raises(TypeError, match=r"^margins\(\) got an unexpected keyword argument 'weights'"):
    losses.margins(LOGITS, Y, weights=1.0)


@pytest.mark.parametrize(
  ("leaf", "got"),
  [
    (jax.ShapeDtypeStruct((2, 3), jnp.float32), "a ShapeDtypeStruct"),
    (object(), "a object"),
    (np.ones((2, 3), ">f4"), "dtype >f4"),
    (np.ones((2, 3), object), "dtype object"),
  ],
)
def test_a_parameter_that_is_no_array_is_called_what_it_is(leaf, got):
  with pytest.raises(ValueError, match=f"^params, at w, must be floating point; got {got}"):
    kkt_jax.make_classifier(lambda p, x: x @ p["w"], {"w": leaf}, (2,))
