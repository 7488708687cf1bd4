"""Generators g(noise, y, t; theta): what `kkt_jax.reconstruction.Recipe` takes, and the flax modules behind some of
them.

A `Generator` is a handful of functions. `table` needs no network; `network` wraps a flax module. Both are factories:
they return a function from the examinations of the classifiers to the `Generator`.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from kkt_jax import _checks
from kkt_jax._typing import PyTree
from kkt_jax.analysis.examination import Examination
from kkt_jax.networks import conditioned, kaiming

_CODES, _GUESSES = 50, 2  # samples of each label; and guesses for each sample that may be certified
_FREE_CODES, _SPARE = 20, 1.2  # the same with free multipliers

# (theta, statistics, noise [M, D], y [M], t [M], train) -> (x [M, ...], statistics); the statistics are the generator's
# own running averages (batch norm), an empty tree for generators without them.
GenerateFn = Callable[[PyTree, PyTree, jax.Array, jax.Array, jax.Array, bool], tuple[jax.Array, PyTree]]
# (key, progress from 0 to 1, classes [M], a constant) -> the noise [M, D] of one classifier's batch in one step.
NoiseFn = Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]


class Generator(NamedTuple):
  """A conditional generator, as functions.

  Attributes:
    init: ``key -> (theta, statistics)``.
    generate: ``(theta, statistics, noise [M, D], y [M], t [M], train) -> (x [M, ...], statistics)``, x in the
      classifiers' own units.
    noise: the noise of a training step, for one classifier.
    noise_dim: D.
    batch_size: M, samples for each classifier in each training step.
    codes: samples of each label and classifier that it can draw, one for each code (`code_of`); 0 if they are endless.
    put: ``(theta, t, y [K], codes [K], unit [K, ...]) -> theta`` with other samples of classifier t in some places, in
      units of the range; None if its samples cannot be set.
    coordinates: ``(theta, codes [M], y [M], t) -> [M, r]``, where samples of classifier t lie in its subspace in
      training; None if they do not.
  """

  init: Callable[[jax.Array], tuple[PyTree, PyTree]]
  generate: GenerateFn
  noise: NoiseFn
  noise_dim: int
  batch_size: int
  codes: int = 0
  put: Callable[[PyTree, int, np.ndarray, np.ndarray, jax.Array], PyTree] | None = None
  coordinates: Callable[[PyTree, jax.Array, jax.Array, int], jax.Array] | None = None


#: Makes a generator for classifiers that have been examined.
GeneratorFactory = Callable[[Sequence[Examination]], Generator]


def all_labels(examinations: Sequence[Examination]) -> tuple[int, ...]:
  """Every label that a classifier knows, once, in increasing order."""
  return tuple(sorted({label for examination in examinations for label in examination.classifier.labels}))


def num_labels(examinations: Sequence[Examination]) -> int:
  """How many labels the classifiers know altogether."""
  return len(all_labels(examinations))


def places_of(examinations: Sequence[Examination]) -> Callable[[ArrayLike], jax.Array]:
  """From labels [M] to their places [M] in `all_labels`, by which arrays are indexed; labels 0..n-1 are their own.

  Labels that no classifier knows have no place; what comes of them is undefined.

  >>> from types import SimpleNamespace
  >>> classifiers = [SimpleNamespace(classifier=SimpleNamespace(labels=own)) for own in ((-1, 1), (1, 10**6))]
  >>> places_of(classifiers)(jnp.array([1, 10**6, -1])).tolist()
  [1, 2, 0]
  """
  known = all_labels(examinations)
  if known == tuple(range(len(known))):
    return _checks.integers
  return lambda y: jnp.searchsorted(_checks.integers(known), _checks.integers(y))


def normal_noise(dimensions: int) -> NoiseFn:
  """Standard normal noise, new in every step."""
  return lambda key, progress, classes: jax.random.normal(key, (len(classes), dimensions))


def stratified_noise(dimensions: int, *, size: Callable[[jax.Array], Any] = lambda progress: 1.0) -> NoiseFn:
  """Standard normal noise whose first coordinate is drawn once from each of n equally likely intervals.

  n is the number of samples of the class in the batch, so that a generator with n codes uses each of them in every
  step, and one with more uses all equally often in the long run.

  Args:
    dimensions: D.
    size: factor on the other coordinates, a function of the progress from 0 to 1 through the training.

  >>> z = stratified_noise(1)(jax.random.key(0), 0, np.array([0, 1, 0, 1]))[:, 0]
  >>> bool(z[0] < 0 < z[2]) and bool(z[1] < 0 < z[3])
  True
  """

  def noise(key: jax.Array, progress: jax.Array, classes: np.ndarray) -> jax.Array:
    normal_key, uniform_key = jax.random.split(key)
    drawn = jax.random.normal(normal_key, (len(classes), dimensions))
    is_class = classes[:, None] == np.arange(classes.max() + 1)[None, :]
    number, count = (np.cumsum(is_class, axis=0) - 1)[is_class], is_class.sum(axis=0)[classes]
    uniform = (number + jax.random.uniform(uniform_key, number.shape)) / count
    tiny = 1e-6  # the quantile of 0 and of 1 is not finite
    first = jax.scipy.stats.norm.ppf(jnp.clip(uniform, tiny, 1 - tiny))
    return jnp.concatenate([first[:, None], size(progress) * drawn[:, 1:]], axis=1)

  return noise


def codes_for(examinations: Sequence[Examination], *, free: bool = False) -> int:
  """Samples of each label that a table learns by default.

  Fifty; and twice as many as there can be training samples where those can be certified as vertices, because not every
  guess leads to one of its own.

  Args:
    examinations: of the classifiers.
    free: whether each sample has multipliers of its own, which become 0 for one too many: then twenty will do, and
      a fifth more in all than the subspace has dimensions.
  """
  least, spare = (_FREE_CODES, _SPARE) if free else (_CODES, _GUESSES)
  revealed = [(e.subspace, e.classifier.num_classes) for e in examinations if e.subspace is not None]
  needed = [
    spare * (subspace.dimension if free else subspace.most_samples) / classes
    for subspace, classes in revealed
    if free or subspace.certifies
  ]
  return max([least, *map(math.ceil, needed)])


def table(codes: int = _CODES, *, in_span: bool = True, deviation: float = 1.0) -> GeneratorFactory:
  """A generator without a network: each noise picks one of many learned samples.

  ``g(noise, y, t) = start_t + c F_t`` with the coefficients c of one of ``codes`` codes of label y. Where the first
  layer reveals the subspace of the data, the rows of F_t are its directions s_j^p v_j (singular values s), with p the
  share of all dimensions that it fills: the singular values span six decades, and gradient descent needs directions of
  comparable size. Else F_t is the identity, and samples are free, as in Haim et al. (2022).

  It is a *finite* generator: its distribution is ``codes`` equally likely samples of each label and classifier, and
  nothing is shared between them but the equations.

  Args:
    codes: samples of each label and classifier.
    in_span: whether to search in the subspace only, if all classifiers reveal theirs.
    deviation: root mean square of a coordinate of the random first samples around the start, over what black and white
      pixels of that mean would have, or over .3 of the range of the inputs if the start is not an image.

  Returns:
    A factory. Outside training samples are clipped to the classifiers' range, if there is one.

  Raises:
    ValueError: ``codes`` below 1 or ``deviation`` negative.
  """
  _checks.check_at_least("codes", codes, 1)
  _checks.check_at_least("deviation", deviation, 0)

  def make(examinations: Sequence[Examination]) -> Generator:
    classifiers = [examination.classifier for examination in examinations]
    shape = classifiers[0].input_shape
    bounded = all(classifier.value_range is not None for classifier in classifiers)
    starts, place_of = [examination.origin for examination in examinations], places_of(examinations)
    first = deviation * typical_deviation(examinations)
    revealed = [examination.subspace for examination in examinations if in_span and examination.subspace is not None]
    factors: list[jax.Array | None] = [None] * len(starts)
    scales: list[jax.Array] = []
    if within := len(revealed) == len(starts):
      power = float(np.mean([examination.share for examination in examinations]))
      scales = [subspace.singular_values**power for subspace in revealed]
      scales = [scale * first * math.sqrt(starts[0].size) / jnp.linalg.norm(scale) for scale in scales]
      factors = [scale[:, None] * subspace.basis.T for scale, subspace in zip(scales, revealed, strict=True)]
    sizes = [starts[0].size if factor is None else factor.shape[0] for factor in factors]

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
      keys = jax.random.split(key, len(sizes))
      deviations = [first if factor is None else 1.0 for factor in factors]
      shapes = [(num_labels(examinations), codes, size) for size in sizes]
      return [s * jax.random.normal(k, size) for k, size, s in zip(keys, shapes, deviations, strict=True)], {}

    def generate(
      theta: PyTree, statistics: PyTree, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
      place, code = place_of(y), code_of(noise, codes)
      x = jnp.zeros((noise.shape[0], starts[0].size))
      for index, (learned, start, factor) in enumerate(zip(theta, starts, factors, strict=True)):
        coefficients = learned[place, code]
        unit = start.reshape(1, -1) + (coefficients if factor is None else coefficients @ factor)
        if bounded and not train:
          unit = jnp.clip(unit, 0.0, 1.0)
        x = jnp.where((t == index)[:, None], classifiers[index].from_unit(unit), x)
      return x.reshape(-1, *shape), statistics

    def put(theta: PyTree, t: int, y: np.ndarray, chosen: np.ndarray, unit: jax.Array) -> PyTree:
      offsets, factor = unit.reshape(len(y), -1) - starts[t].reshape(1, -1), factors[t]
      coefficients = offsets if factor is None else offsets @ factor.T / jnp.sum(jnp.square(factor), axis=1)[None]
      return [*theta[:t], theta[t].at[place_of(y), chosen].set(coefficients), *theta[t + 1 :]]

    def coordinates(theta: PyTree, chosen: jax.Array, y: jax.Array, t: int) -> jax.Array:
      learned: jax.Array = theta[t][place_of(y), chosen]
      return scales[t][None] * learned

    batch_size = codes * max(classifier.num_classes for classifier in classifiers)
    placed = coordinates if within else None
    return Generator(init, generate, stratified_noise(1), 1, batch_size, codes, put, placed)

  return make


def typical_deviation(examinations: Sequence[Examination]) -> float:
  """The deviation of black and white pixels whose means the networks subtract; .3 if they subtract no images."""
  if not all(examination.tells_mean for examination in examinations):
    return 0.3
  starts = jnp.stack([examination.origin for examination in examinations])
  return float(jnp.sqrt(jnp.mean(jnp.clip(starts * (1 - starts), 0.01))))


def network(
  module: Callable[[Sequence[Examination]], nn.Module], *, noise: NoiseFn, noise_dim: int, batch_size: int
) -> GeneratorFactory:
  """A generator that is a flax module.

  Args:
    module: from the examinations to the module, which is called as ``module(noise, place, t, train=...)`` with the
      places of the labels (`places_of`), and returns samples in the classifiers' own units.
    noise: the noise of a training step.
    noise_dim: D.
    batch_size: M.

  Returns:
    A factory.
  """
  _checks.check_at_least("noise_dim", noise_dim, 1)
  _checks.check_at_least("batch_size", batch_size, 1)

  def make(examinations: Sequence[Examination]) -> Generator:
    made, place_of = module(examinations), places_of(examinations)
    apply: Any = made.apply

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
      zeros = jnp.zeros(1, jnp.int32)
      variables: Any = jax.jit(made.init)(key, jnp.zeros((1, noise_dim)), zeros, zeros)
      return variables["params"], variables.get("batch_stats", {})

    def generate(
      theta: PyTree, statistics: PyTree, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool
    ) -> tuple[jax.Array, PyTree]:
      variables, y = {"params": theta, "batch_stats": statistics}, place_of(y)
      if not train:
        return apply(variables, noise, y, t), statistics
      x, updated = apply(variables, noise, y, t, train=True, mutable=["batch_stats"])
      return x, updated.get("batch_stats", {})

    return Generator(init, generate, noise, noise_dim, batch_size)

  return make


class MLPGenerator(nn.Module):
  """A fully connected generator g(noise, y, t; theta): cheap enough that a training step is spent in the classifier.

  Attributes:
    sample_shape: shape of one sample.
    num_labels: number of labels altogether.
    num_classifiers: T.
    hidden: widths of the hidden layers, each Linear-BatchNorm-ReLU.
    batch_norm: whether the hidden layers have batch norm.
    output: maps the last layer [M, *sample_shape] to samples.
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
    """Maps noise [M, D], places of labels [M] and classifier indices [M] to samples [M, *sample_shape]."""
    x = conditioned(noise, y, t, self.num_labels, self.num_classifiers)
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
    """Maps noise [M, D], places of labels [M] and classifier indices [M] to samples [M, *sample_shape]; D > 1."""
    shape = (self.num_classifiers, self.num_labels, self.codebook_size, noise.shape[1] - 1)
    codebook = self.param("codebook", nn.initializers.normal(1.0), shape)
    x = codebook[t, y, code_of(noise, self.codebook_size)] + self.jitter * noise[:, 1:]
    x = conditioned(x, y, t, self.num_labels, self.num_classifiers, strength=1.0)
    for width in self.hidden:
      x = nn.silu(nn.Dense(width, kernel_init=kaiming())(x))
    x = nn.Dense(math.prod(self.sample_shape), kernel_init=kaiming())(x)
    return self.output(x.reshape(-1, *self.sample_shape), t)


