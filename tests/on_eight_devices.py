"""What `test_parallel` runs in a process that has eight virtual devices."""

import re

import chex
import jax
import numpy as np
import pytest
from tiny_run import problem

from kkt_jax import parallel, training

_COLLECTIVE = re.compile(
  r"= (?P<shapes>.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)"
  r"(?:-start)?\("
)
CASES = [
  {"batch_norm": True, "num_classifiers": 2},
  {"batch_norm": False, "num_classifiers": 2, "microbatch_size": 24},
  {"batch_norm": False, "num_classifiers": 1, "batch_size": 42},  # 42 samples on 8 devices
]


def on_mesh(parts, mesh):
  return parallel.replicate(parts, mesh)


@pytest.mark.parametrize("settings", CASES)
def test_a_step_on_eight_devices_is_the_step_on_one(settings):
  method, *parts = problem(**settings)
  alone, metrics = training.make_train_step(method).call(*parts)
  mesh = parallel.device_mesh()
  method, *parts = problem(**settings, mesh=mesh)
  together, metrics_together = training.make_train_step(method).call(*on_mesh(parts, mesh))
  chex.assert_trees_all_close(parallel.fetch(together.params), alone.params, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(parallel.fetch(together.statistics), alone.statistics, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(parallel.fetch(metrics_together), metrics, rtol=1e-4, atol=1e-6)


def collectives(settings):
  """The kinds of collectives in a compiled step, how many numbers go through them, and how many ought to."""
  mesh = parallel.device_mesh()
  method, *parts = problem(**settings, mesh=mesh)
  compiled = training.make_train_step(method).call.lower(*on_mesh(parts, mesh)).compile()
  kinds, numbers = set(), 0
  for match in _COLLECTIVE.finditer(compiled.as_text()):
    kinds.add(match["kind"])
    numbers += sum(
      int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", match["shapes"])
    )
  state, classifiers, _ = parts
  # The stationarity sum of each classifier, the gradient of theta, and that of eta from each classifier.
  large = [[c.params for c in classifiers], state.params["theta"], [state.params["eta"]] * len(classifiers)]
  return kinds, numbers, sum(leaf.size for leaf in jax.tree.leaves(large))


def test_only_sums_cross_devices():
  settings = {"batch_norm": False, "num_classifiers": 2, "microbatch_size": 24}
  kinds, numbers, expected = collectives(settings)
  assert kinds == {"all-reduce"}
  assert expected <= numbers <= expected + 20  # and a few scalars; nothing that is one for each sample
  assert collectives(settings | {"batch_size": 96})[1] == numbers


def test_with_batch_norm_its_statistics_cross_too_and_nothing_that_grows_with_the_batch():
  settings = {"batch_norm": True, "num_classifiers": 1}
  kinds, numbers, _ = collectives(settings)
  assert kinds == {"all-reduce"}
  assert collectives(settings | {"batch_size": 96})[1] == numbers


def test_parameters_split_over_a_model_axis_give_the_same_step():
  method, *parts = problem(num_classifiers=1)
  alone, _ = training.make_train_step(method).call(*parts)
  mesh = parallel.device_mesh(model=4)
  method, state, classifiers, conditions = problem(num_classifiers=1, mesh=mesh)
  split = parallel.split_parameters((classifiers, conditions), mesh)
  kernel = split[0][0].params["Dense_0"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (4, 4)  # of (4, 16): a quarter on each device
  together, _ = training.make_train_step(method).call(parallel.replicate(state, mesh), *split)
  chex.assert_trees_all_close(parallel.fetch(together.params), alone.params, rtol=1e-5, atol=1e-6)


def test_a_mesh_that_does_not_fit_is_named():
  with pytest.raises(ValueError, match="model must divide the number of devices, 8; got 3"):
    parallel.device_mesh(model=3)
