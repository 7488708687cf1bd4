"""Tiny classifiers at their convergence point, and the drawings that they were trained on; trained once a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import kkt_jax
from kkt_jax import networks
from kkt_jax.kkt import pretrain

CLASSES, PIXELS, FLIPPED, WEIGHT_DECAY = 3, 64, 0.25, 0.01


def drawings(seed, per_class):
  """Drawings [M, 64], black and white, and their classes [M]: each class's own drawing, a quarter of it flipped."""
  own = np.random.default_rng(99).uniform(size=(CLASSES, PIXELS)) < 0.5
  y = np.repeat(np.arange(CLASSES), per_class)
  flipped = np.random.default_rng(seed).uniform(size=(y.size, PIXELS)) < FLIPPED
  return jnp.asarray(own[y] ^ flipped, jnp.float32), y


@functools.cache
def with_weight_decay(seed):
  """Parameters of a ReLU network of one hidden layer, and its nine training drawings."""
  x, y = drawings(seed, 3)
  module = networks.MLPClassifier(num_classes=CLASSES, hidden=(64,))
  apply_fn = lambda params, x: module.apply({"params": params}, x)
  start = jax.jit(module.init)(jax.random.key(seed), x)["params"]
  settings = {"num_steps": 4000, "learning_rate": 0.1, "weight_decay": WEIGHT_DECAY, "steps_per_call": 4000}
  return (
    module,
    pretrain.gradient_descent(apply_fn, start, x, y, pretrain.Descent.to_convergence(**settings)).params,
    x,
    y,
  )


@functools.cache
def flax_classifier(seed):
  """The classifier by its flax module."""
  module, params, *_ = with_weight_decay(seed)
  return kkt_jax.from_linen(module, {"params": params}, input_shape=(PIXELS,), weight_decay=WEIGHT_DECAY)


def tuples_of(params):
  """A list of (W, b) with W as PyTorch lays it out, [out, in]."""
  return [(params[name]["kernel"].T, params[name]["bias"]) for name in ("Dense_0", "Dense_1")]


def tuples_apply(layers, x):
  (w, b), (last, shift) = layers
  return jax.nn.relu(x @ w.T + b[None]) @ last.T + shift[None]


@functools.cache
def nameless_classifier(seed):
  """The same classifier as a plain function of a list of tuples."""
  params = tuples_of(with_weight_decay(seed)[1])
  return kkt_jax.make_classifier(tuples_apply, params, (PIXELS,), weight_decay=WEIGHT_DECAY)


@functools.cache
def with_batch_norm(seed, per_class=3):
  """Variables of a network with batch norm, trained without weight decay, and its training drawings."""
  x, y = drawings(seed, per_class)
  module = networks.MLPClassifier(num_classes=CLASSES, hidden=(64,), batch_norm=True, init_scale=0.05)
  variables = jax.jit(module.init)(jax.random.key(seed), x)
  start = variables["params"]
  start["BatchNorm_0"]["scale"] *= 0.05  # a small last normalisation, like small weights

  def train_fn(params, x):
    return module.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])

  settings = {"num_steps": 4000, "learning_rate": 0.1, "steps_per_call": 4000}
  params = pretrain.gradient_descent(
    lambda p, x: train_fn(p, x)[0], start, x, y, pretrain.Descent.to_convergence(**settings)
  ).params
  return module, {"params": params, **train_fn(params, x)[1]}, x, y


@functools.cache
def batch_norm_classifier(seed):
  module, variables, *_ = with_batch_norm(seed)
  return kkt_jax.from_linen(module, variables, input_shape=(PIXELS,))


@functools.cache
def examined(make, seed=0):
  """What the weights of one of these classifiers say."""
  return kkt_jax.examine(make(seed))
