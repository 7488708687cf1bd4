"""The last stage of the image experiments: looks at the data again, and measures what came out beside its controls."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data import Split
from experiments.measure import comparison
from experiments.measure.judge import soft_labels, train_judge
import kkt_jax
from kkt_jax.auditing import matching, pictures
from kkt_jax.auditing.samples import Samples
from kkt_jax.classifiers import Classifier, PyTree
from kkt_jax.cli.progress import say
from kkt_jax.cli.workdir import Workdir, write_json
from kkt_jax.kkt import Conditions, diagnostics, losses, multipliers

_SHOWN: tuple[str, ...] = ("eval_accuracy", "ssim_nearest", "ssim_cover", "distinct_nearest", "spread")
_SHOWN += ("label_agreement", "residual", "residual_free")
_NOVELTY = (
  "Of fresh draws {trained:.0%} are nearly a training image, {repeated:.0%} nearly another draw, {new:.0%} nearly"
  " neither (structural similarity above .9)."
)
_MEMBERSHIP = (
  "The median training image lies on {train:.2%} of the activation boundaries, another real image on {others:.2%}; this"
  " distinguishes them with an AUC of {auc:.3f}."
)
_CERTIFICATES = (
  "The weights alone certify {certified} of at most {most} training images (framed); {exact} of these are exact,"
  " {false} are no training images; {to_the_bit} are claimed to be right to the last bit, of which {identical} are"
  " identical to one."
)
_AT_ONCE = 1000  # samples whose gradients are in memory at once


def evaluate(
  out: Workdir,
  shared: pathlib.Path,
  data: Split,
  reconstruction: "kkt_jax.Reconstruction",
  config: Any,
  *,
  num_samples: int,
  picture: str,
) -> Mapping[str, Any]:
  """Draws the picture and measures every metric beside its controls.

  Args:
    out: the workdir.
    shared: folder of the judge and of the controls, which other runs on the same data can share.
    data: training images, images for the judge, held-out images, distractors.
    reconstruction: the attacked classifiers, their conditions, and the trained generator.
    config: of `experiments.images`: ``seed`` (of the judge and of the samples), ``judge_epochs`` (passes over the data
      of the judge's training), ``thorough`` (whether to measure what takes longer, too) and ``population`` (fresh
      samples of which the residual is measured).
    num_samples: samples of each kind, the same number of each class.
    picture: file name of the picture.

  Returns:
    The metrics, which are also written to ``metrics.json``, with ``summary``, a table for people, and ``pictures``.
  """
  say("comparing with the data: independent judge, similarities, residuals")
  classifiers = reconstruction.classifiers
  labels = sorted({label for classifier in classifiers for label in classifier.labels})
  matching.check_classes(vars(data), labels)
  judge = train_judge(data.evaluation, seed=config.seed + 2, directory=shared / "judge", epochs=config.judge_epochs)
  key = jax.random.key(config.seed + 3)
  only = len(classifiers) == 1
  teach = functools.partial(soft_labels, classifiers[0], float(reconstruction.margins[0])) if only else None

  def fresh(count: int, labels_of: Callable[..., np.ndarray]) -> Samples:
    y = labels_of(labels, count)
    return Samples(np.asarray(reconstruction.sample(key, y)), y)

  def measure(images: Samples) -> dict[str, Any]:
    metrics: dict[str, Any] = comparison.measure(judge, data, images)
    if config.thorough:  # five times the judge's passes: there are fewer images to learn from
      metrics |= comparison.measure_further(
        judge, data, images, seed=config.seed, epochs=5 * config.judge_epochs, teach=teach
      )
    return metrics

  samples = fresh(num_samples // len(labels), np.repeat)
  # A distribution's residual has no sampling error: of fresh noise many samples, of the training data all.
  # Where samples interact, or multipliers are fitted, as many of each as the classifiers were trained on.
  coupled = any(classifier.batch_coupled for classifier in classifiers)
  many = fresh(len(data.train.y) if coupled else config.population, np.resize)
  x, y = map(np.asarray, (reconstruction.table or reconstruction).every_sample())
  every = Samples(x, y)
  margins = _true_margins(classifiers, data.train)
  kkt = functools.partial(_kkt_metrics, classifiers, reconstruction.conditions, margins, thorough=config.thorough)
  results: dict[str, Any] = {
    "fresh_noise": measure(samples) | kkt(many),
    "trained_noise": comparison.measure(judge, data, _with_labels(every, samples.y))
    | kkt(_with_labels(every, many.y) if coupled else every),
    "recovered_by_all_trained_noise": comparison.recovered(every, data.train),
    **_controls(shared / "controls.json", data, samples.y, many, key, measure, kkt),
    "true_median_margin": margins,
    "exp_minus_alpha": np.asarray(reconstruction.margins).tolist(),
    "final_losses": out.last_logged(),
  }
  results["novelty"] = comparison.novelty(samples, data.train)
  results["boundaries"] = comparison.boundaries(classifiers, data.train, data.held_out)
  results["certificates"], certified = matching.exactness(reconstruction, data.train)
  results["criteria"] = [dataclasses.asdict(exact.criteria) for exact in reconstruction.exact]
  columns = pictures.COLUMNS // len(labels)
  pairs = matching.similar_pairs(samples, data.train, certified=certified, columns=columns)
  (out.path / picture).write_bytes(pairs)
  out.finish(results)
  measured = {name: row for name, row in results.items() if isinstance(row, dict) and "eval_accuracy" in row}
  summary = [matching.table(measured, _SHOWN), _NOVELTY.format_map(results["novelty"])]
  summary += [_CERTIFICATES.format_map(row) for row in results["certificates"] if row["most"]]
  summary += [_MEMBERSHIP.format_map(row) for row in results["boundaries"]]
  return results | {"summary": "\n\n".join(summary), "pictures": [picture]}


def _controls(
  path: pathlib.Path,
  data: Split,
  y: np.ndarray,
  like: Samples,
  key: jax.Array,
  measure: Callable[[Samples], dict[str, Any]],
  kkt: Callable[[Samples], dict[str, Any]],
) -> dict[str, Any]:
  """The same metrics of what generated images are compared with; measured once and kept in a file.

  Args:
    path: the file.
    data: training images, images for the judge, held-out images.
    y: labels of the samples [S].
    like: as many images of noise are drawn for their residual as these, and no more than these of any other kind.
    key: of the noise.
    measure: the metrics of a set of samples.
    kkt: the method's own metrics of as many images as a classifier was trained on.

  Returns:
    The metrics.
  """
  if path.exists():
    return json.loads(path.read_text())
  samples = matching.controls(data.train, data.held_out, y, key)
  populations = samples | {"training_data": data.train, "uniform_noise": matching.uniform_noise(like, key)}
  del populations["real_held_out"]  # the conditions are those of other data
  results: dict[str, Any] = {name: measure(images) for name, images in samples.items()}
  for name, images in populations.items():
    results[name] |= kkt(images if len(images.y) <= len(like.y) else _with_labels(images, like.y))
  results["recovered_by_real_held_out"] = comparison.recovered(data.held_out, data.train)
  results["recovered_by_class_means"] = comparison.recovered(samples["class_means"], data.train)
  write_json(path, results)
  return results


def _with_labels(images: Samples, y: np.ndarray) -> Samples:
  """Images with labels y [S], sorted: those of each class in their order, from the first again after the last."""
  labels, counts = np.unique(y, return_counts=True)
  pairs = zip(labels, counts, strict=True)
  chosen = np.concatenate([np.resize(np.flatnonzero(images.y == label), count) for label, count in pairs])
  return Samples(images.x[chosen], images.y[chosen])


def _own(classifier: Classifier, images: Samples) -> tuple[jax.Array, jax.Array]:
  """The images whose label a classifier knows."""
  known = np.isin(images.y, classifier.labels)
  return jnp.asarray(images.x[known]), jnp.asarray(images.y[known])


def _true_margins(classifiers: Sequence[Classifier], train: Samples) -> list[float]:
  """The median margin of each classifier's training images, in logits."""
  triples = [(classifier, *_own(classifier, train)) for classifier in classifiers]
  return [float(jnp.median(losses.runner_up_margin(c.predict(x), c.classes_of(y)))) for c, x, y in triples]


