"""Training steps stay on the device: none copies between host and device, and each is compiled once."""

import dataclasses

import jax
import pytest
import tiny_run

from kkt_jax import generators, reconstruction
from kkt_jax.generators import flows
from kkt_jax.reconstruction import loop
from kkt_jax.reconstruction.step import make_train_step

GENERATORS = {
  "network": None,
  "table": generators.table(codes=4),
  "flow": flows.Flow(width=8, blocks=1, steps=2, batch_size=12),  # as in the stage that trains it by the equations
}


@pytest.fixture(scope="module", params=GENERATORS)
def begin(request):
  examinations, recipe = tiny_run.problem(batch_norm=False, num_classifiers=1)
  if GENERATORS[request.param]:
    recipe = dataclasses.replace(recipe, generator=GENERATORS[request.param])
  own = [examination.classifier for examination in examinations]
  return reconstruction.start(own, recipe, examinations=examinations)


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_no_step_copies_or_is_compiled_again(begin, steps_per_call):
  step, calls = make_train_step(begin.problem), []

  def guarded(state, count):
    count = jax.device_put(count)  # the only number that the host knows and the device does not
    with jax.transfer_guard("disallow"):
      calls.append(count)
      return step(state, begin.classifiers, begin.trainer.equations, count)

  observer = reconstruction.Observer(log_every=5)
  loop.fit(guarded, begin.state, num_steps=10, steps_per_call=steps_per_call, observer=observer)
  assert len(calls) == {1: 10, 4: 4}[steps_per_call]  # four steps and one, twice
  assert step._cache_size() == 1


def test_the_guard_sees_a_copy():
  with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
    jax.jit(lambda x: x + 1)(1)
