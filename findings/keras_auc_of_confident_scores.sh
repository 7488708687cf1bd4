#!/usr/bin/env bash
# keras 3.15.1 on JAX, beside scikit-learn 1.9.1.
# Guess: keras.metrics.AUC of scores in perfect order is 1, as anywhere.
# Seen: it is 0.5. The curve is read at 200 thresholds, evenly spaced from 0 to 1, and here all scores lie between the
# last two. With from_logits=True the same happens to logits, since a sigmoid comes first.
#   members' confidences 1 - 1e-5 and above, others' 1 - 1e-3 to 1 - 1e-4: Keras 0.5, scikit-learn 1.0
# Why it matters: the confidences of a network that was trained to fit its data are of this kind, and they are what
# attacks on membership compare. The metric says "no leak" of a classifier that gives every member away.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' \
  'scikit-learn==1.9.1'
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import keras
import numpy as np
from sklearn.metrics import roc_auc_score

labels = np.repeat([1, 0], 50)
scores = 1 - np.concatenate([np.geomspace(1e-6, 1e-5, 50), np.geomspace(1e-4, 1e-3, 50)])
usual = roc_auc_score(labels, scores)
area = float(keras.metrics.AUC()(labels, scores))
area_of_logits = float(keras.metrics.AUC(from_logits=True)(labels, np.log(scores) - np.log1p(-scores)))
print("Keras", area, "from logits", area_of_logits, "scikit-learn", usual)
if usual != 1:
  sys.exit("Changed: scikit-learn no longer finds these scores perfectly ordered.")
if abs(area - 0.5) > 1e-6 or abs(area_of_logits - 0.5) > 1e-6:
  sys.exit("Changed: keras.metrics.AUC of perfectly ordered confident scores is no longer one half.")
EOF
