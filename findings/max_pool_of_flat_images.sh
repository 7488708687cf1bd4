#!/usr/bin/env bash
# jax 0.10.2, flax 0.12.8, keras 3.15.1, dm-haiku 0.0.17, equinox 0.13.8.
# Guess: a max-pooling layer has the derivative of jnp.max over its windows: equal pixels share it.
# Seen: jnp.max shares it. The pooling layers of all four give it whole to the first pixel of the window, top left.
#   a flat image of 4 x 4, windows of 2 x 2: gradient 1/4 everywhere by jnp.max, 1 at one pixel of four by pooling
#   flipped and flipped back: another gradient, of the same flat image
# Why it matters: backgrounds are flat, so most windows tie. The derivative by the pixels of a reconstruction is then a
# grid of points that push one pixel in four; a network with "the same" pooling written by reshape and max obeys other
# equations with the same outputs; and the gradients of a flipped sample are not those of the sample, flipped.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'flax==0.12.8' 'keras==3.15.1' 'dm-haiku==0.0.17' 'equinox==0.13.8' \
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

pools = {
  "flax": lambda image: nn.max_pool(image[None, :, :, None], (2, 2), (2, 2)),
  "keras": lambda image: keras.layers.MaxPooling2D(2)(image[None, :, :, None]),
  "haiku": lambda image: hk.max_pool(image[None, :, :, None], (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
  "equinox": lambda image: eqx.nn.MaxPool2d(2, 2)(image[None]),
  "jnp.max": lambda image: image.reshape(2, 2, 2, 2).max((1, 3)),
}
first = np.kron(np.ones((2, 2)), [[1, 0], [0, 0]])
last = np.kron(np.ones((2, 2)), [[0, 0], [0, 1]])
ramp = jnp.arange(16.0).reshape(4, 4)
for name, pool in pools.items():
  if not np.array_equal(jnp.ravel(pool(ramp)), [5, 7, 13, 15]):
    sys.exit("Changed: %s is another pooling." % name)
  gradient = jax.grad(lambda image: pool(image).sum())
  found, flipped = gradient(jnp.zeros((4, 4))), gradient(jnp.zeros((4, 4))[::-1, ::-1])[::-1, ::-1]
  print(name, found.tolist())
  expected = (np.full((4, 4), 0.25),) * 2 if name == "jnp.max" else (first, last)
  if not (np.array_equal(found, expected[0]) and np.array_equal(flipped, expected[1])):
    sys.exit("Changed: %s has another derivative at ties." % name)
EOF
