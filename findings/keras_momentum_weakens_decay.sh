#!/usr/bin/env bash
# keras 3.15.1 on JAX, beside optax 0.2.8.
# Guess: SGD(momentum=m, weight_decay=w) ends where gradient + w * weights = 0, as gradient descent on the loss plus w /
# 2 * |weights|^2 does, and as PyTorch's SGD with arguments of the same names does.
# Seen: the decay is applied to the weights and not through the momentum, which multiplies the gradient by 1 / (1 - m).
# It ends where gradient + (1 - m) * w * weights = 0.
#   w = 0.5: decay at the end 0.05 with momentum 0.9, 0.5 without; optax, decay before momentum: 0.5
# Why it matters: a reconstruction that uses the named weight decay as the coefficient of stationarity is wrong by a
# factor of ten for the most common momentum, and no check of shapes or names can tell.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 'optax==0.2.8'
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import jax.numpy as jnp
import keras
import optax

DECAY, RATE, TARGET = 0.5, 0.01, 2.0  # the loss is (weight - 2)^2 / 2


def keras_decay(momentum):
  optimizer = keras.optimizers.SGD(RATE, momentum=momentum, weight_decay=DECAY)
  weight = keras.Variable(1.0)
  for _ in range(4000):
    optimizer.apply([weight - TARGET], [weight])
  return (TARGET - float(weight)) / float(weight)


def optax_decay(momentum):
  optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=momentum))
  weight = jnp.array(1.0)
  state = optimizer.init(weight)
  for _ in range(4000):
    update, state = optimizer.update(weight - TARGET, state, weight)
    weight += update
  return float((TARGET - weight) / weight)


found = keras_decay(0.9), keras_decay(0.0), optax_decay(0.9)
print("Keras, momentum 0.9: %.4f, 0: %.4f; optax, momentum 0.9: %.4f" % found)
if any(abs(decay - right) > 1e-3 for decay, right in zip(found, (0.05, 0.5, 0.5))):
  sys.exit("Changed: the decay at the end of Keras' SGD is no longer (1 - momentum) * weight_decay.")
EOF
