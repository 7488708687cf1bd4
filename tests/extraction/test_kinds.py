"""No certificate is false, whatever the data: searches that start from mixtures of training samples."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.certificates import count, KINDS, train
import kkt_jax
from kkt_jax.extraction import exact

LEAST = {"digits": 8, "words": 20, "one_hot": 20, "binary": 20, "framed": 8, "sixteen_levels": 12}  # of 30 or 40


def mixtures(x, y, seed):
  """Training samples with noise, and blends of two of a class: what a generator makes at best."""
  random = np.random.default_rng(seed)
  partner = np.array([random.choice(np.flatnonzero(y == label)) for label in y])
  share = random.uniform(0.5, 0.9, (len(x), *[1] * (x.ndim - 1)))
  noise = lambda size: size * random.normal(size=x.shape)
  guesses = np.concatenate([x + noise(0.1), share * x + (1 - share) * x[partner] + noise(0.03)])
  return jnp.asarray(guesses, jnp.float32), np.concatenate([y, y])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_no_certificate_is_false(kind, seed):
  x, y = KINDS[kind](seed)
  examination = kkt_jax.examine(train(x, y, steps=3000, seed=seed))
  found, _ = exact.find(examination, *mixtures(x, y, seed), exact.Effort(rounds=2))
  counts = count(found.unit, x)
  assert counts["false"] == 0, counts
  assert counts["found"] >= LEAST.get(kind, 0), counts
