"""The flags of `circle`, and their defaults."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from experiments import common, ingredients, methods
from kkt_jax import homogeneity, multipliers, training

STEPS_PER_CALL = 20  # a step here is shorter than the call of it
# The flags on which the attacked classifiers depend.
SHARED = ("seed", "labels", "classifiers", "width", "batch_norm", "weight_decay", "init_scale", "pretrain_steps")
GENERATORS = ("codebook", "free", "moments")


def by_batch_norm(with_it: Any, without: Any, help_text: str, **limits: Any) -> Any:
  """A flag with one default for classifiers with batch norm and another for those with weight decay."""
  return common.flag_by("variant", {"batch_norm": with_it, "nobatch_norm": without}, help_text, **limits)


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  seed: int = common.flag(0, "Seed of everything random.", lower=0)
  method: str = common.flag(
    "kkt",
    "kkt: this library's. points, points_published, ce, inversion, means: its neighbours'. The others are ablations."
    " Each sets some of the flags below; see experiments/methods.py.",
    choices=tuple(methods.CIRCLE),
  )
  generator_seed: int = common.flag(
    0, "Further seed of the generator alone: the same classifier, another run.", lower=0
  )
  shared_dir: str = common.flag(
    "", "Folder of the classifiers, for runs that share them. The working folder where empty."
  )
  labels: str = common.flag(
    "alternating", "Classes of neighbouring points: in turn, or six in a row.", choices=("alternating", "contiguous")
  )
  classifiers: int = common.flag(1, "2 splits the points evenly between two classifiers (Fig. 5).", lower=1, upper=2)
  # The attacked classifier.
  width: int = common.flag(64, "Width of its two hidden layers.", lower=3)
  batch_norm: bool = common.flag(True, "Whether it has batch norm; without, it is trained with weight decay.")
  weight_decay: float = common.flag(1e-3, "nobatch_norm: weight decay of its training.", lower=1e-8)
  init_scale: float = common.flag(
    0.05, "batch_norm: scale of its initial weights and of its last batch norm.", lower=1e-6
  )
  pretrain_steps: int = common.flag(20_000, "Steps of full-batch gradient descent.", lower=1)
  # The generator and its training.
  generator: str = common.method_flag(
    "codebook",
    "codebook: a network of learned codes, in the stored mean and covariance. free: free points. moments: Gaussian"
    " points of the stored mean and covariance, without training.",
    choices=GENERATORS,
  )
  restarts: int = common.method_flag(
    6, "Generators that are started; the best by a loss without data goes on.", lower=1
  )
  restart_steps: int = common.method_flag(3200, "Steps of each before the choice.", lower=1)
  steps: int = common.method_flag(8000, "Steps of the chosen one altogether.", lower=0)
  optimizer: str = common.method_flag(
    "adam", "sgd has a momentum of 0.9 and a constant rate.", choices=ingredients.OPTIMIZERS
  )
  learning_rate: float = common.method_flag(3e-3, "Peak learning rate of the generator.", lower=1e-8)
  multiplier_learning_rate: float = common.method_flag(3e-3, "Peak learning rate of the multipliers.", lower=0)
  codes: int = common.method_flag(60, "Learned codes, or free points, a class; each is used once a step.", lower=1)
  code_dim: int = common.flag(8, "Size of a code.", lower=1)
  jitter: float = common.flag(0.1, "Noise on a code before the choice.", lower=0)
  final_jitter: float = common.flag(0.03, "Noise on a code after it.", lower=0)
  rule: str = common.method_flag("balanced", "Which solution for Lambda.", choices=homogeneity.RULES)
  target_scale: bool = common.method_flag(False, "batch_norm: Lambda-bar with the paper's factor of the learned alpha.")
  residual: str = by_batch_norm(
    "cosine",
    "relative",
    "How stationarity is measured; with squared all terms are sums over samples.",
    choices=training.RESIDUALS,
  )
  multiplier_form: str = by_batch_norm(
    "softplus", "softmax", "Where the multipliers come from.", choices=multipliers.FORMS
  )
  least_multiplier: float = common.method_flag(0.0, "runner_up: the least multiplier that costs nothing.", lower=0)
  least_multiplier_weight: float = common.method_flag(0.0, "Weight of what is missing to it.", lower=0)
  cross_entropy_weight: float = common.method_flag(0.0, "Weight of the classification loss.", lower=0)
  stationarity_weight: float = by_batch_norm(1.0, 0.3, "Weight of the stationarity (0 is the ablation).", lower=0)
  beta: float = by_batch_norm(3.0, 10.0, "Weight of the duality loss.", lower=0)
  delta: float = by_batch_norm(
    0.01, 1.0, "Width of the flat bottom of the duality loss, in units of e^-alpha.", lower=0
  )
  statistics_weight: float = by_batch_norm(100.0, 0.0, "Weight of the distance from the stored statistics.", lower=0)
  repulsion_weight: float = common.method_flag(0.3, "Weight of the repulsion at the start; it fades out.", lower=0)
  repulsion_bandwidth: float = common.flag(0.3, "Its reach, in standard deviations of the data.", lower=1e-6)
  # What is written.
  log_every: int = common.flag(100, "Steps between logged metrics.", lower=1)
  checkpoint_every: int = common.flag(1000, "Steps between checkpoints and pictures.", lower=1)
  tensorboard: bool = common.flag(False, "Also write metrics for TensorBoard.")

  @property
  def variant(self) -> str:
    """What the defaults of some flags depend on."""
    return "batch_norm" if self.batch_norm else "nobatch_norm"

  @property
  def preset(self) -> Mapping[str, Any]:
    """The flags that the method sets."""
    flags = dict(methods.CIRCLE[self.method].flags)
    if not self.batch_norm:
      flags.pop("statistics_weight", None)  # there are none
    return flags


def check(config: Config) -> None:
  """What the bounds of single flags cannot say."""
  common.check_config(config)
  if config.steps and config.restart_steps >= config.steps:
    raise common.UsageError(f"--restart_steps must be less than --steps = {config.steps}; got {config.restart_steps}.")
  for name in ("steps", "restart_steps", "log_every", "checkpoint_every"):
    if getattr(config, name) % STEPS_PER_CALL:
      raise common.UsageError(f"--{name} must be a multiple of {STEPS_PER_CALL}; got {getattr(config, name)}.")
  if config.multiplier_form == "softmax" and config.batch_norm:
    raise common.UsageError(
      "--multiplier_form must not be softmax with --batch_norm: without weight decay all probabilities are 0 or 1."
    )
  if config.multiplier_form == "runner_up" and config.generator != "free":
    raise common.UsageError(
      f"--generator must be free with --multiplier_form=runner_up: there is one multiplier for each point; got"
      f" {config.generator}."
    )