def _kkt_metrics(
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  margins: Sequence[float],
  images: Samples,
  *,
  thorough: bool,
) -> dict[str, list[Any]]:
  """How well images satisfy the conditions of each classifier: the method's own metrics.

  Args:
    classifiers: the attacked classifiers.
    conditions: the stationarity condition of each.
    margins: median margin of the training images of each.
    images: as many as a classifier was trained on, or of one that is not batch-coupled any number.
    thorough: whether to return more than the residual of more than a thousand images.

  Returns:
    One number per classifier: the relative squared ``residual``, of all images, with exact gates; and of the first
    thousand ``residual_free``, with gates that are free at kinks, ``residual_per_tensor``, ``margin_spread`` and
    ``active_multipliers`` as in `kkt_jax.kkt.Diagnosis` and ``duality`` (mean distance of the margin from that
    of the training data, in units of it). Multipliers are the softmax's; with batch norm, where none are known, the
    best non-negative ones. Gates are free only where there are few images: those of a large population fit anything.
  """
  rows: dict[str, list[Any]] = {}
  for classifier, condition, margin in zip(classifiers, conditions, margins, strict=True):
    x, y = _own(classifier, images)
    metrics: dict[str, Any] = {}
    if thorough or classifier.batch_coupled or len(y) <= _AT_ONCE:
      few, few_labels = x[:_AT_ONCE], y[:_AT_ONCE]
      alpha = -math.log(max(margin, 1e-6))  # a classifier that errs on its own data has no margin
      softmax, duality = _at_inference(classifier, few, few_labels, alpha)
      mu = None if classifier.batch_coupled else softmax
      diagnosis = diagnostics.diagnose(classifier, condition, few, few_labels, mu=mu, num_steps=200)
      names = ("residual_per_tensor", "margin_spread", "active_multipliers")
      metrics = {"residual": diagnosis.residual_exact_gates, "residual_free": diagnosis.residual}
      metrics |= {name: getattr(diagnosis, name) for name in names} | {"duality": float(duality)}
    if not classifier.batch_coupled and len(y) > _AT_ONCE:
      metrics["residual"] = _residual(classifier, condition, x, y)
    for name, value in metrics.items():
      rows.setdefault(name, []).append(value)
  return rows


def _residual(classifier: Classifier, condition: Conditions, x: jax.Array, y: jax.Array) -> float:
  """The relative squared residual with softmax multipliers, in parts to save memory."""
  mean = jax.tree.map(jnp.zeros_like, classifier.params)
  for part in np.array_split(np.arange(len(y)), -(-len(y) // _AT_ONCE)):
    mean = optax.tree.add_scale(mean, len(part) / len(y), _mean_gradients(classifier, x[part], y[part]))
  return float(jax.jit(losses.relative_residual)(condition, mean))


@jax.jit
def _at_inference(classifier: Classifier, x: jax.Array, y: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
  """The softmax's multipliers, and the mean duality loss in units of the margin."""
  logits = classifier.predict(x)
  duality = losses.duality_loss(logits, classifier.classes_of(y), alpha, delta=0.0, relative=True)
  return multipliers.from_softmax(logits), jnp.mean(duality)


@jax.jit
def _mean_gradients(classifier: Classifier, x: jax.Array, y: jax.Array) -> PyTree:
  mu = multipliers.from_softmax(classifier.predict(x))
  return losses.stationarity_sum(classifier.apply_fn, classifier.params, x, classifier.classes_of(y), mu)
