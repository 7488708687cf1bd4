"""The independent judge of the image experiments: a classifier trained on real data that the attacked one never saw."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from experiments.data import Images
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifier import PyTree

_OPTIMIZER = optax.adam(2e-3)
_STUDENT_BATCH = 50


class _Network(nn.Module):
  """Two convolutions and a hidden layer, whose outputs are what `Judge.features` returns."""

  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    for channels, window in ((16, 5), (32, 3)):
      x = nn.max_pool(nn.relu(nn.Conv(channels, (window, window))(x)), (2, 2), strides=(2, 2))
    features = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
    return nn.Dense(self.num_classes)(features), features


_apply = jax.jit(_Network.apply, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Judge:
  """What the experiments ask of the judge.

  Attributes:
    logits: ``x[M, H, W, C] -> [M, classes]``.
    features: ``x[M, H, W, C] -> [M, 64]``.
  """

  logits: Callable[[ArrayLike], jax.Array]
  features: Callable[[ArrayLike], jax.Array]

  def accuracy(self, x: ArrayLike, y: ArrayLike) -> float:
    """Share of samples that the judge gives the wanted label."""
    return float(jnp.mean(jnp.argmax(self.logits(x), axis=1) == jnp.asarray(y)))


def train_judge(images: Images, *, seed: int, directory: pathlib.Path, epochs: int = 8) -> Judge:
  """Trains the judge, or restores it.

  A convolutional network, because a plain fully connected one errs on thick and blurry strokes that a person reads.

  Args:
    images: real data; must be disjoint from what the attacked classifier was trained on.
    seed: of initialisation and order.
    directory: where it is kept.
    epochs: passes over the data.

  Returns:
    The `Judge`.
  """
  network = _Network(num_classes=int(images.y.max()) + 1)
  with Checkpointer(directory) as checkpointer:
    restored = checkpointer.restore(_init(network, images, seed))
    params = restored[1] if restored else _fit(network, images, seed=seed, epochs=epochs, batch_size=100)
    if not restored:
      checkpointer.save(0, params)
  return _judge(network, params)


def usefulness(images: Images, real: Images, *, seed: int, epochs: int) -> float:
  """What images are worth as training data: accuracy on real data of a fresh classifier that saw nothing but them.

  Args:
    images: what the fresh classifier, a network like the judge, is trained on.
    real: what it is tested on; must be disjoint from ``images``.
    seed: of initialisation and order.
    epochs: passes over ``images``.

  Returns:
    The accuracy.
  """
  network = _Network(num_classes=int(real.y.max()) + 1)
  params = _fit(network, images, seed=seed, epochs=epochs, batch_size=_STUDENT_BATCH)
  return _judge(network, params).accuracy(real.x, real.y)


def _judge(network: _Network, params: PyTree) -> Judge:
  return Judge(
    logits=lambda x: _apply(network, params, jnp.asarray(x))[0],
    features=lambda x: _apply(network, params, jnp.asarray(x))[1],
  )


def _init(network: _Network, images: Images, seed: int) -> PyTree:
  return network.init(jax.random.split(jax.random.key(seed))[0], jnp.asarray(images.x[:1]))


def _fit(network: _Network, images: Images, *, seed: int, epochs: int, batch_size: int) -> PyTree:
  """Parameters after training with Adam."""
  params = _init(network, images, seed)
  opt_state = _OPTIMIZER.init(params)
  batch_size = min(batch_size, len(images.y))
  for epoch_key in jax.random.split(jax.random.split(jax.random.key(seed))[1], epochs):
    order = np.asarray(jax.random.permutation(epoch_key, len(images.y)))
    for start in range(0, len(order) - batch_size + 1, batch_size):
      chosen = order[start : start + batch_size]
      params, opt_state = _step(network, params, opt_state, images.x[chosen], images.y[chosen])
  return params


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(network: _Network, params: PyTree, opt_state: PyTree, x: jax.Array, y: jax.Array) -> tuple[PyTree, PyTree]:
  def loss(params: PyTree) -> jax.Array:
    logits = network.apply(params, x)[0]
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))

  updates, opt_state = _OPTIMIZER.update(jax.grad(loss)(params), opt_state, params)
  return optax.apply_updates(params, updates), opt_state
