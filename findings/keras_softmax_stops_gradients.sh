#!/usr/bin/env bash
# keras 3.15.1 on JAX.
# Guess: a softmax layer before the default cross-entropy loses some digits, but its gradient in the logits is still p -
# y: about -1 at the true class of a sample that the network gets badly wrong.
# Seen: the probabilities are clipped at 1e-7 from 0 and 1, and beyond that the gradient is exactly 0, on both sides. A
# sample whose logits are wrong by more than 16.1 no longer trains the network at all; nor does one right by so much.
# With from_logits=True the gradient is that of theory.
#   true logit 15 below the other: -1;  17 below: 0 (loss 16.118);  from logits: -1
# Why it matters: equations that write the weights as a sum of p - y times gradients, with one multiplier per sample, do
# not hold for such a training: multipliers of the worst samples are 0. Ask how the loss was given before trusting them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import keras


def loss(logits, from_logits):
  outputs = logits if from_logits else keras.ops.softmax(logits)
  return keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)(jnp.array([0]), outputs)


def slopes(excess):
  logits = jnp.array([[0.0, excess]])
  return [float(jax.grad(loss)(logits, from_logits)[0, 0]) for from_logits in (False, True)]


found = {excess: slopes(excess) for excess in (-17.0, 15.0, 17.0, 40.0)}
for excess, (clipped, theory) in found.items():
  print("excess of the wrong logit", excess, "gradient after softmax", clipped, "from logits", theory)
if abs(found[15.0][0] + 1) > 1e-3 or any(abs(found[excess][1] + 1) > 1e-3 for excess in (15.0, 17.0, 40.0)):
  sys.exit("Changed: where nothing is clipped, the gradient is no longer p - y.")
if any(found[excess][0] != 0 for excess in (-17.0, 17.0, 40.0)):
  sys.exit("Changed: the gradient of a clipped probability is no longer exactly 0.")
EOF
