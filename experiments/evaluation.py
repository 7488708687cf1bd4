"""The last stage of the image experiments: looks at the data again, and measures what came out beside its controls."""

from collections.abc import Mapping, Sequence
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, comparison, figures
from experiments.data import Images, Split
from experiments.judge import Judge, train_judge
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
    num_samples: samples of each kind, the same number of each class.
    population: fresh samples of which the residual is measured.
    figure: file name of the picture.

  Returns:
    The figures, also written to ``metrics.json``.
  """
  common.say("comparing with the data: independent judge, similarities, residuals")
  judge = train_judge(data.evaluation, seed=seed + 2, directory=shared / "judge", epochs=judge_epochs)
  student_epochs = 5 * judge_epochs  # its training set is small
  labels = np.unique(data.train.y)
  y = np.repeat(labels, num_samples // len(labels))
  key = jax.random.key(seed + 3)
  fresh, _ = training.sample(method, state, classifiers, key, y)
  samples = {"fresh_noise": Images(np.asarray(fresh), y)}
  if method.fixed_noise:
    samples["trained_noise"] = _from_trained_noise(method, state, classifiers, y)
  results: dict[str, Any] = {name: comparison.measure(judge, data, images) for name, images in samples.items()}
  further = functools.partial(comparison.measure_further, judge, data, seed=seed, epochs=student_epochs)
  results["fresh_noise"] |= further(samples["fresh_noise"])
  # A distribution's residual has no sampling error: of fresh noise many samples, of the training data all.
  # Where samples interact, or multipliers are fitted, as many of each as the classifiers were trained on.
  coupled = any(classifier.batch_coupled for classifier in classifiers)
  many_labels = np.resize(labels, len(data.train.y) if coupled else population)
  many = Images(np.asarray(training.sample(method, state, classifiers, key, many_labels)[0]), many_labels)
  populations = {"fresh_noise": many}
  if method.fixed_noise:
    populations["trained_noise"] = _from_all_trained_noise(method, state, classifiers)
    results["recovered_by_all_trained_noise"] = comparison.recovered(populations["trained_noise"], data.train)
  margins = _true_margins(classifiers, data.train)
  for name, images in populations.items():
    results[name] |= _kkt_figures(classifiers, conditions, margins, images)
  results |= _controls(
    shared / "controls.json", judge, data, classifiers, conditions, margins, y, many, seed, student_epochs
  )
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
  judge: Judge,
  data: Split,
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  margins: Sequence[float],
  y: np.ndarray,
  like: Images,
  seed: int,
  student_epochs: int,
) -> dict[str, Any]:
  """The same figures of what generated images are compared with; measured once and kept in a file.

  Args:
    path: the file.
    judge: the independent judge.
    data: training images, images for the judge, held-out images.
    classifiers: the attacked classifiers.
    conditions: the stationarity condition of each.
    margins: median margin of the training images of each.
    y: labels of the samples [S].
    like: as many images of noise are drawn for their residual as these.
    seed: of the noise, and of the classifier that is trained on the images.
    student_epochs: passes over the images of its training.

  Returns:
    The figures.
  """
  if path.exists():
    kept: dict[str, Any] = json.loads(path.read_text())
    return kept
  key = jax.random.key(seed + 3)
  samples = comparison.controls(data, y, key)
  further = functools.partial(comparison.measure_further, judge, data, seed=seed, epochs=student_epochs)
  results: dict[str, Any] = {
    name: comparison.measure(judge, data, images) | further(images) for name, images in samples.items()
  }
  populations = {
    "training_data": data.train,
    "class_means": samples["class_means"],
    "dataset_mean": samples["dataset_mean"],
    "uniform_noise": comparison.uniform_noise(like, key),
  }
  for name, images in populations.items():
    results[name] |= _kkt_figures(classifiers, conditions, margins, images)
  results["recovered_by_real_held_out"] = comparison.recovered(data.held_out, data.train)
  results["recovered_by_class_means"] = comparison.recovered(samples["class_means"], data.train)
  results["true_median_margin"] = list(margins)
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


def _from_all_trained_noise(
  method: training.Method, state: training.TrainState, classifiers: Sequence[Classifier]
) -> Images:
  """The samples of every noise that the generator was trained on, M for each classifier."""
  y = np.concatenate([training.balanced_labels(c, method.batch_size) for c in classifiers])
  t = np.repeat(np.arange(len(classifiers)), method.batch_size)
  x = training.generate_from(method, state, jnp.asarray(state.noise).reshape(len(y), -1), y, t)
  return Images(np.asarray(x), y)


def _true_margins(classifiers: Sequence[Classifier], train: Images) -> list[float]:
  """The median margin of each classifier's training images, in logits."""
  own = [_own(classifier, train) for classifier in classifiers]
  return [
    float(jnp.median(losses.runner_up_margin(c.predict_fn(c.params, x), c.local_labels(y))))
    for c, (x, y) in zip(classifiers, own, strict=True)
  ]


def _kkt_figures(
  classifiers: Sequence[Classifier], conditions: Sequence[Conditions], margins: Sequence[float], images: Images
) -> dict[str, Any]:
  """How well images satisfy the conditions of each classifier: the method's own figures.

  Returns:
    One number for each classifier: the relative squared ``residual``, of all images; and ``residual_per_tensor``,
    ``duality`` (mean distance of the margin from its median over the training data, in units of that, by
    `kkt_jax.losses.duality_loss`), ``margin_spread`` and ``active_multipliers`` as in `kkt_jax.diagnostics.Diagnosis`,
    of the first thousand. Multipliers are the softmax's; with batch norm, where none are known, the best non-negative
    ones.
  """
  names = ("residual", "residual_per_tensor", "margin_spread", "active_multipliers")
  figures_of_merit: dict[str, list[Any]] = {name: [] for name in (*names, "duality")}
  for classifier, condition, margin in zip(classifiers, conditions, margins, strict=True):
    x, y = _own(classifier, images)
    few, few_labels = x[:1000], y[:1000]
    mu = None
    if not classifier.batch_coupled:
      mu = multipliers.from_softmax(classifier.predict_fn(classifier.params, few))
    diagnosis = diagnostics.diagnose(classifier, condition, few, few_labels, mu=mu, num_steps=200)
    for name in names:
      figures_of_merit[name].append(getattr(diagnosis, name))
    logits = classifier.predict_fn(classifier.params, few)
    duality = losses.duality_loss(
      logits, classifier.local_labels(few_labels), -jnp.log(margin), delta=0.0, relative=True
    )
    figures_of_merit["duality"].append(float(jnp.mean(duality)))
    if not classifier.batch_coupled:
      figures_of_merit["residual"][-1] = _residual(classifier, condition, x, y)
  return figures_of_merit


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
