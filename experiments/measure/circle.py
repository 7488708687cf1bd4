"""The last stage of `experiments.circle`: looks at the points again, and measures what came out beside its controls."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from experiments.measure import pictures
import kkt_jax
from kkt_jax import metrics
from kkt_jax.auditing import matching
from kkt_jax.classifiers import Classifier
from kkt_jax.cli.workdir import Workdir
from kkt_jax.kkt import diagnostics

_RADIUS = 0.15  # what counts as near a training point
_NUM_SAMPLES, _FITTED = 900, 180
_SHOWN = ("precision", "coverage", "median_distance", "residual")

Points = tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]]


def evaluate(
  out: Workdir,
  data: Points,
  reconstruction: "kkt_jax.Reconstruction",
  *,
  seed: int,
  moments: tuple[ArrayLike, ArrayLike],
) -> Mapping[str, Any]:
  """Draws the picture and measures every metric beside its controls.

  Args:
    out: the workdir.
    data: the points [N, 2], their labels [N], and which of them each classifier was trained on.
    reconstruction: the attacked classifiers, their conditions, and the trained generator.
    seed: of the samples.
    moments: mean [2] and covariance factor [2, 2] of the training points as the first classifier stores them, for the
      control that uses nothing else.

  Returns:
    The metrics, which are also written to ``metrics.json``, with ``summary``, a table for people, and ``pictures``.
  """
  x, y, parts = data
  classifiers = reconstruction.classifiers
  key = jax.random.key(seed + 3)
  labels = np.arange(_NUM_SAMPLES) % classifiers[0].num_classes
  index = np.asarray(reconstruction.choose_classifiers(key, labels))
  samples = np.asarray(reconstruction.sample(key, labels, t=index))
  mean, factor = map(jnp.asarray, moments)
  gaussian = mean[None] + jax.random.normal(key, samples.shape) @ factor.T
  square = jax.random.uniform(key, samples.shape, minval=-1.5, maxval=1.5)

  def score(points: ArrayLike, point_labels: np.ndarray) -> dict[str, Any]:
    return metrics.precision_coverage(points, point_labels, x, y, radius=_RADIUS)

  results: dict[str, Any] = {
    "generated": score(samples, labels),
    "training_data": score(x, y),
    "gaussian_of_the_stored_moments": score(gaussian, labels),
    "uniform_in_the_square": score(square, labels),
  }
  for t, (classifier, condition) in enumerate(zip(classifiers, reconstruction.conditions, strict=True)):
    chosen = index == t
    # Equal numbers of all but the training data: the more points, the more multipliers there are to fit with.
    for name, points, point_labels in (
      ("generated", samples[chosen][:_FITTED], labels[chosen][:_FITTED]),
      ("training_data", x[parts[t]], y[parts[t]]),
      ("gaussian_of_the_stored_moments", gaussian[:_FITTED], labels[:_FITTED]),
    ):
      diagnosis = diagnostics.diagnose(classifier, condition, points, point_labels)
      for metric in ("residual", "margin_spread", "median_margin"):
        results[name].setdefault(metric, []).append(getattr(diagnosis, metric))
  measured = dict(results)
  if len(classifiers) > 1:
    subsets = (index == t for t in range(len(classifiers)))
    results["per_classifier"] = [
      _own_subset(samples[chosen], labels[chosen], data, t) for t, chosen in enumerate(subsets)
    ]
  results["exp_minus_alpha"] = np.asarray(reconstruction.margins).tolist()
  results["true_median_margin"] = results["training_data"]["median_margin"]
  results["final_losses"] = out.last_logged()
  picture = _picture(out.path, data, classifiers, (samples, labels, index))
  out.finish(results)
  return results | {"summary": matching.table(measured, _SHOWN), "pictures": [picture]}


def _own_subset(samples: np.ndarray, labels: np.ndarray, data: Points, t: int) -> dict[str, float]:
  """How well samples with fixed t stay on D_t (Fig. 5): nearest point of all in D_t, precision, coverage."""
  x, y, parts = data
  nearest = np.asarray(metrics.pairwise_distance(samples, x)).argmin(axis=1)
  on_subset = metrics.precision_coverage(samples, labels, x[parts[t]], y[parts[t]], radius=_RADIUS)
  return {"nearest_in_own_subset": float(parts[t][nearest].mean()), **on_subset}


def _picture(folder: pathlib.Path, data: Points, classifiers: Sequence[Classifier], drawn: Sequence[np.ndarray]) -> str:
  """Draws Fig. 4 or Fig. 5 with samples, their labels and their classifiers; returns the name of the file."""
  (x, y, parts), (samples, labels, index) = data, drawn
  panels: list[tuple[str, Any]] = []
  for t, (classifier, part) in enumerate(zip(classifiers, parts, strict=True)):
    of = f" of classifier {t + 1}" if len(classifiers) > 1 else ""
    panels += [(f"training data{of}", (x[part], y[part])), (f"regions{of}", classifier.predict)]
    if len(classifiers) > 1:
      panels.append((f"generated, t = {t + 1}", (samples[index == t], labels[index == t])))
  panels.append(("generated from fresh noise", (samples, labels)))
  name = "fig4.png" if len(classifiers) == 1 else "fig5.png"
  pictures.plane(folder / name, panels, num_classes=classifiers[0].num_classes)
  return name
