"""PyTorch modules are the classifiers that they are in PyTorch; `make test-torch` installs what it takes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import kkt_jax

torch = pytest.importorskip("torch", reason="PyTorch is not installed: make test-torch")
torchax = pytest.importorskip("torchax", reason="torchax is not installed: make test-torch", exc_type=Exception)
nn = torch.nn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
X, Y = (own[:100] for own in load_digits(return_X_y=True))
X = (X / 16).reshape(-1, 1, 8, 8).astype(np.float32)
LAST = jnp.asarray(X.transpose(0, 2, 3, 1))  # channels last, as the library has them


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


@pytest.mark.parametrize("make", [dense, convolutional, Residual])
def test_logits_and_gradients_of_samples_are_those_of_pytorch(make):
  module = make()
  own = kkt_jax.from_torch(module, input_shape=(1, 8, 8))
  assert own.input_shape == (8, 8, 1)
  assert kkt_jax.tensor_names(own.params) == sorted(n.replace(".", "/") for n, _ in module.named_parameters())
  module.eval()
  logits = module(torch.tensor(X))
  np.testing.assert_allclose(own.predict(LAST), logits.detach().numpy(), atol=1e-5)
  found = jax.jacrev(own.predict_fn)(own.params, LAST[:2])
  names = kkt_jax.tensor_names(own.params)
  found = dict(zip(names, jax.tree.leaves(found), strict=True))
  for sample, label in ((0, 1), (1, 7)):
    module.zero_grad()
    logits[sample, label].backward(retain_graph=True)
    for name, parameter in module.named_parameters():
      gradient = found[name.replace(".", "/")][sample, label]
      np.testing.assert_allclose(gradient, parameter.grad.numpy(), rtol=1e-4, atol=1e-5)


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
  mean_loss = lambda p: -jnp.mean(jax.nn.log_softmax(own.gradient_fn(p, LAST))[jnp.arange(100), Y])
  found = dict(zip(kkt_jax.tensor_names(own.params), jax.tree.leaves(jax.grad(mean_loss)(own.params)), strict=True))
  for name, parameter in module.named_parameters():
    np.testing.assert_allclose(found[name.replace(".", "/")], parameter.grad.numpy(), rtol=1e-3, atol=1e-5)


def test_frozen_tensors_and_buffers_are_constants_and_a_start_is_known():
  start, module = dense(), dense()
  module[1].requires_grad_(False)
  own = kkt_jax.from_torch(module, input_shape=(1, 8, 8), initial=start, offset=0.5 * LAST[0])
  assert kkt_jax.tensor_names(own.params) == ["3/bias", "3/weight"]
  np.testing.assert_array_equal(own.initial_params["3"]["bias"], start[3].bias.detach().numpy())
  expected = module(torch.tensor(X - 0.5 * X[:1])).detach().numpy()
  np.testing.assert_allclose(own.predict(LAST), expected, atol=1e-5)


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
    return nn.functional.dropout(z) if self.what == "noise" else z.softmax(-1)


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
    (lambda: TwoInputs(4, 3), "missing 1 required positional argument: 'y'"),
    (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 3)), "must have an integer type"),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)), "got False in .'1'"),
  ],
  ids=["scripted", "scripted inside", "class", "outputs", "noise", "softmax", "inputs", "integers", "untracked"],
)
def test_what_is_no_such_classifier_is_refused(module, said):
  with pytest.raises(ValueError, match=said):
    kkt_jax.from_torch(module(), input_shape=(4,))
