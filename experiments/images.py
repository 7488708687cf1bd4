"""What `mnist` and `faces` share (Figs. 6 to 8): a generator of images from nothing but the weights of classifiers.

Trains classifiers on real images by full-batch gradient descent, with batch norm or with weight decay, forgets the
images, trains a conditional generator so that the classifiers' own stationarity conditions hold for what it generates,
and only then looks at the images again, to compare. The picture shows generated images in odd rows and below each the
training image nearest to it.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, TYPE_CHECKING

from experiments.attack import methods
from kkt_jax.cli import flags
from kkt_jax.cli import weights as weights_flag
from kkt_jax.cli.flags import flag, UsageError

if TYPE_CHECKING:
  from experiments.data import Split
  import kkt_jax

# What the attacked classifiers and the judge depend on beside the data; runs that agree in it can share them.
_SHARED: tuple[str, ...] = ("seed", "classifiers", "width", "second_width", "batch_norm", "weight_decay", "mean_image")
_SHARED += ("first_init_scale", "pretrain_steps", "pretrain_learning_rate", "judge_epochs", "thorough")
_BATCH_NORM = {"pretrain_steps": 6000, "pretrain_learning_rate": 0.5}
_WEIGHT_DECAY = {"pretrain_steps": 4000, "pretrain_learning_rate": 0.1}
_BINARISATION = {True: 6.0, False: 12.0}  # weight for drawings, with batch norm or without

_TABLES = {True: 3, False: 6}  # for drawings, with batch norm or without: there they build on one another
_FLOW: Mapping[bool, Any] = {True: {"lean": 0.4, "nearest": 8, "contrast": 1.3}, False: {"contrast": 1.15}}
_TEMPERATURE = 1.4  # of a network's noise
_PAPER_RATE = 2e-3  # peak learning rate of the paper's network


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  seed: int = flag(0, "Seed of the data and of everything else random.", lower=0, group="Data")
  samples_per_class: int = flag(50, "Training images of each class.", lower=2)
  classifiers: int = flag(
    1,
    "Number of classifiers among which the classes are shared out.",
    lower=1,
    upper=5,
    group="The attacked classifier",
  )
  batch_norm: bool = flag(
    True, "The paper's classifier, with batch norm and small initial weights; without, it has weight decay."
  )
  width: int = flag(600, "Width of its first layer; above the number of images it reveals their span.", lower=1)
  second_width: int = flag(256, "Width of its second layer.", lower=1)
  weight_decay: float = flag(None, "Weight decay of its training, without batch norm.", lower=1e-6, type=float)
  first_init_scale: float = flag(
    5e-5, "Batch norm: scale of the first layer's initial weights; what is left of them blurs the span.", lower=1e-8
  )
  pretrain_steps: int = flag(None, "Steps of full-batch gradient descent.", lower=1, type=int)
  pretrain_learning_rate: float = flag(
    None, "Their size; with batch norm that of the first loss-scaled steps.", lower=1e-6, type=float
  )
  mean_image: bool = flag(True, "It subtracts the mean of its training images, and stores it.")
  method: str = flag(
    "kkt",
    "kkt is this library's; points, points_published, ce, inversion, cmi and means are its neighbours'; the"
    " others are ablations. See experiments/attack/methods.py.",
    choices=tuple(methods.IMAGES),
    group="The generator",
  )
  generator_seed: int = flag(0, "Further seed of the generator alone: the same classifier, another run.", lower=0)
  generator: str = flag(
    "network",
    "network: of continuous noise, fitted to a table of images and trained on; table: the noise picks one of finitely"
    " many; paper: the paper's own network, trained from scratch.",
    choices=("network", "table", "paper"),
  )
  codes: int = flag(None, "Images to pick from, for each class and classifier; 0: as weights ask.", lower=0, type=int)
  deviation: float = flag(
    None, "Deviation of the first images, over that of black and white pixels.", lower=0, type=float
  )
  steps: int = flag(0, "Training steps; 0 is what the method takes.", lower=0)
  learning_rate: float = flag(0.0, "Peak learning rate; 0 is what the method takes.", lower=0)
  weights: str = flag("", "Other weights of terms of the loss: stationarity=0,total_variation=10.")
  microbatch_size: int = flag(0, "Without batch norm: samples that are in memory at once; 0 is all.", lower=0)
  compute_dtype: str = flag(
    "float32", "Of the attacked classifier's gradients.", choices=("float32", "bfloat16", "float16")
  )
  shared_dir: str = flag(
    "", "Folder of classifiers, judge and controls, for runs on the same data; the workdir if empty.", group="Output"
  )
  judge_epochs: int = flag(None, "Passes over the data of the independent judge's training.", lower=1, type=int)
  thorough: bool = flag(False, "Also measure what takes longer: neighbourhoods, retrieval, use as training data.")
  population: int = flag(20_000, "Without batch norm: fresh samples whose residual is measured.", lower=2)
  log_every: int = flag(50, "Steps between logged metrics.", lower=1)
  save_every: int = flag(500, "Steps between checkpoints and pictures.", lower=1)


def resolve(config: Any, *presets: Mapping[str, Any]) -> Any:
  """The config without open settings, checked; the first preset that names one fills it."""
  config = flags.resolve(config, *presets, _BATCH_NORM if config.batch_norm else _WEIGHT_DECAY)
  if config.microbatch_size and config.batch_norm:
    raise UsageError(
      f"--microbatch_size must be 0 with --batch_norm, whose samples interact; got {config.microbatch_size}."
    )
  weights_flag.parse_weights(config.weights)
  return config


def run(
  config: Any, workdir: pathlib.Path, data: "Split", *, drawings: bool, num_samples: int, picture: str
) -> Mapping[str, Any]:
  """Runs or resumes an experiment.

  Args:
    config: its settings, see `resolve`.
    workdir: where everything is written.
    data: what the classifiers are trained on, what the judge is trained on, and the controls.
    drawings: whether pixels are black or white.
    num_samples: samples that every metric is measured on, the same number of each class.
    picture: file name.

  Returns:
    The final metrics.
  """
  import jax

  from experiments.attack import classifiers
  from experiments.measure import images as measure
  import kkt_jax
  from kkt_jax.auditing import pictures
  from kkt_jax.cli.progress import say
  from kkt_jax.cli.training import train_generator
  from kkt_jax.cli.workdir import Workdir

  out = Workdir(workdir, config)
  shared = classifiers.shared_folder(out, config, _SHARED, data=data.digest())
  attacked = classifiers.of_images(config, data.train.x, data.train.y, shared / "classifier", seed=config.seed)
  # From here to the measuring no data are seen.
  examinations = [kkt_jax.examine(classifier, seed=config.seed) for classifier in attacked]
  for examination in examinations:
    dimensions = "unknown" if examination.subspace is None else examination.subspace.dimension
    margin = "unknown" if examination.margin is None else f"{examination.margin:.4g}"
    say(f"the weights reveal: dimensions of the data {dimensions}, their margin {margin}")
  recipe = recipe_of(config, examinations, drawings=drawings)
  labels = sorted({label for classifier in attacked for label in classifier.labels})
  grid = [label for label in labels for _ in range(pictures.COLUMNS // len(labels))] * 4

  def draw(reconstruction: "kkt_jax.Reconstruction") -> None:
    x = reconstruction.sample(jax.random.key(0), jax.numpy.asarray(grid))
    rows = [("fresh noise", row) for row in x.reshape(4, -1, *x.shape[1:])]
    (out.path / f"samples_{int(reconstruction.state.step):06d}.png").write_bytes(pictures.image_rows(rows))

  reconstruction = train_generator(
    out,
    examinations,
    recipe,
    seed=config.seed + 1 + 1000 * config.generator_seed,
    log_every=config.log_every,
    save_every=config.save_every,
    microbatch_size=config.microbatch_size or None,
    draw=draw,
  )
  if reconstruction.table is not None:
    rows = [(f"from one {label} to another", images) for label, images in _between(reconstruction, labels).items()]
    (out.path / "interpolation.png").write_bytes(pictures.image_rows(rows))
  return measure.evaluate(out, shared, data, reconstruction, config, num_samples=num_samples, picture=picture)


def _between(reconstruction: "kkt_jax.Reconstruction", labels: "Sequence[int]") -> "dict[int, Any]":
  """For each label images on the way from one noise to another, along a great circle."""
  import jax
  import numpy as np

  from kkt_jax.auditing import pictures

  key = jax.random.key(1)
  first, second = jax.random.normal(key, (2, len(labels), 1, reconstruction.problem.generator.noise_dim))
  angle = np.linspace(0, np.pi / 2, pictures.COLUMNS)[None, :, None]
  noise = np.cos(angle) * first + np.sin(angle) * second
  t = np.asarray(reconstruction.choose_classifiers(key, np.asarray(labels)))
  counts = [pictures.COLUMNS] * len(labels)
  x = reconstruction.generate(noise.reshape(-1, noise.shape[2]), np.repeat(labels, counts), np.repeat(t, counts))
  return dict(zip(labels, np.asarray(x).reshape(len(labels), pictures.COLUMNS, *x.shape[1:]), strict=True))


def recipe_of(config: Any, examinations: "Sequence[kkt_jax.Examination]", *, drawings: bool) -> "kkt_jax.Recipe":
  """The recipe of the chosen method, with what was asked for by hand."""
  import kkt_jax
  from kkt_jax.reconstruction import recipes, Term, terms

  codes = config.codes or kkt_jax.generators.codes_for(examinations)
  table = kkt_jax.generators.table(codes=codes, deviation=config.deviation)
  recipe = dataclasses.replace(recipes.default(examinations), generator=table)
  recipe = recipe.with_schedule(tables=_TABLES[config.batch_norm] if drawings else 1)
  if config.generator == "network":
    steps = config.steps or recipe.schedule.steps
    joint_steps = min(steps, recipe.schedule.joint_steps)
    recipe = recipe.with_schedule(match_steps=2 * steps, joint_steps=joint_steps)
    batch_size = recipe.generator(examinations).batch_size
    flow = kkt_jax.generators.Flow(batch_size=batch_size, temperature=_TEMPERATURE, **_FLOW[drawings])
    recipe = dataclasses.replace(recipe, flow=flow)
  elif config.generator == "paper":
    recipe = dataclasses.replace(recipe, generator=kkt_jax.generators.convolutional())
    recipe = recipe.with_schedule(theta=recipes.adam(_PAPER_RATE))
  recipe = recipe.with_terms(contrast=Term(0.0, terms.contrast()))  # for cmi and --weights
  if drawings:
    recipe = recipe.with_terms(binarisation=Term(_BINARISATION[config.batch_norm], terms.binarisation))
  setting = methods.Setting(examinations, codes, config.samples_per_class, config.deviation)
  return with_flags(methods.recipe_of(methods.IMAGES[config.method], recipe, setting), config)


def with_flags(recipe: "kkt_jax.Recipe", config: Any) -> "kkt_jax.Recipe":
  """The recipe with the steps, learning rate, weights and precision that were asked for by hand."""
  import kkt_jax

  if config.steps and recipe.schedule.steps:  # a method without training has none
    recipe = recipe.with_schedule(steps=config.steps)
  if config.learning_rate:
    recipe = recipe.with_schedule(theta=kkt_jax.reconstruction.recipes.adam(config.learning_rate))
  if config.compute_dtype != "float32":
    recipe = recipe.with_stationarity(compute_dtype=config.compute_dtype)
  return weights_flag.with_weights(recipe, config.weights)
