"""Figs. 4 and 5: points on a circle, recovered from the weights of classifiers of the plane.

Eighteen points lie evenly on the unit circle in three classes. A classifier, with batch norm or with weight decay, is
trained on them by full-batch gradient descent, the points are forgotten, and a generator is trained so that the
classifier's conditions hold for what it generates (`experiments.attack.plane`). ``fig4.png`` shows the points, the
classifier's regions and generated samples.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from experiments.attack import methods
from kkt_jax.cli import flags
from kkt_jax.cli import weights as weights_flag
from kkt_jax.cli.flags import flag

NUM_POINTS, NUM_CLASSES = 18, 3
_SHARED = ("seed", "labels", "classifiers", "width", "batch_norm", "weight_decay", "init_scale", "pretrain_steps")
_MATCH_STEPS, _JOINT_STEPS = 8000, 400  # of the network of continuous noise


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  seed: int = flag(0, "Seed of everything random.", lower=0, group="Data")
  labels: str = flag(
    "alternating", "Classes of neighbouring points: in turn, or six in a row.", choices=("alternating", "contiguous")
  )
  classifiers: int = flag(
    1, "2 splits the points evenly between two classifiers (Fig. 5).", lower=1, upper=2, group="The attacked classifier"
  )
  batch_norm: bool = flag(True, "Whether it has batch norm; without, it is trained with weight decay.")
  width: int = flag(64, "Width of its two hidden layers.", lower=3)
  weight_decay: float = flag(1e-3, "Weight decay of its training, without batch norm.", lower=1e-8)
  init_scale: float = flag(0.05, "Batch norm: scale of its initial weights and of its last batch norm.", lower=1e-6)
  pretrain_steps: int = flag(20_000, "Steps of full-batch gradient descent.", lower=1)
  method: str = flag(
    "kkt",
    "kkt is this library's; points, points_published, ce, inversion and means are its neighbours'; the others are"
    " ablations. See experiments/attack/methods.py.",
    choices=tuple(methods.CIRCLE),
    group="The generator",
  )
  generator_seed: int = flag(0, "Further seed of the generator alone: the same classifier, another run.", lower=0)
  generator: str = flag(
    "network",
    "network: of continuous noise, fitted to what a codebook's points have become, and trained on; codebook: these.",
    choices=("network", "codebook"),
  )
  codes: int = flag(60, "Learned codes of each class; each is used once in every step.", lower=1)
  restarts: int = flag(
    6,
    "Generators that are started; the best by a loss without data goes on. One where the points are solved for.",
    lower=1,
  )
  restart_steps: int = flag(3200, "Steps of each before the choice.", lower=1)
  steps: int = flag(8000, "Steps of the chosen one altogether.", lower=1)
  learning_rate: float = flag(3e-3, "Peak learning rate.", lower=1e-8)
  weights: str = flag("", "Other weights of terms of the loss: stationarity=0,repulsion=0.5.")
  shared_dir: str = flag(
    "", "Folder of the classifiers, for runs that share them; the workdir if empty.", group="Output"
  )
  log_every: int = flag(100, "Steps between logged metrics.", lower=1)
  save_every: int = flag(1000, "Steps between checkpoints.", lower=1)


def circle(labels: str) -> tuple[Any, Any]:
  """The training data: 18 points evenly on the unit circle [18, 2] and their labels [18].

  >>> circle("alternating")[1][:6].tolist(), circle("contiguous")[1][:7].tolist()
  ([0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 0, 1])
  """
  import numpy as np

  index = np.arange(NUM_POINTS)
  angle = 2 * np.pi * index / NUM_POINTS
  x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
  return x, index % NUM_CLASSES if labels == "alternating" else index // (NUM_POINTS // NUM_CLASSES)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the experiment; returns the final metrics."""
  if config.restart_steps >= config.steps:
    raise flags.UsageError(f"--restart_steps must be less than --steps = {config.steps}; got {config.restart_steps}.")
  weights_flag.parse_weights(config.weights)
  import numpy as np

  from experiments.attack import classifiers, plane, points
  from experiments.measure import circle as measure
  import kkt_jax
  from kkt_jax.cli.training import train_generator
  from kkt_jax.cli.workdir import Workdir

  out = Workdir(workdir, config)
  shared = classifiers.shared_folder(out, config, _SHARED)
  x, y = circle(config.labels)
  parts = [np.arange(NUM_POINTS) // NUM_CLASSES % config.classifiers == t for t in range(config.classifiers)]
  attacked = [
    classifiers.of_the_plane(config, x[part], y[part], shared / "classifier" / str(t), index=t)
    for t, part in enumerate(parts)
  ]
  # From here to the measuring no points are seen.
  examinations = [kkt_jax.examine(classifier, seed=config.seed) for classifier in attacked]
  method = methods.CIRCLE[config.method]
  solve = method.kind != "baseline" and config.method not in methods.BY_DESCENT
  recipe = plane.recipe(examinations, config, solve=solve)
  if config.generator == "network":
    flow = kkt_jax.generators.Flow(width=256, steps=16, batch_size=NUM_CLASSES * config.codes, lean=0)
    recipe = dataclasses.replace(recipe, flow=flow)
    steps, joint = min(config.steps, _JOINT_STEPS), kkt_jax.reconstruction.recipes.adam(1e-4, held=0.0)
    recipe = recipe.with_schedule(match_steps=_MATCH_STEPS, joint_steps=steps, joint=joint, joint_factors={})
  setting = methods.Setting(
    examinations, config.codes, NUM_POINTS // NUM_CLASSES // config.classifiers, deviation=1 / 0.3, hidden=(64,)
  )
  recipe = methods.recipe_of(method, recipe, setting)
  recipe = weights_flag.with_weights(recipe, config.weights)
  reconstruction = train_generator(
    out,
    examinations,
    recipe,
    seed=(config.seed + 1) * 1000 + 100 * config.generator_seed,
    log_every=config.log_every,
    save_every=config.save_every,
  )
  return measure.evaluate(
    out, (x, y, parts), reconstruction, seed=config.seed, moments=points.input_moments(attacked[0])
  )


if __name__ == "__main__":
  flags.main(Config, run, jointly=True)
