#!/usr/bin/env bash
# jax 0.10.2.
# Guess: fold_in(key, i) and split(key, n)[i] are two unrelated ways to new keys, and draws of different shapes from one
# key have nothing in common.
# Seen: since threefry is partitionable by default, fold_in(key, i) and split(key, n)[i] are the same key for every i <
# n, and a short draw is the beginning of a long one. With jax_threefry_partitionable=False neither holds.
#   the same keys: True;  normal(key, [50]) begins normal(key, [100]): True;  not partitionable: False False
# Why it matters: a program that splits a key for initialisation, data and noise, and folds step or sample numbers into
# the same key, reuses keys: the "independent" noise of step 0 is that of the initialisation, two controls are one, a
# canary's coin is known from another draw. Derive each purpose's key once, then use only one of the two ways below it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp


def same_keys(seed, n):
  key = jax.random.key(seed)
  folded = jnp.stack([jax.random.key_data(jax.random.fold_in(key, i)) for i in range(n)])
  return bool((folded == jax.random.key_data(jax.random.split(key, n))).all())


def common_beginning(seed):
  key = jax.random.key(seed)
  return bool((jax.random.normal(key, (50,)) == jax.random.normal(key, (100,))[:50]).all())


seeds = (0, 1, 12345)
keys = [same_keys(seed, n) for seed in seeds for n in (1, 2, 7)]
beginnings = [common_beginning(seed) for seed in seeds]
with jax.threefry_partitionable(False):
  keys_before = [same_keys(seed, 7) for seed in seeds]
  beginnings_before = [common_beginning(seed) for seed in seeds]
print("same keys:", all(keys), "common beginning:", all(beginnings))
print("not partitionable:", any(keys_before), any(beginnings_before))
if not (all(keys) and all(beginnings)):
  sys.exit("Changed: fold_in(key, i) is no longer split(key, n)[i], or a short draw no longer begins a long one.")
if any(keys_before) or any(beginnings_before):
  sys.exit("Changed: it holds without partitionable threefry, too.")
EOF
