"""Reconstructed samples against the data: similarity, controls, and identification of training samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kkt_jax import metrics
from kkt_jax._errors import InputError
from kkt_jax.auditing import pictures
from kkt_jax.auditing.samples import Samples
from kkt_jax.reconstruction.result import Reconstruction

LEAST_SIDE = 8  # of images that are compared by structural similarity


def check_classes(sets: Mapping[str, Samples], classes: Sequence[int] | None = None) -> None:
  """Refuses sets that do not hold the same classes, before anything expensive is done with them.

  Args:
    sets: named as the message shall name them.
    classes: what each must hold; the classes of all of them together if None.

  Raises:
    InputError: a set lacks a class, or holds another one.
  """
  wanted = set().union(*(images.y.tolist() for images in sets.values())) if classes is None else set(classes)
  for name, images in sets.items():
    held = set(images.y.tolist())
    if wanted - held:
      raise InputError(f"{name} must hold samples of every class; it has none of class {min(wanted - held)}.")
    if held - wanted:
      raise InputError(f"{name} must hold the classes {sorted(wanted)} only; it has class {min(held - wanted)}, too.")


def controls(train: Samples, held_out: Samples | None, y: np.ndarray, key: jax.Array) -> dict[str, Samples]:
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
  like = Samples(np.broadcast_to(train.x.mean(axis=0), (len(y), *train.x.shape[1:])), y)
  return ({} if held_out is None else {"real_held_out": first_of_each_class(held_out, count)}) | {
    "training_data": first_of_each_class(train, count),
    "class_means": Samples(np.stack([means[label] for label in y]), y),
    "dataset_mean": like,
    "uniform_noise": uniform_noise(like, key),
  }


def uniform_noise(like: Samples, key: jax.Array) -> Samples:
  """Uniform noise in [0, 1] with the shapes and labels of other samples."""
  return Samples(np.asarray(jax.random.uniform(key, like.x.shape)), like.y)


def first_of_each_class(images: Samples, count: int) -> Samples:
  """The first ``count`` samples of each class, or as many as there are, in the order of the classes."""
  indices = np.concatenate([np.flatnonzero(images.y == label)[:count] for label in np.unique(images.y)])
  return Samples(images.x[indices], images.y[indices])


def comparable(images: Samples) -> bool:
  """Whether samples are images that are compared by structural similarity."""
  return images.x.ndim == 4 and min(images.x.shape[1:3]) >= LEAST_SIDE


def similarity(samples: Samples, data: Samples) -> np.ndarray:
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
    places, other = (np.resize(indices, count) for indices, count in zip(of_class, most, strict=True))
    best[other] = np.asarray(pairwise(samples.x[places], data.x[other])).max(axis=0)
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


def tested(train: Samples, held_out: Samples) -> tuple[int, int]:
  """How many training samples of each class can be tested, and how many others there are to each."""
  fewest, available = (int(np.unique(images.y, return_counts=True)[1].min()) for images in (train, held_out))
  count = min(fewest, available)
  return count, available // count


def trial(samples: Samples, train: Samples, held_out: Samples) -> metrics.Trial:
  """Lets samples identify training data among real samples of their class.

  Args:
    samples: all that was generated.
    train: training data without repetitions.
    held_out: data of the same classes that were not trained on, none of them twice.

  Returns:
    The trial. As many of each class take part as the rarest class of the smaller set has.
  """
  count, group = tested(train, held_out)
  places = first_of_each_class(Samples(np.arange(len(train.y)), train.y), count).x
  others = similarity(samples, first_of_each_class(held_out, group * count)).reshape(-1, group)
  members = similarity(samples, Samples(train.x[places], train.y[places]))
  return metrics.Trial(train.y[places], members, others, 1.0 if comparable(train) else 0.0, places)


def similar_pairs(
  images: Samples, train: Samples, *, certified: np.ndarray | None = None, columns: int = 2, rows: int = 5
) -> bytes:
  """PNG of Figs. 6 to 8: generated images in odd rows, the most similar training image of the class below each.

  The first images of every class, unselected; a last row shows the mean of the whole training set.

  Args:
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
  drawn_twice = 0.1  # greatest difference of a pixel of one image
  for row in range(rows):
    of_classes = [np.flatnonzero(shown.y == label)[row * columns : (row + 1) * columns] for label in labels]
    chosen = np.concatenate(of_classes)
    if certified is not None and len(certified):
      near = [np.abs(certified - image).max(axis=(1, 2, 3)).min() for image in shown.x[chosen]]
      framed[len(drawn)] = np.array(near) < drawn_twice
    drawn += [("generated", shown.x[chosen]), ("nearest training image", train.x[nearest[chosen]])]
  drawn.append(("mean of the training set", train.x.mean(axis=0, keepdims=True)))
  return pictures.image_rows(drawn, framed=framed)


def exactness(reconstruction: Reconstruction, train: Samples) -> tuple[list[dict[str, int]], np.ndarray]:
  """Certified samples against the training data. Samples of any shape are compared by value.

  Args:
    reconstruction: polished; otherwise there are no counts.
    train: training data.

  Returns:
    For each classifier the number of ``certified`` samples, how many of them by each kind of evidence
    (`kkt_jax.extraction.EVIDENCE`), the ``most`` there can be, how many of them are ``exact`` (no value differs by
    `kkt_jax.criteria.Criteria.same` of the range from a training sample's), how many are ``false``, how many of them
    are claimed to be right ``to_the_bit``, and how many of these are ``identical`` to one (within a tenth of a level of
    8 bits); and the certified samples [K, ...] in [0, 1].
  """
  if not reconstruction.exact:  # not polished
    return [], train.x[:0]
  counts, certified = [], []
  for proof, examination in zip(reconstruction.exact, reconstruction.examinations, strict=True):
    certified.append(np.clip(proof.unit, 0, 1))
    difference = nearest_by_value(certified[-1], train.x)[1]
    exact, criteria = int(np.sum(difference < proof.criteria.same)), proof.criteria
    row = {"certified": len(proof.y), **proof.counts, "most": examination.most_samples, "exact": exact}
    row |= {"false": len(proof.y) - exact, "to_the_bit": int(proof.to_the_bit.sum())}
    counts.append(row | {"identical": int(np.sum(difference[proof.to_the_bit] < criteria.off_level / criteria.levels))})
  return counts, np.concatenate(certified)


def table(
  rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], *, title: str = "", form: str = ".3f", width: int = 18
) -> str:
  """Some metrics as a table for people, one row per set of samples; of several classifiers the mean.

  Numbers are formatted by ``form`` in columns of ``width``; the ``title`` stands above the names of the rows.

  >>> print(table({"generated": {"accuracy": 0.5, "residual": [0.1, 0.3]}, "noise": {"accuracy": 0.1}},
  ...             ["accuracy", "residual"]))
                       accuracy          residual
  generated               0.500             0.200
  noise                   0.100                 -
  """
  first = max(map(len, [*rows, title])) + 2
  lines = [f"{title:<{first}}" + "".join(f"{name:>{width}}" for name in columns)]
  for name, row in rows.items():
    cells = (f"{np.mean(row[column]):{form}}" if column in row else "-" for column in columns)
    lines.append(f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
  return "\n".join(lines)
