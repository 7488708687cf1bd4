"""The independent judge of the image experiments: a classifier trained on real data that the attacked one never saw."""

from collections.abc import Callable
import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from experiments.data import Images
from kkt_jax.classifier import PyTree


class _Network(nn.Module):
  """Two convolutions and a hidden layer, whose outputs are what `Judge.features` returns."""

  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    for channels, window in ((16, 5), (32, 3)):
      x = nn.max_pool(nn.relu(nn.Conv(channels, (window, window))(x)), (2, 2), strides=(2, 2))
    features = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
    return nn.Dense(self.num_classes)(features), features


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


def train_judge(images: Images, *, seed: int, epochs: int = 8, batch_size: int = 100) -> Judge:
  """Trains the judge with Adam.

  A convolutional network, because a plain fully connected one errs on thick and blurry strokes that a person reads.

  Args:
    images: real data; must be disjoint from what the attacked classifier was trained on.
    seed: of initialisation and order.
    epochs: passes over the data.
    batch_size: images a step.

  Returns:
    The `Judge`.
  """
  network = _Network(num_classes=int(images.y.max()) + 1)
  init_key, key = jax.random.split(jax.random.key(seed))
  params = network.init(init_key, jnp.asarray(images.x[:1]))
  optimizer = optax.adam(2e-3)

  def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    logits: jax.Array = network.apply(params, x)[0]
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params: PyTree, opt_state: PyTree, x: jax.Array, y: jax.Array) -> tuple[PyTree, PyTree]:
    updates, opt_state = optimizer.update(jax.grad(loss)(params, x, y), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state = optimizer.init(params)
  batch_size = min(batch_size, len(images.y))
  for epoch_key in jax.random.split(key, epochs):
    order = np.asarray(jax.random.permutation(epoch_key, len(images.y)))
    for start in range(0, len(order) - batch_size + 1, batch_size):
      chosen = order[start : start + batch_size]
      params, opt_state = step(params, opt_state, images.x[chosen], images.y[chosen])
  apply = jax.jit(network.apply)
  return Judge(
    logits=lambda x: apply(params, jnp.asarray(x))[0],
    features=lambda x: apply(params, jnp.asarray(x))[1],
  )
