"""Whether two sets of data are distinguishable without any classifier's weights.

Scores compare training data with held-out ones; whatever else differs between the two (a pixel's shift, compression,
brightness), weights can tell, too, without ever having seen a sample.
"""

from collections.abc import Iterator

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from kkt_jax.auditing.samples import Samples
from kkt_jax.criteria import AuditCriteria

_DEFAULT = AuditCriteria()


def p_value(first: Samples, second: Samples, criteria: AuditCriteria = _DEFAULT) -> float:
  """The probability of so great a difference between two sets of one source, whatever the frequencies of their classes.

  Thrice the least of three: of a linear classifier of pixels and summaries, cross-validated; of the summary that
  differs most; and of the mean images. Which sample belongs to which set is shuffled within the classes, 1,999 times
  (`AuditCriteria.shuffles`), so that the p-value is exact for exchangeable samples.
  """
  random = np.random.default_rng(0)
  parts = [images.at_most(criteria.sources_samples, random) for images in (first, second)]
  x, y = np.concatenate([images.x for images in parts]), np.concatenate([images.y for images in parts])
  member = np.repeat([1.0, 0.0], [len(images.y) for images in parts])
  members = np.stack([member, *_shuffled(member, y, random, criteria.shuffles)], axis=1)
  members -= _class_means(members, y)  # constant within a class
  flat = x.reshape(len(x), -1).astype(np.float64)
  if flat.shape[1] > criteria.sources_values:
    flat = flat[:, np.sort(random.choice(flat.shape[1], criteria.sources_values, replace=False))]
  summaries = np.stack([stats.rankdata(summary) for summary in _summaries(x)], axis=1)
  values, summaries = _standard(flat, y), _standard(summaries, y)
  left, sizes, _ = np.linalg.svd(values, full_matrices=False)
  components = left[:, : criteria.components][:, sizes[: criteria.components] > 1e-6] * len(x) ** 0.5
  statistics = [
    _predicted(np.concatenate([components, summaries], axis=1), members, random, criteria),
    np.abs(summaries.T @ members).max(axis=0),
    np.square(values.T @ members).sum(axis=0),
  ]
  return float(min(1.0, len(statistics) * min(np.mean(row >= row[0] * (1 - 1e-9)) for row in statistics)))


def _predicted(
  features: np.ndarray, members: np.ndarray, random: np.random.Generator, criteria: AuditCriteria
) -> np.ndarray:
  """How well each of many memberships [N, T] is predicted by ridge regression, on samples that it was not fitted to."""
  fold, predicted = random.permutation(len(features)) % criteria.folds, np.zeros_like(members)
  for turn in range(criteria.folds):
    fitted, tested = features[fold != turn], features[fold == turn]
    ridge = criteria.ridge * len(fitted) * np.eye(features.shape[1])
    predicted[fold == turn] = tested @ np.linalg.solve(fitted.T @ fitted + ridge, fitted.T @ members[fold != turn])
  lengths = np.linalg.norm(predicted, axis=0) * np.linalg.norm(members, axis=0)
  return np.asarray(np.sum(predicted * members, axis=0) / np.maximum(lengths, 1e-12))


def _summaries(x: np.ndarray) -> Iterator[np.ndarray]:
  """Numbers that say something of a whole sample."""
  flat = np.round(x.reshape(len(x), -1).astype(np.float64), 6)
  yield from (flat.mean(axis=1), flat.std(axis=1), flat.min(axis=1), flat.max(axis=1))
  yield from (np.mean(flat == flat.min(), axis=1), np.mean(flat == flat.max(), axis=1))
  yield np.array([len(np.unique(row)) for row in flat])
  yield np.mean(np.abs(255 * flat - np.round(255 * flat)), axis=1)  # whether it was stored in bytes
  yield from (np.quantile(flat, share, axis=1) for share in (0.25, 0.5, 0.75))
  if x.ndim < 3:
    return
  images = x.reshape(*x.shape[:3], -1).mean(axis=3)
  weights = images - images.min()
  total = np.maximum(weights.sum(axis=(1, 2)), 1e-9)
  for axis in (1, 2):
    place = np.arange(images.shape[axis]).reshape((-1, 1) if axis == 1 else (1, -1))
    yield np.sum(weights * place, axis=(1, 2)) / total
    for order in (1, 2):
      yield np.abs(np.diff(images, n=order, axis=axis)).mean(axis=(1, 2))


def _shuffled(member: np.ndarray, y: np.ndarray, random: np.random.Generator, count: int) -> Iterator[np.ndarray]:
  classes = [np.flatnonzero(y == label) for label in np.unique(y)]
  for _ in range(count):
    drawn = member.copy()
    for places in classes:
      drawn[places] = random.permutation(member[places])
    yield drawn


def _class_means(values: np.ndarray, y: np.ndarray) -> np.ndarray:
  means = np.zeros_like(values)
  for label in np.unique(y):
    means[y == label] = values[y == label].mean(axis=0)
  return means


def _standard(values: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Values less the means of their class, of unit variance; 0 where they are constant."""
  values = values - _class_means(values, y)
  deviations = values.std(axis=0)
  return values / np.where(deviations > 1e-9, deviations, np.inf)
