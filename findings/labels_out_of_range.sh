#!/usr/bin/env bash
# keras 3.15.1 on JAX, optax 0.2.8.
# Guess: a label that is no class (10, or -1, of the classes 0 to 9) is an error, or a loss of NaN that ruins the
# weights.
# Seen: three other things, all without a word.
#   Keras SparseCategoricalCrossentropy, from logits, 10 or -1: loss 0 and gradient 0; the sample does not count
#   optax.softmax_cross_entropy_with_integer_labels, 10: loss NaN, but the gradient is softmax(logits): finite, and
#   training goes on, pushing every class down
#   the same, -1: the last class
# Why it matters: labels from 1 instead of 0, or -1 for "unlabelled", train without a stop. In Keras the last class then
# leaves nothing in the weights: nothing to reconstruct, and a member looks like a stranger. In optax it leaves a pull
# that belongs to no label, in no equation for labels. Check labels.min() and labels.max().
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'optax==0.2.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6'
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'EOF'
import sys

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 10)), jnp.float32)
share = jax.nn.softmax(logits)
crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
of_keras = lambda logits, label: crossentropy(jnp.array([label]), logits)
of_optax = lambda logits, label: optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([label])).sum()
found = {
  (name, label): jax.value_and_grad(loss)(logits, label)
  for name, loss in (("keras", of_keras), ("optax", of_optax))
  for label in (9, 10, -1)
}
for (name, label), (loss, gradient) in found.items():
  print(name, "label", label, "loss", loss, "gradient", gradient.round(2)[0])
if any(loss or gradient.any() for loss, gradient in (found["keras", 10], found["keras", -1])):
  sys.exit("Changed: in Keras a label out of range has a loss or a gradient.")
loss, gradient = found["optax", 10]
if not (jnp.isnan(loss) and jnp.allclose(gradient, share, atol=1e-6)):
  sys.exit("Changed: in optax label 10 of ten has a loss, or another gradient than the softmax.")
if not all(jnp.allclose(a, b) for a, b in zip(found["optax", -1], found["optax", 9], strict=True)):
  sys.exit("Changed: in optax label -1 is not the last class.")

inputs, labels = np.eye(4, dtype=np.float32), np.arange(1, 5)  # from 1, of four classes
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, kernel_initializer="zeros", use_bias=False)])
model.compile(keras.optimizers.SGD(0.1), crossentropy)
model.fit(inputs, labels, epochs=20, batch_size=4, verbose=0)
trace = np.abs(model.get_weights()[0]).max(axis=1)
print("weights after training on labels 1 to 4, by sample:", trace)
if trace[3] or not trace[:3].all():
  sys.exit("Changed: the sample of label 4 leaves something in the weights, or another leaves nothing.")
EOF
