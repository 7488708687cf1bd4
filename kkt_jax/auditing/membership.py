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
from kkt_jax.metrics import conformal_p_values, epsilon_lower_bound, q_values, Roc, roc

_DEFAULT = AuditCriteria()
_LEAST_P = 1e-9  # tails below are approximations
_PAIRS = 10**7  # of images that are compared before the training
SCORES = {
  "multipliers": "their multiplier in the stationarity sum",
  "subspace": "their distance from the subspace of the training data",
  "signal": "how much of their back-propagated signal the weights lack",
  "boundaries": "how near they lie to activation boundaries",
  "margin": "their distance from the margin that members share",
  "together": "their multiplier and boundaries, or margin, together",
  "loss": "their loss",
  "change": "how far their gradient points along the change of the weights",
  "change_multipliers": "their multiplier in the change of the weights",
}


class Confounded(str):
  """A limit in words under which no difference between members and non-members is evidence of training."""


class Risk(NamedTuple):
  """How far one sample stands out from held-out samples by its scores.

  Attributes:
    name: its file, or its place from 0.
    label: of its class, or of the one that the classifier takes a candidate for.
    p_value: of standing out so far in all scores together if it is no member.
    q_value: the least false-discovery rate at which it counts as a member, among all that are asked about.
    score: the name of the score by which it stands out most.
  """

  name: str
  label: int
  p_value: float
  q_value: float
  score: str


class Scored(NamedTuple):
  """Scores of members and non-members (`kkt_jax.membership.candidates`).

  Attributes:
    curves: by score, members against non-members.
    best: the score by which most members lie above all non-members.
    values: by score, those of the members [n] and of the non-members [m].
    risks: each member by itself, the surest first.
    p_value: of as great a difference by chance, in any score.
    surest: the name of the score that gives this p-value.
  """

  curves: Mapping[str, Roc]
  best: str
  values: Mapping[str, tuple[np.ndarray, np.ndarray]]
  risks: Sequence[Risk]
  p_value: float
  surest: str

  @property
  def epsilon(self) -> float:
    """The lower bound on epsilon, of differential privacy, that all scores together give at 95 % confidence."""
    confidence = 1 - 0.05 / len(self.values)
    return max(epsilon_lower_bound(*sides, confidence=confidence) for sides in self.values.values())

  @property
  def members(self) -> int:
    """How many training samples were scored."""
    return len(self.values[self.best][0])

  @property
  def others(self) -> int:
    """How many held-out samples were scored."""
    return len(self.values[self.best][1])


def labelled(risks: Sequence[Risk], labels: Sequence[int]) -> Sequence[Risk]:
  """Risks with a classifier's own labels in the place of classes."""
  return [risk._replace(label=labels[risk.label]) for risk in risks]


def with_p(value: float) -> str:
  """A p-value in words.

  >>> with_p(0.0123), with_p(0.0)
  ('p = 0.012', 'p < 1e-09')
  """
  return f"p = {value:.2g}" if value >= _LEAST_P else f"p < {_LEAST_P:g}"


def score(examination: Examination, train: Samples, held_out: Samples, criteria: AuditCriteria = _DEFAULT) -> Scored:
  """Scores training and held-out samples together, at most 1,500 of each (`AuditCriteria.scored`), drawn at random."""
  asked, others = train.at_most(criteria.scored), held_out.at_most(criteria.scored)
  x, y = np.concatenate([asked.x, others.x]), np.concatenate([asked.y, others.y])
  classifier = examination.classifier
  scores = candidates.scores(examination, classifier.from_unit(x), np.asarray(classifier.labels)[y])
  sides = {name: (values[: len(asked.y)], values[len(asked.y) :]) for name, values in scores.items()}
  return compared(asked, sides, criteria)


