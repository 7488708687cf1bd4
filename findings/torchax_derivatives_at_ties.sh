#!/usr/bin/env bash
# torchax 0.0.14.dev20261026 with torch 2.13.0 and jax 0.10.2.
# Guess: a bridge that gives PyTorch's outputs to rounding gives its derivatives, too; at kinks perhaps another one of those
# to the left and to the right.
# Seen: at the points where a formula switches it is JAX's derivative of torchax's formula, and that may be none of both.
#   logsigmoid at 0, where it is smooth: 1 instead of 0.5
#   hardswish at -3, where it becomes flat: -0.25 instead of 0; relu6 at 0: 0.5, though relu has 0 there in both
#   leaky_relu at 0: 1 instead of 0.01; std of equal values: NaN instead of 0
# Why it matters: units whose inputs and bias are 0 sit at 0 exactly, as those of black pixels do, so this is no set of
# measure zero. A check of outputs and of gradients at random inputs does not see it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --extra-index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0' \
  'torchax==0.0.14.dev20261026' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchax

F = torch.nn.functional


class Function(torch.nn.Module):
  def __init__(self, function):
    super().__init__()
    self.function = function

  def forward(self, x):
    return self.function(x)


cases = {  # function, point, derivative in PyTorch, through torchax
  "relu": (F.relu, 0.0, 0.0, 0.0),
  "logsigmoid": (F.logsigmoid, 0.0, 0.5, 1.0),
  "hardswish": (F.hardswish, -3.0, 0.0, -0.25),
  "relu6": (F.relu6, 0.0, 0.0, 0.5),
  "leaky_relu": (F.leaky_relu, 0.0, 0.01, 1.0),
  "std": (torch.std, 1.0, 0.0, np.nan),
}
for name, (function, point, theirs, bridged) in cases.items():
  x = torch.full((2,), point, requires_grad=True)
  function(x).sum().backward()
  states, own = torchax.extract_jax(Function(function))
  value = lambda x: own(states, (x,)).sum()
  found = x.grad[0].item(), float(jax.grad(value)(np.full(2, point, np.float32))[0])
  print("%s at %g: PyTorch %.4g, torchax %.4g" % (name, point, *found))
  random = np.linspace(-4.1, 4.3, 2, dtype=np.float32)
  apart = abs(float(value(jnp.asarray(random))) - function(torch.tensor(random)).sum().item())
  if apart > 1e-5:
    sys.exit("Changed: other outputs of %s." % name)
  if not np.allclose(found, (theirs, bridged), rtol=1e-4, equal_nan=True):
    sys.exit("Changed: %s has other derivatives." % name)
EOF
