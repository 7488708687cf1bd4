"""The flags that `mnist` and `faces` share, and their defaults."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from experiments import common, ingredients, methods
from kkt_jax import homogeneity, multipliers, training

GENERATORS = ("span", "free", "mlp", "conv")
# The flags on which the attacked classifiers and the judge depend, beside the data; runs that agree in them can share.
SHARED = (
  "seed",
  "classifiers",
  "width",
  "second_width",
  "batch_norm",
  "weight_decay",
  "first_init_scale",
  "pretrain_steps",
  "pretrain_learning_rate",
  "mean_image",
  "judge_epochs",
  "thorough",
)


def by_variant(span: Any, network: Any, help_text: str, *, batch_norm: Any = None, **limits: Any) -> Any:
  """A flag with a default for ``--generator=span``, one with ``--batch_norm``, and one for the networks."""
  normalised = span if batch_norm is None else batch_norm
  defaults = {"span": span, "batch_norm": normalised, "mlp": network, "conv": network}
  return common.flag_by("variant", defaults, help_text, **limits)


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  seed: int = common.flag(0, "Seed of everything random.", lower=0)
  method: str = common.flag(
    "kkt",
    "kkt: this library's. points, points_published, ce, inversion, means: its neighbours'. The others are ablations."
    " Each sets some of the flags below; see experiments/methods.py.",
    choices=tuple(methods.IMAGES),
  )
  generator_seed: int = common.flag(
    0, "Further seed of the generator alone: the same classifier, another run.", lower=0
  )
  generator: str = common.method_flag(
    "span",
    "span: images in the span of the first layer, one for each value of a discrete noise. free: the same in all"
    " dimensions. mlp: a network of continuous noise. conv: the paper's network, for accelerators.",
    choices=GENERATORS,
  )
  samples_per_class: int = common.flag(50, "Training images a class.", lower=2)
  classifiers: int = common.flag(1, "Number of classifiers among which the classes are shared out.", lower=1, upper=5)
  shared_dir: str = common.flag(
    "", "Folder of what runs on the same data share: classifiers, judge, controls. The working folder where empty."
  )
  # The attacked classifier.
  width: int = common.flag(
    600, "Width of its first layer; above the number of training images it gives away their span.", lower=1
  )
  second_width: int = common.flag(256, "Width of its second layer.", lower=1)
  batch_norm: bool = common.flag(
    True,
    "The paper's classifier, with batch norm and small initial weights; without, it has weight decay. With span only.",
  )
  weight_decay: float = common.flag(0.02, "Weight decay of its training, without batch norm.", lower=1e-6)
  first_init_scale: float = common.flag(
    5e-5, "batch_norm: scale of the first layer's initial weights; what is left of them blurs the span.", lower=1e-8
  )
  pretrain_steps: int = by_variant(4000, 4000, "Steps of full-batch gradient descent.", batch_norm=6000, lower=1)
  pretrain_learning_rate: float = by_variant(
    0.1, 0.1, "Their step size; with batch norm the first of loss-scaled steps.", batch_norm=0.5, lower=1e-6
  )
  # The generator and its training.
  codes: int = common.method_flag(
    50, "span, free: images that the noise picks from, for each class and classifier.", lower=1
  )
  span_tolerance: float = by_variant(
    2e-7,
    2e-7,
    "span: singular values below this share of the first layer's greatest are not data.",
    batch_norm=2e-5,
    lower=1e-12,
    upper=0.5,
  )
  power: float = common.flag(
    -1.0,
    "span: how much the weights' own strengths scale the search directions, from 0, not at all, to 1; if negative, the"
    " share of all dimensions that the span fills.",
  )
  start: float = common.method_flag(
    1.0, "span, free: first deviation from the mean image, over that of black and white pixels of this mean.", lower=0
  )
  steps: int = by_variant(1500, 1000, "Training steps of the generator.", lower=0)
  warmup: int = by_variant(300, 150, "First steps, in which only the classification counts.", lower=0)
  optimizer: str = common.method_flag(
    "adam", "sgd has a momentum of 0.9 and a constant rate.", choices=ingredients.OPTIMIZERS
  )
  learning_rate: float = by_variant(0.05, 2e-3, "Peak learning rate of the generator.", lower=1e-8)
  multiplier_learning_rate: float = common.method_flag(2e-3, "Peak learning rate of the multipliers.", lower=0)
  alpha_learning_rate: float = by_variant(2e-4, 2e-3, "Peak learning rate of alpha.", lower=0)
  batch_size: int = common.flag(500, "mlp, conv: M, samples for each classifier in each step.", lower=2)
  microbatch_size: int = common.flag(
    0,
    "nobatch_norm: samples for each classifier that are in memory at once, a divisor of all; 0 is all.",
    lower=0,
  )
  compute_dtype: str = common.flag(
    "float32", "Of the attacked classifier's gradients, up to its last layer.", choices=("float32", "bfloat16")
  )
  num_fresh: int = by_variant(0, 100, "Never-trained samples that must be classified right.", lower=0)
  noise_dim: int = by_variant(1, 8, "Size of the noise.", lower=1)
  fixed_noise: bool = common.flag(True, "Train on M fixed noise vectors for each classifier instead of new ones.")
  blur: float = common.flag(1.0, "mlp, conv: blur inside the generator, in pixels.", lower=0.0)
  mean_image: bool = common.flag(True, "Start from the mean image that the classifier stores for its preprocessing.")
  gate_sharpness: float = by_variant(
    20.0, 30.0, "Smoothness of the ReLU derivative in the stationarity; 0 is exact.", lower=0
  )
  multiplier_form: str = by_variant(
    "softmax", "softmax", "Where the multipliers come from.", batch_norm="softplus", choices=multipliers.FORMS
  )
  least_multiplier: float = common.method_flag(0.0, "runner_up: the least multiplier that costs nothing.", lower=0)
  least_multiplier_weight: float = common.method_flag(0.0, "Weight of what is missing to it.", lower=0)
  rule: str = common.method_flag("balanced", "batch_norm: which solution for Lambda.", choices=homogeneity.RULES)
  residual: str = by_variant(
    "relative",
    "relative",
    "How stationarity is measured; with squared all terms are sums over samples and pixels, not means.",
    batch_norm="cosine",
    choices=training.RESIDUALS,
  )
  target_scale: bool = common.method_flag(False, "batch_norm: Lambda-bar with the paper's factor of the learned alpha.")
  stationarity_weight: float = by_variant(
    72.0, 8.0, "Weight of the stationarity (0 is the ablation).", batch_norm=8.0, lower=0
  )
  first_layer_weight: float = common.flag(8.0, "Weight of the first layer's residual among the tensors'.", lower=0)
  later_layers_weight: float = by_variant(4.0, 1.0, "Weight of the later layers' kernels among them.", lower=0)
  margin: float = by_variant(
    0.0, 3.0, "e^-alpha at the start, the margin that samples are pushed to; 0 reads it off the last layer.", lower=0
  )
  delta: float = by_variant(
    1.0, 1.0, "Width of the flat bottom of the duality loss, in units of e^-alpha.", batch_norm=0.01, lower=0
  )
  warmup_beta: float = by_variant(14.0, 3.0, "Weight of the duality loss in the warm-up.", lower=0)
  beta: float = by_variant(14.0, 0.0, "Weight of the duality loss after the warm-up.", lower=0)
  fresh_weight: float = common.flag(1.0, "Weight of the duality loss of never-trained samples.", lower=0)
  range_weight: float = by_variant(8000.0, 0.0, "Weight of the prior that pixels lie in [0, 1].", lower=0)
  statistics_weight: float = by_variant(
    0.0, 0.0, "Weight of the distance from the stored batch-norm statistics.", batch_norm=1000.0, lower=0
  )
  collapse_weight: float = by_variant(
    0.0, 0.0, "Weight of the distance from the common features of the class.", batch_norm=30.0, lower=0
  )
  binarisation_weight: float = by_variant(
    12.0, 2.0, "Weight of the prior that pixels are black or white.", batch_norm=6.0, lower=0
  )
  mean_weight: float = by_variant(0.0, 2.0, "Weight of the distance from the stored mean image.", lower=0)
  ink_weight: float = by_variant(0.0, 1.0, "Weight of the prior that no image is almost blank.", lower=0)
  mode_seeking_weight: float = by_variant(0.0, 0.3, "Weight of the diversity term.", lower=0)
  cross_entropy_weight: float = common.method_flag(0.0, "Weight of the classification loss.", lower=0)
  l2_weight: float = common.method_flag(0.0, "Weight of the mean square of a pixel.", lower=0)
  total_variation_weight: float = by_variant(
    16.0,
    0.0,
    "Weight of the total variation; with span times the share of all dimensions that it fills.",
    batch_norm=25.0,
    lower=0,
  )
  judge_epochs: int = common.flag(8, "Passes over the data of the independent judge's training.", lower=1)
  thorough: bool = common.flag(
    True, "Also measure what takes longer: neighbourhoods, memory, worth as training data, residual of each tensor."
  )
  population: int = common.flag(
    20_000,
    "nobatch_norm: fresh samples of which the residual of the generator's whole distribution is measured.",
    lower=2,
  )
  # What is written.
  log_every: int = common.flag(50, "Steps between logged metrics.", lower=1)
  grid_every: int = common.flag(500, "Steps between sample grids and checkpoints.", lower=1)
  tensorboard: bool = common.flag(False, "Also write metrics for TensorBoard.")

  @property
  def variant(self) -> str:
    """What the defaults of many flags depend on: the generator, or batch norm."""
    return "batch_norm" if self.batch_norm else self.generator.replace("free", "span")

  @property
  def preset(self) -> Mapping[str, Any]:
    """The flags that the method sets."""
    flags = dict(methods.IMAGES[self.method].flags)
    if flags.get("multiplier_form") == "runner_up":
      flags["codes"] = 2 * self.samples_per_class
    if not self.batch_norm:
      flags.pop("statistics_weight", None)  # there are none
    return flags


def check(config: Config) -> None:
  """What the bounds of single flags cannot say."""
  common.check_config(config)
  if config.steps and config.warmup >= config.steps:
    raise common.UsageError(f"--warmup must be less than --steps = {config.steps}; got {config.warmup}.")
  table = config.generator in ("span", "free")
  if config.batch_norm and not table:
    raise common.UsageError(
      f"--generator must be span or free with --batch_norm; got {config.generator} (--nobatch_norm?)."
    )
  if config.batch_norm and config.multiplier_form == "softmax":
    raise common.UsageError(
      "--multiplier_form must not be softmax with --batch_norm: without weight decay all probabilities are 0 or 1."
    )
  if config.multiplier_form == "runner_up" and not table:
    raise common.UsageError(
      f"--generator must be span or free with --multiplier_form=runner_up: there is one multiplier for each of its"
      f" images; got {config.generator}."
    )
  if (config.target_scale or config.rule != "balanced") and not config.batch_norm:
    raise common.UsageError("--rule and --target_scale need --batch_norm: with weight decay Lambda is 1.")
  if (config.statistics_weight or config.collapse_weight) and not config.batch_norm:
    raise common.UsageError("--statistics_weight and --collapse_weight must be 0 without --batch_norm.")
  if config.microbatch_size and config.batch_norm:
    raise common.UsageError(
      f"--microbatch_size must be 0 with --batch_norm, whose samples interact; got {config.microbatch_size}."
    )
  if table and (config.num_fresh or not config.fixed_noise):
    raise common.UsageError(
      f"--num_fresh must be 0 and --fixed_noise set with --generator={config.generator}: every image that its noise can"
      " pick is trained in every step."
    )
  if not config.mean_image and (config.mean_weight or config.ink_weight):
    raise common.UsageError(
      "--mean_weight and --ink_weight must be 0 with --nomean_image: there is then no mean image to compare with."
    )
