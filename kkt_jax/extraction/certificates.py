"""Which samples are certified to be training samples, by what evidence, under which assumptions. No data are seen.

- *equations*: its signal stands in the weights, at its scale (`kkt_jax.extraction.signals`). Besides there must be
  weight decay, training to convergence, no batch norm, and samples that do not depend on one another.
- *levels*: all its values lie on the levels of 8-bit images, many more than the subspace can choose. Values must be of
  that many levels.
- *range*: it is a firm vertex of the subspace cut with the range of values (`kkt_jax.extraction.vertices`). Values must
  reach the ends of their range, and the subspace must tell a sample from a brighter one.

All need a subspace that is that of the data (`kkt_jax.analysis.examination`) and one explanation only: samples that
account for one another, or that can be put together to others which would pass as well, are *ambiguous*, and none of
them is certified (`unambiguous`). Where samples are on levels, those that are not are not certified by their range.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from kkt_jax.analysis.examination import Examination
from kkt_jax.analysis.subspace import Subspace
from kkt_jax.criteria import Criteria
from kkt_jax.extraction import signals, vertices

#: The kinds of evidence, the strongest first.
EVIDENCE = ("equations", "levels", "range")
_HALVES = 96  # blends that are measured to see how far training has converged
_PIXELS = 48  # on which combinations of three are looked at first


@dataclasses.dataclass(frozen=True)
class Candidates:
  """Points that may be training samples, with the evidence for each.

  Attributes:
    unit: the points [P, *input_shape] in units of the range.
    tight: how many of their values are at an end of the range [P].
    evidence: the place in `EVIDENCE` of the strongest that each has [P].
    doubt: what is left of it, the smaller the better [P]; compares points of one kind of evidence.
    whole: the points in whole levels [P, *input_shape], the same as ``unit`` where they are on none.
    to_the_bit: whether they are [P].
    misfit: of `by_equations` [P].
    duals: of `kkt_jax.extraction.Signals` [P, D]; 0 without equations.
  """

  unit: np.ndarray
  tight: np.ndarray
  evidence: np.ndarray
  doubt: np.ndarray
  whole: np.ndarray
  to_the_bit: np.ndarray
  misfit: np.ndarray
  duals: np.ndarray

  def __getitem__(self, chosen: np.ndarray) -> "Candidates":
    return Candidates(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

  def __add__(self, other: "Candidates") -> "Candidates":
    names = [field.name for field in dataclasses.fields(self)]
    return Candidates(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))


def applicable(examination: Examination) -> bool:
  """Whether the equations of single samples hold for a classifier's training samples; see `extraction.signals`."""
  classifier, subspace = examination.classifier, examination.subspace
  return (
    examination.form == "weight_decay"
    and subspace is not None
    and not subspace.blur
    and examination.first is not None
    and classifier.initial_params is None
    and not classifier.batch_coupled
  )


