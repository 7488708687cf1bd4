#!/usr/bin/env bash
# keras 3.15.1 on JAX.
# Guess: Flatten of [N, C, H, W] only reshapes, whatever data_format says, as flattening does in PyTorch and NumPy.
# Seen: with data_format="channels_first" it moves the channels last before it reshapes. The result has the right shape
# and the order of a channels-last network.
#   [1, 3, 2, 2] of 0 ... 11 becomes 0 4 8 1 5 9 2 6 10 3 7 11
# Why it matters: weights of a dense layer after it fit no plain reshape of the same image, and every shape agrees. A
# classifier that is rewritten for an audit from such a network sees permuted pixels, and "no evidence of training data"
# is what a wrong order of pixels looks like.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import keras
import numpy as np

images = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
flat = np.asarray(keras.layers.Flatten(data_format="channels_first")(images))
print(*flat[0].astype(int))
if np.array_equal(flat, images.reshape(1, -1)):
  sys.exit("Changed: Flatten of channels-first images only reshapes.")
if not np.array_equal(flat, images.transpose(0, 2, 3, 1).reshape(1, -1)):
  sys.exit("Changed: Flatten of channels-first images has neither the channels-first nor the channels-last order.")
EOF
