"""What a bias is by the function alone: names and shapes of parameter trees do not count."""

from collections import namedtuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from kkt_jax._tree import tensor_names
from kkt_jax.classifiers.dataflow import bias_tensors

X = jnp.ones((3, 4))
W, B = jnp.ones((4, 4)), jnp.zeros(4)
Layer = namedtuple("Layer", ["matrix", "shift"])
TREES = {
  "list of tuples": [(W, B), (W, B)],
  "named tuples": [Layer(W, B), Layer(W, B)],
  "flat names": {"1": W, "2": B, "3": W, "4": B},
  "dotted names": {"0.weight": W, "1.bias": B, "2.weight": W, "3.bias": B},
  "misleading names": {"a_bias": W, "b_kernel": B, "c_bias": W, "d_kernel": B},
  "biases with two axes": [(W, B[None]), (W, B[None])],
}


@pytest.mark.parametrize("tree", TREES)
def test_layers_have_biases_whatever_the_tree(tree):
  def mlp(p, x):
    w1, b1, w2, b2 = jax.tree.leaves(p)
    return jax.nn.relu(x @ w1 + jnp.reshape(b1, (1, -1))) @ w2 + jnp.broadcast_to(b2, (3, 4))

  assert bias_tensors(mlp, TREES[tree], X) == (False, True, False, True)


class Everything(nn.Module):
  """A layer of many kinds each; batch norm with stored statistics."""

  @nn.compact
  def __call__(self, x):
    x = nn.remat(nn.Dense)(4)(x)
    x = nn.BatchNorm(use_running_average=False, name="batch")(x)
    x = nn.BatchNorm(use_running_average=True, name="stored")(x)
    x = nn.PReLU()(nn.LayerNorm()(x))
    x = nn.WeightNorm(nn.Dense(4))(x)
    x = nn.relu(nn.Conv(4, (2,))(x[:, :, None]))
    return nn.Dense(2)(nn.MultiHeadDotProductAttention(2)(x, x).reshape(len(x), -1))


def test_flax_modules_have_the_biases_of_their_names():
  module = Everything()
  variables = jax.eval_shape(module.init, jax.random.key(0), X)
  rest = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables["batch_stats"])
  function = lambda p, x: module.apply({"params": p, "batch_stats": rest}, x, mutable=["batch_stats"])[0]
  names, found = tensor_names(variables["params"]), bias_tensors(function, variables["params"], X)
  assert dict(zip(names, found, strict=True)) == {name: name.endswith("/bias") for name in names}
  assert sum(found) == 11


@jax.custom_jvp
def twice(x):
  return 2 * x


twice.defjvp(lambda primals, tangents: (twice(primals[0]), 2 * tangents[0]))


def scanned(p, x):
  return jax.lax.scan(lambda h, layer: (jax.nn.relu(h @ layer[0] + layer[1]), None), x, (p["w"], p["b"]))[0]


def recurrent(p, x):  # u first meets h0, a parameter, and the data in the second turn only
  return jax.lax.scan(lambda h, row: (jnp.tanh(row @ p["w"] + h @ p["u"] + p["b"]), None), p["b_start"], x)[0]


def looped(p, x):
  return jax.lax.while_loop(lambda h: h.sum() < p["limit"], lambda h: h @ p["w"] + p["b"], x)


def branching(p, x):
  use = lambda x: x @ p["w"] + p["b"]
  return jax.lax.cond(p["which"] > 0, use, lambda x: x * p["scale"], x)


def chosen_by_data(p, x):
  return jax.lax.cond(x.sum() > 0, lambda: jnp.ones((3, 4)) + p["level"], lambda: x + p["b"])


STACK = {"w": jnp.ones((2, 4, 4)), "b": jnp.zeros((2, 4))}
FUNCTIONS = [
  (lambda p, x: x * p["scale"] - jnp.exp(-p["b"]), {"scale": B, "b": B}),
  (lambda p, x: jax.jit(jax.vmap(lambda row: row @ p["w"] + p["b"]))(x), {"w": W, "b": B}),
  (lambda p, x: twice(x + p["b"]) * p["scale"], {"b": B, "scale": B}),
  (lambda p, x: x @ (p["gain"] * p["v"] / jnp.linalg.norm(p["v"])) + p["b"] * 2, {"gain": B, "v": W, "b": B}),
  (lambda p, x: (x + p["tied"]) * p["tied"] + p["b"], {"tied": B, "b": B}),
  (lambda p, x: jnp.maximum(x, p["floor"]) / p["scale"], {"floor": B, "scale": B}),
  (lambda p, x: x @ (p["w"] + p["w_more"]), {"w": W, "w_more": W}),
  (lambda p, x: x @ p["w"], {"w": W, "unused": B}),
  (lambda p, x: jnp.broadcast_to(p["level"], (3, 4)), {"level": B}),
  (lambda p, x: (x - p["b_mean"]) * jax.lax.rsqrt(p["var"] + 1e-5), {"b_mean": B, "var": B + 1}),
  (scanned, STACK),
  (recurrent, {"w": W, "u": W, "b": B, "b_start": B}),
  (looped, {"w": W, "b": B, "limit": jnp.float32(1)}),
  (branching, {"w": W, "b": B, "which": jnp.float32(1), "scale": B}),
  (chosen_by_data, {"level": B, "b": B}),
  (lambda p, x: jax.lax.fori_loop(0, 2, lambda i, h: h @ p["w"] + p["b"], x), {"w": W, "b": B}),
]


@pytest.mark.parametrize("case", range(len(FUNCTIONS)))
def test_what_is_added_to_data_and_multiplied_nowhere_is_a_bias(case):
  function, params = FUNCTIONS[case]
  expected = tuple(name.split("_")[0] == "b" for name in tensor_names(params))
  with jax.numpy_rank_promotion("allow"):
    assert bias_tensors(function, params, X) == expected
