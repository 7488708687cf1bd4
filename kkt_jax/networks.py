"""Flax modules of the experiments: classifiers, generators, the multiplier network.

The library proper takes functions; `from_module` turns one of these classifiers into a `kkt_jax.classifier.Classifier`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kkt_jax.classifier import Classifier, make_classifier, PyTree

# Kaiming initialisation (He et al. 2015), the paper's.
_kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def relaxed_relu(x: jax.Array, sharpness: float) -> jax.Array:
  """ReLU with a smooth derivative, ``sigmoid(sharpness * x)`` (Haim et al. 2022).

  The value is ReLU's. In the stationarity sum the smooth derivative stands for the sub-differential at the kinks, and
  it lets the sum's own gradient see the gates, which for ReLU's step function is 0 almost everywhere.

  Args:
    x: pre-activations, any shape.
    sharpness: k, positive; 20 to 500 are usual, below 10 the sum is biased.

  Returns:
    max(x, 0).

  >>> print(relaxed_relu(jnp.array([-1.0, 2.0]), 20.0), jax.grad(relaxed_relu)(0.0, 20.0))
  [0. 2.] 0.5
  """
  del sharpness  # shapes the derivative only
  return nn.relu(x)


@relaxed_relu.defjvp
def _relaxed_relu_jvp(
  sharpness: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  return nn.relu(primals[0]), nn.sigmoid(sharpness * primals[0]) * tangents[0]


def _activation(gate_sharpness: float | None, x: jax.Array) -> jax.Array:
  return nn.relu(x) if gate_sharpness is None else relaxed_relu(x, gate_sharpness)


def _batch_norm(train: bool, name: str | None = None) -> nn.BatchNorm:
  """Batch norm of the classifiers; momentum 0 makes the stored statistics those of the last batch exactly."""
  return nn.BatchNorm(use_running_average=not train, momentum=0.0, use_fast_variance=False, name=name)


class MLPClassifier(nn.Module):
  """The paper's classifier: fully connected layers, ReLU, optional batch norm before each ReLU.

  Attributes:
    num_classes: C.
    hidden: widths of the hidden layers; two of them make the paper's three layers.
    batch_norm: Linear-BatchNorm-ReLU instead of Linear-ReLU.
    use_bias: biases on the linear layers.
    init_scale: factor on the Kaiming initial weights; small values are what brings gradient descent to a KKT point.
    gate_sharpness: smooths the derivative of ReLU, see `relaxed_relu`; exact where None.
  """

  num_classes: int
  hidden: Sequence[int] = (256, 256)
  batch_norm: bool = False
  use_bias: bool = True
  init_scale: float = 1.0
  gate_sharpness: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps x [M, ...] to logits [M, C]."""

    def kernel_init(*args: Any) -> jax.Array:
      return self.init_scale * _kaiming(*args)

    x = x.reshape(x.shape[0], -1)
    for width in self.hidden:
      x = nn.Dense(width, use_bias=self.use_bias, kernel_init=kernel_init)(x)
      if self.batch_norm:
        x = _batch_norm(train)(x)
      x = _activation(self.gate_sharpness, x)
    return nn.Dense(self.num_classes, use_bias=self.use_bias, kernel_init=kernel_init)(x)


