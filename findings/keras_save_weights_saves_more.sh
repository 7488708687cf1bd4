#!/usr/bin/env bash
# keras 3.15.1 on JAX.
# Guess: model.save_weights, and ModelCheckpoint(save_weights_only=True), write the weights; the state of the optimiser
# is what model.save adds.
# Seen: of a compiled model the file holds the whole state of the optimiser, too: step count, learning rate, and the
# running means of the gradients. An uncompiled model loads it without notice.
#   Adam, Dense(3) of 16 pixels, one more step on one sample: means of the gradient by kernel over those by bias are its
#   pixels, to 1e-6
# Why it matters: whoever is handed "the weights" for an audit holds the last gradients, and an audit of model.weights
# alone says too little about that file. Look into the file (h5py) for optimizer/vars; to hand out weights only, save a
# copy that was never compiled.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'h5py==3.16.0' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
cd "$folder"
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W error::UserWarning - <<'EOF'
import sys

import h5py
import keras
import numpy as np


def model():
  return keras.Sequential([keras.Input((16,)), keras.layers.Dense(3)])


def optimiser(path):
  with h5py.File(path) as file:
    saved = file.get("optimizer/vars", {})
    return [np.asarray(saved[str(number)]) for number in range(len(saved))]


sample = np.random.default_rng(0).uniform(size=(1, 16)).astype(np.float32)
trained = model()
trained.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
checkpoint = keras.callbacks.ModelCheckpoint("checkpoint.weights.h5", save_weights_only=True)
trained.fit(sample, np.array([1]), epochs=1, verbose=0, callbacks=[checkpoint])
trained.save_weights("trained.weights.h5")
copy = model()
copy.load_weights("trained.weights.h5")
copy.save_weights("copy.weights.h5")
for path in ("trained.weights.h5", "checkpoint.weights.h5"):
  state = optimiser(path)
  kernel = next((value for value in state if value.shape == (16, 3)), None)
  bias = next((value for value in state if value.shape == (3,)), None)
  if kernel is None or bias is None:
    sys.exit("Changed: %s holds no gradients; of the optimiser only %s." % (path, [value.shape for value in state]))
  error = np.abs(kernel[:, 1] / bias[1] - sample[0]).max()
  print(path, [value.shape for value in state], "error of the pixels", error)
  if error > 1e-5:
    sys.exit("Changed: the first state of the optimiser is not a mean of gradients.")
print("of a copy that was not compiled:", optimiser("copy.weights.h5"))
if optimiser("copy.weights.h5") or not np.array_equal(copy.get_weights()[0], trained.get_weights()[0]):
  sys.exit("Changed: the copy holds a state of the optimiser, or other weights.")
EOF
