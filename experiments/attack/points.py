"""The training points of the plane, solved for without a generator: few of many candidates that together explain it.

In two dimensions every place can be listed. What a classifier stores is then a positive combination of what each
candidate would contribute, and few candidates have a part in it: non-negative least squares, which is convex, finds
them, their number and their places, from no start.

- With batch norm, the stored means and variances are averages over the training points of functions of one point each,
  and all training points have the common margin: the candidates are places with about that margin.
- With weight decay, the weights are a sum over the training points, and gradient descent rests with hinges of the first
  layer on them: the candidates are the places where a hinge crosses the curve of the revealed margin, and places around
  them, because the gates of a unit that rests on its hinge are an average of both sides.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize  # type: ignore[import-untyped]

from kkt_jax.analysis import Examination, first_layer
from kkt_jax.classifiers import Classifier, PyTree

_GRID, _REACH = 200, 2.2  # places on a side, and how far it goes, in standard deviations
_MARGIN = 0.1  # relative deviation from the revealed margin, up to which a place may be a training point
_FAR = 1.6  # how far hinges are followed; without batch norm the weights do not tell where the data end
_STEP, _SAME = 0.002, 0.02  # along a hinge; difference of two hinges up to which they are one
_UNEXPLAINED = 0.4  # share of what the weights say above which the candidates are not the training points
_AROUND, _DIRECTIONS = (0.01, 0.03), 16
_EVEN = 0.3  # greatest relative difference of points' weights in stored averages
_TOGETHER, _LEAST = 0.12, 0.5  # of one point; share of the typical point's weight that makes a point


def solve(examination: Examination) -> tuple[np.ndarray, np.ndarray]:
  """Training points of a classifier of the plane (`kkt_jax.networks.MLPClassifier`).

  Args:
    examination: of the classifier.

  Returns:
    Points [K, 2] and their classes [K]; none where the margin is not revealed, no candidates explain the weights,
    or more than a few points would do so.
  """
  classifier, margin = examination.classifier, examination.margin
  nothing = np.zeros((0, 2)), np.zeros(0, int)
  if margin is None:
    return nothing
  find = _from_gradients if classifier.statistics is None else _from_statistics
  candidates, groups, weights = find(classifier, margin)
  points, weights = _merged(candidates, groups, weights)
  if not len(points):
    return nothing
  typical = np.median(weights[weights > 0.1 * weights.max()])
  kept = weights > _LEAST * typical
  if classifier.statistics is not None and np.abs(weights[kept] / typical - 1).max() > _EVEN:
    return nothing  # every training point weighs the same
  points = points[kept]
  return points, np.asarray(jnp.argmax(classifier.predict(jnp.asarray(points)), axis=1))


def input_moments(classifier: Classifier) -> tuple[jax.Array, jax.Array]:
  """The mean [2] and the covariance's Cholesky factor [2, 2] of the training points, read off the first batch norm.

  Without batch norm they are not to be had; 0 and the identity stand for the region in which points are searched.
  """
  if classifier.statistics is None:
    return jnp.zeros(2), jnp.eye(2)
  layer, stored = classifier.params["Dense_0"], classifier.statistics["BatchNorm_0"]
  mean, covariance = first_layer.input_moments(layer["kernel"], layer["bias"], stored["mean"], stored["var"])
  return mean, jnp.linalg.cholesky(covariance)


def _from_statistics(classifier: Classifier, margin: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Candidates [K, 2], each its own group [K], and their weights [K], which sum to 1."""
  mean, factor = input_moments(classifier)
  deviation = np.sqrt(np.sum(np.square(factor), axis=1))
  sides = np.asarray(mean) + _REACH * deviation * np.linspace(-1, 1, _GRID)[:, None]
  places = np.stack(np.meshgrid(*sides.T), axis=-1).reshape(-1, 2).astype(np.float32)
  places = places[np.abs(_margins(classifier, places) / margin - 1) < _MARGIN]
  x, atoms = places.astype(np.float64), []
  stored_statistics: Any = classifier.statistics
  for index in range(2):
    trees = [classifier.params[f"{kind}_{index}"] for kind in ("Dense", "BatchNorm")]
    trees.append(stored_statistics[f"BatchNorm_{index}"])
    layer, norm, stored = ({name: np.asarray(value, np.float64) for name, value in tree.items()} for tree in trees)
    x = (x @ layer["kernel"] + layer["bias"] - stored["mean"]) / np.sqrt(stored["var"] + 1e-5)
    atoms += [x, np.square(x) - stored["var"] / (stored["var"] + 1e-5)]  # both are 0 in the mean
    x = np.maximum(x * norm["scale"] + norm["bias"], 0.0)
  scaled = np.concatenate([*atoms, np.full((len(x), 1), 10.0)], axis=1)  # and the weights sum to 1
  target = np.concatenate([np.zeros(scaled.shape[1] - 1), [10.0]])
  return places, np.arange(len(places)), _combination(scaled, target)


