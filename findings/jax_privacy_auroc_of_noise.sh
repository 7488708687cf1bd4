#!/usr/bin/env bash
# jax-privacy 2.0.0, beside scikit-learn 1.9.1.
# Guess: CanaryScoreAuditor.attack_auroc is the usual area under the ROC curve: the share of pairs in the right order,
# one half on average for scores without information, 0 for scores in the reverse order.
# Seen: it is the area under the upper hull of that curve, which never lies below the diagonal.
#   500 draws of noise, 50 against 50: mean 0.576, least 0.500 (scikit-learn: 0.502 and 0.348)
#   scores in the reverse order: 0.5 (scikit-learn: 0.0);  [1, 4] against [2, 3]: 0.75 (scikit-learn: 0.5)
# tpr_at_given_fpr is read from the same hull, between the samples' own points. The docstrings do say that attacks may
# draw lots between two thresholds; what that does to a small sample is left to the reader.
# Why it matters: 0.58 with fifty canaries is what a model that leaks nothing gives. Compare with permuted labels, not
# with one half; a score whose sign is wrong does not show; and never set this number beside another library's area.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax-privacy==2.0.0' 'scikit-learn==1.9.1' 'jax==0.10.2' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from jax_privacy.auditing import CanaryScoreAuditor
from sklearn.metrics import roc_auc_score


def areas(members, others):
  labels = np.repeat([1, 0], [len(members), len(others)])
  return CanaryScoreAuditor(members, others).attack_auroc(), roc_auc_score(labels, np.concatenate([members, others]))


random = np.random.default_rng(0)
hull, usual = np.array([areas(random.normal(size=50), random.normal(size=50)) for _ in range(500)]).T
print("noise: mean %.3f, least %.3f (scikit-learn: %.3f, %.3f)" % (hull.mean(), hull.min(), usual.mean(), usual.min()))
reverse = areas(np.arange(100.0), np.arange(100.0) + 1000)
crossed = areas([1.0, 4.0], [2.0, 3.0])
print("reverse order:", *reverse, " [1, 4] against [2, 3]:", *crossed)
if not (hull.mean() > 0.56 and hull.min() >= 0.5 and abs(usual.mean() - 0.5) < 0.01):
  sys.exit("Changed: attack_auroc of noise is no longer one half at least and 0.576 on average.")
if reverse != (0.5, 0.0) or crossed != (0.75, 0.5):
  sys.exit("Changed: attack_auroc of reversed or crossed scores is no longer the area under the hull.")
EOF
