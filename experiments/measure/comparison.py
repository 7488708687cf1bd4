"""Samples against the data: their matching.controls, how near they come, and whether they know the training data."""

from collections.abc import Callable, Sequence
import functools

import jax.numpy as jnp
import numpy as np

from experiments.data import Split
from experiments.measure.judge import Judge, usefulness
from kkt_jax import metrics
from kkt_jax.auditing import matching
from kkt_jax.auditing.samples import Samples
from kkt_jax.classifiers import Classifier, relaxation
from kkt_jax.criteria import AuditCriteria
from kkt_jax.membership import candidates

_TESTED = 100  # real images of each class on which a classifier trained on generated ones is tested
_NEIGHBOURS = 5  # k of precision, recall, density and coverage
_NEAR = 0.9  # structural similarity from which they are hard to tell apart


def retrieval(samples: Samples, train: Samples, others: Samples) -> dict[str, float]:
  """Do samples know the training data better than other real data of the same kind?

  Every training image has a group of its own of other images of its class, all groups of one size, and is retrieved if
  some sample resembles it more than any sample resembles any of the group. As many images of each class take part as
  the rarest class of the smaller set has.

  Args:
    samples: all that is generated.
    train: training data.
    others: real data of the same classes that were not trained on: the distractors.

  Returns:
    ``retrieval_*`` as in `kkt_jax.metrics.retrieval`, and ``nearer_*`` as in `kkt_jax.metrics.nearer_to_training`.

  Raises:
    UsageError: a class is in one of the two sets only.
  """
  matching.check_classes({"the training data": train, "the other real data": others})
  trial = matching.trial(samples, train, others)
  retrieved = metrics.retrieval(trial.members, trial.others.ravel())
  count, _ = matching.tested(train, others)
  nearer = metrics.nearer_to_training(samples.x, train.x[trial.places], matching.first_of_each_class(others, count).x)
  return {f"retrieval_{name}": value for name, value in retrieved.items()} | {
    f"nearer_{name}": value for name, value in nearer.items()
  }


def recovered(images: Samples, train: Samples) -> dict[str, float]:
  """How many training images have a similar one of their class among others; beside real images it says what is near.

  Args:
    images: all the images of a generator, or of a control.
    train: training images.

  Returns:
    ``images``: how many were looked through; ``ssim_cover``: mean of the training images' best similarity to one of
    them; ``above_0.4`` and so on: training images for which it is greater.
  """
  best = matching.similarity(images, train)
  above = {f"above_{threshold}": int(np.sum(best > threshold)) for threshold in (0.4, 0.6, 0.9, AuditCriteria().equal)}
  return {"images": len(images.y), "ssim_cover": float(best.mean())} | above


def novelty(samples: Samples, train: Samples) -> dict[str, float]:
  """Which draws are training images, which are draws of one another, and which are new.

  Args:
    samples: draws, two or more.
    train: training images.

  Returns:
    Shares of the draws: ``trained`` have a structural similarity above .9 to a training image; ``repeated`` only
    to another draw; ``new`` to neither.
  """
  trained = np.asarray(metrics.pairwise_ssim(samples.x, train.x)).max(axis=1) > _NEAR
  among = np.array(metrics.pairwise_ssim(samples.x, samples.x))
  np.fill_diagonal(among, -1.0)
  repeated = ~trained & (among.max(axis=1) > _NEAR)
  shares = {"trained": trained, "repeated": repeated, "new": ~trained & ~repeated}
  return {name: float(np.mean(share)) for name, share in shares.items()}


def measure(judge: Judge, data: Split, images: Samples) -> dict[str, float]:
  """How recognisable, near, diverse and rightly labelled images are; see `kkt_jax.metrics`."""
  real = metrics.within_class_distance(judge.features(data.held_out.x), data.held_out.y)
  return {
    "eval_accuracy": judge.accuracy(images.x, images.y),
    **metrics.faithfulness(images.x, images.y, data.train.x, data.train.y),
    "spread": metrics.within_class_distance(judge.features(images.x), images.y) / real,
  }


def measure_further(
  judge: Judge,
  data: Split,
  images: Samples,
  *,
  seed: int,
  epochs: int,
  teach: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, float]:
  """What takes longer: neighbourhoods, kernel distance, retrieval, and what the images are worth as training data.

  Args:
    judge: the independent judge.
    data: the training data, real data that nothing was trained on, and those that the judge was trained on.
    images: what is measured.
    seed: of the classifier that is trained on the images.
    epochs: passes over the images of its training.
    teach: what another classifier is taught of each image, see `experiments.measure.judge.soft_labels`, if there is one
      teacher of all classes.

  Returns:
    The metrics by name.
  """
  features, real = judge.features(images.x), judge.features(data.train.x)
  # In units of the features' root mean square, without which the kernel's cube is a large number of no meaning.
  size = jnp.sqrt(jnp.mean(jnp.square(real)))
  own_test = matching.first_of_each_class(data.evaluation, _TESTED)
  useful = functools.partial(usefulness, images, own_test, seed=seed, epochs=epochs)
  return {
    **_neighbourhoods("features", data.train.y, np.asarray(real), images.y, np.asarray(features)),
    **_neighbourhoods("pixels", data.train.y, data.train.x, images.y, images.x),
    "kernel_distance": metrics.kernel_distance(features / size, real / size),
    "useful_accuracy": useful(),
    **({} if teach is None else {"taught_accuracy": useful(lessons=teach(images.x))}),
    **retrieval(images, data.train, data.distractors),
  }


def _neighbourhoods(
  space: str, real_labels: np.ndarray, real: np.ndarray, labels: np.ndarray, points: np.ndarray
) -> dict[str, float]:
  """Precision, recall, density and coverage within each class, if there are enough images of every class."""
  if min(int(np.unique(y, return_counts=True)[1].min()) for y in (real_labels, labels)) <= _NEIGHBOURS:
    return {}
  filled = metrics.precision_recall(real, real_labels, points, labels, k=_NEIGHBOURS)
  return {f"{name}_{space}_k{_NEIGHBOURS}": value for name, value in filled.items()}


def boundaries(classifiers: Sequence[Classifier], train: Samples, others: Samples) -> list[dict[str, float]]:
  """Membership inference by the activation boundaries on which images lie, for each classifier.

  Args:
    classifiers: with gates; the others are left out.
    train: training images, in [0, 1].
    others: real images that were not trained on.

  Returns:
    The median fraction of units on whose activation boundary ``train`` and ``others`` lie
    (`kkt_jax.membership.candidates.boundary_fractions`), and the area under the curve ``auc`` of true against false
    positives: .5 says nothing, 1 all.
  """
  results = []
  for classifier in classifiers:
    if not relaxation.gates(classifier.predict_fn, classifier.params, jnp.zeros((2, *classifier.input_shape))):
      continue
    members, other = (images.x[np.isin(images.y, classifier.labels)] for images in (train, others))
    shares = candidates.boundary_fractions(classifier, classifier.from_unit(jnp.concatenate([members, other])))
    inside, outside = shares[: len(members)], shares[len(members) :]
    auc = metrics.roc(inside, outside).auc
    results.append({"train": float(np.median(inside)), "others": float(np.median(outside)), "auc": auc})
  return results
