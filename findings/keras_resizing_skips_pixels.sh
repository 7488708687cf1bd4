#!/usr/bin/env bash
# keras 3.15.1 on JAX, pillow 13.0.0, jax 0.10.2.
# Guess: keras.layers.Resizing and keras.utils.load_img(target_size=...) shrink a picture as Pillow's bilinear resize
# and jax.image.resize do: each pixel of the result is a mean over all it covers.
# Seen: by default neither averages. Of 224 x 224 pixels shrunk to 32 x 32, one in 49 is looked at; the others could be
# anything. load_img takes "nearest", Resizing "bilinear" between the next pixels only.
#   noise of deviation 74: after Keras 74, after Pillow or JAX 7
# Why it matters: a classifier trained so has never seen 98 % of the pixels of its pictures; no weight can tell them.
# Compare reconstructions with data that went the same way: to the same photograph shrunk by Pillow a perfect one is far
# away. Resizing has antialias=True.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'pillow==13.0.0' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
cd "$folder"
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import jax
import keras
import numpy as np
from PIL import Image

photograph = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
Image.fromarray(photograph).save("photograph.png")
real = photograph.astype(np.float32)
small = {
  "load_img": keras.utils.img_to_array(keras.utils.load_img("photograph.png", target_size=(32, 32))),
  "Resizing": np.asarray(keras.layers.Resizing(32, 32)(real)),
  "Resizing, antialias": np.asarray(keras.layers.Resizing(32, 32, antialias=True)(real)),
  "Pillow": np.asarray(Image.fromarray(photograph).resize((32, 32), Image.Resampling.BILINEAR)),
  "JAX": np.asarray(jax.image.resize(real, (32, 32, 3), "bilinear")),
}
spread = {name: float(image.std()) for name, image in small.items()}
seen = float((jax.grad(lambda image: keras.layers.Resizing(32, 32)(image).sum())(real) != 0).mean())
print(spread, "share of the pixels that Resizing sees: %.4f" % seen)
print("load_img against Resizing: greatest difference", np.abs(small["load_img"] - small["Resizing"]).max())
if min(spread["load_img"], spread["Resizing"]) < 70 or abs(seen - 1 / 49) > 1e-6:
  sys.exit("Changed: Keras looks at more than one pixel in 49 by default.")
if max(spread["Resizing, antialias"], spread["Pillow"], spread["JAX"]) > 10:
  sys.exit("Changed: Pillow, JAX or antialias does not average.")
EOF
