"""Random sums of logits: their derivatives beside those of forward mode, and Lambda from them beside that from all."""

import functools

from example_networks import random_mlp
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kkt_jax.kkt import functionals, homogeneity, rates


def three_layers(params, x):
  hidden = jax.nn.relu(x @ params["a"] + params["b"][None])
  return jax.nn.relu(hidden @ params["c"]) * params["s"] @ params["d"]


def case():
  random = np.random.default_rng(0)
  shapes = {"a": (4, 5), "b": (5,), "c": (5, 6), "d": (6, 3), "s": ()}
  params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
  return params, jnp.asarray(random.normal(size=(10, 4)), jnp.float32)


def test_every_change_is_that_of_forward_mode():
  params, x = case()
  found = functionals.functionals(three_layers, params, x)
  for row, (own, weights) in enumerate(functionals.sums(three_layers, params, x, len(found.values))):
    total = lambda p, own=own, weights=weights: jnp.vdot(three_layers(p, own), weights)
    assert found.values[row] == pytest.approx(float(total(params)), rel=1e-4, abs=1e-5)
    for name, changes in zip(sorted(params), found.changes, strict=True):
      value, random = params[name], functionals.normal(params[name])
      first = random[..., :1] if value.ndim else random
      directions = {"scaled": value, "uneven": value * random, "random": random}
      directions["shift"] = np.broadcast_to(first, value.shape)
      directions["one_sided"] = directions["shift"] * (np.arange(value.shape[-1]) == 0 if value.ndim else 1)
      for kind, direction in directions.items():
        moved = params | {name: jnp.asarray(direction)}
        tangents = {other: moved[other] if other == name else jnp.zeros_like(params[other]) for other in params}
        expected = float(jax.jvp(total, (params,), (tangents,))[1])
        assert getattr(changes, kind)[row] == pytest.approx(expected, rel=1e-4, abs=1e-4), (name, kind)
      for units in (changes.into[row], changes.out[row]):
        if units.size:
          assert units.sum() == pytest.approx(changes.scaled[row], rel=1e-4, abs=1e-4)
    if row == 9:  # of logits and of margins
      break


def test_after_the_first_ones_a_shift_of_all_logits_changes_nothing():
  params, x = case()
  found = functionals.functionals(three_layers, params, x)
  last = found.margins[sorted(params).index("d")]
  assert np.linalg.norm(last.shift) < 1e-5 * np.linalg.norm(last.one_sided)
  assert len(last.shift) == len(found.values) - len(found.logits)


def test_of_large_networks_each_sum_sees_a_few_inputs_and_all_take_part(monkeypatch):
  monkeypatch.setattr(functionals, "_LARGE", 10)
  params, x = case()
  own = [np.asarray(batch) for batch, _ in functionals.sums(three_layers, params, x, 8)]
  assert {len(batch) for batch in own} == {4}
  seen = {row.tobytes() for batch in own for row in batch}
  assert seen == {np.asarray(row).tobytes() for row in x[:8]}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("bias", [1.0, 1e-4])
def test_lambda_of_sums_is_that_of_all_logits(large, bias, monkeypatch):
  monkeypatch.setattr(functionals, "_LARGE", 10 if large else 10**9)
  params, x = case()
  params["b"] = bias * params["b"]
  known = functionals.functionals(three_layers, params, x)
  found = rates.balanced(homogeneity.summed_equations(known), params)
  whole = rates.balanced(homogeneity.derivative_equations(three_layers, params, x), params)
  assert int(found.null_space_dimension) == int(whole.null_space_dimension)
  for a, b in zip(*(jax.tree.leaves(own.rates) for own in (found, whole)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_with_batch_norm_rates_are_on_the_last_normalisation_and_the_last_layer():
  classifier, x, _ = random_mlp(batch_norm=True, num_samples=20)
  known = functionals.functionals(classifier.apply_fn, classifier.params, x)
  solve = functools.partial(rates.balanced, params=classifier.params)
  found = solve(homogeneity.summed_equations(known))
  assert float(found.target_rate) == pytest.approx(0.5, abs=1e-3)
  groups = rates.parameter_groups(found)
  assert int(groups["Dense_0"]["kernel"][0, 0]) == -1 and int(groups["BatchNorm_1"]["scale"][0]) == 0
