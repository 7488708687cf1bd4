"""Does the back-propagated signal of a single sample lie in the weights? Beyond the paper.

With weight decay w the stationarity of a fully connected first layer, Eq. 5 by its kernel, is

  ``w N W = -sum_i x_i s_i^T``,  s_i = d loss(x_i) / d (its pre-activations in the first layer), [F],

with x_i less the constant that the network subtracts. If W has rank N, as many as there are training samples, the s_i
are a basis of its row space, and so for every training sample

1. s_i lies in the row space of W: F - N equations,
2. ``s_i W^+ x_i = -w N``, which fixes its scale,
3. ``s_i W^+ x_j = 0`` for every other training sample x_j,

and no other sample, label, range of values or level is needed. At a kink a gate is any number from 0 to 1: where
gradient descent rests there, the stored weights hold a number in between. So gates of units at their kink are free:
a bounded least squares over as many unknowns as a sample has kinks. With exact gates the equations hold to a quarter,
with free ones to a thousandth.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from kkt_jax import _checks
from kkt_jax._descent import accelerated, greatest_value
from kkt_jax._precision import full_precision
from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.analysis.examination import Examination
from kkt_jax.analysis.first_layer import FirstLayer
from kkt_jax.classifiers import relaxation
from kkt_jax.criteria import Criteria

_ITERATIONS = 1000  # of the bounded least squares
_AT_ONCE = 16  # samples whose derivatives by their free gates are in memory at once


class Signals(NamedTuple):
  """What the first layer's weights say of each sample alone.

  Attributes:
    distance: of each signal from the row space of the kernel [M], relative to its length; of a training sample near 0.
    scale: ``-s W^+ x / (w N)`` [M] with N the rank of the kernel and w its weight decay, 1 if that is unknown; of a
      training sample 1, or one unknown number for all if w or N is.
    duals: q [M, D] with ``q . x_j`` = 0 for every other training sample x_j (less what is subtracted), and `scale` for
      the sample itself.
    kinks: how many units of the first layer rest on their kink at each sample [M], units without weights not counted.
    unrest: how far the unit that is the second nearest to its kink is from it, in standard deviations of its layer's
      arguments [M]; of a training sample near 0, for descent rests exactly there.
    leverage: ``|s| |W^+ x| / (w N)`` [M]: how much an error of the signal moves the scale, both relative.
  """

  distance: np.ndarray
  scale: np.ndarray
  duals: np.ndarray
  kinks: np.ndarray
  unrest: np.ndarray
  leverage: np.ndarray


@full_precision
def signals(
  examination: Examination,
  x: ArrayLike,
  labels: ArrayLike | None = None,
  *,
  kink: float = Criteria().kink,
  scale: tuple[float, float] | None = None,
) -> Signals:
  """The signals of samples in the first layer, with free gates at kinks, beside what the weights hold.

  Args:
    examination: of a classifier with a fully connected first layer, without batch norm.
    x: samples [M, *input_shape], in the classifier's units.
    labels: their labels [M]; what the classifier takes them for if None.
    kink: up to which a gate's argument is at its kink, in standard deviations of the arguments of its unit; positive.
    scale: the scale c of training samples and the relative error of it that counts as much as a distance of 1, if the
      gates are to bring the signal to that, too: among free gates above the first layer there are some that change the
      scale by tenths and the distance by nothing. None: they see the distance only.

  Returns:
    `Signals`.

  Raises:
    ValueError: no such first layer, or one whose rank cannot be told; shapes that do not fit.
  """
  classifier, first = examination.classifier, examination.first
  if first is None or not first.rank or classifier.batch_coupled:
    raise ValueError(
      "examination must be of a classifier without batch norm, with a fully connected first layer whose rank is told."
    )
  x = jnp.asarray(x)
  _checks.check_shape("x", x, (len(x), *classifier.input_shape), "[M, *input_shape]")
  _checks.check_positive("kink", kink)
  apply_fn, params = classifier.apply_fn, classifier.params
  logits = classifier.predict(x)
  classes = jnp.argmax(logits, axis=1) if labels is None else classifier.classes_of(labels)
  roots = [root for root in relaxation.pre_activations(apply_fn, params, x) if root.shape[:1] == x.shape[:1]]
  shapes = tuple(root.shape[1:] for root in roots)
  arguments = np.concatenate(
    [np.zeros((len(x), 0)), *(np.asarray(r, np.float64).reshape(len(x), -1) for r in roots)], 1
  )
  spread = _spread(examination)
  at_kink = np.abs(arguments) < kink * spread  # never where the spread is 0
  most = -(-max(int(at_kink.sum(axis=1).max(initial=0)), 1) // _AT_ONCE) * _AT_ONCE
  places = np.full((len(x), most), arguments.shape[1])
  for row, kinks in zip(places, at_kink, strict=True):
    gates = np.flatnonzero(kinks)
    row[: len(gates)] = gates
  u, s, rows = first.factors
  offsets = np.asarray(x, np.float64).reshape(len(x), -1) - first.start.reshape(-1)
  pixel = np.argmax(np.abs(offsets), axis=1)
  height = first.gain * offsets[np.arange(len(x)), pixel]
  duality = -((offsets @ u) / s) @ rows / (len(s) * (first.decay or 1.0))  # the scale is its product with the signal
  sought = (0.0 if scale is None else 1 / scale[1]) * np.ones(len(x))
  pull = (0.0 * duality if scale is None else duality / (scale[0] * scale[1])).astype(np.float32)
  given = (x, classes, places, arguments.astype(np.float32), pixel, height.astype(np.float32), pull, sought)
  layer, space = _Layer(apply_fn, first.place, first.turned, shapes), jnp.asarray(rows, jnp.float32)
  parts = []
  for begin in range(0, len(x), _AT_ONCE):  # of one size, so that one program does for all
    chunk = np.resize(np.arange(begin, min(begin + _AT_ONCE, len(x))), _AT_ONCE)
    parts.append(_signals(layer, params, space, _Sample(*(jnp.asarray(values)[chunk] for values in given))))
  signal = np.asarray(jnp.concatenate(parts)[: len(x)], np.float64)
  relative = np.abs(arguments[:, spread > 0]) / spread[spread > 0]
  unrest = np.partition(relative, 1)[:, 1] if relative.shape[1] > 1 else np.zeros(len(x))  # 0 without gates
  inside = signal @ rows.T
  lengths = np.maximum(np.linalg.norm(signal, axis=1), 1e-300)
  distance = np.linalg.norm(signal - inside @ rows, axis=1) / lengths
  duals = -(inside / s) @ u.T / (len(s) * (first.decay or 1.0))
  width = first.kernel.shape[1]
  leverage = lengths * np.linalg.norm(duality, axis=1)
  return Signals(distance, np.sum(duals * offsets, axis=1), duals, at_kink[:, :width].sum(axis=1), unrest, leverage)


def left_over(first: FirstLayer, x: ArrayLike, duals: ArrayLike) -> np.ndarray:
  """What a set of samples leaves of the first kernel: whether all K of them are training samples, complete or not.

  Less the outer products ``-x_i s_i^T / (w N)`` of K training samples, a kernel of rank N keeps N - K directions. All
  is measured in coordinates in which the singular values of the kernel are 1. There ``I - a^T b`` is left, a [K, N] the
  samples and b [K, N] their signals: a projection on N - K directions if and only if every sample's dual is 1 on itself
  and 0 on the others of the set. One wrong sample among them leaves one value more.

  Args:
    first: the first layer.
    x: the samples [K, ...], K < N, in the classifier's units.
    duals: their duals [K, D], with the scale 1 (`kkt_jax.extraction.certificates.by_equations`).

  Returns:
    The singular values [N], falling: N - K of at least 1, the others of training samples near 0.

  >>> kernel = np.diag([3.0, 2.0, 1.0])
  >>> layer = FirstLayer(kernel, np.zeros(3), 0, False, 1.0, None, 3, 1.0)
  >>> left_over(layer, np.eye(3)[:2], np.eye(3)[:2]).round(3).tolist()
  [1.0, 0.0, 0.0]
  >>> left_over(layer, [[1, 0, 0], [0.5, 0.5, 0]], [[1, 0, 0], [0, 2, 0]]).round(3).tolist()  # the second is a blend
  [1.0, 0.667, 0.0]
  """
  u, s, _ = first.factors
  offsets = np.asarray(x, np.float64).reshape(len(np.asarray(x)), -1) - first.start
  a, b = offsets @ u / s, np.asarray(duals, np.float64) @ u * s
  return np.linalg.svd(np.eye(len(s)) - a.T @ b, compute_uv=False)


def _spread(examination: Examination) -> np.ndarray:
  """The standard deviation of a layer's arguments over random inputs, for each of its gates; 0 for dead units."""
  classifier = examination.classifier
  roots = relaxation.pre_activations(classifier.apply_fn, classifier.params, examination.probes)
  parts = []
  for root in roots:
    if root.shape[:1] == examination.probes.shape[:1]:
      arguments = np.asarray(root, np.float64).reshape(len(root), -1)
      moving = arguments.std(axis=0)
      parts.append(np.where(moving > 1e-3 * moving.max(initial=0.0), arguments.std(), 0.0))
  return np.concatenate([np.zeros(0), *parts])


