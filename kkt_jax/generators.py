"""Flax modules of generators g(noise, y, t; theta), and the last layers that hold what is known of the samples.

`generator_functions` turns a module into the two functions that `kkt_jax.training` needs; `span_functions` makes them
without a network.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax import _checks
from kkt_jax.classifier import PyTree
from kkt_jax.first_layer import InputSpan
from kkt_jax.networks import kaiming
from kkt_jax.training import GenerateFn

InitFn = Callable[[jax.Array], tuple[PyTree, PyTree]]


class MLPGenerator(nn.Module):
  """A fully connected generator g(noise, y, t; theta): cheap enough that a training step is spent in the classifier.

  Attributes:
    sample_shape: shape of one sample.
    num_labels: number of labels altogether.
    num_classifiers: T.
    hidden: widths of the hidden layers, each Linear-BatchNorm-ReLU.
    batch_norm: whether the hidden layers have batch norm.
    output: maps the last layer [M, *sample_shape] to samples, such as `pixel_output`.
    output_scale: factor on the last layer's initial weights; small starts all samples near ``output(0)``.
  """

  sample_shape: Sequence[int]
  num_labels: int
  num_classifiers: int = 1
  hidden: Sequence[int] = (256, 256)
  batch_norm: bool = True
  output: Callable[[jax.Array], jax.Array] = lambda x: x
  output_scale: float = 0.1

  @nn.compact
  def __call__(self, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool = False) -> jax.Array:
    """Maps noise [M, D], labels [M] and classifier indices [M] to samples [M, *sample_shape]."""
    x = _conditioned(noise, y, t, self.num_labels, self.num_classifiers)
    for width in self.hidden:
      x = nn.Dense(width, kernel_init=kaiming())(x)
      if self.batch_norm:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False)(x)
      x = nn.relu(x)
    last = kaiming(self.output_scale)
    x = nn.Dense(math.prod(self.sample_shape), kernel_init=last)(x)
    return self.output(x.reshape(-1, *self.sample_shape))


class CodebookGenerator(nn.Module):
  """A generator of few separate modes: the first noise coordinate picks a learned code, the others blur it a little.

  A continuous network of Gaussian noise must bridge the gaps between separate points; this one need not. A fresh draw
  is one of ``codebook_size`` learned codes of its label and classifier, moved by fresh noise.

  Attributes:
    sample_shape: shape of one sample.
    num_labels: number of labels altogether.
    num_classifiers: T.
    codebook_size: codes for each label and classifier; equally likely.
    jitter: size of the noise that is added to a code.
    hidden: widths of the hidden layers (SiLU).
    output: maps the last layer [M, *sample_shape] and the classifier indices [M] to samples, such as `affine_output`.
  """

  sample_shape: Sequence[int]
  num_labels: int
  num_classifiers: int = 1
  codebook_size: int = 60
  jitter: float = 0.1
  hidden: Sequence[int] = (128, 128)
  output: Callable[[jax.Array, jax.Array], jax.Array] = lambda x, t: x

  @nn.compact
  def __call__(self, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool = False) -> jax.Array:
    """Maps noise [M, D], labels [M] and classifier indices [M] to samples [M, *sample_shape]; D is at least 2."""
    shape = (self.num_classifiers, self.num_labels, self.codebook_size, noise.shape[1] - 1)
    codebook = self.param("codebook", nn.initializers.normal(1.0), shape)
    x = codebook[t, y, _code(noise, self.codebook_size)] + self.jitter * noise[:, 1:]
    x = jnp.concatenate(
      [x, jax.nn.one_hot(y, self.num_labels, dtype=x.dtype), jax.nn.one_hot(t, self.num_classifiers, dtype=x.dtype)],
      axis=1,
    )
    for width in self.hidden:
      x = nn.silu(nn.Dense(width, kernel_init=kaiming())(x))
    x = nn.Dense(math.prod(self.sample_shape), kernel_init=kaiming())(x)
    return self.output(x.reshape(-1, *self.sample_shape), t)


class ConvGenerator(nn.Module):
  """The paper's generator: three fully connected layers, three transposed convolutions, ReLU, batch norm, Kaiming.

  For accelerators: on a CPU it is many times slower than `MLPGenerator`.

  Attributes:
    sample_shape: height, width (multiples of 4) and channels of an image.
    num_labels: number of labels altogether.
    num_classifiers: T.
    hidden: widths of the first two fully connected layers.
    channels: channels of the three feature maps that the transposed convolutions take.
    output: maps the last layer [M, H, W, C] to images, such as `pixel_output`.
    output_scale: factor on the last layer's initial weights.
  """

  sample_shape: Sequence[int]
  num_labels: int
  num_classifiers: int = 1
  hidden: Sequence[int] = (256, 256)
  channels: Sequence[int] = (64, 32, 16)
  output: Callable[[jax.Array], jax.Array] = lambda x: x
  output_scale: float = 0.1

  @nn.compact
  def __call__(self, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool = False) -> jax.Array:
    """Maps noise [M, D], labels [M] and classifier indices [M] to images [M, H, W, C]."""
    height, width, out_channels = self.sample_shape
    if height % 4 or width % 4:
      raise ValueError(f"sample_shape must have height and width in multiples of 4; got {tuple(self.sample_shape)}.")

    def normalised(x: jax.Array) -> jax.Array:
      return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False)(x))

    x = _conditioned(noise, y, t, self.num_labels, self.num_classifiers)
    for size in (*self.hidden, height // 4 * (width // 4) * self.channels[0]):
      x = normalised(nn.Dense(size, kernel_init=kaiming())(x))
    x = x.reshape(-1, height // 4, width // 4, self.channels[0])
    for size in self.channels[1:]:
      x = normalised(nn.ConvTranspose(size, (4, 4), strides=(2, 2), kernel_init=kaiming())(x))
    last = kaiming(self.output_scale)
    return self.output(nn.ConvTranspose(out_channels, (3, 3), kernel_init=last)(x))


def _conditioned(noise: jax.Array, y: jax.Array, t: jax.Array, num_labels: int, num_classifiers: int) -> jax.Array:
  """Noise, label and classifier index side by side; the one-hot parts as strong as several noise dimensions."""
  label, index = jax.nn.one_hot(y, num_labels, dtype=noise.dtype), jax.nn.one_hot(t, num_classifiers, dtype=noise.dtype)
  return jnp.concatenate([noise, 3 * label, 3 * index], axis=1)


def _code(noise: jax.Array, num_codes: int) -> jax.Array:
  """Which of equally likely codes [M] the first coordinate of standard normal noise [M, D] picks."""
  uniform = jax.scipy.stats.norm.cdf(noise[:, 0])
  return jnp.clip((uniform * num_codes).astype(jnp.int32), 0, num_codes - 1)


def span_functions(
  starts: Sequence[ArrayLike],
  spans: Sequence[InputSpan],
  *,
  num_labels: int,
  num_codes: int,
  deviation: float,
  power: float = 0.5,
) -> tuple[InitFn, GenerateFn]:
  """A generator whose samples lie in the span of the first layer: each noise picks one of many learned combinations.

  ``g(noise, y, t) = start_t + sum_j c_j s_j^power v_j`` with the basis v and the strengths s of classifier t's span and
  the coefficients c of one of ``num_codes`` codes of label y. Nothing is shared between the codes but the equations:
  a *finite* generator, whose distribution has num_codes equally likely images of each label and classifier. In the
  coordinates c all directions are of comparable size, which gradient descent needs: the strengths span six decades.

  Args:
    starts: for each classifier the sample at c = 0 [*sample_shape], such as the stored mean image.
    spans: the span of each classifier's inputs, of ``D = prod(sample_shape)`` dimensions.
    num_labels: number of labels altogether.
    num_codes: codes of each label and classifier.
    deviation: root mean square of a coordinate of the random first samples around the start, in units of the samples.
    power: how much of the strengths the coefficients are freed from: 1 leaves strong directions strong, 0 makes all
      equal.

  Returns:
    ``init(key) -> (theta, statistics)`` and ``generate(theta, statistics, noise, y, t, train) -> (x, statistics)``, as
    `generator_functions` returns them. Noise [M, 1] is enough. In training x may leave [0, 1], against which
    `kkt_jax.priors.out_of_range` pulls; otherwise x is clipped to [0, 1].

  Raises:
    ValueError: no classifier, or spans that do not fit the starts.

  >>> span = InputSpan(basis=jnp.eye(4)[:, :2], strengths=jnp.array([4.0, 1.0]))
  >>> init, generate = span_functions([jnp.zeros((2, 2))], [span], num_labels=3, num_codes=5, deviation=0.1)
  >>> theta, statistics = init(jax.random.key(0))
  >>> theta[0].shape  # labels, codes, rank
  (3, 5, 2)
  >>> label = jnp.zeros(7, int)
  >>> generate(theta, statistics, jnp.zeros((7, 1)), label, label, False)[0].shape
  (7, 2, 2)
  """
  if not starts or len(starts) != len(spans):
    raise ValueError(f"spans must hold one for each of {len(starts)} starts, at least one; got {len(spans)}.")
  size, factors = jnp.size(starts[0]), []
  for span in spans:
    _checks.check_shape("spans[t].basis", span.basis, (size, span.strengths.size), "[D, r]")
    scale = span.strengths**power
    scale = scale * deviation * jnp.sqrt(size) / jnp.linalg.norm(scale)
    factors.append(scale[:, None] * span.basis.T)
  ranks = [span.strengths.size for span in spans]
  return _table_functions(
    starts, ranks, lambda t, c: c @ factors[t], num_labels=num_labels, num_codes=num_codes, deviation=1.0, limits=(0, 1)
  )


def free_functions(
  starts: Sequence[ArrayLike],
  *,
  num_labels: int,
  num_codes: int,
  deviation: float,
  limits: tuple[float, float] | None = (0.0, 1.0),
) -> tuple[InitFn, GenerateFn]:
  """A generator without any structure: each noise picks one of many free samples, as in Haim et al. (2022).

  Args:
    starts: for each classifier the sample around which the random first ones lie [*sample_shape].
    num_labels: number of labels altogether.
    num_codes: free samples of each label and classifier.
    deviation: standard deviation of a coordinate of the first samples, in units of the samples.
    limits: what samples are clipped to outside training; not at all where None.

  Returns:
    As of `span_functions`.

  Raises:
    ValueError: no classifier.

  >>> init, generate = free_functions([jnp.zeros((2, 2))], num_labels=3, num_codes=5, deviation=0.1)
  >>> theta, statistics = init(jax.random.key(0))
  >>> theta[0].shape  # labels, codes, coordinates
  (3, 5, 4)
  """
  if not starts:
    raise ValueError("starts must hold at least one sample; got none.")
  return _table_functions(
    starts,
    [jnp.size(start) for start in starts],
    lambda t, c: c,
    num_labels=num_labels,
    num_codes=num_codes,
    deviation=deviation,
    limits=limits,
  )


def _table_functions(
  starts: Sequence[ArrayLike],
  sizes: Sequence[int],
  decode: Callable[[int, jax.Array], jax.Array],
  *,
  num_labels: int,
  num_codes: int,
  deviation: float,
  limits: tuple[float, float] | None,
) -> tuple[InitFn, GenerateFn]:
  """``g(noise, y, t) = start_t + decode(t, c)`` with c [sizes[t]] of the code that the noise picks, from a table."""
  sample_shape = jnp.shape(starts[0])

  def init(key: jax.Array) -> tuple[PyTree, PyTree]:
    keys = jax.random.split(key, len(sizes))
    return [
      deviation * jax.random.normal(k, (num_labels, num_codes, size)) for k, size in zip(keys, sizes, strict=True)
    ], {}

  def generate(
    theta: PyTree, statistics: PyTree, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool
  ) -> tuple[jax.Array, PyTree]:
    code = _code(noise, num_codes)
    x = jnp.zeros((noise.shape[0], math.prod(sample_shape)))
    for index, (table, start) in enumerate(zip(theta, starts, strict=True)):
      own = jnp.asarray(start).reshape(1, -1) + decode(index, table[y, code])
      x = jnp.where((t == index)[:, None], own, x)
    if limits is not None and not train:
      x = jnp.clip(x, *limits)
    return x.reshape(-1, *sample_shape), statistics

  return init, generate


def pixel_output(start: ArrayLike, *, blur: float = 0.0) -> Callable[[jax.Array], jax.Array]:
  """Images in (0, 1) around a start: ``sigmoid(logit(start) + blur(x))``, a smoothness prior in the generator itself.

  Args:
    start: the image at x = 0, [H, W, C] with values in [0, 1]: the data's mean where it is known.
    blur: standard deviation of a Gaussian blur of x, in pixels; none where 0.

  Returns:
    A function from [M, H, W, C] to [M, H, W, C].

  >>> print(pixel_output(jnp.full((1, 1, 1), 0.25))(jnp.zeros((1, 1, 1, 1)))[0, 0, 0])
  [0.25]
  """
  start = jnp.clip(jnp.asarray(start), 3e-3, 1 - 3e-3)  # the logit of pure black is not finite
  base = jnp.log(start) - jnp.log1p(-start)
  rows, columns = (_blur_matrix(size, blur) for size in start.shape[:2])

  def output(x: jax.Array) -> jax.Array:
    if blur:
      x = jnp.einsum("ih,mhwc,jw->mijc", rows, x, columns)
    return nn.sigmoid(base[None] + x)

  return output


def affine_output(means: ArrayLike, factors: ArrayLike, *, bound: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Samples around known means with known shapes, bounded: ``means[t] + factors[t] @ (bound * tanh(x / bound))``.

  Args:
    means: for each classifier [T, D].
    factors: for each classifier [T, D, D], such as Cholesky factors of the covariances.
    bound: greatest coordinate before the factor, in standard deviations.

  Returns:
    A function from [M, D] and classifier indices [M] to [M, D].

  >>> output = affine_output(jnp.array([[5.0], [0.0]]), jnp.array([[[2.0]], [[1.0]]]), bound=3.0)
  >>> print(output(jnp.array([[0.0], [100.0], [100.0]]), jnp.array([0, 0, 1])))
  [[ 5.]
   [11.]
   [ 3.]]
  """
  means, factors = jnp.asarray(means), jnp.asarray(factors)
  return lambda x, t: means[t] + jnp.einsum("mde,me->md", factors[t], bound * jnp.tanh(x / bound))


