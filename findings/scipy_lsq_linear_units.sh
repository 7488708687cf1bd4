#!/usr/bin/env bash
# scipy 1.17.1.
# Guess: a least-squares problem with bounds has one solution, whatever the unit of A and b, and lsq_linear, "success",
# has found it.
# Seen: the default method compares the optimality with tol as an absolute number, and it goes with the square of the
# unit. In a unit of 1e-6 it stops after one step and returns the unconstrained solution with the signs of negative
# entries turned: plausible positive numbers, success=True. nnls, and method="bvls", return the solution.
#   nnls 1.390 0 1.644 0 3.083;  lsq_linear 1.390 0 1.644 0 3.083;  in a unit of 1e-6: 1 1 2 0.5 3, success
# Why it matters: multipliers of training samples are a non-negative least-squares solution over gradients, which are
# small numbers near convergence. Samples that take no part come back with weight, and the status says that all is well.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'scipy==1.17.1' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'EOF'
import sys

import numpy as np
from scipy.optimize import lsq_linear, nnls

random = np.random.default_rng(0)
gradients = random.normal(size=(20, 5))
weights = gradients @ np.array([1, -1, 2, -0.5, 3])
right, _ = nnls(gradients, weights)
found = {unit: lsq_linear(gradients * unit, weights * unit, bounds=(0, np.inf)) for unit in (1, 1e-6)}
print("nnls", right.round(3))
for unit, result in found.items():
  print("lsq_linear, unit", unit, result.x.round(3), "success", result.success)
others = [nnls(gradients * 1e-6, weights * 1e-6)[0]]
others.append(lsq_linear(gradients * 1e-6, weights * 1e-6, bounds=(0, np.inf), method="bvls").x)
if not np.allclose([found[1].x, *others], right, atol=1e-6):
  sys.exit("Changed: nnls, bvls, or lsq_linear in a unit of 1, no longer solves the problem.")
if not (found[1e-6].success and np.abs(found[1e-6].x - right).max() > 0.3):
  sys.exit("Changed: lsq_linear no longer calls a wrong solution of a small problem a success.")
EOF
