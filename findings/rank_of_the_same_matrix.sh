#!/usr/bin/env bash
# numpy 2.4.6, scipy 1.17.1, jax 0.10.2.
# Guess: libraries that choose the smallest singular value to count agree that a product of [400, 5] and [5, 300] has
# rank 5, in either precision, and their least-squares solutions and pseudo-inverses of it are of moderate size.
# Seen: scipy.linalg.lstsq cuts at the machine precision, without a factor for the size of the matrix, and counts
# rounding errors. numpy's lstsq and pinv cut a float32 matrix at the precision of float64; numpy's own matrix_rank does
# not.
#   float64: numpy lstsq 5, matrix_rank 5, jax 5, scipy lstsq 23, whose solution has norm 3e13 instead of 0.005
#   float32: numpy lstsq 300, matrix_rank 5, jax 5;  norm of the pseudo-inverse: numpy 5e7, scipy 0.007
# Why it matters: weights are float32, and span, rank and minimum-norm solutions are how one reads from them in how many
# dimensions the data lie. Always pass rcond (cond), from the precision of the data and the larger side.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'numpy==2.4.6' 'scipy==1.17.1' 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import jax.numpy as jnp
import numpy as np
import scipy.linalg

random = np.random.default_rng(0)
product = random.normal(size=(400, 5)) @ random.normal(size=(5, 300))
target = random.normal(size=400)
single = product.astype(np.float32)

by_numpy, by_scipy = np.linalg.lstsq(product, target), scipy.linalg.lstsq(product, target)
norms = np.linalg.norm(by_numpy[0]), np.linalg.norm(by_scipy[0])
print("float64: numpy", by_numpy[2], np.linalg.matrix_rank(product), "scipy", by_scipy[2], "norms %.1g %.1g" % norms)
rank_of_single = np.linalg.lstsq(single, target.astype(np.float32))[2]
steady = np.linalg.matrix_rank(single), int(jnp.linalg.lstsq(single, target.astype(np.float32))[2])
inverses = np.linalg.norm(np.linalg.pinv(single)), np.linalg.norm(scipy.linalg.pinv(single))
print("float32: numpy", rank_of_single, "matrix_rank, jax", *steady, "pinv: norms %.1g %.1g" % inverses)
if by_numpy[2] != 5 or np.linalg.matrix_rank(product) != 5 or steady != (5, 5):
  sys.exit("Changed: numpy (float64), matrix_rank or jax no longer finds rank 5.")
if not (by_scipy[2] > 5 and norms[1] > 1e6 * norms[0]):
  sys.exit("Changed: scipy.linalg.lstsq no longer counts rounding errors as rank.")
if not (rank_of_single == 300 and inverses[0] > 1e6 * inverses[1]):
  sys.exit("Changed: numpy's lstsq or pinv no longer cuts float32 matrices at the precision of float64.")
EOF
