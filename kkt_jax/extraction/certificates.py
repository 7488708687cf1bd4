"""Which samples are certified to be training samples, by what evidence, under which assumptions. No data are seen.

=========  ==================================================  ================================================
evidence   what is checked of a sample                         what must hold besides
=========  ==================================================  ================================================
equations  its own signal stands in the weights, at its scale  weight decay, trained to convergence, no batch
           (`kkt_jax.extraction.signals`)                                 norm, samples that do not depend on one
           another
levels     all its values lie on the levels of 8-bit images,   values of that many levels
           many more than the subspace can choose
range      it is a firm vertex of the subspace cut with the    values that reach the ends of their range, and a
           range of values (`kkt_jax.extraction.vertices`)                subspace that tells a sample from a brighter
           one
=========  ==================================================  ================================================

All need a subspace that is that of the data (`kkt_jax.analysis.examination`) and one explanation only: samples that
account for one another, or that can be put together to others which would pass as well, are *ambiguous*, and none of
them is certified (`unambiguous`). Where samples are on levels, those that are not are not certified by their range.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from kkt_jax.analysis import first_layer
from kkt_jax.analysis.examination import Examination
from kkt_jax.analysis.first_layer import InputSpan
from kkt_jax.criteria import Criteria
from kkt_jax.extraction import signals, vertices

#: The kinds of evidence, the strongest first.
EVIDENCE = ("equations", "levels", "range")
_AGREE = 5  # samples that agree on a scale, or say of all others that they fulfil the equations, or are on levels
_SPREAD = 5.0  # so many times the greatest difference of a value are two samples apart that are one
_OF_HALVES, _OF_DISTANCE = 0.5, 7.0  # of their distance that is allowed, and of that the scale may be off
_HALVES = 96  # blends that are measured to see how far training has converged
_PIXELS = 48  # on which combinations of three are looked at first


@dataclasses.dataclass(frozen=True)
class Candidates:
  """Points that may be training samples, and what speaks for each.

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
  classifier, span = examination.classifier, examination.span
  return (
    examination.form == "weight_decay"
    and span is not None
    and not span.blur
    and examination.first is not None
    and classifier.initial_params is None
    and not classifier.batch_coupled
  )


