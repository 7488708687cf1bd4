#!/usr/bin/env bash
# equinox 0.13.8.
# Guess: BatchNorm in its mode "batch" corrects its running averages for where they started, so that after one step on a
# batch inference on that batch does what training did: the outputs have standard deviation 1.
# Seen: the running variance starts at 1 and is corrected as if it had started at 0. After t steps inference divides by
# the root of variance + m^t / (1 - m^t), with momentum m = 0.99: 99 too much after one step.
#   inputs of standard deviation 0.2, the same batch in every step; standard deviation of the outputs at inference
#   after 1 step 0.020, after 10 0.065, after 100 0.255, after 500 0.925; in training always 1.000
# Why it matters: a classifier of few steps, or fine-tuned from a fresh state, is another one at inference than in
# training, and worst where variances are small. Take batch statistics, or see to some 1000 steps; do not read the
# stored variance as one of the training data.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'equinox==0.13.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import equinox as eqx
import jax
import numpy as np

VARIANCE, MOMENTUM = 0.04, 0.99
batch = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
batch = (batch - batch.mean(0)) / batch.std(0) * np.sqrt(VARIANCE)


def spreads(steps):
  """Standard deviation of the outputs in the last step of training, and at inference after it."""
  norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
    4, axis_name="batch", mode="batch", momentum=MOMENTUM, channelwise_affine=False
  )
  call = lambda norm: jax.jit(jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None)))
  train, infer = call(norm), call(eqx.nn.inference_mode(norm))
  for _ in range(steps):
    trained, state = train(batch, state)
  return float(trained.std()), float(infer(batch, state)[0].std())


for steps in (1, 10, 100, 500):
  trained, inferred = spreads(steps)
  left = MOMENTUM**steps
  expected = np.sqrt(VARIANCE / (VARIANCE + left / (1 - left)))
  print("after %d steps: %.3f in training, %.3f at inference" % (steps, trained, inferred))
  if abs(trained - 1) > 1e-3 or abs(inferred - expected) > 2e-3:
    sys.exit("Changed: inference divides by the root of another variance; expected outputs of %.3f." % expected)
EOF
