#!/usr/bin/env bash
# keras 3.15.1 on JAX, jax 0.10.2, flax 0.12.8.
# Guess: within Keras, activation="leaky_relu" is layers.LeakyReLU() and ops.gelu is activations.gelu, all with their
# defaults; and jax.nn has the same functions under the same names.
# Seen: neither. Slope of leaky_relu below 0, and gelu(-1):
#   layers.LeakyReLU() 0.3; activation="leaky_relu" and ops.leaky_relu 0.2; jax.nn and Flax 0.01
#   activation="gelu" -0.158655, exact; ops.gelu, jax.nn.gelu and Flax -0.158808, by tanh
# Why it matters: weights are often rebuilt into a network from a description. Shapes fit, and the gradients at the
# samples are wrong: by a factor of up to 30 per layer, or in the fourth digit, which is where a residual of
# stationarity is read. Compare logits to 1e-6, not accuracies.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'flax==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras

at = jnp.array([-1.0])
functions = {
  "layers.LeakyReLU()": keras.layers.LeakyReLU(),
  'activation="leaky_relu"': keras.layers.Activation("leaky_relu"),
  "ops.leaky_relu": keras.ops.leaky_relu,
  "jax leaky_relu": jax.nn.leaky_relu,
  "flax leaky_relu": nn.leaky_relu,
  'activation="gelu"': keras.layers.Activation("gelu"),
  "ops.gelu": keras.ops.gelu,
  "jax gelu": jax.nn.gelu,
  "flax gelu": nn.gelu,
}
found = {name: float(function(at)[0]) for name, function in functions.items()}
print("at -1:", found)
exact, tanh = -0.158655, -0.158808
for (name, value), expected in zip(
  found.items(), (-0.3, -0.2, -0.2, -0.01, -0.01, exact, tanh, tanh, tanh), strict=True
):
  if abs(value - expected) > 2e-6:
    sys.exit("Changed: %s at -1 is %s, not %s." % (name, value, expected))
EOF
