"""The search for exact training samples: rounds of polishing and certifying (`extraction.vertices`), put together."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from kkt_jax.analysis.examination import Examination
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import Criteria
from kkt_jax.extraction import certificates, vertices
from kkt_jax.extraction.certificates import Candidates

_FEW = 48  # guesses that are polished to see whether there is any hope
_FEWER = 16  # the same, to see whether there is much
_IDLE, _BRINGS = 2, 0.05  # rounds that bring less than this share of what is missing after which the search ends


class Exact(NamedTuple):
  """The certified training samples of one classifier; see `kkt_jax.extraction.certificates` for what that assumes.

  Attributes:
    unit: the samples [K, *input_shape] in units of the range, [0, 1].
    y: their labels [K], as the classifier labels them.
    tight: how many of their values are at an end of the range [K]; see `kkt_jax.extraction.vertices.certify`.
    to_the_bit: which of them have the values of 8-bit images [K]; see `kkt_jax.extraction.vertices.to_levels`.
    evidence: what certifies each [K], by its place in `kkt_jax.extraction.EVIDENCE`.
    criteria: by which they are certified, as `kkt_jax.extraction.certificates.calibrated` left them.
  """

  unit: np.ndarray
  y: np.ndarray
  tight: np.ndarray
  to_the_bit: np.ndarray
  evidence: np.ndarray
  criteria: Criteria = Criteria()

  @property
  def counts(self) -> dict[str, int]:
    """How many are certified by each kind of evidence."""
    return {kind: int(np.sum(self.evidence == place)) for place, kind in enumerate(certificates.EVIDENCE)}


@dataclasses.dataclass(frozen=True)
class Effort:
  """How much a search tries.

  Attributes:
    rounds: at most so many.
    points: about how many later rounds start from; as many as there are guesses if None.
    num_steps: of `kkt_jax.extraction.vertices.polish`.
    least_hope: there must be more `hope` than this, and as great a share of the training samples after each round.
  """

  rounds: int
  points: int | None = None
  num_steps: int = 60
  least_hope: float = 0.0


def find(
  examination: Examination,
  guesses: jax.Array | np.ndarray,
  y: np.ndarray,
  effort: Effort,
  *,
  known: Exact | None = None,
  criteria: Criteria | None = None,
  on_round: Callable[[int, int, int], None] | None = None,
) -> tuple[Exact, np.ndarray]:
  """Training samples of one classifier, from guesses and then from random points of the subspace.

  Nothing is tried if there is too little `hope` for the guesses. The first round polishes the guesses themselves. Later
  rounds start in turn from random points and from means of two: of a guess and of another one, or of a sample that was
  found, of the same label. Random points lie in the subspace around the mean of the guesses, in directions that no
  sample found so far has; they are given up once a round of them brings too little. With weight decay, samples that are
  certified lead to the others (`kkt_jax.extraction.certificates.of_the_others`). The search ends with as many training
  samples as the subspace can hold, or after two rounds in a row that brought less than a twentieth of the missing ones.

  Args:
    examination: of the classifier.
    guesses: samples [M, *input_shape] in units of the range.
    y: their labels [M].
    effort: how much is tried.
    known: training samples that are certified already; they lead to others from the first round on, and guesses that
      are copies of them are not polished again.
    criteria: what certifies a sample; the default `Criteria` if None.
    on_round: called with (round, number of training samples, most that there can be).

  Returns:
    The training samples, each once, and which guesses [M] led to one, all if there are no others. None where no
    subspace is revealed or inputs have no range.
  """
  classifier, subspace = examination.classifier, examination.subspace
  criteria = criteria or Criteria()
  guesses = np.asarray(guesses)  # what JAX did would be compiled for every shape
  led, fresh = np.zeros(len(guesses), bool), np.ones(len(guesses), bool)
  nothing: list[Any] = [*(np.zeros(0, kind) for kind in (int, int, bool, int)), criteria]
  exact = known or Exact(np.zeros((0, *classifier.input_shape), np.float32), *nothing)
  if hope(examination, guesses, y, few=_FEWER if effort.least_hope else _FEW, criteria=criteria) <= effort.least_hope:
    return exact, led
  assert subspace is not None
  most, idle, at_random = subspace.most_samples, 0, True
  every = max(len(guesses) // (effort.points or len(guesses)), 1)
  typical = np.mean(guesses, axis=0)
  pool: Candidates | None = None
  others: vertices.Others | None = None
  if known is not None and len(known.y):
    criteria = known.criteria
    misfit, duals = certificates.by_equations(examination, known.unit, criteria)
    surest = np.where(known.evidence < 2, 0.0, -known.tight)  # what was certified stays so, unless it is ambiguous now
    said = known.tight, known.evidence, surest, known.unit, known.to_the_bit
    pool = Candidates(known.unit, *said, misfit, duals)
    others = certificates.of_the_others(examination, pool, criteria)
    both = np.concatenate([known.unit, guesses]).reshape(len(known.y) + len(y), -1)
    fresh = certificates.first_alike(both, criteria.least_distance)[len(known.y) :] >= len(known.y)
    led, guesses, y = ~fresh, guesses[fresh], y[fresh]
  for number in range(effort.rounds if len(guesses) else 0):
    key = jax.random.key(number)
    seen, seen_y = np.concatenate([guesses, exact.unit]), np.concatenate([y, exact.y])
    drawn = at_random and number > 0 and number % 2 == (others is None)  # later where what is found leads on
    taken = slice(number % every, None, every) if number else slice(None)
    likely = None
    if drawn:
      starts: Any = vertices.search(key, subspace, len(y[taken]), around=typical, known=exact.unit)
    else:
      alike = (y[:, None] == seen_y[None, :]) * np.random.default_rng(number).random((len(y), len(seen)))
      starts = ((guesses + seen[np.argmax(alike, axis=1)]) / 2 if number else guesses)[taken]
      likely = vertices.likely_ends(starts, y[taken], seen, seen_y)
    x = np.asarray(vertices.polish(starts, subspace, likely=likely, others=others, num_steps=effort.num_steps))
    x = _right_way(classifier, x, np.asarray(subspace.origin), typical, criteria)
    if pool is None:
      criteria = certificates.calibrated(examination, x, criteria)
    more, of = certificates.gather(examination, x, vertices.certify(x, subspace, criteria), criteria, pool)
    if not number:
      led[fresh] = of
    pool = more if pool is None else pool + more
    chosen = certificates.unambiguous(pool, subspace, criteria)[:most]
    brought = len(chosen) > len(exact.y) + _BRINGS * (most - len(chosen))
    idle, at_random = 0 if brought else idle + 1, at_random and (brought or not drawn)
    kept = pool[chosen]
    others = certificates.of_the_others(examination, kept, criteria)
    exact = Exact(kept.whole, _read(classifier, kept.whole)[0], kept.tight, kept.to_the_bit, kept.evidence, criteria)
    if on_round is not None:
      on_round(number + 1, len(chosen), most)
    if len(chosen) == most:
      led[:] = True  # there are no others, so that every guess was meant for one of these
    if len(chosen) == most or idle == _IDLE or len(chosen) < effort.least_hope * most:
      break
  return exact, led


def hope(
  examination: Examination,
  guesses: jax.Array | np.ndarray,
  y: np.ndarray,
  *,
  few: int = _FEW,
  criteria: Criteria | None = None,
) -> float:
  """The share of a few guesses that polishing turns into training samples; at 0 a search is not worth its time.

  Args:
    examination: of the classifier.
    guesses: samples [M, *input_shape] in units of the range.
    y: their labels [M].
    few: how many are tried, about.
    criteria: what certifies a sample; the default `Criteria` if None.

  Returns:
    The share, 0 where no subspace is revealed or inputs have no range.
  """
  subspace, criteria = examination.subspace, criteria or Criteria()
  if subspace is None or examination.classifier.value_range is None:
    return 0.0
  if not certificates.applicable(examination) and not vertices.promising(guesses, subspace).any():
    return 0.0
  taken = slice(None, None, math.ceil(len(guesses) / few))
  likely = vertices.likely_ends(guesses[taken], y[taken], guesses, y)
  polished = np.asarray(vertices.polish(guesses[taken], subspace, likely=likely))
  measured = vertices.certify(polished, subspace, criteria)
  return float(np.mean(certificates.gather(examination, polished, measured, criteria)[1]))


def places(labels: np.ndarray, led: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The places of training samples in a table.

  Args:
    labels: of the training samples [K].
    led: which entries of the table [M], label by label, led to one.
    y: labels of the entries [M].

  Returns:
    Labels, codes, and indices of training samples. Those of a label are placed in turn until each is in the table and
    every entry of the label that led to one is taken. A training sample whose label has no entries is left out.

  >>> places(np.array([7, 7, 8]), np.array([False, True, True, True, False]), np.array([7] * 5))
  (array([7, 7, 7]), array([1, 2, 3]), array([0, 1, 0]))
  """
  taken: list[tuple[int, int, int]] = []
  for label in np.unique(labels):
    samples, entries = np.flatnonzero(labels == label), led[y == label]
    order = np.argsort(~entries, kind="stable")  # those that led to one first
    count = min(max(int(entries.sum()), len(samples)), len(entries))
    taken += [(int(label), int(code), int(k)) for code, k in zip(order[:count], np.resize(samples, count), strict=True)]
  rows = np.array(taken, int).reshape(-1, 3)
  return rows[:, 0], rows[:, 1], rows[:, 2]


