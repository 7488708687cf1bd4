"""The loop around a training step: logging, saving and callbacks."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from kkt_jax import _checks
from kkt_jax._typing import PyTree
from kkt_jax.reconstruction.step import TrainState


class TrainingDiverged(FloatingPointError):
  """A loss term or the gradient became NaN or infinite; the message names it."""


@runtime_checkable
class Saver(Protocol):
  """What keeps states, such as `kkt_jax.checkpoint.Checkpointer`."""

  def steps(self) -> Sequence[int]:
    """The steps that are kept."""

  def save(self, step: int, state: PyTree) -> None:
    """Keeps a state."""

  def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
    """The newest state that is kept and whole, if there is one."""


def _ignore(*_: Any) -> None:
  """Tells nobody."""


@dataclasses.dataclass(frozen=True)
class Observer:
  """Callbacks for the progress of a reconstruction, and how often they are called; none of it changes the result.

  Attributes:
    log_every: training steps between logged metrics.
    save_every: training steps between saved states.
    on_log: called with (step, metrics as floats); metrics of several classifiers have names such as ``"residual/1"``.
      Steps go on counting where a further table and then the network are trained, from ``schedule.steps`` for each.
    on_save: called with the reconstruction so far, after the saver.
    on_restart: called with (restart, step, metrics) while starts are tried; those of a further table go on counting.
    on_round: called with (classifier, round, number of certified samples, most that there can be) while samples are
      polished.
    on_match: called with (step, mean squared error) while a network is fitted to the samples.

  Raises:
    ValueError: an interval below 1.

  >>> Observer(log_every=0)
  Traceback (most recent call last):
  ValueError: log_every must be at least 1; got 0.
  """

  log_every: int = 50
  save_every: int = 500
  on_log: Callable[[int, dict[str, float]], None] = _ignore
  on_save: Callable[[Any], None] = _ignore
  on_restart: Callable[[int, int, dict[str, float]], None] = _ignore
  on_round: Callable[[int, int, int, int], None] = _ignore
  on_match: Callable[[int, float], None] = _ignore

  def __post_init__(self) -> None:
    for name in ("log_every", "save_every"):
      _checks.check_at_least(name, getattr(self, name), 1)


SILENT = Observer()  # tells nobody


def fit(
  step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
  state: TrainState,
  *,
  num_steps: int,
  steps_per_call: int = 1,
  saver: Saver | None = None,
  observer: Observer = SILENT,
) -> TrainState:
  """Runs steps until ``state.step`` reaches ``num_steps``; a restored state goes on where it was.

  Metrics are read one log interval late, so that the device never waits for them; before a state is saved they are read
  at once, so that no saved state is one that a NaN has reached. An interruption (Ctrl-C) is passed on after one more
  save.

  Args:
    step: ``(state, count) -> (state, metrics)``, as from `kkt_jax.reconstruction.step.make_train_step`.
    state: where to start.
    num_steps: step at which to stop.
    steps_per_call: greatest number of steps in one compiled call.
    saver: keeps the state every ``observer.save_every`` steps and at the end.
    observer: its ``on_log`` is called every ``log_every`` steps and at the end, its ``on_save`` with every saved state.

  Returns:
    The final state.

  Raises:
    TrainingDiverged: a NaN or an infinity appeared. States saved before are kept.
    ValueError: ``steps_per_call`` is below 1.
  """
  _checks.check_at_least("steps_per_call", steps_per_call, 1)
  pending: tuple[int, dict[str, jax.Array]] | None = None

  def flush() -> None:
    nonlocal pending
    if pending is not None:
      (at, metrics), pending = pending, None
      floats = _floats(metrics)
      _check_converging(at, floats)
      observer.on_log(at, floats)

  number = int(state.step)
  try:
    while number < num_steps:
      ahead = (every - number % every for every in (observer.log_every, observer.save_every))
      count = min(steps_per_call, num_steps - number, *ahead)
      state, metrics = step(state, None if steps_per_call == 1 else jax.device_put(count))
      number += count
      last = number == num_steps
      saving = saver is not None and (number % observer.save_every == 0 or last)
      if saving or number % observer.log_every == 0 or last:
        flush()
        pending = (number, metrics)
      if saving:
        assert saver is not None
        flush()
        saver.save(number, state)
        observer.on_save(state)
  except KeyboardInterrupt:
    flush()
    if saver is not None and int(state.step) not in saver.steps() and _is_finite(state.params):
      saver.save(int(state.step), state)
    raise
  flush()
  return state


def _floats(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
  """Metrics as floats: [T] becomes one entry for each classifier, named ``name/t`` if there are several."""
  floats = {}
  for name, value in metrics.items():
    if value.ndim == 0 or value.shape == (1,):
      floats[name] = float(value.reshape(()))
    else:
      floats |= {f"{name}/{t}": float(entry) for t, entry in enumerate(value)}
  return floats


def _is_finite(tree: PyTree) -> bool:
  return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


def _check_converging(step: int, metrics: Mapping[str, float]) -> None:
  broken = [name for name, value in metrics.items() if not math.isfinite(value)]
  if broken:
    cause = next((name for name in broken if name not in ("total", "gradient_norm")), broken[0])
    raise TrainingDiverged(
      f"{cause} became {metrics[cause]} at or before step {step}. The last checkpoint is from before that; a smaller"
      f" learning rate or a smaller weight of {cause} is the usual cure."
    )
