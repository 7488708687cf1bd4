"""Products are those of float32 proper, on accelerators too, unless the user says otherwise."""

import functools

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

import kkt_jax
from kkt_jax import deformations, kkt, priors
from kkt_jax.analysis import Subspace
from kkt_jax.extraction import vertices
from kkt_jax.generators import flows
from kkt_jax.kkt import diagnostics, jacobians, losses, pretrain, symmetries, weight_decay_conditions
from kkt_jax.membership import candidates
from kkt_jax.reconstruction.step import make_train_step

X, CLASSES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32), jnp.arange(6) % 2
PARAMS = {"w1": jnp.eye(4) + 0.1, "w2": jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)), jnp.float32)}
CONDITIONS = weight_decay_conditions(PARAMS)


def use(classifier, name):
  """Calls some of the functions that evaluate a network."""
  apply_fn = classifier.apply_fn
  match name:
    case "examine, reconstruct, sample":
      schedule = kkt_jax.reconstruction.Schedule(steps=2)
      made = kkt_jax.reconstruct([classifier], kkt_jax.Recipe(schedule=schedule))
      made.sample(jax.random.key(0), CLASSES)
    case "predict":
      classifier.predict(X)
    case "stationarity":
      losses.stationarity_sum(apply_fn, PARAMS, X, CLASSES, jnp.ones((6, 2)))
    case "jacobians":
      jacobians.per_sample_jacobians(apply_fn, PARAMS, X)
    case "equations":
      kkt.derivative_equations(apply_fn, PARAMS, X)
      kkt.scaling_error(apply_fn, PARAMS, jax.tree.map(jnp.ones_like, PARAMS), X, jnp.ones(1))
    case "symmetries":
      symmetries.least_residual(apply_fn, PARAMS, CONDITIONS, X)
    case "diagnostics":
      diagnostics.diagnose(classifier, CONDITIONS, X, CLASSES, num_steps=2)
      diagnostics.nonnegative_multipliers(apply_fn, PARAMS, X, CLASSES, CONDITIONS, num_steps=2)
    case "candidates":
      candidates.boundary_fractions(classifier, X)
    case _:
      pretrain.gradient_descent(apply_fn, PARAMS, X, CLASSES, pretrain.Descent(num_steps=2, learning_rate=0.1))


NAMES = ["examine, reconstruct, sample", "predict", "stationarity", "jacobians", "equations", "symmetries"]
NAMES += ["diagnostics", "candidates", "gradient descent"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", ["highest", "tensorfloat32"])
def test_networks_are_evaluated_in_the_precision_that_is_wanted(name, wanted):
  noted = set()

  def apply_fn(params, x):
    logits = jax.nn.relu(x @ params["w1"]) @ params["w2"]
    noted.add(jax.config.jax_default_matmul_precision)
    return logits

  classifier = kkt_jax.make_classifier(apply_fn, PARAMS, (4,), weight_decay=1.0)
  noted.clear()
  if wanted == "highest":
    use(classifier, name)
  else:
    with jax.default_matmul_precision(wanted):
      use(classifier, name)
  assert noted == {wanted}


@pytest.mark.parametrize("name", NAMES)
def test_strict_promotion_of_types_is_no_hindrance(name):
  apply_fn = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
  with jax.numpy_dtype_promotion("strict"):
    use(kkt_jax.make_classifier(apply_fn, PARAMS, (4,), weight_decay=1.0), name)


def products(jaxpr):
  """The precisions of all products in a program."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      yield equation.params["precision"]
    for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda own: hasattr(own, "eqns")):
      inner = getattr(parameter, "jaxpr", parameter)
      if isinstance(inner, core.Jaxpr):
        yield from products(inner)


def assert_precise(function, *args):
  found = list(products(jax.make_jaxpr(function)(*args).jaxpr))
  assert found
  assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_every_product_of_what_needs_no_network_is_precise():
  flow = flows.Flow(batch_size=4)
  assert_precise(lambda x: flow.leaning_on_others(x, CLASSES), X)
  assert_precise(lambda x: deformations.warp(jax.random.key(0), x, size=1.0), jnp.ones((2, 8, 8, 1)))
  assert_precise(lambda x: vertices.likely_ends(x, CLASSES, x, CLASSES), X)
  assert_precise(lambda x: priors.repulsion(x, CLASSES, bandwidth=1.0), X)
  assert_precise(lambda x: priors.contrast(x, x), X)


def test_every_product_of_polishing_is_precise():
  subspace = Subspace(jnp.full(4, 0.5), jnp.eye(4)[:, :2], jnp.ones(2))
  assert_precise(lambda x: vertices.polish(x, subspace, num_steps=2), X)


def test_every_product_of_a_gradient_of_stationarity_is_precise():
  def residual(x):
    sums = losses.stationarity_sum(lambda w, x: jnp.tanh(x @ w["w1"]) @ w["w2"], PARAMS, x, CLASSES, jnp.ones((6, 2)))
    return losses.relative_residual(CONDITIONS, sums)

  assert_precise(jax.grad(residual), X)


def test_every_product_of_a_training_step_is_precise():
  classifier = kkt_jax.make_classifier(lambda w, x: jax.nn.relu(x @ w["w1"]) @ w["w2"], PARAMS, (4,), weight_decay=1.0)
  begin = kkt_jax.reconstruction.start([classifier])
  step = make_train_step(begin.problem)
  assert_precise(functools.partial(step, count=None), begin.state, begin.classifiers, begin.trainer.equations)
