"""The Gram matrix of gradients against the products of the gradients themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.membership import _gram


def network(params, x):
  """A convolution, a dense layer, and one that is used twice: only the gradient of the dense kernel has rank one."""
  hidden = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
  hidden = jax.nn.relu(hidden.reshape(len(x), -1) @ params["dense"] + params["bias"][None])
  for _ in range(2):
    hidden = jnp.tanh(hidden @ params["twice"])
  return jnp.sum(hidden**3)


@pytest.mark.parametrize("kept", [2**30, 1])
def test_products_are_those_of_the_gradients(kept, monkeypatch):
  monkeypatch.setattr(_gram, "_ROWS", kept)
  random = np.random.default_rng(0)
  shapes = {"conv": (3, 3, 1, 2), "dense": (32, 5), "bias": (5,), "twice": (5, 5)}
  params, target = ({name: random.normal(size=shape) for name, shape in shapes.items()} for _ in range(2))
  x = jnp.asarray(random.normal(size=(7, 4, 4, 1)), jnp.float32)
  x = x.at[3].set(0)  # a sample without a gradient by the first kernel
  of_each = jax.vmap(jax.grad(lambda params, x: network(params, x[None])), in_axes=(None, 0))
  gradients = lambda chunk: jax.tree.leaves(of_each(params, x[chunk]))
  total, products = _gram.gram(gradients, len(x), jax.tree.leaves(target), chunk_size=3)
  rows = np.concatenate([np.asarray(leaf, np.float64).reshape(len(x), -1) for leaf in gradients(slice(None))], axis=1)
  flat = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(target)])
  np.testing.assert_allclose(total, rows @ rows.T, atol=1e-5 * np.max(rows @ rows.T))
  np.testing.assert_allclose(products, rows @ flat, atol=1e-5 * np.max(np.abs(rows @ flat)))


def test_a_dense_kernel_is_never_kept_whole(monkeypatch):
  kept = []
  monkeypatch.setattr(_gram, "_products", lambda a, b: kept.append(a.shape[1]) or np.zeros((len(a), len(b))))
  rank_one = jnp.einsum("ma,mb->mab", jnp.ones((4, 30)), jnp.arange(8.0).reshape(4, 2))
  _gram.gram(lambda chunk: [rank_one[chunk], jnp.ones((4, 2))[chunk]], 4, [np.ones((30, 2)), np.ones(2)], chunk_size=2)
  assert set(kept) == {2}


def test_many_entries_are_summed_with_random_signs_and_dense_kernels_stay_exact(monkeypatch):
  monkeypatch.setattr(_gram, "SKETCHED", 1000)
  monkeypatch.setattr(_gram, "_SUMS", 2**12)
  random = np.random.default_rng(0)
  common = random.normal(size=(1, 40, 40, 8))
  wide = np.asarray(random.normal(size=(6, 40, 40, 8)) + common, np.float32)
  dense = np.einsum("ma,mb->mab", random.normal(size=(6, 30)), random.normal(size=(6, 5))).astype(np.float32)
  target = [random.normal(size=leaf.shape[1:]) for leaf in (wide, dense)]
  gradients = lambda chunk: [jnp.asarray(wide[chunk]), jnp.asarray(dense[chunk])]
  total, products = _gram.gram(gradients, 6, target, chunk_size=2)
  flat = np.concatenate([leaf.reshape(6, -1).astype(np.float64) for leaf in (wide, dense)], axis=1)
  wanted = flat @ flat.T
  lengths = np.sqrt(np.diag(wanted))
  np.testing.assert_allclose(np.diag(total), np.diag(wanted), rtol=1e-5)
  np.testing.assert_allclose(products, flat @ np.concatenate([leaf.ravel() for leaf in target]), rtol=1e-3)
  errors = (total - wanted) / np.outer(lengths, lengths)
  assert np.abs(errors).max() < 5 / 2**6  # a standard deviation is one over the root of the number of sums
  assert np.linalg.eigvalsh(total).min() > 0


def test_a_gradient_that_is_no_product_in_a_later_chunk_is_taken_for_none(monkeypatch):
  monkeypatch.setattr(_gram, "SKETCHED", 10)
  own = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
  own[:2] = 0  # which is a product
  many = np.ones((4, 20), np.float32)
  total, _ = _gram.gram(
    lambda chunk: [jnp.asarray(own[chunk]), jnp.asarray(many[chunk])], 4, [np.ones((6, 5)), np.ones(20)], chunk_size=2
  )
  flat = np.concatenate([own.reshape(4, -1), many], axis=1).astype(np.float64)
  np.testing.assert_allclose(total, flat @ flat.T, rtol=1e-4)  # as many sums as entries, and more
