"""Flax modules of the experiments: classifiers and the network of the multipliers. Nothing else needs them."""

from collections.abc import Sequence

from flax import linen as nn
import jax
import jax.numpy as jnp

from kkt_jax import _checks


def kaiming(scale: float = 1.0) -> nn.initializers.Initializer:
  """Kaiming initialisation (He et al. 2015), the paper's, with its standard deviation times ``scale``."""
  return nn.initializers.variance_scaling(2.0 * scale**2, "fan_in", "normal")


def conditioned(
  x: jax.Array, y: jax.Array, t: jax.Array, num_labels: int, num_classifiers: int, *, strength: float = 3.0
) -> jax.Array:
  """Values [M, D] with places of labels [M] and classifier indices [M] beside them: one-hot, times ``strength``.

  At 3 they are as strong as several dimensions of noise.
  """
  pairs = ((y, num_labels), (t, num_classifiers))
  places = [strength * jax.nn.one_hot(_checks.integers(indices), count, dtype=x.dtype) for indices, count in pairs]
  return jnp.concatenate([x, *places], axis=1)


class MLPClassifier(nn.Module):
  """The paper's classifier: fully connected layers, ReLU, optional batch norm before each ReLU.

  Attributes:
    num_classes: C.
    hidden: widths of the hidden layers; two of them make the paper's three layers.
    batch_norm: Linear-BatchNorm-ReLU instead of Linear-ReLU. Its momentum is 0: the stored statistics are exactly
      those of the last batch.
    use_bias: biases on the linear layers.
    init_scale: factor on the Kaiming initial weights; small values are what brings gradient descent to a KKT point.
  """

  num_classes: int
  hidden: Sequence[int] = (256, 256)
  batch_norm: bool = False
  use_bias: bool = True
  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps x [M, ...] to logits [M, C]."""
    x = x.reshape(x.shape[0], -1)
    for width in self.hidden:
      x = self._normalised_relu(nn.Dense(width, **self._layer)(x), train)
    return nn.Dense(self.num_classes, **self._layer)(x)

  @property
  def _layer(self) -> dict:
    return {"use_bias": self.use_bias, "kernel_init": kaiming(self.init_scale)}

  def _normalised_relu(self, x: jax.Array, train: bool) -> jax.Array:
    if self.batch_norm:
      x = nn.BatchNorm(use_running_average=not train, momentum=0.0, use_fast_variance=False)(x)
    return nn.relu(x)


class MultiplierNetwork(nn.Module):
  """The network h(x, y, t; eta) of section 4: raw multipliers mu' for `kkt_jax.kkt.multipliers.from_network`.

  Attributes:
    num_outputs: C, the greatest number of classes of any classifier.
    num_labels: number of labels altogether.
    num_classifiers: T.
    hidden: widths of the hidden layers.
    initial_bias: bias of the last layer at the start, positive so that no multiplier starts dead.
  """

  num_outputs: int
  num_labels: int
  num_classifiers: int = 1
  hidden: Sequence[int] = (128, 128)
  initial_bias: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
    """Maps inputs [M, ...], places of labels [M] and classifier indices [M] to mu' [M, C]."""
    h = conditioned(x.reshape(x.shape[0], -1), y, t, self.num_labels, self.num_classifiers, strength=1.0)
    for width in self.hidden:
      h = nn.relu(nn.Dense(width, kernel_init=kaiming())(h))
    # A small last layer: all multipliers start near the initial bias, whatever the input.
    small = nn.initializers.normal(1e-2)
    bias = nn.initializers.constant(self.initial_bias)
    return nn.Dense(self.num_outputs, kernel_init=small, bias_init=bias)(h)
