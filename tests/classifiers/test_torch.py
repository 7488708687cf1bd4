"""PyTorch modules are the classifiers that they are in PyTorch; `make test-torch` installs what it takes."""

import copy
import pathlib

import chex
import flax_twin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kkt_jax

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-torch")
torchax = pytest.importorskip("torchax", reason="torchax is not installed: make test-torch", exc_type=Exception)
nn = torch.nn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
LAST, Y = jnp.asarray(flax_twin.X), flax_twin.Y  # channels last, as the library has them
X = flax_twin.X.reshape(-1, 1, 8, 8)


@pytest.fixture(autouse=True)
def _as_torch_computes():
  torch.manual_seed(0)
  with jax.numpy_rank_promotion("allow"):
    yield


def dense():
  return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def convolutional():
  return nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, momentum=0.5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5),
    nn.Linear(36, 10),
  )  # fmt: skip


class Residual(nn.Module):
  def __init__(self):
    super().__init__()
    self.first, self.norm = nn.Linear(64, 16), nn.LayerNorm(16)
    self.inner = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)
    self.last = nn.Linear(16, 10)
    self.register_buffer("scale", torch.full((16,), 2.0))

  def forward(self, x):
    h = self.norm(self.first(x.flatten(1))) * self.scale
    return self.last(h + self.inner(h[:, None])[:, 0])


def trained(module, steps=160, decay=1e-3):
  """By full-batch descent whose steps shrink to nothing."""
  optimizer = torch.optim.SGD(module.parameters(), 0.2, momentum=0.9, weight_decay=decay)
  schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - 2 * step / steps))
  module.train()[5].eval()
  for _ in range(steps):
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(torch.tensor(X)), torch.tensor(Y)).backward()
    optimizer.step()
    schedule.step()
  return module


class Spelled(nn.Module):
  """A layer that is a function."""

  def __init__(self, function):
    super().__init__()
    self.forward = function


class Attention(nn.MultiheadAttention):
  def forward(self, x):
    return super().forward(x, x, x)[0]


class Skip(nn.Sequential):
  def forward(self, x):
    return x + super().forward(x)


rows = lambda x: x.flatten(2)  # [M, channels, pixels]
LAYERS = {
  "nn.ReLU": nn.ReLU,
  "F.relu": lambda: Spelled(nn.functional.relu),
  "torch.relu": lambda: Spelled(torch.relu),
  "x.relu": lambda: Spelled(lambda x: x.relu()),
  "leaky_relu": nn.LeakyReLU,
  "gelu": nn.GELU,
  "silu": nn.SiLU,
  "tanh": nn.Tanh,
  "sigmoid": nn.Sigmoid,
  "dropout": nn.Dropout,
  "layer_norm": lambda: nn.LayerNorm((4, 8, 8)),
  "group_norm": lambda: nn.GroupNorm(2, 4),
  "batch_norm": lambda: nn.BatchNorm2d(4),
  "max_pool": lambda: nn.MaxPool2d(3, 2, 1),
  "F.max_pool2d": lambda: Spelled(lambda x: nn.functional.max_pool2d(x, 2)),
  "avg_pool": lambda: nn.AvgPool2d(2),
  "adaptive_avg_pool": lambda: nn.AdaptiveAvgPool2d(3),
  "view": lambda: Spelled(lambda x: x.view(len(x), -1)),
  "flatten": lambda: Spelled(lambda x: torch.flatten(x, 1)),
  "grouped_conv_residual": lambda: Skip(nn.Conv2d(4, 4, 3, padding=1, groups=2)),
  "log_softmax": lambda: nn.LogSoftmax(1),
  "mean": lambda: Spelled(lambda x: x.mean((2, 3))),
  "attention": lambda: nn.Sequential(Spelled(rows), Attention(64, 2, batch_first=True)),
  "transformer": lambda: nn.Sequential(Spelled(rows), nn.TransformerEncoderLayer(64, 2, 8, batch_first=True)),
  # beyond the usual
  "elu": nn.ELU,
  "hardswish": nn.Hardswish,
  "mish": nn.Mish,
  "prelu": nn.PReLU,
  "softplus": nn.Softplus,
  "rms_norm": lambda: nn.RMSNorm(8),
  "instance_norm": lambda: nn.InstanceNorm2d(4, affine=True),
  "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
  "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
  "dilated_conv": lambda: nn.Conv2d(4, 4, 3, dilation=2),
  "same_conv": lambda: nn.Conv2d(4, 4, 4, padding="same"),
  "circular_conv": lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
  "transposed_conv": lambda: nn.ConvTranspose2d(4, 4, 3, 2),
  "conv1d_batch_norm": lambda: nn.Sequential(Spelled(rows), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)),
  "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 2, 3)),
  "upsample": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
  "pixel_shuffle": lambda: nn.PixelShuffle(2),
  "lstm": lambda: nn.Sequential(Spelled(rows), nn.LSTM(64, 5, batch_first=True), Spelled(lambda x: x[0])),
  "einsum": lambda: Spelled(lambda x: torch.einsum("mcij,mdij->mcd", x, x)),
  "interpolate": lambda: Spelled(lambda x: nn.functional.interpolate(x, 5)),
  "scaled_dot_product": lambda: Spelled(lambda x: nn.functional.scaled_dot_product_attention(x, x, x)),
}


