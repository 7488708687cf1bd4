"""Samples against the data: their controls, how near they come, and whether they know the training data."""

from collections.abc import Callable, Mapping, Sequence
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Images, Split
from experiments.harness.flags import UsageError
from experiments.measure import pictures
from experiments.measure.judge import Judge, usefulness
import kkt_jax
from kkt_jax import candidates, metrics, relaxation
from kkt_jax.certificates import EVIDENCE
from kkt_jax.classifier import Classifier
from kkt_jax.criteria import Criteria
from kkt_jax.exact import most_samples

_TESTED = 100  # real images of each class on which a classifier trained on generated ones is tested
_NEIGHBOURS = 5  # k of precision, recall, density and coverage
EXACT = 0.99  # structural similarity from which two images are the same
_NEAR = 0.9  # structural similarity from which they are hard to tell apart
_SAME = 0.1  # greatest difference of a pixel of one image drawn twice
LEAST_SIDE = 8  # of images that are compared by structural similarity


def check_classes(sets: Mapping[str, Images], classes: Sequence[int] | None = None) -> None:
  """Refuses sets that do not hold the same classes, before anything expensive is done with them.

  Args:
    sets: named as the message shall name them.
    classes: what each must hold; the classes of all of them together if None.

  Raises:
    UsageError: a set lacks a class, or holds another one.
  """
  wanted = set().union(*(images.y.tolist() for images in sets.values())) if classes is None else set(classes)
  for name, images in sets.items():
    found = set(images.y.tolist())
    if wanted - found:
      raise UsageError(f"{name} must hold samples of every class; it has none of class {min(wanted - found)}.")
    if found - wanted:
      raise UsageError(f"{name} must hold the classes {sorted(wanted)} only; it has class {min(found - wanted)}, too.")


def controls(train: Images, held_out: Images | None, y: np.ndarray, key: jax.Array) -> dict[str, Images]:
  """What generated samples are compared with.

  Args:
    train: the training data, with every label of ``y``.
    held_out: real data that were not trained on, if there are any.
    y: labels [S] of the samples; the controls that are made up have the same ones.
    key: of the noise.

  Returns:
    Real held-out data, if there are any, and training data, as many of each class as there are samples of the rarest,
    or as there are; the mean of the class, the mean of all training data, and uniform noise in [0, 1], S of each.
  """
  count = int(np.unique(y, return_counts=True)[1].min())
  means = {label: train.x[train.y == label].mean(axis=0) for label in np.unique(y)}
  like = Images(np.broadcast_to(train.x.mean(axis=0), (len(y), *train.x.shape[1:])), y)
  return ({} if held_out is None else {"real_held_out": first_of_each_class(held_out, count)}) | {
    "training_data": first_of_each_class(train, count),
    "class_means": Images(np.stack([means[label] for label in y]), y),
    "dataset_mean": like,
    "uniform_noise": uniform_noise(like, key),
  }


def uniform_noise(like: Images, key: jax.Array) -> Images:
  """Uniform noise in [0, 1] with the shapes and labels of other samples."""
  return Images(np.asarray(jax.random.uniform(key, like.x.shape)), like.y)


def first_of_each_class(images: Images, count: int) -> Images:
  """The first ``count`` samples of each class, or as many as there are, in the order of the classes."""
  indices = np.concatenate([np.flatnonzero(images.y == label)[:count] for label in np.unique(images.y)])
  return Images(images.x[indices], images.y[indices])


def comparable(images: Images) -> bool:
  """Whether samples are images that are compared by structural similarity."""
  return images.x.ndim == 4 and min(images.x.shape[1:3]) >= LEAST_SIDE


def similarity(samples: Images, data: Images) -> np.ndarray:
  """How near samples come to each of the data.

  Args:
    samples: generated, say.
    data: the data.

  Returns:
    [N]: for each of the data, the greatest structural similarity to a sample of its class if these are images of at
    least 8 x 8 pixels, else the negative distance to the nearest; -inf if its class has no sample.
  """
  pairwise = metrics.pairwise_ssim if comparable(samples) else lambda a, b: -metrics.pairwise_distance(a, b)
  best = np.full(len(data.y), -np.inf)
  # Class by class, for others do not count. Samples are repeated up to the largest class: one shape is compiled once.
  most = [int(np.unique(images.y, return_counts=True)[1].max()) for images in (samples, data)]
  for label in np.intersect1d(samples.y, data.y):
    of_class = [np.flatnonzero(images.y == label) for images in (samples, data)]
    own, other = (np.resize(indices, count) for indices, count in zip(of_class, most, strict=True))
    best[other] = np.asarray(pairwise(samples.x[own], data.x[other])).max(axis=0)
  return best


