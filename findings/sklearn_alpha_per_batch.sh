#!/usr/bin/env bash
# scikit-learn 1.9.1.
# Guess: MLPClassifier minimises the mean loss plus alpha / 2 * |W|^2, so at the end the mean gradient is -alpha * W.
# One leftover sample in the last batch of an epoch changes nothing to speak of.
# Seen: each batch of b samples decays the weights by alpha / b, so the decay at the end is alpha / b, alpha / n with
# lbfgs. 41 samples in batches of 40 make batches of 40 and of 1, and the latter decays by alpha whole: the decay at the
# end is about alpha * (1 / 40 + 1) / 2, twenty times what 40 samples give.
#   alpha 1, decay at the end: lbfgs, 40 samples 0.025; SGD, batches of 40: 0.025, of 8: 0.125; 41 samples in 40s: 0.55
# Why it matters: decay is the coefficient of a stationarity equation. Batch size and number of samples are needed
# beside alpha, and the remainder of their division counts most.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'scikit-learn==1.9.1' 'numpy==2.4.6' 'scipy==1.17.1'
"$folder/venv/bin/python" - <<'EOF'
import sys
import warnings

import numpy as np
from sklearn.neural_network import MLPClassifier


def decay(n, batch_size=None):
  random = np.random.default_rng(0)
  x = random.normal(size=(n, 3))
  y = (x[:, 0] + random.normal(size=n) > 0).astype(int)
  how = {"solver": "lbfgs"}
  if batch_size:
    how = {"solver": "sgd", "batch_size": batch_size, "learning_rate_init": 0.02, "momentum": 0}
  # Without hidden layers it is logistic regression.
  classifier = MLPClassifier((), alpha=1.0, max_iter=4000, n_iter_no_change=4000, tol=1e-9, random_state=0, **how)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGD is stopped by the number of epochs
    classifier.fit(x, y)
  weights = classifier.coefs_[0][:, 0]
  mean_gradient = x.T @ (classifier.predict_proba(x)[:, 1] - y) / n
  return -mean_gradient @ weights / (weights @ weights)


right = {(40,): 1 / 40, (40, 40): 1 / 40, (40, 8): 1 / 8, (41, 40): (1 / 40 + 1) / 2}
for case, expected in right.items():
  found = decay(*case)
  print("samples and batch size", case, "decay %.4f, expected %.4f" % (found, expected))
  if abs(found / expected - 1) > 0.2:
    sys.exit("Changed: the decay of MLPClassifier is no longer alpha divided by the size of each batch.")
EOF