def _right_way(
  classifier: Classifier, unit: np.ndarray, start: np.ndarray, typical: np.ndarray, criteria: Criteria
) -> np.ndarray:
  """Each sample, or its mirror image at the start if that is in the range and the more likely.

  Where the start is the middle of the range, the negative of a sample is as much of a vertex as the sample. The more
  likely is the one on the side of the typical sample, the guesses' mean; where that is on neither, the one of which the
  classifier is surer.
  """
  mirror = 2 * start[None] - unit
  inside = np.abs(mirror - 0.5).reshape(len(unit), start.size).max(axis=1, initial=0.0) < 0.5 + criteria.overshoot
  offsets, towards = (unit - start[None]).reshape(len(unit), start.size), np.ravel(typical - start)
  cosine = offsets @ towards / np.maximum(np.linalg.norm(offsets, axis=1) * np.linalg.norm(towards), 1e-12)
  unsure = _read(classifier, mirror)[1] > _read(classifier, unit)[1]
  turned = inside & np.where(np.abs(cosine) > criteria.side, cosine < 0, unsure)
  return np.where(turned.reshape(-1, *[1] * start.ndim), mirror, unit)


def _read(classifier: Classifier, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Labels that a classifier gives samples in units of its range, and their margins to the runner-up."""
  if not len(unit):
    return np.zeros(0, int), np.zeros(0)
  logits = np.asarray(classifier.predict(classifier.from_unit(unit)))
  second, first = np.sort(logits, axis=1)[:, -2:].T
  return np.asarray(classifier.labels)[np.argmax(logits, axis=1)], first - second