def _blur_matrix(size: int, blur: float) -> jax.Array:
  """[size, size]: row i holds Gaussian weights around i that sum to 1."""
  distance = jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
  weights = jnp.exp(-0.5 * jnp.square(distance / max(blur, 1e-6)))
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def generator_functions(
  module: MLPGenerator | CodebookGenerator | ConvGenerator, noise_dim: int
) -> tuple[InitFn, GenerateFn]:
  """The two functions that `kkt_jax.training` needs of a generator module.

  Args:
    module: the generator.
    noise_dim: D.

  Returns:
    ``init(key) -> (theta, statistics)`` and ``generate(theta, statistics, noise, y, t, train) -> (x, statistics)``.

  >>> init, generate = generator_functions(MLPGenerator(sample_shape=(2,), num_labels=3, hidden=(4,)), noise_dim=5)
  >>> theta, statistics = init(jax.random.key(0))
  >>> label = jnp.zeros(7, int)
  >>> generate(theta, statistics, jnp.zeros((7, 5)), label, label, False)[0].shape
  (7, 2)
  """
  apply: Any = module.apply

  def init(key: jax.Array) -> tuple[PyTree, PyTree]:
    zeros = jnp.zeros(1, jnp.int32)
    variables: Any = module.init(key, jnp.zeros((1, noise_dim)), zeros, zeros)
    return variables["params"], variables.get("batch_stats", {})

  def generate(
    theta: PyTree, statistics: PyTree, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool
  ) -> tuple[jax.Array, PyTree]:
    variables = {"params": theta, "batch_stats": statistics}
    if not train:
      return apply(variables, noise, y, t), statistics
    x, updated = apply(variables, noise, y, t, train=True, mutable=["batch_stats"])
    return x, updated.get("batch_stats", {})

  return init, generate
