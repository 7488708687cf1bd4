"""From classifiers to a generator: `kkt_jax.reconstruct` with a folder, logs and progress."""

from collections.abc import Callable, Mapping, Sequence

import jax

import kkt_jax
from kkt_jax import sharding
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifiers import PyTree
from kkt_jax.cli.progress import Progress, say
from kkt_jax.cli.workdir import Workdir
from kkt_jax.reconstruction import Observer, Schedule

_SHOWN = ("total", "residual", "mean squared error")


class RunProgress:
  """One line that counts all steps of a run: restarts and training of each table, then fitting and training a network.

  Stages that turn out not to be needed shorten it.
  """

  def __init__(self, schedule: Schedule, *, start: int = 0):
    """Starts the clock.

    Args:
      schedule: of the run.
      start: steps that an earlier run has trained the first table.
    """
    self._schedule = schedule
    self._tries = schedule.restarts * schedule.restart_steps if schedule.steps else 0
    self._table = self._tries + schedule.steps
    self._network = schedule.tables * self._table
    total = self._network + (schedule.match_steps + schedule.joint_steps if schedule.match_steps else 0)
    self._at, self._left_out = self._tries + start if start else 0, 0
    self._progress = Progress("generator", total, start=self._at)

  def on_restart(self, restart: int, step: int, metrics: Mapping[str, float]) -> None:
    """See `kkt_jax.reconstruction.Observer`, as for the other two."""
    table, number = divmod(restart, self._schedule.restarts)
    self._show(table * self._table, number * self._schedule.restart_steps + step, metrics)

  def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
    """A step of the training of a table, or of the network after all of them."""
    steps, tables = self._schedule.steps, self._schedule.tables
    table = (step - 1) // steps if step <= tables * steps else tables
    begin = self._network + self._schedule.match_steps if table == tables else table * self._table + self._tries
    self._show(begin, step - table * steps, metrics)

  def on_match(self, step: int, error: float) -> None:
    """A step of fitting the network."""
    self._show(self._network, step, {"mean squared error": error})

  def end(self) -> None:
    """Completes the line of a run that ended early."""
    done = self._at - self._left_out
    if done < self._progress.total:
      self._progress.total = done
      self._progress.update(done)

  def _show(self, begin: int, step: int, metrics: Mapping[str, float]) -> None:
    """Shows a step of the stage that begins at ``begin``; the last step of the stage before it was shown, too."""
    less = max(begin - self._at, 0)
    self._at, self._left_out = begin + step, self._left_out + less
    self._progress.total -= less
    shown = {name: value for name, value in metrics.items() if name.split("/")[0] in _SHOWN}
    self._progress.update(self._at - self._left_out, shown)


class _Resuming(Checkpointer):
  """Checkpoints that bring the logs and the progress in line with the step from which training goes on."""

  def __init__(self, out: Workdir, schedule: Schedule):
    super().__init__(out.path / "generator")
    self._out, self._schedule = out, schedule
    self.progress = RunProgress(schedule)

  def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
    restored = super().restore(like)
    step = restored[0] if restored else 0
    if step:
      say(f"resuming the generator at step {step}")
    self._out.forget_after(step)
    self.progress = RunProgress(self._schedule, start=step)
    return restored


def train_generator(
  out: Workdir,
  examinations: Sequence[kkt_jax.Examination],
  recipe: kkt_jax.Recipe,
  *,
  seed: int,
  log_every: int,
  save_every: int,
  microbatch_size: int | None = None,
  draw: Callable[[kkt_jax.Reconstruction], None] | None = None,
) -> kkt_jax.Reconstruction:
  """Trains a generator from what classifiers' weights say, or resumes; no data can reach this function.

  If there are several devices, of one process or of several, the samples of every step are split among them.

  Args:
    out: the workdir; checkpoints go to its folder ``generator``, a network of continuous noise to ``network``.
    examinations: of the attacked classifiers.
    recipe: how it is trained.
    seed: of the generator.
    log_every: steps between logged metrics.
    save_every: steps between checkpoints and pictures.
    microbatch_size: see `kkt_jax.reconstruct`.
    draw: called with the reconstruction so far after every checkpoint, to draw a picture.
  """
  complete = kkt_jax.reconstruction.recipes.complete(recipe, examinations)
  mesh = None
  if jax.device_count() > 1:
    mesh = sharding.device_mesh()
    say(f"training on {jax.device_count()} devices")

  def on_log(step: int, metrics: dict[str, float]) -> None:
    out.log(step, metrics)
    checkpointer.progress.on_log(step, metrics)

  def on_round(t: int, number: int, found: int, most: int) -> None:
    say(f"polishing, classifier {t + 1}, round {number}: {found} training samples certified, of at most {most}")

  with _Resuming(out, complete.schedule) as checkpointer:
    made = kkt_jax.reconstruct(
      [examination.classifier for examination in examinations],
      complete,
      seed=seed,
      examinations=examinations,
      microbatch_size=microbatch_size,
      mesh=mesh,
      saver=checkpointer,
      observer=Observer(
        log_every=log_every,
        save_every=save_every,
        on_log=on_log,
        on_save=draw or (lambda reconstruction: None),
        on_restart=lambda *restart: checkpointer.progress.on_restart(*restart),
        on_round=on_round,
        on_match=lambda *match: checkpointer.progress.on_match(*match),
      ),
    )
  checkpointer.progress.end()
  if made.table is not None:
    made.save(out.path / "network")
  return made
