"""What `test_parallel` runs in a process that has eight virtual devices."""

import functools
import re

import chex
import jax
import numpy as np
import pytest
from tiny_run import problem

from kkt_jax import sharding
from kkt_jax.reconstruction import reconstruct, start
from kkt_jax.reconstruction.step import make_train_step

_COLLECTIVE = re.compile(
  r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
  r"(?:-start)?\("
)
COUPLED = {"batch_norm": True, "num_classifiers": 2}
SEPARABLE = {"batch_norm": False, "num_classifiers": 2, "microbatch_size": 24}


def begin(mesh=None, microbatch_size=None, **settings):
  """A step, and what it takes."""
  examinations, recipe = problem(**settings)
  classifiers = [own.classifier for own in examinations]
  own = start(classifiers, recipe, examinations=examinations, microbatch_size=microbatch_size, mesh=mesh)
  parts = (own.state, own.classifiers, own.trainer.equations)
  return make_train_step(own.problem), parts if mesh is None else sharding.replicate(parts, mesh)


@functools.cache
def on_mesh(**settings):
  """The compiled step on all devices, and what it takes."""
  step, parts = begin(sharding.device_mesh(), **settings)
  return step.lower(*parts, None).compile(), parts


@pytest.mark.parametrize("settings", [COUPLED, SEPARABLE])
def test_a_step_on_eight_devices_is_the_step_on_one(settings):
  step, parts = begin(**settings)
  alone, metrics = step(*parts, None)
  step, parts = on_mesh(**settings)
  together, metrics_together = step(*parts, None)
  chex.assert_trees_all_close(sharding.fetch(together.params), alone.params, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(sharding.fetch(together.statistics), alone.statistics, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(sharding.fetch(metrics_together), metrics, rtol=1e-4, atol=1e-6)


def test_a_reconstruction_with_restarts_comes_back_from_its_devices():
  examinations, recipe = problem(num_classifiers=1, batch_norm=False, steps=4, restarts=2, restart_steps=2)
  classifiers = [own.classifier for own in examinations]
  state = reconstruct(classifiers, recipe, examinations=examinations, mesh=sharding.device_mesh()).state
  assert int(state.step) == 4
  assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(state))


def collectives(settings):
  """The kinds of collectives in a compiled step, how many numbers go through them, and how many ought to."""
  compiled, (state, classifiers, _) = on_mesh(**settings)
  kinds, numbers = set(), 0
  for match in _COLLECTIVE.finditer(compiled.as_text()):
    kinds.add(match["kind"])
    numbers += sum(
      int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", match["shapes"])
    )
  # The stationarity sum of each classifier, the gradient of theta, and that of eta from each classifier.
  large = [[c.params for c in classifiers], state.params["theta"], [state.params["eta"]] * len(classifiers)]
  return kinds, numbers, sum(leaf.size for leaf in jax.tree.leaves(large))


def test_only_sums_cross_devices():
  kinds, numbers, expected = collectives(SEPARABLE)
  assert kinds == {"all-reduce"}
  # Of the loop over two microbatches, which older versions unroll.
  expected *= 2 if jax.__version_info__ < (0, 10) else 1
  assert expected <= numbers <= expected + 20  # and a few scalars; nothing that is one for each sample
  assert collectives(SEPARABLE | {"batch_size": 96, "microbatch_size": 48})[1] == numbers


def test_with_batch_norm_its_statistics_cross_too_and_nothing_that_grows_with_the_batch():
  kinds, numbers, _ = collectives(COUPLED)
  assert kinds == {"all-reduce"}
  assert collectives(COUPLED | {"batch_size": 96})[1] == numbers


def test_parameters_split_over_a_model_axis_give_the_same_step():
  settings = {"num_classifiers": 1, "batch_norm": False, "batch_size": 41}  # on two copies
  step, parts = begin(**settings)
  alone, _ = step(*parts, None)
  mesh = sharding.device_mesh(model=4)
  step, (state, classifiers, conditions) = begin(mesh, **settings)
  split = sharding.split_parameters((classifiers, conditions), mesh)
  kernel = split[0][0].params["Dense_0"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (4, 4)  # of (4, 16): a quarter on each device
  together, _ = step(state, *split, None)
  chex.assert_trees_all_close(sharding.fetch(together.params), alone.params, rtol=1e-5, atol=1e-6)


def test_a_mesh_that_does_not_fit_is_named():
  with pytest.raises(ValueError, match="model must divide the number of devices, 8; got 3"):
    sharding.device_mesh(model=3)
