#!/usr/bin/env bash
# jax 0.10.2.
# Guess: jax.random.key(seed) uses all of a Python integer up to 64 bits, as threefry's key has 64, or refuses it; and
# the key of a seed does not depend on the precision of floating point.
# Seen: without jax_enable_x64, the default, only the lower 32 bits count, and nothing is said. With it all 64 do, and
# negative seeds, too, become other keys.
#   key(1) == key(2**32 + 1) == key(7 * 2**32 + 1): True; with x64: False
#   key(-1): other numbers with x64 than without
# Why it matters: seeds drawn from 64 bits, from a hash or a clock, meet again after some 80 000 draws instead of 5e9,
# and two "independent" classifiers or permutations are one. A run repeated with x64, to rule out rounding, has another
# start where its seed is negative or large. Take seeds from 0 to 2**32 - 1, or give all 64 bits to
# jax.random.wrap_key_data.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W error - <<'EOF'
import sys

import jax
import numpy as np


def keys(seeds):
  return [tuple(np.asarray(jax.random.key_data(jax.random.key(seed))).tolist()) for seed in seeds]


seeds = (1, 2**32 + 1, 7 * 2**32 + 1, -1, 2**32 - 1)
short = keys(seeds)
with jax.enable_x64(True):
  long = keys(seeds)
print("without x64:", short)
print("with x64:   ", long)
if not (short[0] == short[1] == short[2] and short[3] == short[4]):
  sys.exit("Changed: without x64 more than the lower 32 bits count.")
if len(set(long)) != 5:
  sys.exit("Changed: with x64 not all 64 bits count.")
if not (short[0] == long[0] and short[4] == long[4]):
  sys.exit("Changed: seeds from 0 to 2**32 - 1 have other keys with x64.")
if short[3] == long[3]:
  sys.exit("Changed: key(-1) is the same with x64.")
EOF
