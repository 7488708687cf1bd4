"""The last stage of the image experiments: looks at the data again, and measures what came out beside its controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, comparison, figures
from experiments.data import Images, Split
from experiments.judge import train_judge
from kkt_jax import diagnostics, losses, multipliers, training
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import Conditions


def evaluate(
  out: common.Workdir,
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
  judge = train_judge(data.evaluation, seed=seed + 2, epochs=judge_epochs)
  labels = np.unique(data.train.y)
  y = np.repeat(labels, num_samples // len(labels))
  key = jax.random.key(seed + 3)
  fresh, _ = training.sample(method, state, classifiers, key, y)
  samples = {"fresh_noise": Images(np.asarray(fresh), y)}
  if method.fixed_noise:
    samples["trained_noise"] = _from_trained_noise(method, state, classifiers, y)
  samples |= comparison.controls(data, y, key)
  results: dict[str, Any] = {name: comparison.measure(judge, data, images) for name, images in samples.items()}
  # A distribution's residual has no sampling error: of fresh noise many samples, of the training data all.
  # Where samples interact, or multipliers are fitted, as many of each as the classifiers were trained on.
  coupled = any(classifier.batch_coupled for classifier in classifiers)
  many_labels = np.resize(labels, len(data.train.y) if coupled else population)
  many = Images(np.asarray(training.sample(method, state, classifiers, key, many_labels)[0]), many_labels)
  populations = {
    "fresh_noise": many,
    "training_data": data.train,
    "class_means": samples["class_means"],
    "dataset_mean": samples["dataset_mean"],
    "uniform_noise": comparison.uniform_noise(many, key),
  }
  if method.fixed_noise:
    everything = _from_all_trained_noise(method, state, classifiers)
    populations["trained_noise"] = everything
    results["recovered_by_all_trained_noise"] = comparison.recovered(everything, data.train)
    results["recovered_by_real_held_out"] = comparison.recovered(data.held_out, data.train)
    results["recovered_by_class_means"] = comparison.recovered(samples["class_means"], data.train)
  for name, images in populations.items():
    results[name]["residual"] = _residuals(classifiers, conditions, images)
  results["true_median_margin"] = [
    float(jnp.median(losses.runner_up_margin(c.predict_fn(c.params, x), c.local_labels(y))))
    for c, (x, y) in ((c, _own(c, data.train)) for c in classifiers)
  ]
  results["exp_minus_alpha"] = np.exp(-np.asarray(state.params["alpha"])).tolist()
  results["final_losses"] = out.last_logged()
  comparison.similar_pairs(
    out.path / figure, samples["fresh_noise"], data.train, columns=figures.COLUMNS // len(labels)
  )
  out.finish(results)
  common.say(comparison.table(results))
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


def _residuals(classifiers: Sequence[Classifier], conditions: Sequence[Conditions], images: Images) -> list[float]:
  """The relative squared stationarity residual of images for each classifier.

  Multipliers are the softmax's; with batch norm, where none are known, the best non-negative ones.
  """
  residuals = []
  for classifier, condition in zip(classifiers, conditions, strict=True):
    x, y = _own(classifier, images)
    if classifier.batch_coupled:
      residuals.append(diagnostics.diagnose(classifier, condition, x, y, num_steps=200).residual)
      continue
    mean = jax.tree.map(jnp.zeros_like, classifier.params)
    for part in np.array_split(np.arange(len(y)), -(-len(y) // 1000)):  # memory for a thousand samples at a time
      share = len(part) / len(y)
      mean = optax.tree.add_scale(mean, share, _mean_gradients(classifier, x[part], y[part]))
    residuals.append(float(losses.stationarity_residual(condition, mean).relative))
  return residuals


@jax.jit
def _mean_gradients(classifier: Classifier, x: jax.Array, y: jax.Array) -> PyTree:
  mu = multipliers.from_softmax(classifier.predict_fn(classifier.params, x))
  return losses.stationarity_sum(classifier.gradient_fn, classifier.params, x, classifier.local_labels(y), mu)
