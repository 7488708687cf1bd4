"""The neighbours' extraction in PyTorch beside this library: the same loss and gradient, and how runs are compared."""

import types

from example_networks import random_mlp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import peers
from kkt_jax.auditing.samples import Samples
from kkt_jax.cli.flags import UsageError
from kkt_jax.kkt import conditions, losses, multipliers

SHARPNESS = 5.0


@jax.custom_jvp
def gate(x):
  """ReLU with a smooth derivative wherever it is differentiated; `relaxation` keeps the true one of values."""
  return jax.nn.relu(x)


gate.defjvp(lambda primals, tangents: (gate(*primals), jax.nn.sigmoid(SHARPNESS * primals[0]) * tangents[0]))


def with_their_gates(params, x):
  for name in ("Dense_0", "Dense_1"):
    x = gate(x @ params[name]["kernel"] + params[name]["bias"][None])
  return x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"][None]


def test_their_residual_and_its_gradients_are_those_of_this_library():
  torch = pytest.importorskip("torch", reason="PyTorch is not installed; nothing else needs it")
  classifier, x, y = random_mlp(gate_sharpness=SHARPNESS)
  raw = jnp.linspace(0.1, 1.0, len(y))
  wanted = conditions.weight_decay_conditions(classifier.params)

  def residual(x, raw, gradient_fn):
    mu = multipliers.on_runner_up(raw[:, None] * len(y), classifier.apply_fn(classifier.params, x), y)  # ours is a mean
    return losses.squared_residual(wanted, losses.stationarity_sum(gradient_fn, classifier.params, x, y, mu))

  own = peers.Extraction(classifier, y.tolist(), peers.Settings(sharpness=SHARPNESS))
  with torch.no_grad():
    own.x.copy_(torch.tensor(np.array(x)))
    own.multipliers.copy_(torch.tensor(np.array(raw)))
  theirs = own.residual()
  assert float(theirs.detach()) == pytest.approx(float(residual(x, raw, classifier.apply_fn)), rel=1e-5)
  gradients = jax.grad(residual, argnums=(0, 1))(x, raw, with_their_gates)
  for gradient, expected in zip(torch.autograd.grad(theirs, (own.x, own.multipliers)), gradients, strict=True):
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)


def test_their_step_goes_down():
  pytest.importorskip("torch", reason="PyTorch is not installed; nothing else needs it")
  classifier, _, y = random_mlp()
  own = peers.Extraction(classifier, y.tolist(), peers.Settings("Adam", rate=0.01, multiplier_rate=0.01))
  values = [own.step() for _ in range(50)]
  assert values[-1] < values[0]
  assert own.samples().shape == (len(y), 2)


def test_without_torch_the_message_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "torch", None)  # as if it were not there
  with pytest.raises(UsageError, match="pip install torch"):
    peers.require_torch()


def test_a_curve_is_the_cover_over_the_time_of_the_run_alone(monkeypatch):
  clock = iter(range(100))
  monkeypatch.setattr(peers, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
  x = np.random.default_rng(0).random((3, 8, 8, 1))
  train = Samples(x, np.zeros(3, int))
  worse = Samples(1 - x, np.zeros(3, int))
  points = peers.curve(iter([lambda: worse, lambda: train, lambda: worse]), train, seconds=10)
  assert [seconds for seconds, _ in points] == [1, 2, 3]
  assert points[1][1] == pytest.approx(1.0)
  assert peers.reached(points, 0.9) == 2
  assert len(peers.curve(iter([lambda: worse] * 9), train, seconds=2)) == 2


def test_sentences_compare_at_the_best_cover_that_theirs_has():
  curves = {"theirs, published": [], "theirs, SGD": [(5.0, 0.1)], "theirs, Adam": [(5.0, 0.2), (40.0, 0.4)]}
  none, first, missed, second, _ = peers.race(curves | {"this library": [(2.0, 0.3), (4.0, 0.5)]})
  assert none == "theirs, published: not finite before it was first looked at."
  assert first.endswith("2.5 times") and missed.startswith("MISSED")
  assert second == "theirs, Adam: cover 0.400 after 40 s; this library after 4 s, 10.0 times"
