"""Generated images against the data, beside the controls without which no figure means anything."""

from collections.abc import Mapping
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from experiments.data import Images, Split
from experiments.judge import Judge, usefulness
from kkt_jax import metrics

_TESTED = 100  # real images of each class on which a classifier trained on generated ones is tested
_DISTRACTORS = 5  # at the most, for each training image
_NEIGHBOURS = (3, 5)  # k of precision, recall, density and coverage
_COLUMNS = ("eval_accuracy", "ssim_nearest", "ssim_cover", "distinct_nearest", "spread", "label_agreement", "residual")


def controls(train: Images, held_out: Images | None, y: np.ndarray, key: jax.Array) -> dict[str, Images]:
  """What generated samples are compared with.

  Args:
    train: the training data.
    held_out: real data that were not trained on, if there are any.
    y: labels [S], sorted; the controls have the same ones.
    key: of the noise.

  Returns:
    Real held-out data, if there are any, training data, class means, the mean of all training data, uniform noise; S of
    each, or as many as there are.
  """
  shape = train.x.shape[1:]
  labels, counts = np.unique(y, return_counts=True)
  means = {label: train.x[train.y == label].mean(axis=0) for label in labels}
  count = int(counts.min())
  return ({} if held_out is None else {"real_held_out": first_of_each_class(held_out, count)}) | {
    "training_data": first_of_each_class(train, count),
    "class_means": Images(np.stack([means[label] for label in y]), y),
    "dataset_mean": Images(np.broadcast_to(train.x.mean(axis=0), (len(y), *shape)), y),
    "uniform_noise": uniform_noise(Images(np.empty((len(y), *shape)), y), key),
  }


def uniform_noise(like: Images, key: jax.Array) -> Images:
  """Uniform noise in [0, 1] with the shapes and labels of other images."""
  return Images(np.asarray(jax.random.uniform(key, like.x.shape)), like.y)


def first_of_each_class(images: Images, count: int) -> Images:
  """The first ``count`` images of each class, or as many as there are, in the order of the classes."""
  indices = np.concatenate([np.flatnonzero(images.y == label)[:count] for label in np.unique(images.y)])
  return Images(images.x[indices], images.y[indices])


def measure(judge: Judge, data: Split, images: Images) -> dict[str, float]:
  """How recognisable, near, diverse and rightly labelled images are; see `kkt_jax.metrics`."""
  real = metrics.within_class_distance(judge.features(data.held_out.x), data.held_out.y)
  return {
    "eval_accuracy": judge.accuracy(images.x, images.y),
    **metrics.faithfulness(images.x, images.y, data.train.x, data.train.y),
    "spread": metrics.within_class_distance(judge.features(images.x), images.y) / real,
  }


def measure_further(judge: Judge, data: Split, images: Images, *, seed: int, epochs: int) -> dict[str, float]:
  """What takes longer: neighbourhoods, kernel distance, memory, and what the images are worth as training data.

  Args:
    judge: the independent judge.
    data: the training data, real data that nothing was trained on, and those that the judge was trained on.
    images: what is measured.
    seed: of the classifier that is trained on the images.
    epochs: passes over the images of its training.

  Returns:
    The figures by name.
  """
  features, real = judge.features(images.x), judge.features(data.train.x)
  # In units of the features' root mean square, without which the kernel's cube is a large number of no meaning.
  size = jnp.sqrt(jnp.mean(jnp.square(real)))
  tested = first_of_each_class(data.evaluation, _TESTED)
  return {
    **_neighbourhoods("features", data.train.y, np.asarray(real), images.y, np.asarray(features)),
    **_neighbourhoods("pixels", data.train.y, data.train.x, images.y, images.x),
    "kernel_distance": metrics.kernel_distance(features / size, real / size),
    "useful_accuracy": usefulness(images, tested, seed=seed, epochs=epochs),
    **_memorisation(data, images),
  }


def _neighbourhoods(
  space: str, real_labels: np.ndarray, real: np.ndarray, labels: np.ndarray, points: np.ndarray
) -> dict[str, float]:
  """Precision, recall, density and coverage within each class, for every k that the smallest class allows."""
  fewest = min(int(np.unique(y, return_counts=True)[1].min()) for y in (real_labels, labels))
  figures_of_merit: dict[str, float] = {}
  for k in (k for k in _NEIGHBOURS if k < fewest):
    own = metrics.precision_recall(
      real.reshape(len(real), -1), real_labels, points.reshape(len(points), -1), labels, k=k
    )
    figures_of_merit |= {f"{name}_{space}_k{k}": value for name, value in own.items()}
  return figures_of_merit


def _memorisation(data: Split, images: Images) -> dict[str, float]:
  """Do the images know the training data better than other real data? Nearest distances, and retrieval."""
  count = min(int(np.unique(real.y, return_counts=True)[1].min()) for real in (data.train, data.distractors))
  train = first_of_each_class(data.train, count)
  nearer = metrics.nearer_to_training(images.x, train.x, first_of_each_class(data.distractors, count).x)
  distractors = first_of_each_class(data.distractors, _DISTRACTORS * count)
  scores = [np.asarray(metrics.best_similarity(images.x, images.y, real.x, real.y)) for real in (train, distractors)]
  retrieved = metrics.retrieval(*scores)
  return {f"nearer_{name}": value for name, value in nearer.items()} | {
    f"retrieval_{name}": value for name, value in retrieved.items()
  }


def recovered(images: Images, train: Images) -> dict[str, float]:
  """How many training images have a similar one of their class among others; beside real images it says what is near.

  Args:
    images: all the images of a generator, or of a control.
    train: training images.

  Returns:
    ``images``: how many were looked through; ``ssim_cover``: mean of the training images' best SSIM to one of them;
    ``above_0.4`` and so on: training images for which it is greater.
  """
  best = np.asarray(metrics.best_similarity(images.x, images.y, train.x, train.y))
  above = {f"above_{threshold}": int(np.sum(best > threshold)) for threshold in (0.4, 0.6, 0.9)}
  return {"images": len(images.y), "ssim_cover": float(best.mean())} | above


def similar_pairs(path: pathlib.Path, images: Images, train: Images, *, columns: int = 2, rows: int = 5) -> None:
  """Figs. 6 to 8: generated images in odd rows, the SSIM-nearest training image of the class below each.

  The first images of every class, unselected; a last row shows the mean of the whole training set.

  Args:
    path: PNG file.
    images: generated images.
    train: training images.
    columns: images of each class in a row.
    rows: pairs of rows.
  """
  labels = np.unique(images.y)
  of_class = {label: np.flatnonzero(images.y == label) for label in labels}
  nearest = np.asarray(metrics.ssim_nearest_indices(images.x, images.y, train.x, train.y))
  drawn = []
  for row in range(rows):
    chosen = np.concatenate([of_class[label][row * columns : (row + 1) * columns] for label in labels])
    drawn += [("generated", images.x[chosen]), ("nearest training image", train.x[nearest[chosen]])]
  drawn.append(("mean of the training set", train.x.mean(axis=0, keepdims=True)))
  figures.image_rows(path, drawn)


def table(results: Mapping[str, Any]) -> str:
  """The figures of merit as a table for people, one row a set of images."""
  lines = [f"{'':<16}" + "".join(f"{name:>18}" for name in _COLUMNS)]
  for name, row in results.items():
    if isinstance(row, dict) and "eval_accuracy" in row:
      cells = [np.mean(row.get(column, np.nan)) for column in _COLUMNS]
      lines.append(f"{name:<16}" + "".join(f"{cell:18.3f}" for cell in cells))
  return "\n".join(lines)