class ConvClassifier(nn.Module):
  """A small convolutional classifier: two strided 3 x 3 convolutions and a linear layer, ReLU, optional batch norm.

  Attributes are those of `MLPClassifier`; ``channels`` are the widths of the convolutions.
  """

  num_classes: int
  channels: Sequence[int] = (16, 32)
  batch_norm: bool = False
  use_bias: bool = True
  init_scale: float = 1.0
  gate_sharpness: float | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [M, H, W, channels] to logits [M, C]."""

    def kernel_init(*args: Any) -> jax.Array:
      return self.init_scale * _kaiming(*args)

    for width in self.channels:
      x = nn.Conv(width, (3, 3), strides=2, use_bias=self.use_bias, kernel_init=kernel_init)(x)
      if self.batch_norm:
        x = _batch_norm(train)(x)
      x = _activation(self.gate_sharpness, x)
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(self.num_classes, use_bias=self.use_bias, kernel_init=kernel_init)(x)


def from_module(
  module: MLPClassifier | ConvClassifier,
  variables: Mapping[str, PyTree],
  *,
  input_shape: Sequence[int],
  labels: Sequence[int],
  offset: ArrayLike | None = None,
) -> Classifier:
  """A `Classifier` from a trained flax classifier of this file.

  Only ``gradient_fn`` has the module's relaxed gates; everything else is exact. With batch norm the training function
  uses the statistics of the batch, and the stored ones are kept for comparison.

  Args:
    module: the classifier.
    variables: ``{"params": ..., "batch_stats": ...}``, the latter with batch norm only.
    input_shape: shape of one input.
    labels: the label of each output.
    offset: subtracted from every input before the network, a stored preprocessing constant of shape input_shape,
      or None.

  Returns:
    The `Classifier`.

  Raises:
    ValueError: see `make_classifier`.

  >>> module = MLPClassifier(num_classes=3, hidden=(4,))
  >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 2)))
  >>> from_module(module, variables, input_shape=(2,), labels=(0, 1, 2)).num_classes
  3
  """
  exact = module.clone(gate_sharpness=None)
  shift = 0.0 if offset is None else jnp.asarray(offset)[None]
  if module.batch_norm and "batch_stats" not in variables:
    raise ValueError(f"variables must hold 'batch_stats' for a module with batch norm; got {sorted(variables)}.")
  constants = {name: tree for name, tree in variables.items() if name != "params"}

  def trained(module: nn.Module) -> Callable[[PyTree, jax.Array], Any]:
    """Logits and updated statistics as in training."""
    return lambda params, x: module.apply(
      {"params": params, **constants}, x - shift, train=True, mutable=["batch_stats"]
    )

  predict: Any = exact.apply
  statistics_fn = (lambda params, x: trained(exact)(params, x)[1]["batch_stats"]) if module.batch_norm else None
  return make_classifier(
    lambda params, x: trained(exact)(params, x)[0],
    variables["params"],
    input_shape,
    labels=labels,
    gradient_fn=lambda params, x: trained(module)(params, x)[0],
    predict_fn=lambda params, x: predict({"params": params, **constants}, x - shift),
    batch_coupled=module.batch_norm,
    statistics_fn=statistics_fn,
    statistics=constants.get("batch_stats"),
    offset=offset,
  )


class MultiplierNetwork(nn.Module):
  """The network h(x, y, t; eta) of section 4: raw multipliers mu' for `kkt_jax.multipliers.from_network`.

  Attributes:
    num_outputs: C, the greatest number of classes of any classifier.
    num_labels: number of labels altogether.
    num_classifiers: T.
    hidden: widths of the hidden layers.
    initial_bias: bias of the last layer at the start, positive so that no multiplier starts dead.
  """

  num_outputs: int
  num_labels: int
  num_classifiers: int = 1
  hidden: Sequence[int] = (128, 128)
  initial_bias: float = 1.0

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array, t: jax.Array) -> jax.Array:
    """Maps inputs [M, ...], labels [M] and classifier indices [M] to mu' [M, C]."""
    h = jnp.concatenate(
      [
        x.reshape(x.shape[0], -1),
        jax.nn.one_hot(y, self.num_labels, dtype=x.dtype),
        jax.nn.one_hot(t, self.num_classifiers, dtype=x.dtype),
      ],
      axis=1,
    )
    for width in self.hidden:
      h = nn.relu(nn.Dense(width, kernel_init=_kaiming)(h))
    # A small last layer: all multipliers start near the initial bias, whatever the input.
    small = nn.initializers.normal(1e-2)
    bias = nn.initializers.constant(self.initial_bias)
    return nn.Dense(self.num_outputs, kernel_init=small, bias_init=bias)(h)


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
      x = nn.Dense(width, kernel_init=_kaiming)(x)
      if self.batch_norm:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False)(x)
      x = nn.relu(x)
    last = nn.initializers.variance_scaling(2.0 * self.output_scale**2, "fan_in", "normal")
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
    output: maps the last layer [M, *sample_shape] to samples, such as `affine_output`.
  """

  sample_shape: Sequence[int]
  num_labels: int
  num_classifiers: int = 1
  codebook_size: int = 60
  jitter: float = 0.1
  hidden: Sequence[int] = (128, 128)
  output: Callable[[jax.Array], jax.Array] = lambda x: x

  @nn.compact
  def __call__(self, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool = False) -> jax.Array:
    """Maps noise [M, D], labels [M] and classifier indices [M] to samples [M, *sample_shape]; D is at least 2."""
    shape = (self.num_classifiers, self.num_labels, self.codebook_size, noise.shape[1] - 1)
    codebook = self.param("codebook", nn.initializers.normal(1.0), shape)
    uniform = jax.scipy.stats.norm.cdf(noise[:, 0])
    code = jnp.clip((uniform * self.codebook_size).astype(jnp.int32), 0, self.codebook_size - 1)
    x = codebook[t, y, code] + self.jitter * noise[:, 1:]
    x = jnp.concatenate(
      [x, jax.nn.one_hot(y, self.num_labels, dtype=x.dtype), jax.nn.one_hot(t, self.num_classifiers, dtype=x.dtype)],
      axis=1,
    )
    for width in self.hidden:
      x = nn.silu(nn.Dense(width, kernel_init=_kaiming)(x))
    x = nn.Dense(math.prod(self.sample_shape), kernel_init=_kaiming)(x)
    return self.output(x.reshape(-1, *self.sample_shape))


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
      x = normalised(nn.Dense(size, kernel_init=_kaiming)(x))
    x = x.reshape(-1, height // 4, width // 4, self.channels[0])
    for size in self.channels[1:]:
      x = normalised(nn.ConvTranspose(size, (4, 4), strides=(2, 2), kernel_init=_kaiming)(x))
    last = nn.initializers.variance_scaling(2.0 * self.output_scale**2, "fan_in", "normal")
    return self.output(nn.ConvTranspose(out_channels, (3, 3), kernel_init=last)(x))


def _conditioned(noise: jax.Array, y: jax.Array, t: jax.Array, num_labels: int, num_classifiers: int) -> jax.Array:
  """Noise, label and classifier index side by side; the one-hot parts as strong as several noise dimensions."""
  label, index = jax.nn.one_hot(y, num_labels, dtype=noise.dtype), jax.nn.one_hot(t, num_classifiers, dtype=noise.dtype)
  return jnp.concatenate([noise, 3 * label, 3 * index], axis=1)


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


def affine_output(mean: ArrayLike, factor: ArrayLike, *, bound: float) -> Callable[[jax.Array], jax.Array]:
  """Samples around a known mean with a known shape, bounded: ``mean + factor @ (bound * tanh(x / bound))``.

  Args:
    mean: [D].
    factor: [D, D], such as the Cholesky factor of the covariance.
    bound: greatest coordinate before the factor, in standard deviations.

  Returns:
    A function from [M, D] to [M, D].

  >>> print(affine_output(jnp.array([5.0]), jnp.array([[2.0]]), bound=3.0)(jnp.array([[0.0], [100.0]])))
  [[ 5.]
   [11.]]
  """
  mean, factor = jnp.asarray(mean), jnp.asarray(factor)
  return lambda x: mean[None] + (bound * jnp.tanh(x / bound)) @ factor.T


def _blur_matrix(size: int, blur: float) -> jax.Array:
  """[size, size]: row i holds Gaussian weights around i that sum to 1."""
  distance = jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
  weights = jnp.exp(-0.5 * jnp.square(distance / max(blur, 1e-6)))
  return weights / jnp.sum(weights, axis=1, keepdims=True)


def generator_functions(
  module: MLPGenerator | CodebookGenerator | ConvGenerator, noise_dim: int
) -> tuple[Callable[[jax.Array], tuple[PyTree, PyTree]], Callable[..., tuple[jax.Array, PyTree]]]:
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
