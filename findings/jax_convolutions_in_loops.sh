#!/usr/bin/env bash
# jax 0.10.2 on a CPU.
# Guess: fifty gradient steps in one lax.scan take at most as long as fifty calls of the same step, compiled alone.
# Seen: with a convolution they take more than twenty times as long; with a dense layer no longer than the calls.
#   convolution: 50 calls 0.158 s, one scan 3.864 s; dense layer: 50 calls 0.018 s, one scan 0.014 s
# Why it matters: solvers and training loops that are one program, for multipliers of a stationarity condition for
# instance, seem never to end for convolutional networks. Call the compiled step from Python on a CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys
import time

import jax
import jax.numpy as jnp

STEPS = 50
convolution = lambda w: jax.lax.conv(jnp.ones((100, 16, 16, 16)), w, (1, 1), "SAME")
dense = lambda w: jnp.ones((100, 256)) @ w


def seconds(function, weights):
  """The least of three times of the calls, and of the scan."""
  step = lambda w: w - 0.01 * jax.grad(lambda w: jnp.mean(function(w) ** 2))(w)
  one = jax.jit(step)
  many = jax.jit(lambda w: jax.lax.scan(lambda w, _: (step(w), None), w, length=STEPS)[0])

  def calls(w):
    for _ in range(STEPS):
      w = one(w)
    return w

  times = []
  for run in (calls, many):
    jax.block_until_ready(run(weights))  # compiles
    runs = []
    for _ in range(3):
      begin = time.perf_counter()
      jax.block_until_ready(run(weights))
      runs.append(time.perf_counter() - begin)
    times.append(min(runs))
  return times


slow, fast = seconds(convolution, jnp.full((16, 16, 3, 3), 0.01)), seconds(dense, jnp.full((256, 256), 0.01))
for name, (calls, scan) in {"convolution": slow, "dense layer": fast}.items():
  print(f"{name}: {STEPS} calls {calls:.3f} s, one scan {scan:.3f} s")
if slow[1] < 4 * slow[0]:
  sys.exit("Changed: a scan over a convolution is less than four times as slow as the calls.")
if fast[1] > 3 * fast[0]:
  sys.exit("Changed: a scan over a dense layer is slow, too.")
EOF