def by_equations(
  examination: Examination, unit: np.ndarray, criteria: Criteria, *, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """How far samples are from their own equations, and their duals; certified below 1.

  The misfit is the root of a sum of squares, each over what `Criteria` allow: the distance of the signal from the row
  space; the distance of its scale from 1; how much an error of that size within the row space would change the scale;
  the unrest of its kinks; the part of the sample outside the subspace; and its brightness against what the bias says.
  If the weight decay or the number of training samples is unknown, scales are compared with that of most samples that
  pass the rest, of which at least five must agree. Five such samples also set the usual distance, for those of training
  samples are all alike.

  Args:
    examination: of the classifier.
    unit: samples [M, *input_shape] in units of the range.
    criteria: what is allowed.
    labels: their labels [M]; what the classifier takes them for if None.

  Returns:
    The misfit [M], infinite where the equations do not apply, and the duals [M, D].
  """
  size = math.prod(examination.classifier.input_shape)
  first = examination.first
  if not applicable(examination) or not len(unit):
    return np.full(len(unit), np.inf), np.zeros((len(unit), size))
  assert first is not None
  x = examination.classifier.from_unit(jnp.asarray(unit, jnp.float32))
  offsets = np.asarray(x, np.float64).reshape(len(unit), -1) - first.start
  u, _, _ = first.factors
  lengths = np.maximum(np.linalg.norm(offsets, axis=1), 1e-300)
  outside = np.linalg.norm(offsets - (offsets @ u) @ u.T, axis=1) / lengths
  beside = outside / criteria.outside
  if first.normal is not None:
    beside = np.hypot(beside, (offsets @ first.normal - 1) / criteria.affine)
  signal = signals.signals(examination, x, labels, kink=criteria.kink)
  rest = _beside_scale(signal, beside, criteria)
  factor = _common_scale(signal.scale[rest < 1], criteria)
  if examination.classifier.weight_decay is not None and (factor is None or abs(factor - 1) < criteria.scale):
    factor = 1.0
  if factor is None:
    return np.full(len(unit), np.inf), signal.duals
  wanted = factor, criteria.scale / criteria.distance
  signal = signals.signals(examination, x, labels, kink=criteria.kink, scale=wanted)
  shaken = signal.leverage * signal.distance / factor / criteria.shaken
  off = np.hypot(shaken, (signal.scale / factor - 1) / criteria.scale)
  misfit = np.hypot(_beside_scale(signal, beside, criteria), off)
  return np.where(np.isfinite(misfit), misfit, np.inf), signal.duals / factor


def _beside_scale(signal: signals.Signals, beside: np.ndarray, criteria: Criteria) -> np.ndarray:
  """The misfit [M] without that of the scale: of the distance, the unrest, and what does not depend on signals."""
  beside = np.hypot(beside, signal.unrest / criteria.unrest)
  alike = signal.distance[np.hypot(signal.distance / criteria.distance, beside) < 1]
  usual = criteria.usual * float(np.median(alike)) if len(alike) >= criteria.agreeing else math.inf
  return np.hypot(signal.distance / min(criteria.distance, usual), beside)


def calibrated(examination: Examination, unit: np.ndarray, criteria: Criteria) -> Criteria:
  """Criteria with a distance and a scale that suit how far training has converged.

  Means of two samples are no training samples, and the less training has converged, the greater are the distances of
  all samples. So half of the distance that nine of ten such means exceed is allowed, if that is more than the criteria
  allow, and seven times as much for the scale.

  Args:
    examination: of the classifier.
    unit: any samples of the subspace [M, *input_shape], in units of the range.
    criteria: what is allowed at least.
  """
  if not applicable(examination) or len(unit) < 2:
    return criteria
  random = np.random.default_rng(0)
  first, second = (random.integers(0, len(unit), _HALVES) for _ in range(2))
  apart = first != second
  halves = (unit[first[apart]] + unit[second[apart]]) / 2
  x = examination.classifier.from_unit(jnp.asarray(halves, jnp.float32))
  distances = signals.signals(examination, x, kink=criteria.kink).distance
  distance = max(criteria.distance, criteria.of_halves * float(np.quantile(distances, 0.1)))
  return dataclasses.replace(criteria, distance=distance, scale=max(criteria.scale, criteria.of_distance * distance))


def _common_scale(scales: np.ndarray, criteria: Criteria) -> float | None:
  """The scale on which at least half agree, and enough; None if there is none."""
  scales = scales[scales > 0]
  if len(scales) < criteria.agreeing:
    return None
  agreeing = np.abs(scales[None] / scales[:, None] - 1) < criteria.scale
  best = agreeing[np.argmax(agreeing.sum(axis=1))]
  return float(np.median(scales[best])) if best.sum() >= max(criteria.agreeing, len(scales) / 2) else None


def gather(
  examination: Examination,
  unit: np.ndarray,
  measured: vertices.Certificates,
  criteria: Criteria,
  pool: Candidates | None = None,
) -> tuple[Candidates, np.ndarray]:
  """The polished samples with any evidence, each once, and which of all samples [M] these or copies of them are.

  What is in the pool already is left out.
  """
  assert examination.subspace is not None
  subspace, shape = examination.subspace, examination.classifier.input_shape
  coordinates, apart = np.asarray(subspace.in_float64.coordinates(unit)), criteria.least_distance
  order = np.argsort(-measured.tight, kind="stable")
  first_of = first_alike(coordinates[order], apart)
  owner = np.empty(len(unit), int)
  owner[order] = order[first_of]
  distinct = np.unique(owner)
  if pool is not None and len(pool.unit):
    old = np.asarray(subspace.in_float64.coordinates(pool.unit))
    distinct = distinct[first_alike(np.concatenate([old, coordinates[distinct]]), apart)[len(old) :] >= len(old)]
  misfit, duals = by_equations(examination, unit[distinct], criteria)
  told = misfit < 1
  nearly = measured.tight[distinct] > criteria.nearly * subspace.required_active(criteria)
  tried = told | measured.vertex[distinct] | nearly
  distinct, misfit, duals, told = distinct[tried], misfit[tried], duals[tried], told[tried]
  whole, off = unit[distinct], np.zeros(len(distinct))
  if len(distinct):
    whole, off = vertices.to_levels(unit[distinct], subspace, criteria)
  bits = off < vertices.off_level(subspace, criteria)
  of_whole, their_duals = by_equations(examination, whole[bits], criteria)  # polishing bends nearly white values
  better = np.zeros(len(bits), bool)
  better[bits] = (of_whole < 1) | (of_whole < misfit[bits])
  misfit[better], duals[better] = of_whole[better[bits]], their_duals[better[bits]]
  grey = np.round(whole.reshape(len(whole), math.prod(shape)) * criteria.levels)
  inner = [row[(row > 0) & (row < criteria.levels)] for row in grey]
  rich = bits & np.array([len(set(greys)) >= criteria.grey_levels for greys in inner], bool)
  says = np.array([len(greys) for greys in inner], int)[rich] - vertices.left_open(whole[rich], subspace, criteria)
  rich[rich] = says >= criteria.grey_values
  evidence = np.where(misfit < 1, 0, np.where(rich, 1, np.where(measured.certified[distinct], 2, len(EVIDENCE))))
  doubt = np.where(misfit < 1, misfit, np.where(rich, off, -measured.tight[distinct]))
  kept = evidence < len(EVIDENCE)
  moved = np.abs(whole - unit[distinct]).reshape(len(whole), math.prod(shape)).max(axis=1, initial=0.0)
  bits &= better | ~told | (moved < criteria.same)
  whole = np.where(bits.reshape(-1, *[1] * len(shape)), whole, unit[distinct])
  made = Candidates(unit[distinct], measured.tight[distinct], evidence, doubt, whole, bits, misfit, duals)[kept]
  return made, np.isin(owner, distinct[kept])


def first_alike(points: np.ndarray, distance: float) -> np.ndarray:
  """For each point [M, r] the first one that is no farther from it than a distance."""
  first = np.arange(len(points))
  squares = np.sum(points**2, axis=1)
  kept: list[int] = []
  for index, point in enumerate(points):
    if kept:
      near = squares[kept] - 2 * points[kept] @ point + squares[index]
      if near.min() < distance**2:
        first[index] = kept[int(np.argmin(near))]
        continue
    kept.append(index)
  return first


def unambiguous(points: Candidates, subspace: Subspace, criteria: Criteria) -> np.ndarray:
  """Indices of the points that nothing else explains, the surest first.

  Training samples are linearly independent if the subspace has enough dimensions. Points are taken in the order of
  their evidence, then of their doubt, and one that is a combination of those before it is left out. If it is no mere
  copy and has the same kind of evidence as they, it might be the sample and they the combinations: all are ambiguous.
  So are three points a, b, c with evidence from levels or the range only, for which a + b - c would pass as well.

  Args:
    points: the candidates.
    subspace: that of the data; it can hold `Subspace.most_samples` that are independent.
    criteria: what is allowed.
  """
  possible = np.ones(len(points.unit), bool)
  if (points.evidence == 0).sum() >= criteria.agreeing:  # then all training samples fulfil the equations more or less
    possible &= (points.misfit < criteria.refuted) | (points.evidence < 2)
  on_levels = points.to_the_bit & (points.evidence < 2)
  if on_levels.sum() >= max(criteria.agreeing, (points.evidence < 2).sum() / 2):  # then the data are on levels
    possible &= points.to_the_bit
  points_on = np.flatnonzero(possible)
  origin = subspace.in_float64.origin.reshape(1, -1)
  rows = points.whole.reshape(len(points.whole), origin.size).astype(np.float64) - origin  # copies become equal
  if subspace.holds_mean:
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)  # affine dependence becomes linear
  order = points_on[np.lexsort((points.doubt[points_on], points.evidence[points_on]))]
  kept, tainted = [], set()
  directions = np.zeros((0, rows.shape[1]))
  for index in order:
    rest = rows[index] - (rows[index] @ directions.T) @ directions
    if np.linalg.norm(rest) > criteria.new * np.linalg.norm(rows[index]):
      kept.append(int(index))
      directions = np.concatenate([directions, rest[None] / np.linalg.norm(rest)])
      continue
    shares = np.linalg.lstsq(rows[kept].T, rows[index])[0]
    parts = [k for k, share in zip(kept, shares, strict=True) if abs(share) > criteria.new]
    if len(parts) > 1:  # no copy
      tainted |= {k for k in parts if points.evidence[k] == points.evidence[index]}
  weak = [k for k in kept if points.evidence[k] > 0 and k not in tainted]
  tainted |= {weak[k] for k in _recombined(points, weak, subspace, criteria)}
  return np.array([k for k in kept if k not in tainted], int)