def ended(*layers):
  """The layers on an image of four channels, and ten logits."""
  module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(10))
  module.eval()(torch.tensor(X[:1]))
  return module


def lenet():
  pooled = lambda a, b: (nn.Conv2d(a, b, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2))
  return ended(
    *pooled(4, 6), *pooled(6, 16), nn.Flatten(), nn.Linear(64, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh()
  )


def vgg():
  block = lambda a, b: (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(True))
  pool = nn.MaxPool2d(2)
  end = nn.Flatten(), nn.Linear(64, 32), nn.ReLU(True), nn.Dropout()
  return ended(*block(4, 8), *block(8, 8), pool, *block(8, 16), *block(16, 16), pool, *end)


class Block(nn.Module):
  def __init__(self, before, width, stride):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
    self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
    self.downsample = None
    if stride > 1 or before != width:
      self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

  def forward(self, x):
    h = self.bn2(self.conv2(nn.functional.relu(self.bn1(self.conv1(x)))))
    return nn.functional.relu(h + (x if self.downsample is None else self.downsample(x)))


def resnet18(width=8):
  widths = [width * own for own in (1, 1, 1, 2, 2, 4, 4, 8, 8)]
  places = enumerate(zip(widths, widths[1:], strict=False))
  blocks = [Block(a, b, 2 if i and not i % 2 else 1) for i, (a, b) in places]
  stem = nn.Conv2d(4, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
  return ended(*stem, *blocks, nn.AdaptiveAvgPool2d(1))


class Turned(nn.Sequential):
  def forward(self, x):
    return super().forward(x.transpose(1, 2)).transpose(1, 2)


def mixer():
  mlp = lambda n, inner: (nn.LayerNorm(n), nn.Linear(n, inner), nn.GELU(), nn.Dropout(0.1), nn.Linear(inner, n))
  tokens = nn.Conv2d(4, 12, 2, 2), nn.Flatten(2), Spelled(lambda x: x.transpose(1, 2))  # [M, 16, 12]
  blocks = [layer for _ in range(2) for layer in (Skip(Turned(*mlp(16, 8))), Skip(*mlp(12, 24)))]
  return ended(*tokens, *blocks, nn.LayerNorm(12), Spelled(lambda x: x.mean(1)))


class Tokens(nn.Module):
  def __init__(self, width):
    super().__init__()
    self.patches = nn.Conv2d(4, width, 2, 2)
    self.first, self.places = (nn.Parameter(torch.randn(1, n, width)) for n in (1, 17))

  def forward(self, x):
    x = self.patches(x).flatten(2).transpose(1, 2)
    return torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places


def vit():
  layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True, norm_first=True)
  encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
  return ended(Tokens(16), encoder, nn.LayerNorm(16), Spelled(lambda x: x[:, 0]))


NETWORKS = (dense, convolutional, Residual, lenet, vgg, resnet18, mixer, vit)


def by_name(classifier, tree):
  return dict(zip(kkt_jax.tensor_names(classifier.params), jax.tree.leaves(tree), strict=True))


def compare_gradients(own, function, module, count=6):
  """The derivative of the mean cross-entropy by each tensor differs by a ten thousandth, as a vector."""
  module.zero_grad()
  nn.functional.cross_entropy(module(torch.tensor(X[:count])), torch.tensor(Y[:count])).backward()
  loss = lambda p: -jnp.mean(jax.nn.log_softmax(function(p, LAST[:count]))[jnp.arange(count), Y[:count]])
  found = by_name(own, jax.grad(loss)(own.params))
  size = max(float(parameter.grad.norm()) for parameter in module.parameters())
  for name, parameter in module.named_parameters():
    apart = np.linalg.norm(found[name.replace(".", "/")] - parameter.grad.numpy())
    assert apart <= 1e-4 * float(parameter.grad.norm()) + 1e-6 * size, name  # a bias before batch norm has none


@pytest.mark.parametrize("make", [*NETWORKS, *(pytest.param(own, id=name) for name, own in LAYERS.items())])
def test_logits_and_gradients_are_those_of_pytorch(make):
  module = make() if make in NETWORKS else ended(make())
  own = kkt_jax.from_torch(module, input_shape=(1, 8, 8))
  assert own.input_shape == (8, 8, 1)
  assert kkt_jax.tensor_names(own.params) == sorted(n.replace(".", "/") for n, _ in module.named_parameters())
  logits = module.eval()(torch.tensor(X)).detach().numpy()
  np.testing.assert_allclose(own.predict(LAST), logits, atol=1e-5 * np.abs(logits).max())
  compare_gradients(own, own.predict_fn, module)
  norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
  for norm in norms:
    norm.train()
  if norms:
    compare_gradients(own, own.apply_fn, module)


def test_batch_norm_follows_the_batch_and_its_statistics_hold_where_pytorch_has_trained():
  module = trained(convolutional())
  before = {name: value.clone() for name, value in module.state_dict().items()}
  own = kkt_jax.from_torch(module, input_shape=(1, 8, 8))
  assert own.batch_coupled and module.training
  np.testing.assert_array_equal(own.statistics["1"]["var"], module[1].running_var.numpy())
  chex.assert_trees_all_close(own.statistics_fn(own.params, LAST), own.statistics, rtol=1e-4, atol=1e-5)
  assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
  logits = module(torch.tensor(X))
  np.testing.assert_allclose(own.apply_fn(own.params, LAST), logits.detach().numpy(), atol=1e-4)
  module.zero_grad()
  nn.functional.cross_entropy(logits, torch.tensor(Y)).backward()
  mean_loss = lambda p: -jnp.mean(jax.nn.log_softmax(own.apply_fn(p, LAST))[jnp.arange(100), Y])
  found = dict(zip(kkt_jax.tensor_names(own.params), jax.tree.leaves(jax.grad(mean_loss)(own.params)), strict=True))
  for name, parameter in module.named_parameters():
    np.testing.assert_allclose(found[name.replace(".", "/")], parameter.grad.numpy(), rtol=1e-3, atol=1e-5)


def test_the_own_training_data_leave_as_much_as_in_flax():
  """100 digits, batch norm, full batch: trained by PyTorch, and in flax from the same start with the same steps."""
  norm = nn.BatchNorm1d(flax_twin.WIDTH, momentum=1 - flax_twin.KEPT)
  module = nn.Sequential(nn.Flatten(), nn.Linear(64, flax_twin.WIDTH), norm, nn.ReLU(), nn.Linear(flax_twin.WIDTH, 10))
  pair = lambda layer: (layer.weight.detach().numpy().T, layer.bias.detach().numpy())
  twin = flax_twin.from_flax(pair(module[1]), pair(norm), pair(module[4]), norm.eps)
  optimizer = torch.optim.SGD(module.parameters(), flax_twin.RATE)
  for _ in range(flax_twin.STEPS):
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(torch.tensor(X)), torch.tensor(Y)).backward()
    optimizer.step()
  flax_twin.check_residual(kkt_jax.from_torch(module, input_shape=(1, 8, 8)), twin)