def compared(
  asked: Samples, values: Mapping[str, tuple[np.ndarray, np.ndarray]], criteria: AuditCriteria = _DEFAULT
) -> Scored:
  """The curves, the risks and the p-value of scores of samples [n] and of held-out ones [m], by the score's name."""
  curves = {name: roc(*sides) for name, sides in values.items()}
  best = max(curves, key=lambda name: (curves[name].points[0].members, curves[name].auc))
  p_values = {name: _p_value(*sides, curves[name].points[0].members) for name, sides in values.items()}
  surest = min(p_values, key=lambda name: (p_values[name], name != best))
  p_value = min(1.0, len(p_values) * p_values[surest])
  return Scored(curves, best, values, risks(asked, values, criteria), p_value, surest)


def suspects(
  examination: Examination, asked: Samples, held_out: Samples, criteria: AuditCriteria = _DEFAULT
) -> Sequence[Risk]:
  """Scores samples together with held-out ones, all with the labels that the classifier predicts."""
  others = held_out.at_most(criteria.scored)
  scores = candidates.scores(examination, examination.classifier.from_unit(np.concatenate([asked.x, others.x])))
  sides = {name: (values[: len(asked.x)], values[len(asked.x) :]) for name, values in scores.items()}
  return risks(asked, sides, criteria)


def risks(
  asked: Samples, values: Mapping[str, tuple[np.ndarray, np.ndarray]], criteria: AuditCriteria = _DEFAULT
) -> Sequence[Risk]:
  """The risk of each sample by itself, the surest member first.

  Args:
    asked: the samples [n].
    values: by score, those of the samples [n] and of held-out samples [m].
    criteria: how often the least p-value counts.
  """
  names, (own, others) = list(values), [np.stack(side) for side in zip(*values.values(), strict=True)]
  p_values, joint = _p_values(own, others, criteria.least_counted)
  best, order = p_values.argmin(axis=0), np.lexsort([p_values.mean(axis=0), joint])
  rows = zip(asked.names, asked.y.tolist(), joint.tolist(), q_values(joint).tolist(), best.tolist(), strict=True)
  ranked = [Risk(name, label, p, q, names[place]) for name, label, p, q, place in rows]
  return [ranked[place] for place in order]


def _p_values(asked: np.ndarray, others: np.ndarray, least_counted: float) -> tuple[np.ndarray, np.ndarray]:
  """The p-values of each sample by each score [K, n], and by all of them together [n].

  Together they are combined as Fisher does, the least p-value counted more often, since often one score tells what the
  others do not; and this is compared with what every held-out sample has among the sample in question and the others.
  So non-members are exchangeable with these, however scores depend on one another, and K scores cost no factor of K.

  Args:
    asked: the scores [K, n].
    others: those of the held-out samples [K, m].
    least_counted: how often the least p-value counts besides once.
  """
  p_values = np.stack([conformal_p_values(*sides) for sides in zip(asked, others, strict=True)])
  count = others.shape[1] + 1
  as_high = np.stack([count - 1 - np.searchsorted(np.sort(scores), scores) for scores in others])
  combined = lambda p: -np.log(p).sum(axis=0) - least_counted * np.log(p.min(axis=0))
  # [K, m] for one sample after the other: with all at once memory would grow with n times m.
  among = ((as_high + (scores[:, None] >= others)) / count for scores in asked.T)
  as_far = [np.sum(combined(p) >= one - 1e-9) for p, one in zip(among, combined(p_values), strict=True)]
  return p_values, (1 + np.array(as_far)) / count


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
        f" ({with_p(apart)}): they differ by themselves, in source, compression, brightness or cropping, so that no"
        " difference of scores is evidence of training. Hold out data of the same source, stored in the same way."
      )
    )
  return said


def _p_value(members: np.ndarray, others: np.ndarray, leading: int) -> float:
  """The p-value of a score for exchangeable samples: twice the lesser of that of the ranks and of the leading ones."""
  ranks = stats.mannwhitneyu(members, others, alternative="greater").pvalue
  n, m = len(members), len(others)
  tops = np.arange(leading)  # the greatest of all n + m is a member with odds n / (n + m), and so on
  return float(min(1.0, 2 * min(ranks, np.prod((n - tops) / (n + m - tops)))))
