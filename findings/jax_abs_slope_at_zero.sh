#!/usr/bin/env bash
# jax 0.10.2, with keras 3.15.1 and optax 0.2.8.
# Guess: the derivative of abs at 0 is 0, as that of jax.nn.relu is, as jnp.sign(0) says and as PyTorch has it.
# Seen: jax.grad gives 1, at 0 and at -0.
#   abs 1, relu 0, maximum(x, 0) 0.5, clip(x, 0, 1) 0.5, keras L1 regulariser 1, optax.huber_loss 0
#   total variation of six equal pixels: gradient -1 0 0 0 0 1
#   mean absolute error of a perfect fit: gradient of size 1 / n
# Why it matters: much of an image is flat, many weights are exactly 0, and values that are right have error 0. An L1 or
# total-variation prior built on abs is at its minimum there and still pushes: the two ends of a flat row apart, weights
# of 0 to one side. x * jnp.sign(x) is the same function with slope 0 there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 'keras==3.15.1' 'optax==0.2.8'
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax


def slope(function, at=0.0):
  return float(jax.grad(lambda x: jnp.sum(function(x)))(at))


found = {
  "abs": slope(jnp.abs),
  "abs at -0": slope(jnp.abs, -0.0),
  "keras L1": slope(lambda x: keras.regularizers.L1(1.0)(x)),
  "relu": slope(jax.nn.relu),
  "maximum": slope(lambda x: jnp.maximum(x, 0)),
  "clip": slope(lambda x: jnp.clip(x, 0, 1)),
  "huber": slope(optax.huber_loss),
  "x * sign(x)": slope(lambda x: x * jnp.sign(x)),
}
variation = np.asarray(jax.grad(lambda x: jnp.abs(jnp.diff(x)).sum())(jnp.zeros(6)))
fit = np.asarray(jax.grad(lambda x: jnp.abs(x - 0.5).mean())(jnp.full(4, 0.5)))
print(found, "total variation", variation, "perfect fit", fit)
if list(found.values()) != [1, 1, 1, 0, 0.5, 0.5, 0, 0]:
  sys.exit("Changed: the derivatives at 0 are others: " + str(found))
if not (np.array_equal(variation, [-1, 0, 0, 0, 0, 1]) and np.array_equal(fit, np.full(4, 0.25))):
  sys.exit("Changed: total variation of equal pixels, or the error of a perfect fit, has another gradient.")
EOF