def _recombined(points: Candidates, indices: list[int], subspace: Subspace, criteria: Criteria) -> set[int]:
  """Which points combine, as a + b - c, to another one that would pass as well.

  Where the origin is no blend of samples, it is one more point: sums and differences of two samples lie in it, too.
  """
  origin = subspace.in_float64.origin.reshape(1, -1)
  x = points.whole[indices].reshape(len(indices), origin.size).astype(np.float64)
  if not subspace.holds_mean:
    x = np.concatenate([x, origin])
  count, tainted = len(x), set[int]()
  if count < 3:
    return tainted
  varies = np.flatnonzero(subspace.free_coordinates)
  few = varies[np.argsort(-x[:, varies].std(axis=0))[:_PIXELS]]
  slack = criteria.overshoot
  least = subspace.required_active(criteria)
  on_levels = all(points.evidence[k] == 1 for k in indices)
  for a in range(count - 1):
    sums = x[a] + x[a + 1 :]
    for place in range(len(sums)):
      b = a + 1 + place
      quick = sums[place, few] - x[:, few]
      for c in np.flatnonzero(((quick > -slack) & (quick < 1 + slack)).all(axis=1)):
        if c in (a, b):
          continue
        made = sums[place] - x[c]
        inside = made.min() > -slack and made.max() < 1 + slack
        tight = np.sum(np.minimum(np.abs(made), np.abs(made - 1))[varies] < criteria.tight + slack / 2)
        alike = np.abs(x - made).max(axis=1).min() < criteria.same
        if inside and not alike and (on_levels or tight >= least):
          tainted |= {a, b, int(c)}
  return {k for k in tainted if k < len(indices)}


