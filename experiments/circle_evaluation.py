"""The last stage of `circle`: looks at the points again, and measures what came out beside its controls."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, figures
from experiments.circle_classifier import input_moments, NUM_CLASSES
from kkt_jax import diagnostics, losses, metrics, training
from kkt_jax.classifier import Classifier
from kkt_jax.conditions import Conditions

_RADIUS = 0.15  # what counts as near a training point
_NUM_SAMPLES = 900


def evaluate(
  out: common.Workdir,
  data: tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]],
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  method: training.Method,
  state: training.TrainState,
  *,
  seed: int,
) -> Mapping[str, Any]:
  """Draws the picture and measures every figure of merit beside its controls.

  Args:
    out: the workdir.
    data: the points, their labels, and which of them each classifier was trained on.
    classifiers: the attacked classifiers.
    conditions: the stationarity condition of each.
    method: how the generator was trained.
    state: the trained generator.
    seed: of the samples.

  Returns:
    The figures, also written to ``metrics.json``.
  """
  x, y, parts = data
  key = jax.random.key(seed + 3)
  labels = np.arange(_NUM_SAMPLES) % NUM_CLASSES
  samples, index = training.sample(method, state, classifiers, key, labels)
  mean, factor = input_moments(classifiers[0])
  gaussian = mean[None] + jax.random.normal(key, samples.shape) @ factor.T
  square = jax.random.uniform(key, samples.shape, minval=-1.5, maxval=1.5)

  def score(points: jax.Array | np.ndarray, point_labels: np.ndarray) -> dict[str, float]:
    return metrics.precision_coverage(points, point_labels, x, y, radius=_RADIUS)

  results: dict[str, Any] = score(samples, labels)
  results["controls"] = {
    "training_data": score(x, y),
    "gaussian_of_the_stored_moments": score(gaussian, labels),
    "uniform_in_the_square": score(square, labels),
  }
  if len(classifiers) > 1:
    results["per_classifier"] = [
      _own_subset(np.asarray(samples)[np.asarray(index) == t], labels[np.asarray(index) == t], data, t)
      for t in range(len(classifiers))
    ]
  diagnoses = [
    {
      name: diagnostics.diagnose(classifier, condition, points, point_labels)
      for name, (points, point_labels) in {
        "training_data": (x[part], y[part]),
        # Equal numbers for both: the more points, the more multipliers there are to fit with.
        "generated": (samples[index == t][:180], labels[np.asarray(index) == t][:180]),
        "gaussian_of_the_stored_moments": (gaussian[:180], labels[:180]),
      }.items()
    }
    for t, (classifier, condition, part) in enumerate(zip(classifiers, conditions, parts, strict=True))
  ]
  results["residual"] = [{name: one.residual for name, one in own.items()} for own in diagnoses]
  results["margin_spread"] = [own["generated"].margin_spread for own in diagnoses]
  results["exp_minus_alpha"] = np.exp(-np.asarray(state.params["alpha"])).tolist()
  results["true_median_margin"] = [
    float(jnp.median(losses.runner_up_margin(c.predict_fn(c.params, jnp.asarray(x[part])), y[part])))
    for c, part in zip(classifiers, parts, strict=True)
  ]
  results["final_losses"] = out.last_logged()
  _figure(out.path, data, classifiers, np.asarray(samples), labels, np.asarray(index))
  out.finish(results)
  return results


def _own_subset(
  samples: np.ndarray, labels: np.ndarray, data: tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]], t: int
) -> dict[str, float]:
  """How well samples with fixed t stay on D_t (Fig. 5): nearest point of all in D_t, precision, coverage."""
  x, y, parts = data
  nearest = np.asarray(metrics.pairwise_distance(samples, x)).argmin(axis=1)
  own = metrics.precision_coverage(samples, labels, x[parts[t]], y[parts[t]], radius=_RADIUS)
  return {"nearest_in_own_subset": float(parts[t][nearest].mean()), **own}


def _figure(
  path: pathlib.Path,
  data: tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]],
  classifiers: Sequence[Classifier],
  samples: np.ndarray,
  labels: np.ndarray,
  index: np.ndarray,
) -> None:
  x, y, parts = data
  panels: list[tuple[str, Any]] = []
  for t, (classifier, part) in enumerate(zip(classifiers, parts, strict=True)):
    of = f" of classifier {t + 1}" if len(classifiers) > 1 else ""

    def logits(points: np.ndarray, classifier: Classifier = classifier) -> jax.Array:
      return classifier.predict_fn(classifier.params, jnp.asarray(points))

    panels += [(f"training data{of}", ("points", x[part], y[part])), (f"regions{of}", ("regions", logits))]
    if len(classifiers) > 1:
      panels.append((f"generated, t = {t + 1}", ("points", samples[index == t], labels[index == t])))
  panels.append(("generated from fresh noise", ("points", samples, labels)))
  figures.plane(path / ("fig4.png" if len(classifiers) == 1 else "fig5.png"), panels, num_classes=NUM_CLASSES)
