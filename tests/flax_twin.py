"""100 digits, and a network with batch norm of them in flax, beside which other frameworks' own ones are held."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import kkt_jax
from kkt_jax.kkt import diagnostics, pretrain

X, Y = (own[:100] for own in load_digits(return_X_y=True))
X = (X / 16).reshape(-1, 8, 8, 1).astype(np.float32)
STEPS, RATE, WIDTH, KEPT = 150, 0.1, 32, 0.5  # of the full-batch descent, without momentum or decay; of averages


class Twin(nn.Module):
  """Dense, batch norm, ReLU and dense."""

  epsilon: float

  @nn.compact
  def __call__(self, x, train=False):
    h = nn.Dense(WIDTH)(x.reshape(len(x), -1))
    h = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=KEPT, epsilon=self.epsilon)(h))
    return nn.Dense(10)(h)


def from_flax(first, norm, last, epsilon):
  """The classifier trained in flax from kernels [in, out] (scales) and biases of the three layers."""
  module, names = Twin(epsilon), ("kernel", "bias")
  pair = lambda layer, names=names: dict(zip(names, (jnp.array(own) for own in layer), strict=True))
  start = {"Dense_0": pair(first), "BatchNorm_0": pair(norm, ("scale", "bias")), "Dense_1": pair(last)}
  variables = module.init(jax.random.key(0), X)
  descent = pretrain.Descent(num_steps=STEPS, learning_rate=RATE, steps_per_call=STEPS)
  train = lambda params, x: module.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])[0]
  own = {**variables, "params": pretrain.gradient_descent(train, start, X, Y, descent).params}
  for _ in range(40):  # of which a half is kept of each
    own |= module.apply(own, X, train=True, mutable=["batch_stats"])[1]
  return kkt_jax.from_linen(module, own, input_shape=(8, 8, 1))


def check_residual(own, twin):
  """The training data leave as much of the weights unexplained as in flax, and less than noise does."""
  noise = np.random.default_rng(0).uniform(size=X.shape).astype(np.float32)

  def left(classifier, x):
    conditions = kkt_jax.examine(classifier, form="max_margin").conditions
    return diagnostics.diagnose(classifier, conditions, x, Y).residual

  found, beside, of_noise = left(own, X), left(twin, X), left(own, noise)
  assert found == pytest.approx(beside, rel=0.1)
  assert found < 0.8 * of_noise
