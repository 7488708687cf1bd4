"""Membership inference by scores of single samples, and the limits of a comparison of members with non-members."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from kkt_jax.analysis import Examination
from kkt_jax.auditing import sources
from kkt_jax.auditing.matching import comparable, similarity, tested
from kkt_jax.auditing.samples import Samples
from kkt_jax.criteria import AuditCriteria
from kkt_jax.membership import candidates
from kkt_jax.metrics import Roc, roc

_DEFAULT = AuditCriteria()
_PAIRS = 10**7  # of images that are compared before the training
SCORES = {
  "multipliers": "their multiplier in the stationarity sum",
  "subspace": "their distance from the subspace of the training data",
  "signal": "how much of their back-propagated signal the weights lack",
  "boundaries": "the activation boundaries on which they lie",
  "margin": "their distance from the margin that members share",
  "loss": "their loss",
}


class Confounded(str):
  """A limit in words under which no difference between members and non-members is evidence of training."""


class Scored(NamedTuple):
  """Scores of members and non-members (`kkt_jax.membership.candidates`).

  Attributes:
    curves: by score, members against non-members.
    best: the score by which most members lie above all non-members.
    members: how many training samples were scored.
    others: how many held-out samples.
    p_value: of as great a difference by chance, in any score.
  """

  curves: Mapping[str, Roc]
  best: str
  members: int
  others: int
  p_value: float


class Candidates(NamedTuple):
  """Which candidates score above all held-out samples.

  Attributes:
    marks: in which scores each of these does, by its name.
    asked: how many candidates there were.
    others: how many held-out samples.
    by_chance: how many candidates would at most if none were members, in the mean.
  """

  marks: Mapping[str, Sequence[str]]
  asked: int
  others: int
  by_chance: float


def score(examination: Examination, train: Samples, held_out: Samples, criteria: AuditCriteria = _DEFAULT) -> Scored:
  """Scores training and held-out samples together, at most 1,500 of each (`AuditCriteria.scored`), drawn at random."""
  own, others = _some(train, criteria.scored), _some(held_out, criteria.scored)
  x, y = np.concatenate([own.x, others.x]), np.concatenate([own.y, others.y])
  found = candidates.scores(examination, examination.classifier.from_unit(x), y)
  sides = {name: (values[: len(own.y)], values[len(own.y) :]) for name, values in found.items()}
  curves = {name: roc(*side) for name, side in sides.items()}
  best = max(curves, key=lambda name: (curves[name].points[0].members, curves[name].auc))
  p_values = [_p_value(*side, curves[name].points[0].members) for name, side in sides.items()]
  return Scored(curves, best, len(own.y), len(others.y), min(1.0, len(p_values) * min(p_values)))


def suspects(
  examination: Examination,
  asked: Samples,
  names: Sequence[str],
  held_out: Samples,
  criteria: AuditCriteria = _DEFAULT,
) -> Candidates:
  """Scores samples together with held-out ones; all count as what the classifier takes them for."""
  others = _some(held_out, criteria.scored)
  found = candidates.scores(examination, examination.classifier.from_unit(np.concatenate([asked.x, others.x])))
  above = {name: values[: len(asked.x)] > values[len(asked.x) :].max() for name, values in found.items()}
  marks = {own: [name for name in above if above[name][place]] for place, own in enumerate(names)}
  by_chance = len(asked.x) * len(above) / (1 + len(others.y))
  return Candidates({own: marked for own, marked in marks.items() if marked}, len(asked.x), len(others.y), by_chance)


def limits(train: Samples, held_out: Samples, criteria: AuditCriteria = _DEFAULT) -> list[str]:
  """What limits a comparison of these data, in words; nothing if nothing does. See `Confounded`."""
  count, group = tested(train, held_out)
  number, said = count * len(np.unique(train.y)), []
  if number < len(train.y):
    said.append(
      f"Only {number} of the {len(train.y)} training samples can be tested, {count} of each class: so many has the"
      " rarest class of the training data or of those held out."
    )
  if 2 * (1 + group) ** -number >= criteria.significant:
    said.append(f"The data are too few for a verdict: even if all {number} were identified, that could be chance.")
  if comparable(train) and len(train.y) * len(held_out.y) <= _PAIRS:
    near = int(np.sum(similarity(train, held_out) > criteria.equal))
    if near:
      said.append(f"{near} held-out samples are all but equal to a training sample, and indistinguishable from it.")
  counts = np.stack([np.bincount(images.y, minlength=int(train.y.max()) + 1) for images in (train, held_out)])
  if stats.chi2_contingency(counts).pvalue < criteria.significant:
    said.append("The classes have other proportions in the held-out data, by which scores may differ, too.")
  apart = sources.p_value(train, held_out, criteria)
  if apart < criteria.significant:
    said.append(
      Confounded(
        f"The held-out data are distinguishable from the training data of their class without any weights"
        f" (p = {apart:.2g}): they differ by themselves, in source, compression, brightness or cropping, so that no"
        " difference of scores is evidence of training. Hold out data of the same source, stored in the same way."
      )
    )
  return said


def _some(images: Samples, most: int) -> Samples:
  if len(images.y) <= most:
    return images
  places = np.sort(np.random.default_rng(0).choice(len(images.y), most, replace=False))
  return Samples(images.x[places], images.y[places])


def _p_value(members: np.ndarray, others: np.ndarray, leading: int) -> float:
  """Of one score, for exchangeable samples: twice the lesser of two, that of the ranks and that of the leading ones."""
  ranks = stats.mannwhitneyu(members, others, alternative="greater").pvalue
  n, m = len(members), len(others)
  tops = np.arange(leading)  # the greatest of all n + m is a member with odds n / (n + m), and so on
  return float(min(1.0, 2 * min(ranks, np.prod((n - tops) / (n + m - tops)))))
