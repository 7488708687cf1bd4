"""The one corridor from classifiers to a generator: `kkt_jax.reconstruct` with a folder, logs and progress."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

import kkt_jax
from kkt_jax import sharding
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifiers import PyTree
from kkt_jax.cli.progress import Progress, say
from kkt_jax.cli.workdir import Workdir


class _Resuming(Checkpointer):
  """Checkpoints that bring the logs and the progress in line with the step from which training goes on."""

  def __init__(self, out: Workdir, num_steps: int):
    super().__init__(out.path / "generator")
    self._out, self._num_steps = out, num_steps
    self.progress = Progress("generator", num_steps)

  def restore(self, like: PyTree) -> tuple[int, PyTree] | None:
    restored = super().restore(like)
    step = restored[0] if restored else 0
    if step:
      say(f"resuming the generator at step {step}")
    self._out.forget_after(step)
    self.progress = Progress("generator", self._num_steps, start=step)
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
  schedule = complete.schedule
  restarts = Progress("restarts", schedule.restarts * schedule.restart_steps)
  mesh = None
  if jax.device_count() > 1:
    mesh = sharding.device_mesh()
    say(f"training on {jax.device_count()} devices")

  def on_log(step: int, metrics: dict[str, float]) -> None:
    out.log(step, metrics)
    checkpointer.progress.update(step, _shown(metrics))

  def on_restart(restart: int, step: int, metrics: dict[str, float]) -> None:
    restarts.update(restart * schedule.restart_steps + step, _shown(metrics))

  def on_round(t: int, number: int, found: int, most: int) -> None:
    say(f"polishing, classifier {t + 1}, round {number}: {found} training samples certified, of at most {most}")

  matching: list[Progress] = []  # its clock starts when it does

  def on_match(step: int, error: float) -> None:
    if not matching:
      matching.append(Progress("network", schedule.match_steps, start=step))
    matching[0].update(step, {"mean squared error": error})

  later = (schedule.tables - 1) * schedule.steps + schedule.joint_steps if schedule.match_steps else 0
  with _Resuming(out, schedule.steps + later) as checkpointer:
    made = kkt_jax.reconstruct(
      [own.classifier for own in examinations],
      complete,
      seed=seed,
      examinations=examinations,
      microbatch_size=microbatch_size,
      mesh=mesh,
      saver=checkpointer,
      on_log=on_log,
      on_save=draw,
      on_restart=on_restart,
      on_round=on_round,
      on_match=on_match,
      log_every=log_every,
      save_every=save_every,
    )
  if made.table is not None:
    made.save(out.path / "network")
  return made


def _shown(metrics: dict[str, Any]) -> dict[str, float]:
  return {name: value for name, value in metrics.items() if name.split("/")[0] in ("total", "residual")}