def nearest_by_value(samples: np.ndarray, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Which of the data is nearest to each sample by its values, and whether the two are the same, whatever their shape.

  Args:
    samples: [K, ...] in units of the range.
    data: [N, ...] in the same units.

  Returns:
    The place of the nearest [K], and the greatest difference of a value from it [K]; infinite without any data.
  """
  place, least = np.zeros(len(samples), int), np.full(len(samples), np.inf)
  for k, sample in enumerate(samples if len(data) else []):
    greatest = np.abs(data - sample[None]).reshape(len(data), -1).max(axis=1)
    place[k] = np.argmin(greatest)
    least[k] = greatest[place[k]]
  return place, least


def tested(train: Images, held_out: Images) -> tuple[int, int]:
  """How many training samples of each class can be tested, and how many others there are to each."""
  fewest, available = (int(np.unique(images.y, return_counts=True)[1].min()) for images in (train, held_out))
  count = min(fewest, available)
  return count, available // count


def trial(samples: Images, train: Images, held_out: Images) -> metrics.Trial:
  """Sets samples the task of picking out training data.

  Args:
    samples: all that was generated.
    train: training data without repetitions.
    held_out: data of the same classes that were not trained on, none of them twice.

  Returns:
    The trial. As many of each class take part as the rarest class of the smaller set has.
  """
  count, group = tested(train, held_out)
  places = first_of_each_class(Images(np.arange(len(train.y)), train.y), count).x
  others = similarity(samples, first_of_each_class(held_out, group * count)).reshape(-1, group)
  members = similarity(samples, Images(train.x[places], train.y[places]))
  return metrics.Trial(train.y[places], members, others, 1.0 if comparable(train) else 0.0, places)


def retrieval(samples: Images, train: Images, others: Images) -> dict[str, float]:
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
  check_classes({"the training data": train, "the other real data": others})
  own = trial(samples, train, others)
  retrieved = metrics.retrieval(own.members, own.others.ravel())
  count, _ = tested(train, others)
  nearer = metrics.nearer_to_training(samples.x, train.x[own.places], first_of_each_class(others, count).x)
  return {f"retrieval_{name}": value for name, value in retrieved.items()} | {
    f"nearer_{name}": value for name, value in nearer.items()
  }


def recovered(images: Images, train: Images) -> dict[str, float]:
  """How many training images have a similar one of their class among others; beside real images it says what is near.

  Args:
    images: all the images of a generator, or of a control.
    train: training images.

  Returns:
    ``images``: how many were looked through; ``ssim_cover``: mean of the training images' best similarity to one of
    them; ``above_0.4`` and so on: training images for which it is greater.
  """
  best = similarity(images, train)
  above = {f"above_{threshold}": int(np.sum(best > threshold)) for threshold in (0.4, 0.6, 0.9, EXACT)}
  return {"images": len(images.y), "ssim_cover": float(best.mean())} | above


def novelty(samples: Images, train: Images) -> dict[str, float]:
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


def measure(judge: Judge, data: Split, images: Images) -> dict[str, float]:
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
  images: Images,
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
  tested = first_of_each_class(data.evaluation, _TESTED)
  useful = functools.partial(usefulness, images, tested, seed=seed, epochs=epochs)
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
  own = metrics.precision_recall(real, real_labels, points, labels, k=_NEIGHBOURS)
  return {f"{name}_{space}_k{_NEIGHBOURS}": value for name, value in own.items()}


def similar_pairs(
  path: pathlib.Path,
  images: Images,
  train: Images,
  *,
  certified: np.ndarray | None = None,
  columns: int = 2,
  rows: int = 5,
) -> None:
  """Figs. 6 to 8: generated images in odd rows, the most similar training image of the class below each.

  The first images of every class, unselected; a last row shows the mean of the whole training set.

  Args:
    path: PNG file.
    images: generated images.
    train: training images.
    certified: images [K, ...] that are framed where they are shown.
    columns: images of each class in a row.
    rows: pairs of rows.
  """
  labels = np.unique(images.y)
  shown = first_of_each_class(images, rows * columns)
  nearest = np.asarray(metrics.ssim_nearest_indices(shown.x, shown.y, train.x, train.y))
  drawn: list[tuple[str, np.ndarray]] = []
  framed: dict[int, np.ndarray] = {}
  for row in range(rows):
    own = [np.flatnonzero(shown.y == label)[row * columns : (row + 1) * columns] for label in labels]
    chosen = np.concatenate(own)
    if certified is not None and len(certified):
      near = [np.abs(certified - image).max(axis=(1, 2, 3)).min() for image in shown.x[chosen]]
      framed[len(drawn)] = np.array(near) < _SAME
    drawn += [("generated", shown.x[chosen]), ("nearest training image", train.x[nearest[chosen]])]
  drawn.append(("mean of the training set", train.x.mean(axis=0, keepdims=True)))
  pictures.image_rows(path, drawn, framed=framed)


def exactness(reconstruction: "kkt_jax.Reconstruction", train: Images) -> tuple[list[dict[str, int]], np.ndarray]:
  """What the weights certify, beside the truth. Samples of any shape are compared by value.

  Args:
    reconstruction: polished; otherwise there are no counts.
    train: training data.

  Returns:
    For each classifier the number of ``certified`` samples, how many of them by each kind of evidence
    (`kkt_jax.certificates.EVIDENCE`), the ``most`` there can be, how many of them are ``exact`` (no value differs by
    `kkt_jax.criteria.Criteria.same` of the range from a training sample's), how many are ``false``, how many of them
    are claimed to be right ``to_the_bit``, and how many of these are ``identical`` to one (within a tenth of a level of
    8 bits); and the certified samples [K, ...] in [0, 1].
  """
  if not reconstruction.exact:  # not polished
    return [], train.x[:0]
  counts, certified, criteria = [], [], Criteria()
  for own, examination in zip(reconstruction.exact, reconstruction.examinations, strict=True):
    certified.append(np.clip(own.unit, 0, 1))
    difference = nearest_by_value(certified[-1], train.x)[1]
    exact = int(np.sum(difference < criteria.same))
    counts.append(
      {"certified": len(own.y)}
      | {kind: int(np.sum(own.evidence == place)) for place, kind in enumerate(EVIDENCE)}
      | {"most": most_samples(examination), "exact": exact, "false": len(own.y) - exact}
      | {
        "to_the_bit": int(own.to_the_bit.sum()),
        "identical": int(np.sum(difference[own.to_the_bit] < criteria.off_level / criteria.levels)),
      }
    )
  return counts, np.concatenate(certified)


def hinges(classifiers: Sequence[Classifier], train: Images, others: Images) -> list[dict[str, float]]:
  """Whether the kinks on which images sit tell those that a classifier was trained on from others, for each classifier.

  Args:
    classifiers: with gates; the others are left out.
    train: training images, in [0, 1].
    others: real images that were not trained on.

  Returns:
    The median share of gates on whose kinks ``train`` and ``others`` sit (`kkt_jax.candidates.hinge_shares`), and the
    area under the curve ``auc`` of true against false positives: .5 says nothing, 1 all.
  """
  results = []
  for classifier in classifiers:
    if not relaxation.gates(classifier.predict_fn, classifier.params, jnp.zeros((2, *classifier.input_shape))):
      continue
    own, other = (images.x[np.isin(images.y, classifier.labels)] for images in (train, others))
    shares = candidates.hinge_shares(classifier, classifier.from_unit(jnp.concatenate([own, other])))
    inside, outside = shares[: len(own)], shares[len(own) :]
    auc = metrics.roc(inside, outside).auc
    results.append({"train": float(np.median(inside)), "others": float(np.median(outside)), "auc": auc})
  return results


def table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> str:
  """Some metrics as a table for people, one row per set of samples; of several classifiers the mean.

  >>> print(table({"generated": {"accuracy": 0.5, "residual": [0.1, 0.3]}, "noise": {"accuracy": 0.1}},
  ...             ["accuracy", "residual"]))
                       accuracy          residual
  generated               0.500             0.200
  noise                   0.100                 -
  """
  first = max(map(len, rows)) + 2
  lines = [" " * first + "".join(f"{name:>18}" for name in columns)]
  for name, row in rows.items():
    cells = (f"{np.mean(row[column]):.3f}" if column in row else "-" for column in columns)
    lines.append(f"{name:<{first}}" + "".join(f"{cell:>18}" for cell in cells))
  return "\n".join(lines)
