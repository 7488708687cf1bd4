#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6.
# Guess: save_file keeps the values of a transposed array, or refuses it, as PyTorch's save_file does.
# Seen: it writes the numbers in the order in which they lie in memory under the shape of the transposed array, without
# a word. np.ascontiguousarray before saving is enough, and JAX arrays are stored rightly.
#   [[0, 1, 2], [3, 4, 5]].T comes back as [[0, 1], [2, 3], [4, 5]]
# Why it matters: .T is how a PyTorch kernel becomes a flax kernel. A square layer comes back transposed from what it
# was to be, any other with its weights shuffled; shapes, names, mean and norm all agree, and an audit of such a file
# finds nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'safetensors==0.8.0' 'numpy==2.4.6' 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy

kernel = np.arange(6, dtype=np.float32).reshape(2, 3).T
stored = safetensors.numpy.load(safetensors.numpy.save({"kernel": kernel}))["kernel"]
contiguous = safetensors.numpy.load(safetensors.numpy.save({"kernel": np.ascontiguousarray(kernel)}))["kernel"]
by_jax = safetensors.numpy.load(safetensors.flax.save({"kernel": jnp.asarray(kernel)}))["kernel"]
print(kernel.tolist(), "comes back as", stored.tolist())
if not (np.array_equal(contiguous, kernel) and np.array_equal(by_jax, kernel)):
  sys.exit("Changed: contiguous NumPy arrays or JAX arrays do not come back as they were.")
if stored.shape != (3, 2) or not np.array_equal(stored.ravel(), np.arange(6)):
  sys.exit("Changed: a transposed array no longer comes back in its order in memory.")
EOF
