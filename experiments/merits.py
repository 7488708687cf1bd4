"""The figures of merit that `experiments.compare` shows: their names, what they mean, and where a run keeps them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.report import Figure

_NEIGHBOURHOOD = {
  "precision": "Share of samples that lie among the training data of their class",
  "recall": "Share of the training data that lie among the samples",
  "density": "How many training neighbourhoods a sample lies in, over k",
  "coverage": "Share of training points that have a sample nearer than their {} training neighbours",
}


def _neighbourhoods() -> list[Figure]:
  return [
    Figure(
      f"{name}_{space}_k{k}",
      f"{name}, {space}, k = {k}",
      f"{text.format(k)}: {'in the features of the judge' if space == 'features' else 'pixel by pixel'}.",
      "higher",
      2,
      "Diverse",
    )
    for space in ("features", "pixels")
    for k in (3, 5)
    for name, text in _NEIGHBOURHOOD.items()
  ]


_COST = [
  Figure("minutes", "minutes", "Time of the run on one thread, the measuring included.", "", 1, "Cost"),
  Figure("gigabytes", "memory", "Greatest memory of the process, in GB, Python and JAX included.", "", 2, "Cost"),
]

IMAGES = [
  Figure(
    "eval_accuracy",
    "recognisable",
    "Share of samples in which a classifier that was trained on other data reads the wanted class.",
    "higher",
    2,
    "Recognisable",
  ),
  *(
    figure
    for name, title, better in (
      ("ssim", "structural similarity", "higher"),
      ("ncc", "correlation", "higher"),
      ("mse", "squared error", "lower"),
    )
    for figure in (
      Figure(f"{name}_nearest", f"{title}, nearest", f"Mean {title} of a sample and the training image of its class nearest to it.", better, 3, "Faithful"),
      Figure(f"{name}_cover", f"{title}, cover", f"Mean {title} of a training image and the sample of its class nearest to it.", better, 3, "Faithful"),
      Figure(f"{name}_matched", f"{title}, matched", f"Mean {title} over the pairs of the best one-to-one matching within the classes.", better, 3, "Faithful"),
    )
  ),
  Figure("recovered", "resembled", "Training images that a sample of the class resembles (SSIM above 0.4).", "higher", 0, "Faithful"),
  Figure("recovered_share", "share resembled", "The same as a share of all training images.", "higher", 2, "Faithful"),
  Figure("label_agreement", "label agreement", "Share of samples whose nearest training image of any class has their label.", "higher", 2, "Faithful"),
  Figure("distinct_nearest", "distinct", "Different training images among the nearest ones of all samples.", "higher", 0, "Diverse"),
  Figure("spread", "spread", "Mean distance of two samples of a class, over that of real data: 1 is right.", "", 2, "Diverse"),
  *_neighbourhoods(),
  Figure("kernel_distance", "kernel distance", "Unbiased kernel distance (KID) to the training data in the judge's features.", "lower", 2, "Diverse"),
  Figure("nearer_share", "nearer to training", "Share of samples nearer to the training data than to as many other real data; 0.5 is chance.", "", 2, "Memorised"),
  Figure("nearer_median_ratio", "distance ratio", "Distance to the training data over that to as many other real data; 1 is chance.", "", 2, "Memorised"),
  Figure("nearer_p_value", "its p-value", "Of that share, if samples were independent and knew neither.", "", 3, "Memorised"),
  Figure("retrieval_top1", "retrieval", "Share of training images that some sample resembles more than any of a group of real images that were not trained on.", "", 2, "Memorised"),
  Figure("retrieval_chance", "its chance", "What a generator that knows only the kind of data reaches.", "", 2, "Memorised"),
  Figure("retrieval_p_value", "its p-value", "Of so many hits by chance.", "", 3, "Memorised"),
  Figure("useful_accuracy", "useful", "Accuracy on real data of a classifier that was trained on the samples alone.", "higher", 2, "Useful"),
  Figure("residual", "residual", "What the stationarity conditions lack, relative and squared: 0 is perfect, 1 is nothing.", "lower", 3, "The method's own"),
  *(
    Figure(
      f"residual of {tensor}",
      f"residual, {tensor}",
      "The same for one tensor of the classifier.",
      "lower",
      3,
      "The method's own",
    )
    for tensor in ("Dense_0/kernel", "Dense_1/kernel", "Dense_2/kernel")
  ),
  Figure("duality", "duality", "Distance of the margin from that of the training data, in units of it.", "lower", 2, "The method's own"),
  Figure("margin_spread", "margin spread", "5th to 95th percentile of the margins over their median: 0 is equal.", "lower", 2, "The method's own"),
  Figure("active_multipliers", "active multipliers", "Share of multipliers that are not next to 0.", "", 2, "The method's own"),
  *_COST,
]  # fmt: skip
IMAGES_HEADLINE = (
  "eval_accuracy",
  "ssim_cover",
  "coverage_features_k5",
  "distinct_nearest",
  "useful_accuracy",
  "retrieval_top1",
  "residual",
  "minutes",
)

CIRCLE = [
  Figure("precision", "precision", "Share of samples within 0.15 of a training point of their class.", "higher", 3, "Faithful"),
  Figure("coverage", "coverage", "Share of training points with a sample of their class within 0.15.", "higher", 3, "Faithful"),
  Figure("median_distance", "median distance", "Median distance of a sample to the nearest training point of its class.", "lower", 3, "Faithful"),
  Figure("residual", "residual", "What the stationarity conditions lack with the best multipliers: 0 is perfect, 1 is nothing.", "lower", 3, "The method's own"),
  *_COST,
]  # fmt: skip
CIRCLE_HEADLINE = tuple(figure.name for figure in CIRCLE)


def of_images(figures: Mapping[str, Any]) -> dict[str, float]:
  """The figures of one set of images by the names above; of several classifiers the mean."""
  flat: dict[str, float] = {}
  for name, value in figures.items():
    if name == "residual_per_tensor":
      flat |= {f"residual of {tensor}": float(np.mean([own[tensor] for own in value])) for tensor in value[0]}
    else:
      flat[name] = float(np.mean(value))
  known = {figure.name for figure in IMAGES}
  return {name: value for name, value in flat.items() if name in known}


def of_circle(figures: Mapping[str, Any], control: str | None = None) -> dict[str, float]:
  """The figures of a run on the circle, or of one of its controls."""
  scores = figures["controls"][control] if control else figures
  residuals = [own[control or "generated"] for own in figures["residual"] if (control or "generated") in own]
  known = {name: float(scores[name]) for name in ("precision", "coverage", "median_distance")}
  return known | ({"residual": float(np.mean(residuals))} if residuals else {})
