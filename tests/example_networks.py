"""Small networks that several test files share, with every parameter (biases too) away from 0.

They are built once a run, from numpy's random numbers and with jitted functions: compiling is what tests spend time on.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kkt_jax.classifiers import from_linen
from kkt_jax.classifiers.relaxation import relaxed
from kkt_jax.networks import MLPClassifier


class ConvClassifier(MLPClassifier):
  """Strided 3 x 3 convolutions, then the layers of `MLPClassifier`, none of them hidden by default."""

  hidden: Sequence[int] = ()
  channels: Sequence[int] = (16, 32)

  @nn.compact
  def __call__(self, x, train: bool = False):
    for width in self.channels:
      x = self._normalised_relu(nn.Conv(width, (3, 3), strides=2, **self._layer)(x), train)
    return super().__call__(x, train)


class ResidualMLP(nn.Module):
  """Dense_0-ReLU, then h + Dense_2(ReLU(Dense_1(h))), then Dense_3."""

  num_classes: int = 3
  width: int = 5

  @nn.compact
  def __call__(self, x):
    h = nn.relu(nn.Dense(self.width)(x))
    h = h + nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(h)))
    return nn.Dense(self.num_classes)(h)


def inputs(count: int, *shape: int, seed: int = 7) -> jax.Array:
  """Normal inputs [count, *shape] in float32."""
  return jnp.asarray(np.random.default_rng(seed).standard_normal((count, *shape)), jnp.float32)


def random_like(tree: Any, seed: int, scale: float = 0.7) -> Any:
  """A pytree of normal numbers in the shape of another: flax starts biases at 0, which would hide them."""
  generator = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.asarray(scale * generator.standard_normal(leaf.shape), leaf.dtype), tree)


@functools.cache
def random_classifier(
  module: nn.Module, input_shape: tuple[int, ...], num_samples: int, seed: int, gate_sharpness: float | None
):
  """A `Classifier` with random parameters, inputs and labels for it; scales and variances stay positive."""
  x = inputs(num_samples, *input_shape, seed=seed + 100)
  y = jnp.asarray(np.arange(num_samples) % module.num_classes)
  shapes = jax.eval_shape(module.init, jax.random.key(seed), x)
  variables = jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.abs(leaf) + 0.5 if path[-1].key in ("scale", "var") else leaf,
    random_like(dict(shapes), seed),
  )
  made = from_linen(module, variables, input_shape=input_shape)
  made = dataclasses.replace(made, forward=jax.jit(made.forward, static_argnums=2))
  return relaxed(made, gate_sharpness), x, y


def random_mlp(num_samples: int = 6, seed: int = 0, gate_sharpness: float | None = None, **settings: Any):
  module = MLPClassifier(**{"num_classes": 3, "hidden": (5, 4), **settings})
  return random_classifier(module, (2,), num_samples, seed, gate_sharpness)


def random_conv(num_samples: int = 3, seed: int = 0, gate_sharpness: float | None = None, **settings: Any):
  module = ConvClassifier(**{"num_classes": 3, "channels": (2, 3), **settings})
  return random_classifier(module, (4, 4, 1), num_samples, seed, gate_sharpness)


def random_residual(num_samples: int = 6, seed: int = 0):
  """The residual network's function, parameters and inputs (it is no module of the library)."""
  module, x = ResidualMLP(), inputs(num_samples, 2, seed=seed + 100)
  params = random_like(jax.eval_shape(module.init, jax.random.key(seed), x)["params"], seed)
  return jax.jit(lambda p, x: module.apply({"params": p}, x)), params, x


def to_float64(tree: Any) -> Any:
  """Call under ``jax.enable_x64(True)``."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)
