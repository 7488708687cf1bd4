"""The independent judge of the image experiments: a classifier trained on real data that the attacked one never saw."""

import dataclasses
import functools
import pathlib

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from kkt_jax.auditing.samples import Samples
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifiers import Classifier, PyTree

_OPTIMIZER = optax.adam(2e-3)
_BATCH, _STUDENT_BATCH = 100, 50
_SHARPNESS = 3.0  # of what a teacher says, in units of its margin
_AT_ONCE = 50  # images; the temporary memory of more is returned to the system after every step, which takes longer


class _Network(nn.Module):
  """Two convolutions and a hidden layer; a plain fully connected network errs on thick strokes that a person reads."""

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
  """A trained judge."""

  network: _Network
  params: PyTree

  def __call__(self, x: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Logits [M, C] and features [M, 64] of images [M, H, W, channels]."""
    return _apply(self.network, self.params, jnp.asarray(x))

  def features(self, x: ArrayLike) -> jax.Array:
    """Features [M, 64], the outputs of the last hidden layer."""
    return self(x)[1]

  def accuracy(self, x: ArrayLike, y: ArrayLike) -> float:
    """Share of images that the judge gives the wanted label."""
    return float(jnp.mean(jnp.argmax(self(x)[0], axis=1) == jnp.asarray(y)))


def train_judge(images: Samples, *, seed: int, directory: pathlib.Path, epochs: int = 8) -> Judge:
  """Trains the judge, or restores the one that was trained on the same images in the same way.

  Args:
    images: real data; must be disjoint from what the attacked classifier was trained on.
    seed: of initialisation and order.
    directory: where judges are kept, each by a digest of its images.
    epochs: passes over the data.

  Returns:
    The `Judge`.
  """
  network = _Network(num_classes=int(images.y.max()) + 1)
  with Checkpointer(directory / f"{images.digest()[:16]}_{seed}_{epochs}") as checkpointer:
    restored = checkpointer.restore(_init(network, jax.random.key(seed), images.x[:1]))
    params = restored[1] if restored else _fit(network, images, seed=seed, epochs=epochs, batch_size=_BATCH)
    if not restored:
      checkpointer.save(0, params)
  return Judge(network, params)


def usefulness(images: Samples, real: Samples, *, seed: int, epochs: int, lessons: np.ndarray | None = None) -> float:
  """What images are worth as training data: accuracy on real data of a fresh classifier that saw nothing but them.

  Args:
    images: what the fresh classifier, a network like the judge, is trained on.
    real: what it is tested on; must be disjoint from ``images``.
    seed: of initialisation and order.
    epochs: passes over ``images``.
    lessons: what it learns of each image [M, C], such as `soft_labels`; the labels of the images if None.

  Returns:
    The accuracy.
  """
  network = _Network(num_classes=int(real.y.max()) + 1)
  learned = images if lessons is None else Samples(images.x, lessons)
  params = _fit(network, learned, seed=seed, epochs=epochs, batch_size=_STUDENT_BATCH)
  return Judge(network, params).accuracy(real.x, real.y)


def soft_labels(classifier: Classifier, margin: float, x: ArrayLike) -> np.ndarray:
  """What a classifier teaches of images (Hinton et al. 2015): its softmax, tempered so that it is not one of 0 and 1.

  Args:
    classifier: the teacher, whose outputs are the labels.
    margin: of its training data, in logits; the temperature is a third of it, so that of images with this margin a
      runner-up has e^-3 of the winner's probability.
    x: images [M, H, W, C], in its own units.

  Returns:
    Probabilities [M, C].
  """
  return np.asarray(jax.nn.softmax(_SHARPNESS / margin * classifier.predict(jnp.asarray(x))))


@functools.partial(jax.jit, static_argnums=0)
def _init(network: _Network, key: jax.Array, x: jax.Array) -> PyTree:
  return network.init(key, x)


def _fit(network: _Network, images: Samples, *, seed: int, epochs: int, batch_size: int) -> PyTree:
  """Parameters after training with Adam."""
  init_key, order_key = jax.random.split(jax.random.key(seed))
  params = _init(network, init_key, images.x[:1])
  opt_state = _OPTIMIZER.init(params)
  batch_size = min(batch_size, len(images.y))
  for epoch_key in jax.random.split(order_key, epochs):
    order = np.asarray(jax.random.permutation(epoch_key, len(images.y)))
    for start in range(0, len(order) - batch_size + 1, batch_size):
      parts = np.array_split(order[start : start + batch_size], -(-batch_size // _AT_ONCE))
      gradients = [_gradient(network, params, images.x[part], images.y[part]) for part in parts]
      params, opt_state = _update(params, opt_state, gradients, batch_size)
  return params


@functools.partial(jax.jit, static_argnums=0)
def _gradient(network: _Network, params: PyTree, x: jax.Array, y: jax.Array) -> PyTree:
  def loss(params: PyTree) -> jax.Array:
    # Of what a teacher says it has the gradient of the Kullback-Leibler divergence.
    wanted = jax.nn.one_hot(y, network.num_classes) if y.ndim == 1 else y
    return jnp.sum(optax.losses.softmax_cross_entropy(network.apply(params, x)[0], wanted))

  return jax.grad(loss)(params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _update(params: PyTree, opt_state: PyTree, gradients: list[PyTree], batch_size: int) -> tuple[PyTree, PyTree]:
  mean = jax.tree.map(lambda *parts: sum(parts) / batch_size, *gradients)
  updates, opt_state = _OPTIMIZER.update(mean, opt_state, params)
  return optax.apply_updates(params, updates), opt_state
