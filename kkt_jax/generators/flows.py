"""A generator that is a network of continuous noise: a conditional flow, fitted to samples, trained by the equations.

A table of samples is found more easily than a network, because its samples share nothing. A network is found in two
stages: *flow matching* (Lipman et al. 2023) turns any samples into a field of velocities whose flow carries standard
normal noise to them; then the equations train the field itself on fresh noise. The network says where a place is bound
for, from which its velocity follows: at the end of the way this is sharper than the velocity itself. Beyond the paper.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np
import optax

from kkt_jax import _checks
from kkt_jax._precision import full_precision
from kkt_jax._typing import PyTree
from kkt_jax.analysis.examination import Examination
from kkt_jax.analysis.subspace import Subspace
from kkt_jax.criteria import Criteria
from kkt_jax.generators import base as generators
from kkt_jax.generators.base import Generator
from kkt_jax.metrics.distances import pairwise_distance
from kkt_jax.networks import conditioned

_RATE, _LAST_RATE = 1e-3, 0.02  # peak learning rate of flow matching, and the share of it at the end
_WIDEST = 512  # network that is chosen by the dimension
_WAVES = 4  # frequencies by which the velocity knows the time
_DEFAULT = Criteria()


class Destination(nn.Module):
  """The end of the path through a place between noise and samples, v(x, time, y, t): a residual network.

  Attributes:
    num_labels: number of labels altogether.
    num_classifiers: T.
    width: of its layers.
    blocks: residual blocks.
  """

  num_labels: int
  num_classifiers: int = 1
  width: int = 512
  blocks: int = 2

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
    """Maps places [M, D], times [M] from 0 to 1, places of labels [M] and classifier indices [M] to places [M, D]."""
    angle = 2 * jnp.pi * time[:, None] * jnp.arange(1, _WAVES + 1)[None]
    times = jnp.concatenate([time[:, None], jnp.sin(angle), jnp.cos(angle)], axis=1)
    condition = conditioned(times, y, t, self.num_labels, self.num_classifiers)
    h = nn.Dense(self.width)(jnp.concatenate([x, condition], axis=1))
    for _ in range(self.blocks):
      inner = nn.Dense(self.width)(nn.silu(nn.LayerNorm()(h))) + nn.Dense(self.width)(condition)
      h += nn.Dense(self.width, kernel_init=nn.initializers.zeros)(nn.silu(inner))
    return nn.Dense(x.shape[1])(nn.silu(nn.LayerNorm()(h)))


@dataclasses.dataclass(frozen=True)
class Flow:
  """A generator of continuous noise: ``start_t + s_t F_t z(1)`` with ``dz = (v - z) / (1 - time) dtime``.

  v is the network `Destination`. z(0) is standard normal noise times the temperature; its dimension is that of the
  data's subspace, whose directions F_t holds, where all classifiers reveal theirs (the greatest of several), or that
  of all values. s_t is the size of a coordinate of images of black and white pixels with the mean start_t. Samples are
  clipped to the range of the inputs, if they have one. Calling it with examinations makes the generator: it is a
  `kkt_jax.generators.GeneratorFactory`.

  Attributes:
    width: of the network v; if None, the power of two that is two to four times the dimension, at most 512.
    blocks: its residual blocks.
    steps: of Euler's method from noise to sample.
    batch_size: samples for each classifier in each training step.
    lean: how much of the way to the mean of its nearest, of its label, a sample goes before it is fitted: samples with
      faults of their own become more readable and no less like the data. 0 for points that are exact.
    nearest: on how many it leans.
    contrast: how far from the mean of all samples it then is, over how far it was before. Means are pale, and what a
      network draws is a mean; more than 1 suits drawings, whose values are at the ends of their range.
    temperature: factor on the noise: more than 1 for more variety, and more faults.
  """

  width: int | None = None
  blocks: int = 2
  steps: int = 8
  batch_size: int = 500
  lean: float = 0.3
  nearest: int = 4
  contrast: float = 1.0
  temperature: float = 1.0

  def __post_init__(self) -> None:
    for name in ("width", "blocks", "steps", "batch_size", "nearest"):
      if (value := getattr(self, name)) is not None:
        _checks.check_at_least(name, value, 1)
    if not 0 <= self.lean <= 1:
      raise ValueError(f"lean must be in [0, 1]; got {self.lean}.")
    for name in ("contrast", "temperature"):
      _checks.check_positive(name, getattr(self, name))

  def __call__(self, examinations: Sequence[Examination]) -> Generator:
    """The generator for some classifiers."""
    charts = _charts(examinations)
    dimensions = max(subspace.dimension for subspace, _ in charts)
    network, place_of = self._network(examinations, dimensions), generators.places_of(examinations)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
      none = jnp.zeros(1, jnp.int32)
      return jax.jit(network.init)(key, jnp.zeros((1, dimensions)), jnp.zeros(1), none, none), {}

    def generate(
      theta: PyTree, statistics: PyTree, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
      place = place_of(y)

      def step(z: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
        end: Any = network.apply(theta, z, jnp.full(len(y), time), place, t)
        return z + (end - z) / (1 - time) / self.steps, None

      z, _ = jax.lax.scan(step, self.temperature * noise, jnp.arange(self.steps) / self.steps)
      x = jnp.zeros((len(y), *charts[0][0].origin.shape))
      for index, (examination, (subspace, size)) in enumerate(zip(examinations, charts, strict=True)):
        unit = subspace.points(size * z[:, : subspace.dimension])
        if examination.classifier.value_range is not None:
          unit = jnp.clip(unit, 0.0, 1.0)
        x = jnp.where((t == index).reshape(-1, *[1] * (x.ndim - 1)), examination.classifier.from_unit(unit), x)
      return x, statistics

    return Generator(init, generate, generators.normal_noise(dimensions), dimensions, self.batch_size)

  @functools.partial(jax.jit, static_argnums=0)
  @full_precision
  def leaning_on_others(
    self, unit: ArrayLike, y: ArrayLike, certified: np.ndarray | None = None, least: float = _DEFAULT.least_distance
  ) -> jax.Array:
    """Samples [K, *input_shape] of labels y [K], each ``lean`` of the way to its ``nearest``, with ``contrast``.

    A sample that is alone in its label stays, and so does one that is among those that are ``certified`` [P, ...]:
    less than ``least`` from one of them, as a Euclidean norm.

    >>> leaning = Flow(lean=0.5).leaning_on_others(jnp.array([[1.0], [2.0], [6.0]]), jnp.array([0, 0, 1]))
    >>> [round(float(value), 3) for value in leaning.ravel()]
    [1.0, 2.0, 6.0]
    >>> print(Flow(lean=0.25, contrast=0.5).leaning_on_others(jnp.array([[0.0], [6.0]]), jnp.array([0, 0])).ravel())
    [1.5 4.5]
    """
    unit, y = jnp.asarray(unit), jnp.asarray(y)
    flat = unit.reshape(len(y), -1)
    apart = jnp.where((y[:, None] == y[None]) & ~jnp.eye(len(y), dtype=bool), pairwise_distance(flat, flat), jnp.inf)
    nearness, nearest = jax.lax.top_k(-apart, min(self.nearest, len(y)))
    near = jnp.isfinite(nearness)
    means = jnp.einsum("kn,knd->kd", near.astype(flat.dtype), flat[nearest]) / jnp.maximum(near.sum(axis=1), 1)[:, None]
    centre, size = flat.mean(axis=0, keepdims=True), lambda x: jnp.linalg.norm(x, axis=1, keepdims=True)
    leaning = (1 - self.lean) * flat + self.lean * means - centre
    factor = self.contrast * size(flat - centre) / jnp.maximum(size(leaning), 1e-12)
    free = near.any(axis=1)
    if certified is not None and len(certified):
      known = jnp.asarray(certified).reshape(len(certified), -1)
      free &= pairwise_distance(flat, known).min(axis=1) > least
    return jnp.where(free[:, None], centre + factor * leaning, flat).reshape(unit.shape)

  @full_precision
  def match(
    self,
    key: jax.Array,
    theta: PyTree,
    examinations: Sequence[Examination],
    samples: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    num_steps: int = 3000,
    on_progress: Callable[[int, float], None] | None = None,
  ) -> PyTree:
    """Fits v to samples: it is the mean of the samples at whose end straight lines from noise through a place arrive.

    Args:
      key: typed random key.
      theta: parameters to begin with.
      examinations: of T classifiers.
      samples: for each classifier samples [K, *input_shape] in units of its range, and their labels [K].
      num_steps: of Adam, each on ``batch_size`` pairs of a sample and noise.
      on_progress: called with the step and the mean squared error of a coordinate, now and then.

    Returns:
      theta.
    """
    charts = _charts(examinations)
    dimensions, place_of = max(subspace.dimension for subspace, _ in charts), generators.places_of(examinations)
    parts = []
    for index, ((unit, labels), (subspace, size)) in enumerate(zip(samples, charts, strict=True)):
      y, z = place_of(labels), subspace.coordinates(jnp.asarray(unit)) / size
      parts.append((jnp.pad(z, ((0, 0), (0, dimensions - z.shape[1]))), y, jnp.full(len(y), index)))
    ends, of, owners = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    network, count = self._network(examinations, dimensions), self.batch_size
    optimizer = optax.adam(optax.schedules.cosine_decay_schedule(_RATE, max(num_steps, 1), _LAST_RATE))

    @jax.jit
    def step(theta: PyTree, opt_state: PyTree, key: jax.Array) -> tuple[PyTree, PyTree, jax.Array]:
      index_key, noise_key, time_key = jax.random.split(key, 3)
      chosen = jax.random.randint(index_key, (count,), 0, len(of))
      noise, time = jax.random.normal(noise_key, (count, dimensions)), jax.random.uniform(time_key, (count,))
      place = (1 - time)[:, None] * noise + time[:, None] * ends[chosen]

      def loss(theta: PyTree) -> jax.Array:
        aimed: Any = network.apply(theta, place, time, of[chosen], owners[chosen])
        return jnp.mean(jnp.square(aimed - ends[chosen]))

      value, gradient = jax.value_and_grad(loss)(theta)
      updates, opt_state = optimizer.update(gradient, opt_state, theta)
      return optax.apply_updates(theta, updates), opt_state, value

    opt_state = optimizer.init(theta)
    for number, step_key in enumerate(jax.random.split(key, num_steps), 1):
      theta, opt_state, error = step(theta, opt_state, step_key)
      if on_progress is not None and (number % 100 == 0 or number == num_steps):
        on_progress(number, float(error))
    return theta

  def _network(self, examinations: Sequence[Examination], dimensions: int) -> Destination:
    width = self.width or min(2 ** math.ceil(math.log2(2 * dimensions)), _WIDEST)
    return Destination(generators.num_labels(examinations), len(examinations), width, self.blocks)


def _charts(examinations: Sequence[Examination]) -> list[tuple[Subspace, float]]:
  """For each classifier its subspace, or all of space unless all reveal theirs, and the size of a coordinate."""
  deviation = generators.typical_deviation(examinations)
  subspaces = [examination.subspace for examination in examinations if examination.subspace is not None]
  if len(subspaces) < len(examinations):
    subspaces = [Subspace.whole(examination.origin) for examination in examinations]
  return [(subspace, deviation * math.sqrt(subspace.origin.size / subspace.dimension)) for subspace in subspaces]