def test_frozen_tensors_and_buffers_are_constants_and_a_start_is_known():
  start, module = nn.DataParallel.__new__(nn.DataParallel), dense()  # whose own constructor fails beside torchax
  nn.Module.__init__(start)
  start.module = dense()
  module[1].requires_grad_(False)
  own = kkt_jax.from_torch(module, input_shape=(1, 8, 8), initial=start, offset=0.5 * LAST[0])
  assert kkt_jax.tensor_names(own.params) == ["3/bias", "3/weight"]
  np.testing.assert_array_equal(own.initial_params["3"]["bias"], start.module[3].bias.detach().numpy())
  expected = module(torch.tensor(X - 0.5 * X[:1])).detach().numpy()
  np.testing.assert_allclose(own.predict(LAST), expected, atol=1e-5)


def test_a_merged_adapter_is_a_fine_tuned_module_of_low_rank():
  public = dense()
  merged = copy.deepcopy(public)
  with torch.no_grad():
    merged[1].weight += torch.randn(12, 2) @ torch.randn(2, 64)  # alpha / r is in them
  own = kkt_jax.from_torch(merged, input_shape=(1, 8, 8), initial=public.state_dict())
  change = own.params["1"]["weight"] - own.initial_params["1"]["weight"]
  assert np.linalg.matrix_rank(change, rtol=1e-5) == 2
  chex.assert_trees_all_equal(own.params["3"], own.initial_params["3"])
  examination = kkt_jax.examine(own)
  assert examination.form == "change" and examination.subspace is None  # the rank is the adapter's
  with pytest.raises(ValueError, match="^initial must have the tensors of module; it lacks .'1.bias', '3.bias'"):
    kkt_jax.from_torch(merged, input_shape=(1, 8, 8), initial={"1.weight": 0, "3.weight": 0})


