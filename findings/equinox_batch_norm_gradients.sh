#!/usr/bin/env bash
# equinox 0.13.8, beside flax 0.12.8.
# Guess: behind a bias, BatchNorm in training takes the mean of the batch off, so the bias has gradient 0, and the
# weights before it have a gradient at right angles to them, since their scale does not matter.
# Seen: so it is in Flax and in the mode "batch". In "ema", the default, training normalises by the running averages, of
# which the batch is one part in a hundred; the other 99 are constants to the derivative. The outputs do not show it;
# the warning of the default speaks of performance.
#   gradient by a bias, as a share of that without normalisation: "ema" 0.99, "batch" 0.00, Flax 0.00
#   cosine of gradient and weight, one channel: "ema" 0.85, "batch" and Flax 0.0
# Why it matters: at the end of training other equations hold. Batch norm written as "minus the mean of the batch, over
# its deviation" and differentiated so gives residuals that no multipliers can fulfil, though all outputs agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'equinox==0.13.8' 'flax==0.12.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

random = np.random.default_rng(0)
inputs = random.normal(size=(64, 5)).astype(np.float32)
weight, bias = random.normal(size=5).astype(np.float32), np.float32(0.3)
toward = inputs @ weight + inputs[:, 0] + 1  # the loss is the outputs times these


def equinox(mode):
  norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
    1, axis_name="batch", mode=mode, momentum=0.99, channelwise_affine=False
  )
  call = jax.jit(jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None)))
  for _ in range(1000):  # until the averages have arrived at the batch
    _, state = call((inputs @ weight + bias)[:, None], state)
  return lambda hidden: call(hidden[:, None], state)[0][:, 0]


flax = lambda hidden: nn.BatchNorm(use_running_average=False).init_with_output(jax.random.key(0), hidden[:, None])[0]
norms = {"ema": equinox("ema"), "batch": equinox("batch"), "flax": lambda hidden: flax(hidden)[:, 0]}
outputs, found = {}, {}
for name, norm in norms.items():
  outputs[name] = norm(inputs @ weight + bias)
  by_weight, by_bias = jax.grad(lambda w, b: jnp.sum(norm(inputs @ w + b) * toward), (0, 1))(weight, bias)
  share = float(by_bias / (toward.sum() / (inputs @ weight).std()))
  cosine = float(by_weight @ weight / jnp.linalg.norm(by_weight) / jnp.linalg.norm(weight))
  found[name] = share, cosine
  print("%s: share of the bias %.3f, cosine of gradient and weight %.3f" % (name, share, cosine))
if max(np.abs(outputs["ema"] - outputs[name]).max() for name in ("batch", "flax")) > 1e-3:
  sys.exit("Changed: the outputs in training differ.")
if abs(found["ema"][0] - 0.99) > 2e-3 or found["ema"][1] < 0.5:
  sys.exit("Changed: in the mode ema the derivative sees more of the batch.")
if max(abs(number) for name in ("batch", "flax") for number in found[name]) > 1e-3:
  sys.exit("Changed: in the mode batch, or in Flax, the derivative does not see the whole batch.")
if eqx.nn.BatchNorm(1, axis_name="batch").mode != "ema":
  sys.exit("Changed: ema is not the default.")
EOF
