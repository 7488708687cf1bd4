"""The last stage of the image experiments: looks at the data again, and measures what came out beside its controls."""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, comparison, figures, ingredients
from experiments.data import Images, Split
from experiments.judge import train_judge
from kkt_jax import diagnostics, losses, multipliers, training
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import Conditions


def evaluate(
  out: common.Workdir,
  shared: pathlib.Path,
  data: Split,
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  method: training.Method,
  state: training.TrainState,
  *,
  seed: int,
  judge_epochs: int,
  thorough: bool,
  num_samples: int,
  population: int,
  figure: str,
) -> Mapping[str, Any]:
  """Draws the picture and measures every figure of merit beside its controls.

  Args:
    out: the workdir.
    shared: folder of the judge and of the controls, which other runs on the same data can share.
    data: training images, images for the judge, held-out images.
    classifiers: the attacked classifiers.
    conditions: the stationarity condition of each.
    method: how the generator was trained.
    state: the trained generator.
    seed: of the judge and of the samples.
    judge_epochs: passes over the data of the judge's training.
    thorough: whether to measure what takes longer, too.
    num_samples: samples of each kind, the same number of each class.
    population: fresh samples of which the residual is measured.
    figure: file name of the picture.

  Returns:
    The figures, also written to ``metrics.json``.
  """
  common.say("comparing with the data: independent judge, similarities, residuals")
  judge = train_judge(data.evaluation, seed=seed + 2, directory=shared / "judge", epochs=judge_epochs)
  labels = np.unique(data.train.y)
  y = np.repeat(labels, num_samples // len(labels))
  key = jax.random.key(seed + 3)
  fresh, _ = training.sample(method, state, classifiers, key, y)
  samples = {"fresh_noise": Images(np.asarray(fresh), y)}
  if method.fixed_noise:
    samples["trained_noise"] = _from_trained_noise(method, state, classifiers, y)

  def measure(images: Images) -> dict[str, Any]:
    figures_of_merit = comparison.measure(judge, data, images)
    if thorough:  # five times the judge's passes: there are fewer images to learn from
      figures_of_merit |= comparison.measure_further(judge, data, images, seed=seed, epochs=5 * judge_epochs)
    return figures_of_merit

  results: dict[str, Any] = {"fresh_noise": measure(samples["fresh_noise"])}
  if method.fixed_noise:
    results["trained_noise"] = comparison.measure(judge, data, samples["trained_noise"])
  # A distribution's residual has no sampling error: of fresh noise many samples, of the training data all.
  # Where samples interact, or multipliers are fitted, as many of each as the classifiers were trained on.
  coupled = any(classifier.batch_coupled for classifier in classifiers)
  many_labels = np.resize(labels, len(data.train.y) if coupled else population)
  many = Images(np.asarray(training.sample(method, state, classifiers, key, many_labels)[0]), many_labels)
  populations = {"fresh_noise": many}
  if method.fixed_noise:
    every, every_label = ingredients.every_sample(method, state, classifiers)
    populations["trained_noise"] = Images(np.asarray(every), every_label)
    results["recovered_by_all_trained_noise"] = comparison.recovered(populations["trained_noise"], data.train)
  margins = _true_margins(classifiers, data.train)
  own_figures = functools.partial(_kkt_figures, classifiers, conditions, margins, thorough=thorough)
  for name, images in populations.items():
    results[name] |= own_figures(images)
  results |= _controls(shared / "controls.json", data, y, many, key, measure, own_figures)
  results["true_median_margin"] = list(margins)
  results["exp_minus_alpha"] = np.exp(-np.asarray(state.params["alpha"])).tolist()
  results["final_losses"] = out.last_logged()
  comparison.similar_pairs(
    out.path / figure, samples["fresh_noise"], data.train, columns=figures.COLUMNS // len(labels)
  )
  out.finish(results)
  common.say(comparison.table(results))
  return results


def _controls(
  path: pathlib.Path,
  data: Split,
  y: np.ndarray,
  like: Images,
  key: jax.Array,
  measure: Callable[[Images], dict[str, Any]],
  own_figures: Callable[[Images], dict[str, Any]],
) -> dict[str, Any]:
  """The same figures of what generated images are compared with; measured once and kept in a file.

  Args:
    path: the file.
    data: training images, images for the judge, held-out images.
    y: labels of the samples [S].
    like: as many images of noise are drawn for their residual as these.
    key: of the noise.
    measure: the figures of a set of samples.
    own_figures: the method's own figures of as many images as a classifier was trained on.

  Returns:
    The figures.
  """
  if path.exists():
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept
  samples = comparison.controls(data.train, data.held_out, y, key)
  results: dict[str, Any] = {name: measure(images) for name, images in samples.items()}
  populations = {
    "training_data": data.train,
    "class_means": samples["class_means"],
    "dataset_mean": samples["dataset_mean"],
    "uniform_noise": comparison.uniform_noise(like, key),
  }
  for name, images in populations.items():
    results[name] |= own_figures(images)
  results["recovered_by_real_held_out"] = comparison.recovered(data.held_out, data.train)
  results["recovered_by_class_means"] = comparison.recovered(samples["class_means"], data.train)
  common.write_json(path, results)
  return results


def _from_trained_noise(
  method: training.Method, state: training.TrainState, classifiers: Sequence[Classifier], y: np.ndarray
) -> Images:
  """Samples with labels y [S] from the noise that the generator was trained on."""
  trained = np.asarray(state.noise)
  noise, index = [], []
  used: dict[int, int] = {}
  for label in y.tolist():
    t = next(i for i, c in enumerate(classifiers) if label in c.labels)
    own = np.flatnonzero(np.asarray(training.balanced_labels(classifiers[t], method.batch_size)) == label)
    position = used.get(label, 0)
    used[label] = position + 1
    noise.append(trained[t, own[position % len(own)]])
    index.append(t)
  x = training.generate_from(method, state, np.stack(noise), y, np.asarray(index))
  return Images(np.asarray(x), y)


def _own(classifier: Classifier, images: Images) -> tuple[jax.Array, jax.Array]:
  """The images whose label a classifier knows."""
  known = np.isin(images.y, classifier.labels)
  return jnp.asarray(images.x[known]), jnp.asarray(images.y[known])


def _true_margins(classifiers: Sequence[Classifier], train: Images) -> list[float]:
  """The median margin of each classifier's training images, in logits."""
  own = [_own(classifier, train) for classifier in classifiers]
  return [
    float(jnp.median(losses.runner_up_margin(c.predict_fn(c.params, x), c.local_labels(y))))
    for c, (x, y) in zip(classifiers, own, strict=True)
  ]


def _kkt_figures(
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  margins: Sequence[float],
  images: Images,
  *,
  thorough: bool,
) -> dict[str, list[Any]]:
  """How well images satisfy the conditions of each classifier: the method's own figures.

  Args:
    classifiers: the attacked classifiers.
    conditions: the stationarity condition of each.
    margins: median margin of the training images of each.
    images: as many as a classifier was trained on, or of one that is not batch-coupled any number.
    thorough: whether to return more than the residual.

  Returns:
    One number for each classifier: the relative squared ``residual``, of all images; and ``residual_per_tensor``,
    ``margin_spread`` and ``active_multipliers`` as in `kkt_jax.diagnostics.Diagnosis` and ``duality`` (mean distance of
    the margin from that of the training data, in units of it), of the first thousand. Multipliers are the softmax's;
    with batch norm, where none are known, the best non-negative ones.
  """
  own: dict[str, list[Any]] = {}
  for classifier, condition, margin in zip(classifiers, conditions, margins, strict=True):
    x, y = _own(classifier, images)
    figures_of_merit: dict[str, Any] = {}
    if thorough or classifier.batch_coupled:
      few, few_labels = x[:1000], y[:1000]
      logits = classifier.predict_fn(classifier.params, few)
      mu = None if classifier.batch_coupled else multipliers.from_softmax(logits)
      diagnosis = diagnostics.diagnose(classifier, condition, few, few_labels, mu=mu, num_steps=200)
      alpha = -math.log(max(margin, 1e-6))  # a classifier that errs on its own data has no margin
      duality = losses.duality_loss(logits, classifier.local_labels(few_labels), alpha, delta=0.0, relative=True)
      names = ("residual", "residual_per_tensor", "margin_spread", "active_multipliers")
      figures_of_merit = {name: getattr(diagnosis, name) for name in names} | {"duality": float(jnp.mean(duality))}
    if not classifier.batch_coupled:
      figures_of_merit["residual"] = _residual(classifier, condition, x, y)
    for name, value in figures_of_merit.items():
      own.setdefault(name, []).append(value)
  return own


def _residual(classifier: Classifier, condition: Conditions, x: jax.Array, y: jax.Array) -> float:
  """The relative squared residual with softmax multipliers, in parts of a thousand samples to save memory."""
  mean = jax.tree.map(jnp.zeros_like, classifier.params)
  for part in np.array_split(np.arange(len(y)), -(-len(y) // 1000)):
    mean = optax.tree.add_scale(mean, len(part) / len(y), _mean_gradients(classifier, x[part], y[part]))
  return float(losses.stationarity_residual(condition, mean).relative)


@jax.jit
def _mean_gradients(classifier: Classifier, x: jax.Array, y: jax.Array) -> PyTree:
  mu = multipliers.from_softmax(classifier.predict_fn(classifier.params, x))
  return losses.stationarity_sum(classifier.gradient_fn, classifier.params, x, classifier.local_labels(y), mu)