def test_the_first_audit_of_the_documentation_is_what_it_says(tmp_path, monkeypatch):
  """The code of docs/frameworks.md, on weights that PyTorch has saved."""
  code = (pathlib.Path(__file__).parents[2] / "docs" / "frameworks.md").read_text().split("```python\n")[1]
  monkeypatch.chdir(tmp_path)
  module = nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))
  images = np.kron(X, np.ones((1, 1, 4, 4)))[..., 2:-2, 2:-2].astype(np.float32)
  optimizer = torch.optim.Adam(module.parameters(), 1e-2)
  for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(torch.tensor(images[:50])), torch.tensor(Y[:50])).backward()
    optimizer.step()
  torch.save(module.state_dict(), "weights.pt")
  given = {"x_train": images[:50], "y_train": Y[:50], "x_held_out": images[50:], "y_held_out": Y[50:]}
  space = given | {"torch": torch, "module": copy.deepcopy(module)}
  exec(code.partition("```")[0], space)
  assert space["report"].scored is not None and (tmp_path / "runs/audit/report.html").exists()


def test_one_logit_is_two_classes():
  module = nn.Linear(5, 1)
  own = kkt_jax.from_torch(module, input_shape=(5,), value_range=None)
  x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
  logits = own.predict(x)
  assert own.num_classes == 2
  np.testing.assert_allclose(logits[:, 1:] - logits[:, :1], module(torch.tensor(x)).detach().numpy(), atol=1e-5)


class Strange(nn.Linear):
  def __init__(self, what):
    super().__init__(4, 3)
    self.what = what

  def forward(self, x):
    z = super().forward(x)
    if self.what == "two":
      return z, x
    if self.training and self.what != "softmax":
      return (z, z) if self.what == "head" else z - z.mean(0)
    return nn.functional.dropout(z) if self.what == "noise" else z if self.what != "softmax" else z.softmax(-1)


class TwoInputs(nn.Linear):
  def forward(self, x, y):
    return super().forward(x) + y


@pytest.mark.parametrize(
  ("module", "said"),
  [
    (lambda: torch.jit.script(nn.Linear(4, 3)), "was not scripted"),
    (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 3))), "was not scripted"),
    (lambda: nn.Linear, "must be a torch.nn.Module"),
    (lambda: Strange("two"), "one array of logits; it gives a tuple"),
    (lambda: Strange("noise"), "draw no random numbers at inference"),
    (lambda: Strange("softmax"), "logits, not probabilities"),
    (lambda: Strange("head"), "logits alone, in training, too; it gives a tuple"),
    (lambda: Strange("centred"), "in training, must .* normalise by the batch in no layer of batch norm"),
    (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), "torch.nn.utils.parametrizations; .''. do not"),
    (
      lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(1, 3)),
      "aten::adaptive_max_pool2d has no lowering",
    ),
    (lambda: TwoInputs(4, 3), "missing 1 required positional argument: 'y'"),
    (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 3)), "must have an integer type"),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)), "got False in .'1'"),
  ],
  ids=[
    "scripted",
    "scripted inside",
    "class",
    "outputs",
    "noise",
    "softmax",
    "heads",
    "centred",
    "weight norm",
    "no lowering",
    "inputs",
    "integers",
    "untracked",
  ],
)
def test_what_is_no_such_classifier_is_refused(module, said):
  with pytest.raises(ValueError, match=said):
    kkt_jax.from_torch(module(), input_shape=(4,))
