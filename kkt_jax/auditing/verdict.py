"""The answers of an audit in words. They never say more than was measured, and no verdict is an all-clear."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from kkt_jax.auditing.description import Residuals
from kkt_jax.auditing.membership import Confounded, Risk, Scored, SCORES, with_p
from kkt_jax.criteria import AuditCriteria
from kkt_jax.metrics import Trial

_DEFAULT = AuditCriteria()
MEASURED_FALSE = "none was false in 39 searches of thirteen kinds of data"
EVIDENCE = {"equations": "by the equations", "levels": "by 8-bit levels", "range": "by the range of values"}
ASSUMED = {  # in the words of `kkt_jax.extraction.certificates`
  "equations": (
    "By the equations: the signal that is back-propagated from a sample lies in the row space of the first kernel, at"
    " the common scale. This assumes training to convergence with weight decay, no batch norm, and linearly independent"
    " training samples."
  ),
  "levels": (
    "By 8-bit levels: all values of a sample lie on the levels of 8-bit images, many more than the subspace can choose."
    " This assumes values of that many levels."
  ),
  "range": (
    "By the range of values: a sample is a well-conditioned vertex of the subspace intersected with the range. This"
    " assumes values that reach the ends of their range, and a subspace that tells a sample from a brighter one."
  ),
}
ASSUMED_BY_ALL = (
  "All assume that the subspace is that of the training data, and that the explanation is unique: samples that account"
  " for one another, or combine to others that would pass as well, are not certified."
)

_FOUND = {"leak": "found", "member": "found", "class": "not found", "none": "not found"}


class Verdict(NamedTuple):
  """An answer.

  Attributes:
    level: ``"leak"``: training samples are reconstructed; ``"member"``: membership of given samples can be inferred;
      ``"class"``: no more than the class-level baseline explains; ``"none"``: no evidence; ``"open"``: not attempted,
      or undecided.
    answer: in one sentence.
    reasons: the sentences after it.
  """

  level: str
  answer: str
  reasons: Sequence[str]

  def __str__(self) -> str:
    """Both."""
    return " ".join([self.answer, *self.reasons])


def state(answer: Verdict | None, *, applicable: bool = True) -> str:
  """What became of a question: found, not found, not applicable (no theory covers the weights), or not evaluable."""
  if answer is None or answer.level == "open":
    return "not evaluable" if applicable else "not applicable"
  return _FOUND[answer.level]


def of_scores(scored: Scored, criteria: AuditCriteria = _DEFAULT) -> Verdict:
  """The answer on membership inference, by scores of single samples (`kkt_jax.auditing.membership.score`)."""
  best, naive = scored.curves[scored.best], scored.curves["loss"]
  counted = (
    f"{best.points[0].members or 'None'} of {scored.members} members score above all {scored.others} non-members by"
    f" {SCORES[scored.best]} (AUC {best.auc:.3f}, 95 %: {best.low:.3f} to {best.high:.3f})"
  )
  if scored.best != "loss":
    counted += f", and {naive.points[0].members} by their loss, the baseline (AUC {naive.auc:.3f})"
  if scored.p_value < criteria.significant:
    answer = "Membership can be inferred: members and non-members are distinguishable."
    return Verdict("member", answer, [f"{counted}; {with_p(scored.p_value)}."])
  answer = "No evidence that membership can be inferred from these scores."
  return Verdict("none", answer, [f"{counted}; chance explains that ({with_p(scored.p_value)})."])


def with_scores(verdict: Verdict, scored: Scored | None, criteria: AuditCriteria = _DEFAULT) -> Verdict:
  """The verdict on reconstruction, with the answer on membership inference, if there are any scores."""
  if scored is None:
    return verdict
  answer = of_scores(scored, criteria)
  if answer.level == "member" and verdict.level != "leak":
    return Verdict("member", answer.answer, [*answer.reasons, f"Reconstruction: {verdict.answer}", *verdict.reasons])
  return verdict._replace(reasons=[*verdict.reasons, answer.answer, *answer.reasons])


def with_doubts(verdict: Verdict, doubts: Sequence[str]) -> Verdict:
  """The verdict, open instead of "no evidence" if the description of the classifier or its data is in doubt."""
  if not doubts or verdict.level not in ("none", "open"):
    return verdict
  said = [reason for reason in verdict.reasons if reason not in doubts]
  return Verdict("open", "No verdict: the classifier may not be what its description says.", [*doubts, *said])


def with_limits(verdict: Verdict, remarks: Sequence[str], *, certified: bool = False) -> Verdict:
  """The verdict, of which only certificates stand if the data are distinguishable without the weights."""
  confounded = [remark for remark in remarks if isinstance(remark, Confounded)]
  if not confounded or verdict.level not in ("leak", "member", "class"):
    return verdict
  if certified:
    return verdict._replace(reasons=[*confounded, *(reason for reason in verdict.reasons if reason not in confounded)])
  said = [reason for reason in verdict.reasons if reason not in confounded]
  answer = "No verdict: the held-out data are distinguishable from the training data without the weights."
  return Verdict("open", answer, [*confounded, f"Without this limit the verdict would be: {verdict.answer}", *said])


def of_risks(risks: Sequence[Risk], what: str, criteria: AuditCriteria = _DEFAULT) -> str:
  """How many samples, called ``what``, can be named as members at the false-discovery rate of the criteria."""
  rate = criteria.false_discovery_rate
  inferred = sum(risk.q_value <= rate for risk in risks)
  said = (
    f"{inferred or 'None'} of the {len(risks)} {what} can be named as members at a false-discovery rate of {rate:.0%}"
  )
  return f"{said}." if inferred else f"{said}, which is no all-clear: few held-out samples allow few discoveries."


def refusal(bound: float) -> Verdict:
  """The verdict if no generator was trained, because the weights are too far from all conditions."""
  return Verdict(
    "open",
    "The theory of this audit does not cover these weights: reconstruction was not attempted, and nothing follows for"
    " whether another attack would succeed.",
    [
      f"At least {bound:.0%} of the stationarity target is unreachable by any training set: these weights are not at a"
      " KKT point, which training to convergence by gradient descent reaches, with weight decay or from a small"
      " initialisation.",
      "An adaptive optimizer, early stopping, and a large initialisation without weight decay are the usual reasons.",
      "It can be attempted nevertheless (force).",
    ],
  )


def disobedience(residuals: Residuals) -> Verdict:
  """The verdict if no generator was trained, because not even the training data explain the weights."""
  return Verdict(
    "open",
    "These weights do not satisfy the stationarity conditions: reconstruction was not attempted, and nothing follows"
    " for whether another attack would succeed.",
    [
      f"Even with the given training data the conditions leave {residuals.own:.0%} of the weights unexplained"
      f" ({residuals.what}: {residuals.other:.0%}).",
      "Adam and other adaptive optimizers, early stopping, another form of the conditions (form), and incomplete"
      " training data are the usual reasons.",
      "It can be attempted nevertheless (force).",
    ],
  )


def of(
  own: Trial | None,
  controls: Mapping[str, Trial],
  certified: Mapping[str, int],
  false: int | None = None,
  remarks: Sequence[str] = (),
  criteria: AuditCriteria = _DEFAULT,
) -> Verdict:
  """The answer on reconstruction.

  Args:
    own: the trial of the reconstructed samples; None without data to compare with.
    controls: the trials of the class-level baselines, named for a sentence.
    certified: how many samples the weights certify as training samples, by the evidence (`EVIDENCE`).
    false: how many of these are not among the training data; None if there are none to compare with.
    remarks: what limits the trial.
    criteria: what counts as evidence.

  Returns:
    The verdict.

  >>> scores = lambda hits: Trial(np.zeros(100, int), np.arange(100.0, 0, -1) - 100 + hits, np.zeros((100, 5)), 1.0,
  ...                             np.arange(100))
  >>> import textwrap
  >>> print(textwrap.fill(str(of(scores(52), {"class means": scores(20)}, {})), 100))
  These weights reveal individual training samples. Of 100 members, 52 (95 %: 42 to 62) were
  identified among 6 real samples of their class each, as the one nearest to a reconstructed sample;
  by chance 17. 52 of them came nearer than all 500 non-members. The probability of that by chance is
  below one in a billion. Class-level baselines identify fewer: class means 20. Corrected for
  guessing, 42% of them (95 %: 31% to 54%) are identified.
  """
  count = sum(certified.values())
  reasons, right = [_certificates(certified, false)] if count else [], count - (false or 0)
  reveal = "These weights reveal individual training samples."
  if own is None:
    later = "can be said once training data and at least as many held-out data are given; no new generator is needed."
    if right:
      return Verdict("leak", reveal, [*reasons, f"How many more were reconstructed {later}"])
    answer = "No verdict without data to compare with."
    what = "Whether the reconstructed samples are the training data, or only data of their kind,"
    return Verdict("open", answer, [*reasons, f"{what} {later}"])
  tested, hits, chance = len(own.y), int(own.hits.sum()), own.chance
  interval = stats.binomtest(hits, tested).proportion_ci(method="wilson")
  reasons += [
    f"Of {tested} members, {hits} (95 %: {tested * interval.low:.0f} to {tested * interval.high:.0f}) were identified"
    f" among {1 / chance:.0f} real samples of their class each, as the one nearest to a reconstructed sample; by chance"
    f" {tested * chance:.0f}.",
    f"{own.leading or 'None'} of them came nearer than all {own.others.size} non-members.",
  ]
  odds = "below one in a billion" if own.p_value < 1e-9 else f"about one in {float(f'{1 / own.p_value:.2g}'):,.0f}"
  compared = ", ".join(f"{name} {trial.hits.sum()}" for name, trial in controls.items())
  explained = any(more_hits(own, trial) >= criteria.fewer for trial in controls.values())
  if own.p_value < criteria.significant:
    reasons.append(f"The probability of that by chance is {odds}.")
    if explained and not right and not _copies(own, criteria.equal):
      answer = "The reconstructed samples identify training data, but no more of them than a class-level baseline does."
      reasons.append(
        f"Class-level baselines identify about as many: {compared}. So the weights hold what the training data have in"
        " common; that they hold single samples is not shown, and not excluded."
      )
      return Verdict("class", answer, [*reasons, *remarks])
    if compared and not explained:
      reasons.append(f"Class-level baselines identify fewer: {compared}.")
    share, low, high = (
      max((value - chance) / (1 - chance), 0) for value in (hits / tested, interval.low, interval.high)
    )
    reasons.append(f"Corrected for guessing, {share:.0%} of them (95 %: {low:.0%} to {high:.0%}) are identified.")
    return Verdict("leak", reveal, [*reasons, *remarks])
  if right:
    return Verdict("leak", reveal, [*reasons, "That can be chance; the certificates do not rest on it.", *remarks])
  if 2 * chance**tested >= criteria.significant:
    return Verdict("open", "No verdict from so few data.", [*reasons, *remarks])
  least = int(stats.binom.isf(criteria.significant / 2, tested, chance)) + 1
  reasons.append(
    f"As many or more are identified by chance with probability {own.p_value:.2g}; {min(least, tested)} would have been"
    " evidence. That does not show that the weights reveal nothing."
  )
  answer = "No evidence that these weights reveal individual training samples by this method."
  return Verdict("none", answer, [*reasons, *remarks])


def more_hits(own: Trial, other: Trial) -> float:
  """The p-value of one trial's hits over another's, by the samples that only one of them identifies (McNemar)."""
  first, second = int(np.sum(own.hits & ~other.hits)), int(np.sum(other.hits & ~own.hits))
  return float(stats.binomtest(first, first + second, alternative="greater").pvalue) if first + second else 1.0


def _copies(own: Trial, equal: float) -> bool:
  """Whether some reconstructed images equal a training image, and none a held-out one."""
  return own.best == 1 and own.others.max() <= equal < own.members.max()


def _certificates(certified: Mapping[str, int], false: int | None) -> str:
  count = sum(certified.values())
  by = ", ".join(f"{number} {EVIDENCE[kind]}" for kind, number in certified.items() if number)
  what = "1 sample as a training sample" if count == 1 else f"{count} samples as training samples"
  said = (
    f"Without any data, the weights certify {what}: {by}. That holds under the assumptions in docs/certificates.md;"
    f" {MEASURED_FALSE}."
  )
  if false is None:
    return said
  said += f" Among the training data that were given: {count - false} of {count}"
  return f"{said}; the others are false, or these are not all training data." if false else f"{said}."
