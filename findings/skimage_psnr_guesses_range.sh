#!/usr/bin/env bash
# scikit-image 0.26.0.
# Guess: peak_signal_noise_ratio without data_range refuses floating point, as structural_similarity beside it does, or
# takes one fixed range; it depends on the difference of the images only, and not on which comes first.
# Seen: the range is 1 if the first image has no value below 0, else 2. One pixel of -0.001 adds 6.02 dB.
#   images in [0, 1] 20.7 dB; both minus 0.5: 26.7 dB; true and test exchanged, one of them with such a pixel: 6.02 dB
# Why it matters: reconstructions stray a little below 0, and centred images are common. A reconstruction looks better
# by a factor of two in error without a change. Always pass data_range, and clip first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'scikit-image==0.26.0' 'numpy==2.4.6' 'scipy==1.17.1'
"$folder/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

random = np.random.default_rng(0)
image = random.uniform(size=(28, 28))
other = np.clip(image + 0.1 * random.normal(size=image.shape), 0, 1)
strayed = other.copy()
strayed[0, 0] = -0.001
twice = 20 * np.log10(2)
plain = peak_signal_noise_ratio(image, other)
centred = peak_signal_noise_ratio(image - 0.5, other - 0.5)
exchanged = peak_signal_noise_ratio(strayed, image) - peak_signal_noise_ratio(image, strayed)
print("in [0, 1] %.2f dB, centred %.2f dB, exchanged %+.2f dB" % (plain, centred, exchanged))
if abs(plain - peak_signal_noise_ratio(image, other, data_range=1)) > 1e-9:
  sys.exit("Changed: of images in [0, 1] the range is not 1.")
if abs(centred - plain - twice) > 1e-6 or abs(exchanged - twice) > 1e-6:
  sys.exit("Changed: a value below 0 does not double the range.")
try:
  structural_similarity(image, other)
except ValueError as error:
  print("structural_similarity:", str(error).splitlines()[0][:90])
else:
  sys.exit("Changed: structural_similarity guesses a range, too.")
EOF