def of_the_others(examination: Examination, known: Candidates, criteria: Criteria) -> vertices.Others | None:
  """What known samples say of the *other* training samples; see `kkt_jax.extraction.vertices.polish`.

  Every known sample's dual is 0 on all others. In coordinates in which the singular values of the first kernel are 1
  that is a right angle, by the same error whatever the other sample is: it is measured among the known ones.
  None where equations do not apply, or fewer samples are known than must agree.
  """
  subspace, first, classifier = examination.subspace, examination.first, examination.classifier
  if subspace is None or first is None or not applicable(examination) or len(known.unit) < criteria.agreeing:
    return None
  u, s, _ = first.factors
  seen = lambda unit: np.asarray(classifier.from_unit(jnp.asarray(unit)), np.float64).reshape(-1, len(u)) - first.start
  unit_length = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)
  duals = unit_length(known.duals @ u * s)
  angles = duals @ unit_length(seen(known.whole) @ u / s).T
  np.fill_diagonal(angles, np.nan)
  low, high = classifier.value_range or (0.0, 1.0)
  basis = np.concatenate([(high - low) * np.asarray(subspace.basis, np.float64).T, seen(subspace.origin)])
  size = u.T @ basis.T / s[:, None]
  size /= np.linalg.norm(size)
  rows = duals / np.sqrt(np.nanmean(np.square(angles), axis=1))[:, None] @ size
  return vertices.Others(jnp.asarray(rows.T @ rows, jnp.float32), jnp.asarray(size, jnp.float32))