class _Layer(NamedTuple):
  """A first layer in its network: where its kernel is among the leaves, and the shapes of all gates of a sample."""

  apply_fn: ApplyFn
  place: int
  turned: bool
  shapes: tuple[tuple[int, ...], ...]


class _Sample(NamedTuple):
  """A sample: its class, the places of its free gates [K] and the arguments of all, its greatest input and where.

  And what the signal's product with ``pull`` [F] is to be: ``sought``, in units of a distance of 1.
  """

  x: jax.Array
  label: jax.Array
  places: jax.Array
  arguments: jax.Array
  pixel: jax.Array
  height: jax.Array
  pull: jax.Array
  sought: jax.Array


@functools.partial(jax.jit, static_argnums=0)
@full_precision
def _signals(layer: _Layer, params: PyTree, rows: jax.Array, samples: _Sample) -> jax.Array:
  """Signals [M, F] with the free gates that bring them nearest to the row space, ``rows`` [r, F]."""
  leaves, structure = jax.tree.flatten(params)
  place, shapes = layer.place, layer.shapes
  free_gates = relaxation.given_gates(layer.apply_fn)
  sizes = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

  def of_one(one: _Sample) -> jax.Array:
    dtype = one.x.dtype

    def signal(t: jax.Array) -> jax.Array:
      open_ = (one.arguments > 0).astype(dtype).at[one.places].set(t, mode="drop")
      gates = [g.reshape(1, *shape) for g, shape in zip(jnp.split(open_, sizes), shapes, strict=True)] if shapes else []

      def loss(row: jax.Array) -> jax.Array:  # the gradient by one row of the kernel is x there times the signal
        at = (slice(None), one.pixel) if layer.turned else one.pixel
        changed = [*leaves[:place], leaves[place].at[at].add(row), *leaves[place + 1 :]]
        logits = free_gates(jax.tree.unflatten(structure, changed), one.x[None], gates)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, one.label[None])[0]

      return jax.grad(loss)(jnp.zeros(rows.shape[1], dtype)) / one.height

    def beyond(vectors: jax.Array, length: jax.Array) -> jax.Array:
      return jnp.concatenate([vectors - (vectors @ rows.T) @ rows, (vectors @ one.pull * length)[..., None]], axis=-1)

    t = jnp.full(one.places.shape, 0.5, dtype)
    for _ in range(max(len(shapes), 1)):  # linear in the gates of each layer
      now, push = jax.linearize(signal, t)
      length = jnp.linalg.norm(now)
      slopes = beyond(jax.vmap(push)(jnp.eye(len(t), dtype=dtype)), length)
      t = _bounded(slopes, (beyond(now, length) - t @ slopes).at[-1].add(-one.sought * length), t)
    return signal(t)

  return jax.vmap(of_one)(samples)


def _bounded(rows: jax.Array, offset: jax.Array, t: jax.Array) -> jax.Array:
  """The t in [0, 1] that minimises ``|t @ rows + offset|``, by an accelerated projected gradient method."""
  lengths = jnp.linalg.norm(rows, axis=1)
  lengths = jnp.where(lengths > 1e-6 * jnp.max(lengths), lengths, jnp.inf)
  rows = rows / lengths[:, None]
  gram, linear, most = rows @ rows.T, rows @ offset, jnp.where(jnp.isfinite(lengths), lengths, 0.0)
  step = 0.9 / greatest_value(lambda v: gram @ v, jnp.ones_like(t), num_steps=12)
  descend = lambda u: jnp.clip(u - step * (gram @ u + linear), 0.0, most)
  u = accelerated(descend, t * most, num_steps=_ITERATIONS)
  return jnp.where(jnp.isfinite(lengths), u / lengths, t)
