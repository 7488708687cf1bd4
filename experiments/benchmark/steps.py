"""What `experiments.benchmark` times: steps of a generator's training, and plain steps of its classifier."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import images, mnist
from experiments.benchmark import timing
import kkt_jax
from kkt_jax import networks
from kkt_jax.analysis import Subspace
from kkt_jax.classifiers import Classifier
from kkt_jax.kkt import conditions, jacobians, losses
from kkt_jax.reconstruction import start
from kkt_jax.reconstruction.step import make_train_step

_SHAPE = (28, 28, 1)


def training_step(begin: kkt_jax.Reconstruction) -> tuple[Callable[..., Any], Any, Any, Any]:
  """A step of the training that a reconstruction begins, and its arguments."""
  step: Any = make_train_step(begin.problem)
  return lambda *arguments: step(*arguments, None), begin.state, begin.classifiers, begin.trainer.equations


def problem(num_samples: int, hidden: Sequence[int], num_classes: int) -> tuple[Classifier, Any, Any]:
  """The MNIST classifier with random weights, random samples and classes: times do not depend on their values."""
  x = jax.random.uniform(jax.random.key(0), (num_samples, *_SHAPE))
  return mlp(hidden, num_classes, weight_decay=0.02), x, jnp.arange(num_samples) % num_classes


def mlp(hidden: Sequence[int], num_classes: int, *, seed: int = 0, **known: Any) -> Classifier:
  """A classifier with random weights; with batch norm if its ``weight_decay`` is None."""
  module = networks.MLPClassifier(num_classes=num_classes, hidden=hidden, batch_norm=known["weight_decay"] is None)
  variables = module.init(jax.random.key(seed), jnp.zeros((2, *_SHAPE)))
  return kkt_jax.from_linen(module, variables, input_shape=_SHAPE, **known)


def whole_step(*, batch_norm: bool, dimensions: int = 0) -> tuple[timing.Call, timing.Call]:
  """A step of the table's training in `experiments.mnist`, and a plain step of its classifier on as many samples.

  The classifier has random weights. What a step costs does not depend on their values, but on what they reveal: of
  trained weights the span of the data is known, and samples lie in it.

  Args:
    batch_norm: whether the classifier has batch norm; weight decay if not.
    dimensions: of a random span in which samples lie, one less than the digits of a run; if 0, samples are free.
  """
  settings, examination = _examined(batch_norm)
  if dimensions:
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (784, dimensions)))[0]
    subspace = Subspace(examination.origin, basis, jnp.ones(dimensions))
    examination = dataclasses.replace(examination, subspace=subspace)
  recipe = images.recipe_of(settings, [examination], drawings=True)
  begin = start([examination.classifier], recipe, examinations=[examination])
  x = jax.random.uniform(jax.random.key(1), (begin.problem.generator.batch_size, *_SHAPE))
  return timing.Call(*training_step(begin)), plain_step(examination.classifier, x, jnp.arange(len(x)) % 10)


@functools.cache
def _examined(batch_norm: bool) -> tuple[mnist.Config, kkt_jax.Examination]:
  """The settings of `experiments.mnist`, and what its classifier says with random weights."""
  settings = images.resolve(mnist.Config(batch_norm=batch_norm, codes=50), mnist.DEFAULTS)
  decay = None if batch_norm else settings.weight_decay
  return settings, kkt_jax.examine(mlp((settings.width, settings.second_width), 10, weight_decay=decay))


def plain_step(classifier: Classifier, x: Any, y: Any) -> timing.Call:
  """One step of gradient descent on the cross-entropy: what any training of this classifier costs."""

  def step(params: Any, x: Any, y: Any) -> Any:
    def loss(params: Any) -> Any:
      logits = classifier.apply_fn(params, x)
      return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

  return timing.Call(step, classifier.params, x, y)


def stationarity(classifier: Classifier, x: Any, y: Any, *, explicit: bool = False) -> timing.Call:
  """The relative residual with multipliers 1 and its gradient by the samples, by one product or explicit Jacobians."""

  def residual(x: Any, params: Any, y: Any) -> Any:
    wanted, mu = conditions.weight_decay_conditions(params), jnp.ones((x.shape[0], classifier.num_classes))
    if explicit:
      jacobian = jacobians.per_sample_jacobians(classifier.apply_fn, params, x)
      return losses.relative_residual(wanted, losses.stationarity_sum_from_jacobians(jacobian, y, mu))
    return losses.relative_residual(wanted, losses.stationarity_sum(classifier.apply_fn, params, x, y, mu))

  return timing.Call(jax.value_and_grad(residual), x, classifier.params, y)