def _from_gradients(classifier: Classifier, margin: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Candidates with the places around them [K, 2], to which candidate each belongs [K], and their weights [K]."""
  assert classifier.weight_decay is not None  # the experiment's own
  kernel, bias = (np.asarray(classifier.params["Dense_0"][name], np.float64) for name in ("kernel", "bias"))
  size = np.maximum(np.linalg.norm(kernel, axis=0), 1e-12)
  hinges = np.concatenate([kernel / size, bias[None] / size])[:, size > 1e-3 * size.max()].T
  hinges *= np.where(hinges[:, :1] < 0, -1.0, 1.0)
  along = np.arange(-_FAR, _FAR, _STEP)
  crossings: list[np.ndarray] = []
  for *normal, offset in _distinct(hinges, _SAME):
    line = -np.multiply(normal, offset) + along[:, None] * np.array([-normal[1], normal[0]])
    above = _margins(classifier, line.astype(np.float32)) > margin
    crossings += list(line[:-1][above[1:] != above[:-1]])
  centres = _distinct(np.reshape(crossings, (-1, 2)), _TOGETHER)
  if not len(centres):
    return centres, np.zeros(0, int), np.zeros(0)
  angle = 2 * np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS + 0.1  # on no hinge
  circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
  offsets = np.concatenate([np.zeros((1, 2)), *(radius * circle for radius in _AROUND)])
  places = (centres[:, None] + offsets[None]).reshape(-1, 2).astype(np.float32)
  groups = np.repeat(np.arange(len(centres)), len(offsets))
  classes = np.asarray(jnp.argmax(classifier.predict(jnp.asarray(centres)), axis=1))[groups]

  def log_likelihood(params: PyTree, x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(classifier.apply_fn(params, x[None])[0])[index]

  gradients = jax.jit(jax.vmap(jax.grad(log_likelihood), (None, 0, 0)))
  atoms = _flat(gradients(classifier.params, jnp.asarray(places), jnp.asarray(classes)), len(places))
  target = classifier.weight_decay * _flat(jax.tree.map(lambda leaf: leaf[None], classifier.params), 1)[0]
  return places, groups, _combination(atoms, target)


def _flat(tree: PyTree, count: int) -> np.ndarray:
  return np.concatenate([np.asarray(leaf, np.float64).reshape(count, -1) for leaf in jax.tree.leaves(tree)], axis=1)


def _combination(atoms: np.ndarray, target: np.ndarray) -> np.ndarray:
  """Non-negative weights [K] of atoms [K, F] that come nearest to the target [F]."""
  if not len(atoms):
    return np.zeros(0)
  size = np.linalg.norm(atoms, axis=1)
  weights, residual = scipy.optimize.nnls((atoms / size[:, None]).T, target, maxiter=50 * len(atoms))
  return weights / size if residual < _UNEXPLAINED * np.linalg.norm(target) else 0 * weights


def _margins(classifier: Classifier, x: np.ndarray) -> np.ndarray:
  """By how much the greatest logit of each place [K, 2] exceeds the second."""
  logits: Any = jnp.sort(classifier.predict(jnp.asarray(x)), axis=1)
  return np.asarray(logits[:, -1] - logits[:, -2])


def _distinct(rows: np.ndarray, distance: float) -> np.ndarray:
  """The rows without those that are near an earlier one."""
  kept: list[np.ndarray] = []
  for row in rows:
    if all(np.abs(row - other).max() > distance for other in kept):
      kept.append(row)
  return np.reshape(kept, (-1, rows.shape[1]))


def _merged(places: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Points [P, 2] and their weights [P]: places that belong or lie together are one, the heaviest first."""
  left, points, sums = weights > 0, [], []
  for index in np.argsort(-weights):
    if left[index]:
      near = np.abs(places - places[index]).max(axis=1) < _TOGETHER
      together = left & (near | (groups == groups[index]))
      left &= ~together
      points.append(np.average(places[together], axis=0, weights=weights[together]))
      sums.append(weights[together].sum())
  return np.reshape(points, (-1, 2)), np.array(sums)