class ConvGenerator(nn.Module):
  """The paper's generator: three fully connected layers, three transposed convolutions, ReLU, batch norm, Kaiming.

  Attributes:
    sample_shape: height, width (multiples of 4) and channels of an image.
    num_labels: number of labels altogether.
    num_classifiers: T.
    hidden: widths of the first two fully connected layers.
    channels: channels of the three feature maps that the transposed convolutions take.
    output: maps the last layer [M, H, W, C] to images.
  """

  sample_shape: Sequence[int]
  num_labels: int
  num_classifiers: int = 1
  hidden: Sequence[int] = (256, 256)
  channels: Sequence[int] = (64, 32, 16)
  output: Callable[[jax.Array], jax.Array] = lambda x: x

  @nn.compact
  def __call__(self, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool = False) -> jax.Array:
    """Maps noise [M, D], places of labels [M] and classifier indices [M] to images [M, H, W, C]."""
    height, width, out_channels = self.sample_shape

    def normalised(x: jax.Array) -> jax.Array:
      return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, use_fast_variance=False)(x))

    x = conditioned(noise, y, t, self.num_labels, self.num_classifiers)
    for size in (*self.hidden, height // 4 * (width // 4) * self.channels[0]):
      x = normalised(nn.Dense(size, kernel_init=kaiming())(x))
    x = x.reshape(-1, height // 4, width // 4, self.channels[0])
    for size in self.channels[1:]:
      x = normalised(nn.ConvTranspose(size, (4, 4), strides=(2, 2), kernel_init=kaiming())(x))
    return self.output(nn.ConvTranspose(out_channels, (3, 3), kernel_init=kaiming(0.1))(x))


def convolutional(*, noise_dim: int = 64, batch_size: int = 500) -> GeneratorFactory:
  """The paper's network, for images around what the classifiers subtract from them: ``sigmoid(logit(start) + x)``.

  Args:
    noise_dim: dimension of its standard normal noise.
    batch_size: M.

  Returns:
    A factory, which raises a ValueError unless inputs are images in a range, with sides in multiples of 4.
  """

  def module(examinations: Sequence[Examination]) -> nn.Module:
    classifier, shape = examinations[0].classifier, examinations[0].classifier.input_shape
    if classifier.value_range is None or len(shape) != 3 or shape[0] % 4 or shape[1] % 4:
      raise ValueError(
        "a convolutional generator needs images in a range, with height and width in multiples of 4; inputs have shape"
        f" {shape} and range {classifier.value_range}."
      )
    start = jnp.mean(jnp.stack([examination.origin for examination in examinations]), axis=0)
    start = jnp.clip(start, 3e-3, 1 - 3e-3)  # the logit of pure black is not finite
    around = (jnp.log(start) - jnp.log1p(-start))[None]
    output = lambda x: classifier.from_unit(nn.sigmoid(around + x))
    return ConvGenerator(shape, num_labels(examinations), len(examinations), output=output)

  return network(module, noise=normal_noise(noise_dim), noise_dim=noise_dim, batch_size=batch_size)


def code_of(noise: jax.Array, codes: int) -> jax.Array:
  """Which of equally likely codes [M] the first coordinate of standard normal noise [M, D] picks."""
  uniform = jax.scipy.stats.norm.cdf(noise[:, 0])
  return jnp.clip((uniform * codes).astype(jnp.int32), 0, codes - 1)


def noise_of(codes: int) -> jax.Array:
  """Noise [codes, 1] of which `code_of` reads the codes in their order.

  >>> code_of(noise_of(3), 3).tolist()
  [0, 1, 2]
  """
  return jax.jit(jax.scipy.stats.norm.ppf)((np.arange(codes) + 0.5) / codes)[:, None]


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
