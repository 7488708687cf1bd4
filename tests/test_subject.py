"""Classifiers as their owners describe them: linen, nnx and plain functions end in the same `Classifier`."""

from example_networks import inputs, random_like
from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.subject import from_linen, from_nnx, Subject


class Linen(nn.Module):
  momentum: float = 0.9

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(4)(x)
    return nn.Dense(3)(nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)))


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(2, 4, rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.last = nnx.Linear(4, 3, rngs=rngs)

  def __call__(self, x):
    return self.last(nnx.relu(self.norm(self.first(x))))


DESCRIBED = {"input_shape": (2,), "num_classes": 3}


def stored(subject, seed=0):
  variables = random_like(subject.variables_like(), seed)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.abs(leaf) + 0.5 if path[-1].key in ("scale", "var") else leaf, variables
  )


def by_hand(x, mean, var, first, norm, last):
  h = x @ first["kernel"] + first["bias"][None]
  h = (h - mean) / np.sqrt(var + 1e-5) * norm["scale"][None] + norm["bias"][None]
  return np.maximum(h, 0) @ last["kernel"] + last["bias"][None]


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_batch_norm_trains_on_the_batch_and_predicts_with_what_is_stored(kind):
  subject = from_linen(Linen(), **DESCRIBED) if kind == "linen" else from_nnx(Nnx, **DESCRIBED)
  variables = stored(subject)
  names = ("Dense_0", "BatchNorm_0", "Dense_1") if kind == "linen" else ("first", "norm", "last")
  layers = [variables["params"][name] for name in names]
  classifier = subject.classifier(variables)
  x = inputs(6, 2)
  hidden = np.asarray(x @ layers[0]["kernel"] + layers[0]["bias"][None])
  mean, var = hidden.mean(axis=0), hidden.var(axis=0)
  np.testing.assert_allclose(
    classifier.apply_fn(classifier.params, x), by_hand(x, mean[None], var[None], *layers), rtol=1e-3, atol=1e-4
  )
  own = variables["batch_stats"][names[1]]
  np.testing.assert_allclose(
    classifier.predict_fn(classifier.params, x),
    by_hand(x, own["mean"][None], own["var"][None], *layers),
    rtol=1e-3,
    atol=1e-4,
  )
  of_batch = classifier.statistics_fn(classifier.params, x)[names[1]]  # not its running average
  np.testing.assert_allclose(of_batch["mean"], mean, rtol=1e-3, atol=1e-5)
  np.testing.assert_allclose(of_batch["var"], var, rtol=1e-3, atol=1e-5)
  assert classifier.batch_coupled


@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_any_momentum_is_found_out(momentum):
  subject = from_linen(Linen(momentum=momentum), **DESCRIBED)
  variables = stored(subject)
  classifier = subject.classifier(variables)
  x = inputs(6, 2)
  layer = variables["params"]["Dense_0"]
  mean = jnp.mean(x @ layer["kernel"] + layer["bias"][None], axis=0)
  found = classifier.statistics_fn(classifier.params, x)["BatchNorm_0"]["mean"]
  np.testing.assert_allclose(found, mean, rtol=1e-2, atol=1e-4)


def test_a_plain_function_sees_inputs_in_its_own_range():
  subject = Subject(
    apply_fn=lambda w, x: x @ w["w"],
    init_fn=lambda: {"w": jnp.zeros((2, 3))},
    value_range=(-1.0, 3.0),
    offset=jnp.array([1.0, -1.0]),
    **DESCRIBED,
  )
  w = {"w": jnp.arange(6.0).reshape(2, 3)}
  classifier = subject.classifier(w)
  np.testing.assert_allclose(
    classifier.apply_fn(w, jnp.array([[0.0, 1.0]])), jnp.array([[-1.0, 3.0]]) @ w["w"], rtol=1e-6
  )
  np.testing.assert_allclose(classifier.offset, [0.5, 0.0])
  assert classifier.labels == (0, 1, 2)


def test_what_cannot_be_is_named():
  with pytest.raises(ValueError, match="value_range must be"):
    Subject(lambda w, x: x, dict, (2,), 3, value_range=(1.0, 1.0))
  with pytest.raises(ValueError, match="num_classes must be at least 2"):
    Subject(lambda w, x: x, dict, (2,), 1)
