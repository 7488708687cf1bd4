#!/usr/bin/env bash
# flax 0.12.8, dm-haiku 0.0.17, jax 0.10.2, keras 3.15.1, equinox 0.13.8.
# Guess: normalisation takes the mean off, so that adding 1000 to all inputs changes its outputs by rounding, some 1e-4.
# Seen: Flax's BatchNorm and LayerNorm, Haiku's BatchNorm and jax.nn.standardize compute the variance as mean(x^2) -
# mean(x)^2, which cancels in float32. The others do not. Flax has use_fast_variance=False for it.
#   inputs of deviation 1 plus 1000, greatest error: Flax LayerNorm 1.9, BatchNorm of Flax and Haiku and
#   jax.nn.standardize 0.7; Keras, Equinox, Haiku's LayerNorm, Flax without fast variance: below 0.001
#   plus 10000: errors above 1000 or, in Haiku, which does not cut at 0, NaN
# Why it matters: pixels from 0 to 255 and features with a common offset are enough for errors in the third digit (plus
# 100: 0.006), larger than a residual worth reading, and derivatives are those of the noise. Centre the inputs; and a
# model moved to another framework is not the same function there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'flax==0.12.8' 'dm-haiku==0.0.17' 'keras==3.15.1' 'equinox==0.13.8' \
  'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np


def haiku(function):
  transformed = hk.transform_with_state(function)
  return lambda x: transformed.apply(*transformed.init(None, x), None, x)[0]


flax = lambda module: lambda x: module.init_with_output(jax.random.key(0), x)[0]
fast = {
  "flax LayerNorm": (1, flax(nn.LayerNorm(epsilon=1e-5))),
  "flax BatchNorm": (0, flax(nn.BatchNorm(use_running_average=False))),
  "haiku BatchNorm": (0, haiku(lambda x: hk.BatchNorm(False, False, 0.9)(x, is_training=True))),
  "jax.nn.standardize": (0, lambda x: jax.nn.standardize(x, axis=0)),
}
others = {
  "flax LayerNorm, not fast": (1, flax(nn.LayerNorm(epsilon=1e-5, use_fast_variance=False))),
  "flax BatchNorm, not fast": (0, flax(nn.BatchNorm(use_running_average=False, use_fast_variance=False))),
  "haiku LayerNorm": (1, haiku(lambda x: hk.LayerNorm(-1, False, False)(x))),
  "keras LayerNormalization": (1, keras.layers.LayerNormalization(epsilon=1e-5)),
  "keras BatchNormalization": (0, lambda x: keras.layers.BatchNormalization(epsilon=1e-5)(x, training=True)),
  "equinox LayerNorm": (1, jax.vmap(eqx.nn.LayerNorm(8))),
}
inputs = np.random.default_rng(0).normal(size=(64, 8))


def error(axis, norm, shift):
  """Greatest difference to the same in float64, of the inputs as they are in float32."""
  shifted = (inputs + shift).astype(np.float32)
  exact = shifted.astype(np.float64)
  exact = (exact - exact.mean(axis, keepdims=True)) / np.sqrt(exact.var(axis, keepdims=True) + 1e-5)
  return float(np.abs(np.asarray(norm(jnp.asarray(shifted))) - exact).max())


for name, (axis, norm) in (fast | others).items():
  errors = [error(axis, norm, shift) for shift in (0, 100, 1000, 10000)]
  print("%s: plus 0 %.1e, plus 100 %.1e, plus 1000 %.1e, plus 10000 %.1e" % (name, *errors))
  if errors[0] > 1e-4:
    sys.exit("Changed: %s has another epsilon." % name)
  if name in fast and (errors[2] < 0.05 or errors[3] < 10):  # or NaN
    sys.exit("Changed: %s cancels no more." % name)
  if name in others and errors[2] > 1e-3:
    sys.exit("Changed: %s cancels, too." % name)
EOF
