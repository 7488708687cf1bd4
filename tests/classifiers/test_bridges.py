"""The frameworks' conventions, as the table of docs/frameworks.md states them."""

import inspect

import equinox as eqx
from flax import linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from sklearn.neural_network._base import inplace_relu_derivative


def of_torch():
  torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-torch")

  def slopes(function, x):
    own = torch.tensor(np.asarray(x), requires_grad=True)
    function(own).sum().backward()
    return own.grad.numpy()

  own = torch.nn.BatchNorm2d(3)
  pool = lambda x: torch.nn.functional.max_pool2d(x[None, None], 2)
  return own.eps, 1 - own.momentum, torch.relu, torch.nn.functional.leaky_relu, pool, slopes


def slopes(function, x):
  return jax.grad(lambda x: jnp.sum(function(x)))(x)


def of_keras():
  own, pool = keras.layers.BatchNormalization(), lambda x: keras.layers.MaxPooling2D(2)(x[None, :, :, None])
  return own.epsilon, own.momentum, keras.ops.relu, keras.layers.LeakyReLU(0.01), pool, slopes


def of_equinox():
  own, pool = eqx.nn.BatchNorm(3, "batch", mode="ema"), lambda x: eqx.nn.MaxPool2d(2, 2)(x[None])
  return own.eps, own.momentum, jax.nn.relu, jax.nn.leaky_relu, pool, slopes


def of_haiku():
  defaults = inspect.signature(hk.BatchNorm.__init__).parameters
  assert defaults["decay_rate"].default is inspect.Parameter.empty
  pool = lambda x: hk.max_pool(x[None, :, :, None], (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
  return defaults["eps"].default, None, jax.nn.relu, jax.nn.leaky_relu, pool, slopes


def of_flax():
  own, pool = nn.BatchNorm(), lambda x: nn.max_pool(x[None, :, :, None], (2, 2), (2, 2))
  return own.epsilon, own.momentum, nn.relu, nn.leaky_relu, pool, slopes


@pytest.mark.parametrize(
  ("framework", "epsilon", "kept", "leaky"),
  [(of_torch, 1e-5, 0.9, 0.01), (of_keras, 1e-3, 0.99, 1.0), (of_equinox, 1e-5, 0.99, 1.0)]
  + [(of_haiku, 1e-5, None, 1.0), (of_flax, 1e-5, 0.99, 1.0)],
)
def test_batch_norm_and_slopes_at_ties(framework, epsilon, kept, leaky):
  *own, relu, leaky_relu, pool, slopes = framework()
  assert own == [epsilon, kept]
  assert slopes(relu, jnp.zeros(1)) == 0
  np.testing.assert_allclose(slopes(leaky_relu, jnp.zeros(1)), leaky)
  np.testing.assert_array_equal(slopes(pool, jnp.zeros((2, 2))), [[1, 0], [0, 0]])


def test_the_slope_of_scikit_learns_relu_at_0_is_0():
  slope = np.ones(1)
  inplace_relu_derivative(np.zeros(1), slope)
  assert slope == 0
