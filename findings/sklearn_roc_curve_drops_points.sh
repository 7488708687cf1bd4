#!/usr/bin/env bash
# scikit-learn 1.9.1.
# Guess: roc_curve leaves out, by default, thresholds that nobody would choose ("suboptimal"), so that the true positive
# rate at a false positive rate, read as that of the last point not beyond it, is the same.
# Seen: it leaves out every point on the straight line between its neighbours. Where scores tie, as rounded ones and
# votes do, those are thresholds that one would choose.
#   a member and a stranger at each of four scores: the points 1/2 and 3/4 are gone, and the rate at 0.6 reads 0.25, not
#   0.5
#   50 members, 50 others, scores rounded to one digit, 200 draws: at 0.02, 0.05 or 0.1 up to 0.04 is lost, in
#   26 of 600 readings; nothing is gained
# Why it matters: members are counted at low false positive rates, and an attack looks weaker than it is. Pass
# drop_intermediate=False whenever single points are read and not the area.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'scikit-learn==1.9.1' 'numpy==2.4.6' 'scipy==1.17.1'
"$folder/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from sklearn.metrics import roc_curve


def found(members, scores, at):
  """True positive rate at a false positive rate: by default, with every point, and counted at every threshold."""
  rates = []
  for settings in ({}, {"drop_intermediate": False}):
    false, true, _ = roc_curve(members, scores, **settings)
    rates.append(true[false <= at].max())
  above = scores >= np.append(np.unique(scores), np.inf)[:, None]
  allowed = above[:, members == 0].mean(1) <= at
  return *rates, above[:, members == 1].mean(1)[allowed].max()


small = found(np.array([1, 0] * 4), np.repeat([4.0, 3.0, 2.0, 1.0], 2), 0.6)
print("four ties, rate at 0.6: by default %.2f, every point %.2f, counted %.2f" % small)
if small != (0.25, 0.5, 0.5):
  sys.exit("Changed: the points between are there by default, or the others are gone.")

members = np.repeat([1, 0], 50)
random = np.random.default_rng(0)
draws = [np.round(random.normal(size=100) + 0.5 * members, 1) for _ in range(200)]
rates = np.array([found(members, scores, at) for scores in draws for at in (0.02, 0.05, 0.1)])
lost = rates[:, 2] - rates[:, 0]
print("rounded scores: lost at most %.2f, in %d of %d readings" % (lost.max(), (lost > 0).sum(), len(lost)))
if np.abs(rates[:, 1] - rates[:, 2]).max() > 1e-12 or lost.min() < -1e-12:
  sys.exit("Changed: with every point, or by default, the rate is above what can be counted.")
if lost.max() < 0.03:
  sys.exit("Changed: next to nothing is lost.")
EOF
