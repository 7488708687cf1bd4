"""What is shown while a generator is trained: one line that counts the whole run."""

import pytest

from kkt_jax.cli.progress import Progress
from kkt_jax.cli.training import RunProgress
from kkt_jax.reconstruction import Schedule


@pytest.fixture
def shown(monkeypatch):
  """(steps done, steps altogether), each time that the line is shown."""
  seen = []
  monkeypatch.setattr(Progress, "update", lambda self, step, shown="": seen.append((step, self.total)))
  return seen


SCHEDULE = Schedule(steps=100, restarts=2, restart_steps=10, tables=3, match_steps=300, joint_steps=50)  # 710 in all


def test_restarts_tables_and_the_network_are_counted_in_one_line(shown):
  line = RunProgress(SCHEDULE)
  line.on_restart(0, 10, {})
  line.on_restart(1, 10, {})
  for table in range(3):
    line.on_log(table * 100 + 1, {})
    line.on_log(table * 100 + 100, {})
    if table < 2:
      line.on_restart(2 * table + 2, 5, {})
      line.on_restart(2 * table + 3, 10, {})
  line.on_match(100, 0.5)
  line.on_match(300, 0.5)
  line.on_log(301, {})
  line.on_log(350, {})
  line.end()
  steps = [10, 20, 21, 120, 125, 140, 141, 240, 245, 260, 261, 360, 460, 660, 661, 710]
  assert shown == [(step, 710) for step in steps]


def test_tables_that_are_not_needed_shorten_it_and_so_does_an_early_end(shown):
  line = RunProgress(SCHEDULE)
  line.on_restart(1, 10, {})
  line.on_log(70, {})  # all samples are certified
  line.on_match(300, 0.5)
  line.on_log(350, {})
  assert shown == [(20, 710), (90, 710), (390, 440), (440, 440)]
  shown.clear()
  line = RunProgress(Schedule(steps=100))
  line.on_log(40, {})
  line.end()
  assert shown == [(40, 100), (40, 40)]


def test_a_resumed_run_goes_on_where_it_was(shown):
  line = RunProgress(SCHEDULE, start=50)
  line.on_log(60, {})
  assert shown == [(80, 710)]
  untrained = RunProgress(Schedule(steps=0, match_steps=10, joint_steps=2))
  untrained.on_match(10, 0.5)
  untrained.on_log(2, {})
  assert shown[1:] == [(10, 12), (12, 12)]