def by_equations(
  examination: Examination, unit: np.ndarray, criteria: Criteria, *, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """How far samples are from their own equations, and their duals; certified below 1.

  The root of the sum of squares of: the distance of the signal from the row space, its scale's from 1, the unrest of
  its kinks, the part of the sample outside of the subspace, and what the bias says of its brightness, each over what
  `Criteria` allow. The scale is that of most samples that fulfil the rest, if the weight decay or the number of
  training samples is not known: five at least that agree.

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
  found = signals.signals(examination, x, labels, kink=criteria.kink)
  offsets = np.asarray(x, np.float64).reshape(len(unit), -1) - first.start
  u, _, _ = first.factors
  lengths = np.maximum(np.linalg.norm(offsets, axis=1), 1e-300)
  outside = np.linalg.norm(offsets - (offsets @ u) @ u.T, axis=1) / lengths
  parts = [found.distance / criteria.distance, found.unrest / criteria.unrest, outside / criteria.outside]
  if first.normal is not None:
    parts.append((offsets @ first.normal - 1) / criteria.affine)
  rest = np.sqrt(np.sum(np.square(parts), axis=0))
  factor = _common_scale(found.scale[rest < 1], criteria.scale)
  if factor is None:
    factor = math.nan if examination.classifier.weight_decay is None else 1.0
  misfit = np.hypot(rest, (found.scale / factor - 1) / criteria.scale)
  return np.where(np.isfinite(misfit), misfit, np.inf), found.duals / factor


def calibrated(examination: Examination, unit: np.ndarray, criteria: Criteria) -> Criteria:
  """Criteria whose distance and scale fit how far training has converged.

  Halves of two samples each are no training samples. Half of the distance that nine of ten of them keep is
  allowed, if that is more than the criteria allow, and seven times that of the scale: the less training has converged,
  the farther are all samples.

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
  distance = max(criteria.distance, _OF_HALVES * float(np.quantile(distances, 0.1)))
  return dataclasses.replace(criteria, distance=distance, scale=max(criteria.scale, _OF_DISTANCE * distance))


def _common_scale(scales: np.ndarray, tolerance: float) -> float | None:
  """The scale on which most agree, at least five and half of all; None if there is none."""
  scales = scales[scales > 0]
  if len(scales) < _AGREE:
    return None
  agreeing = np.abs(scales[None] / scales[:, None] - 1) < tolerance
  best = agreeing[np.argmax(agreeing.sum(axis=1))]
  return float(np.median(scales[best])) if best.sum() >= max(_AGREE, len(scales) / 2) else None


def gather(
  examination: Examination,
  unit: np.ndarray,
  found: vertices.Certificates,
  criteria: Criteria,
  pool: Candidates | None = None,
) -> tuple[Candidates, np.ndarray]:
  """The polished samples for which any evidence speaks, each once, and which samples these are or are copies of [M].

  What is in the pool already is left out.
  """
  assert examination.span is not None
  span, start = examination.span, examination.unit_start
  flat = unit.reshape(len(unit), -1)
  coordinates = (flat - np.asarray(start, np.float64).reshape(1, -1)) @ np.asarray(span.basis, np.float64)
  order = np.argsort(-found.tight, kind="stable")
  first_of = first_alike(coordinates[order], criteria.same)
  owner = np.empty(len(unit), int)
  owner[order] = order[first_of]
  distinct = np.unique(owner)
  if pool is not None and len(pool.unit):
    old = pool.unit.reshape(len(pool.unit), -1) - np.asarray(start, np.float64).reshape(1, -1)
    both = np.concatenate([old @ np.asarray(span.basis, np.float64), coordinates[distinct]])
    distinct = distinct[first_alike(both, criteria.same)[len(old) :] >= len(old)]
  misfit, duals = by_equations(examination, unit[distinct], criteria)
  told = misfit < 1
  tried = told | found.vertex[distinct]
  distinct, misfit, duals, told = distinct[tried], misfit[tried], duals[tried], told[tried]
  whole, off = unit[distinct], np.zeros(len(distinct))
  if len(distinct):
    whole, off = vertices.to_levels(unit[distinct], span, start, levels=criteria.levels)
  grey = np.round(whole.reshape(len(whole), start.size) * criteria.levels)
  inner = [row[(row > 0) & (row < criteria.levels)] for row in grey]
  rich = np.array([len(r) >= criteria.grey_values and len(set(r)) >= criteria.grey_levels for r in inner], bool)
  bits = off < criteria.off_level
  evidence = np.where(told, 0, np.where(bits & rich, 1, np.where(found.certified[distinct], 2, len(EVIDENCE))))
  doubt = np.where(told, misfit, np.where(bits & rich, off, -found.tight[distinct]))
  kept = evidence < len(EVIDENCE)
  bits &= ~told | (
    np.abs(whole - unit[distinct]).reshape(len(whole), start.size).max(axis=1, initial=0.0) < criteria.same
  )
  whole = np.where(bits.reshape(-1, *[1] * start.ndim), whole, unit[distinct])
  made = Candidates(unit[distinct], found.tight[distinct], evidence, doubt, whole, bits, misfit, duals)[kept]
  return made, np.isin(owner, distinct[kept])


def first_alike(points: np.ndarray, distance: float) -> np.ndarray:
  """For each point [M, r] the first one that is no farther from it than a distance in any direction together."""
  first = np.arange(len(points))
  squares = np.sum(points**2, axis=1)
  kept: list[int] = []
  for index, point in enumerate(points):
    if kept:
      near = squares[kept] - 2 * points[kept] @ point + squares[index]
      if near.min() < (_SPREAD * distance) ** 2:
        first[index] = kept[int(np.argmin(near))]
        continue
    kept.append(index)
  return first


def unambiguous(
  points: Candidates, start: np.ndarray, span: InputSpan, *, affine: bool, criteria: Criteria
) -> np.ndarray:
  """Indices of the points that nothing else explains, the surest first.

  Training samples are independent where the subspace has as many dimensions as they need. In the order of evidence,
  then of doubt, a point that those before it account for is left out. If it is no mere copy of one and its evidence is
  theirs, then it might be the sample and they be made of it: all are ambiguous. So are, where only levels or the range
  speak, three points a, b, c for which a + b - c would pass as well.

  Args:
    points: the candidates.
    start: what the subspace starts from [...].
    span: the subspace.
    affine: whether the start is among the samples' blends, as their mean is; then r + 1 can be independent, else r.
    criteria: what is allowed.
  """
  possible = np.ones(len(points.unit), bool)
  if (points.evidence == 0).sum() >= _AGREE:  # then all training samples fulfil the equations more or less
    possible &= (points.misfit < criteria.refuted) | (points.evidence < 2)
  if (points.evidence == 1).sum() >= _AGREE:  # then the data are on levels
    possible &= (points.evidence < 2) | points.to_the_bit
  points_on = np.flatnonzero(possible)
  rows = points.unit.reshape(len(points.unit), np.size(start)).astype(np.float64)
  rows -= np.asarray(start, np.float64).reshape(1, -1)
  if affine:
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
    parts = [own for own, share in zip(kept, shares, strict=True) if abs(share) > criteria.new]
    if len(parts) > 1:  # no copy
      tainted |= {own for own in parts if points.evidence[own] == points.evidence[index]}
  weak = [own for own in kept if points.evidence[own] > 0 and own not in tainted]
  tainted |= {weak[own] for own in _recombined(points, weak, start, span, affine=affine, criteria=criteria)}
  return np.array([own for own in kept if own not in tainted], int)


def _recombined(
  points: Candidates, own: list[int], start: np.ndarray, span: InputSpan, *, affine: bool, criteria: Criteria
) -> set[int]:
  """Which of some points can be put together, a + b - c, to another one that would pass as well.

  Without an affine subspace the start is one more point: sums and differences of two samples lie in it, too.
  """
  x = points.unit[own].reshape(len(own), np.size(start)).astype(np.float64)
  if not affine:
    x = np.concatenate([x, np.asarray(start, np.float64).reshape(1, -1)])
  count, found = len(x), set[int]()
  if count < 3:
    return found
  varies = np.flatnonzero(first_layer.varying(span))
  few = varies[np.argsort(-x[:, varies].std(axis=0))[:_PIXELS]]
  slack = criteria.overshoot
  least = first_layer.least_tight(span.strengths.size, len(varies), criteria)
  on_levels = all(points.evidence[k] == 1 for k in own)
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
          found |= {a, b, int(c)}
  return {k for k in found if k < len(own)}


def of_the_others(
  examination: Examination, known: Candidates, start: np.ndarray
) -> tuple[InputSpan, np.ndarray] | None:
  """The directions in which the *other* training samples lie, and a point among them [...], in units of the range.

  Every known sample's dual is 0 on all others, so each that is certified by the equations takes a dimension away.
  None if none is.
  """
  span, first = examination.span, examination.first
  duals = known.duals[known.evidence == 0]
  if span is None or first is None or not len(duals) or len(duals) >= span.strengths.size:
    return None
  classifier = examination.classifier
  low, high = classifier.value_range or (0.0, 1.0)
  basis = np.asarray(span.basis, np.float64)
  beyond = np.asarray(classifier.from_unit(start), np.float64).reshape(-1) - first.start
  equations, wanted = duals @ basis * (high - low), -duals @ beyond
  u, s, rows = np.linalg.svd(equations, full_matrices=True)
  rank = int(np.sum(s > 1e-6 * s[0]))
  at = rows[:rank].T @ ((u[:, :rank].T @ wanted) / s[:rank])
  free = basis @ rows[rank:].T
  place = np.asarray(start, np.float64).reshape(-1) + basis @ at
  return InputSpan(jnp.asarray(free, jnp.float32), jnp.ones(free.shape[1])), place.reshape(np.shape(start))
