"""The methods that `--method` chooses from: this library's own, its ablations, and its neighbours', as sets of flags.

Every method attacks the same classifiers and is measured in the same way. A flag that is given by hand goes before the
method's. What is not named here is as in the method ``kkt``.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
  """A method.

  Attributes:
    title: its name for people.
    explanation: what it does, for someone who has not read the paper.
    kind: ``"method"``, ``"baseline"`` or ``"ablation"``.
    flags: the flags that make it, by name.
  """

  title: str
  explanation: str
  kind: str
  flags: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _without(what: str, **flags: Any) -> Preset:
  return Preset(f"without {what}", "This library's method with one piece taken away.", "ablation", flags)


def _literal(what: str, **flags: Any) -> Preset:
  return Preset(what, "This library's method with one choice of the paper put back, to the letter.", "ablation", flags)


_KKT = Preset(
  "this library",
  "A conditional generator whose samples satisfy the conditions that gradient descent left in the classifier's weights"
  " (Yu and Wang 2023), with everything else that the weights give away.",
  "method",
)
_NO_CONDITIONS: Mapping[str, Any] = {"stationarity_weight": 0.0, "beta": 0.0}
# One free sample and one free multiplier for each of about twice as many as there are unknown samples.
_POINTS: Mapping[str, Any] = {
  "generator": "free",
  "beta": 0.0,
  "multiplier_form": "runner_up",
  "statistics_weight": 0.0,
  "least_multiplier_weight": 5.0,
}
_POINTS_TEXT = (
  "One free sample for each unknown one, twice as many as there are, each with its own multiplier (Haim et al. 2022,"
  " Buzaglo et al. 2023): stationarity with relaxed gates, no multiplier below a least one{}."
)
_PUBLISHED: Mapping[str, Any] = {  # of decoreco's second multi-class run, 50 images a class of CIFAR-10
  "optimizer": "sgd",
  "residual": "squared",
  "learning_rate": 0.0013623494,
  "multiplier_learning_rate": 0.4793320031,
  "least_multiplier": 0.2032089016,
  "stationarity_weight": 1.0,
}
_MEANS_TEXT = "{} for every sample: what can be had without any training."

_LITERAL: Mapping[str, Preset] = {
  "least_norm": _literal("Lambda of least norm", rule="least_norm"),
  "relu": _literal("ReLU multipliers", multiplier_form="relu"),
  "unsquared": _literal("unsquared norm", residual="absolute"),
  "target_scale": _literal("learned scale of the target", residual="relative", target_scale=True),
}
_ALL_LITERAL: Mapping[str, Any] = {
  "rule": "least_norm",
  "multiplier_form": "relu",
  "residual": "absolute",
  "target_scale": True,
  "statistics_weight": 0.0,
}

IMAGES: Mapping[str, Preset] = {
  "kkt": _KKT,
  "points": Preset(
    "free images, our settings",
    _POINTS_TEXT.format(", pixels in range. Angle of the residual, Adam and total variation as in our method"),
    "baseline",
    {
      **_POINTS,
      "warmup": 0,
      "warmup_beta": 0.0,
      "collapse_weight": 0.0,
      "learning_rate": 0.05,
      "multiplier_learning_rate": 0.05,
      "least_multiplier": 0.2,
      "total_variation_weight": 3.0,
    },
  ),
  "points_published": Preset(
    "free images, published settings",
    _POINTS_TEXT.format(", pixels in range. Published step sizes, momentum, gates, norm; 8,000 of 50,000 steps"),
    "baseline",
    {
      **_POINTS,
      **_PUBLISHED,
      "warmup": 0,
      "warmup_beta": 0.0,
      "collapse_weight": 0.0,
      "start": 2e-4,
      "steps": 8000,
      "gate_sharpness": 39.51743621,
      "range_weight": 1.0,
      "binarisation_weight": 0.0,
      "total_variation_weight": 0.0,
    },
  ),
  "ce": Preset(
    "classification only",
    "The same generator, in the same span, trained only to be classified as wanted, with total variation.",
    "baseline",
    {
      **_NO_CONDITIONS,
      "warmup": 0,
      "warmup_beta": 0.0,
      "steps": 600,
      "cross_entropy_weight": 1.0,
      "statistics_weight": 0.0,
      "collapse_weight": 0.0,
      "binarisation_weight": 0.0,
      "total_variation_weight": 1.0,
    },
  ),
  "inversion": Preset(
    "DeepInversion",
    "Free images that are classified as wanted and reproduce the stored batch-norm statistics, with total variation and"
    " small squares (Yin et al. 2020).",
    "baseline",
    {
      **_NO_CONDITIONS,
      "generator": "free",
      "warmup": 0,
      "warmup_beta": 0.0,
      "learning_rate": 0.05,
      "cross_entropy_weight": 1.0,
      "collapse_weight": 0.0,
      "binarisation_weight": 0.0,
      "total_variation_weight": 3.0,
      "steps": 1200,
      "l2_weight": 0.1,
    },
  ),
  "means": Preset(
    "mean image",
    _MEANS_TEXT.format("The mean training image, which the classifier stores,"),
    "baseline",
    {"generator": "free", "codes": 1, "start": 0.0, "steps": 0, "warmup": 0},
  ),
  "no_stationarity": _without("stationarity", stationarity_weight=0.0),
  "no_duality": _without("duality", beta=0.0),
  "no_statistics": _without("batch-norm statistics", statistics_weight=0.0),
  "no_collapse": _without("class features", collapse_weight=0.0),
  "no_binarisation": _without("black and white", binarisation_weight=0.0),
  "no_total_variation": _without("total variation", total_variation_weight=0.0),
  "no_span": _without("the first layer's span", generator="free", learning_rate=0.02),
  **_LITERAL,
  "paper": Preset(
    "the paper to the letter",
    "Lambda of least norm, ReLU multipliers, unsquared norm, learned scale, total variation and no other prior; in the"
    " first layer's span.",
    "ablation",
    {**_ALL_LITERAL, "collapse_weight": 0.0, "binarisation_weight": 0.0},
  ),
}

CIRCLE: Mapping[str, Preset] = {
  "kkt": _KKT,
  "points": Preset(
    "free points, our settings",
    _POINTS_TEXT.format(". Angle of the residual and Adam as in our method"),
    "baseline",
    {**_POINTS, "codes": 12, "restarts": 1, "restart_steps": 20, "least_multiplier": 0.2, "repulsion_weight": 0.0},
  ),
  "points_published": Preset(
    "free points, published settings",
    _POINTS_TEXT.format(". Published step sizes, momentum, norm"),
    "baseline",
    {**_POINTS, **_PUBLISHED, "codes": 12, "restarts": 1, "restart_steps": 20, "repulsion_weight": 0.0},
  ),
  "ce": Preset(
    "classification only",
    "The same generator, of the stored mean and covariance, trained only to be classified as wanted.",
    "baseline",
    {**_NO_CONDITIONS, "cross_entropy_weight": 1.0, "statistics_weight": 0.0, "repulsion_weight": 0.0},
  ),
  "inversion": Preset(
    "DeepInversion",
    "Free points that are classified as wanted and reproduce the stored batch-norm statistics (Yin et al. 2020).",
    "baseline",
    {**_NO_CONDITIONS, "generator": "free", "cross_entropy_weight": 1.0, "repulsion_weight": 0.0},
  ),
  "means": Preset(
    "stored moments",
    _MEANS_TEXT.format("Gaussian points with the mean and covariance that the first batch norm stores,"),
    "baseline",
    {"generator": "moments", "steps": 0},
  ),
  "no_stationarity": _without("stationarity", stationarity_weight=0.0),
  "no_duality": _without("duality", beta=0.0),
  "no_statistics": _without("batch-norm statistics", statistics_weight=0.0),
  "no_repulsion": _without("repulsion", repulsion_weight=0.0),
  "no_restarts": _without("restarts", restarts=1),
  **_LITERAL,
  "paper": Preset(
    "the paper to the letter",
    "Lambda of least norm, ReLU multipliers, unsquared norm, learned scale, no prior but the stored mean and"
    " covariance.",
    "ablation",
    {**_ALL_LITERAL, "repulsion_weight": 0.0},
  ),
}
