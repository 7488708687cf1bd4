"""Flax modules of the experiments: classifiers and the multiplier network; the generators are in `kkt_jax.generators`.

The library proper takes functions; `from_module` turns one of these classifiers into a `kkt_jax.classifier.Classifier`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from kkt_jax.classifier import Classifier, make_classifier, PyTree


def kaiming(scale: float = 1.0) -> nn.initializers.Initializer:
  """Kaiming initialisation (He et al. 2015), the paper's, with its standard deviation times ``scale``."""
  return nn.initializers.variance_scaling(2.0 * scale**2, "fan_in", "normal")


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


def _batch_norm(train: bool, *, dtype: DTypeLike | None) -> nn.BatchNorm:
  """Batch norm of the classifiers; momentum 0 makes the stored statistics those of the last batch exactly."""
  return nn.BatchNorm(use_running_average=not train, momentum=0.0, use_fast_variance=False, dtype=dtype)


class MLPClassifier(nn.Module):
  """The paper's classifier: fully connected layers, ReLU, optional batch norm before each ReLU.

  Attributes:
    num_classes: C.
    hidden: widths of the hidden layers; two of them make the paper's three layers.
    batch_norm: Linear-BatchNorm-ReLU instead of Linear-ReLU.
    use_bias: biases on the linear layers.
    init_scale: factor on the Kaiming initial weights; small values are what brings gradient descent to a KKT point.
    gate_sharpness: smooths the derivative of ReLU, see `relaxed_relu`; exact where None.
    dtype: of the computations up to the last hidden layer, such as ``jnp.bfloat16``; parameters, their gradients,
      statistics and logits stay as they are. That of the parameters where None.
  """

  num_classes: int
  hidden: Sequence[int] = (256, 256)
  batch_norm: bool = False
  use_bias: bool = True
  init_scale: float = 1.0
  gate_sharpness: float | None = None
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps x [M, ...] to logits [M, C]."""

    kernel_init = kaiming(self.init_scale)
    x = x.reshape(x.shape[0], -1)
    for width in self.hidden:
      x = nn.Dense(width, use_bias=self.use_bias, kernel_init=kernel_init, dtype=self.dtype)(x)
      if self.batch_norm:
        x = _batch_norm(train, dtype=self.dtype)(x)
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
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [M, H, W, channels] to logits [M, C]."""

    kernel_init = kaiming(self.init_scale)
    for width in self.channels:
      x = nn.Conv(width, (3, 3), strides=2, use_bias=self.use_bias, kernel_init=kernel_init, dtype=self.dtype)(x)
      if self.batch_norm:
        x = _batch_norm(train, dtype=self.dtype)(x)
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

  Only ``gradient_fn`` has the module's relaxed gates and precision; everything else is exact. With batch norm the
  training function uses the statistics of the batch, and the stored ones are kept for comparison.

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
  exact = module.clone(gate_sharpness=None, dtype=None)
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
  last_norm = f"BatchNorm_{len(module.hidden) - 1}" if isinstance(module, MLPClassifier) and module.batch_norm else None

  def features_fn(params: PyTree, x: jax.Array) -> jax.Array:
    _, kept = predict(
      {"params": params, **constants}, x - shift, capture_intermediates=lambda m, _: m.name == last_norm
    )
    return kept["intermediates"][last_norm]["__call__"][0]

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
    features_fn=features_fn if last_norm else None,
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
      h = nn.relu(nn.Dense(width, kernel_init=kaiming())(h))
    # A small last layer: all multipliers start near the initial bias, whatever the input.
    small = nn.initializers.normal(1e-2)
    bias = nn.initializers.constant(self.initial_bias)
    return nn.Dense(self.num_outputs, kernel_init=small, bias_init=bias)(h)
