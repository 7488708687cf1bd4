"""The answer of an audit in plain words. It never says more than was measured, and no verdict is an all-clear."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from kkt_jax.auditing.description import Residuals
from kkt_jax.auditing.matching import EXACT
from kkt_jax.auditing.membership import Confounded, Scored, SCORES, SIGNIFICANT, Told
from kkt_jax.metrics import Trial

_MORE = 0.05  # p-value below which one thing picks out more than another
MEASURED_FALSE = "none was false in 39 searches of thirteen kinds of data"
EVIDENCE = {"equations": "by the equations", "levels": "by whole levels", "range": "by the range of values"}
ASSUMED = {  # in the words of `kkt_jax.extraction.certificates`
  "equations": (
    "By the equations: a sample's own signal stands in the weights, at its scale. This assumes training to convergence"
    " with weight decay, no batch norm, and training samples that do not depend on one another."
  ),
  "levels": (
    "By whole levels: all values of a sample lie on the levels of 8-bit images, many more than the subspace can choose."
    " This assumes values of that many levels."
  ),
  "range": (
    "By the range of values: a sample is a firm vertex of the subspace cut with the range. This assumes values that"
    " reach the ends of their range, and a subspace that tells a sample from a brighter one."
  ),
}
ASSUMED_BY_ALL = (
  "All assume a subspace that is that of the training data, and one explanation only: samples that account for one"
  " another, or that can be put together to others which would pass as well, are not certified."
)


class Verdict(NamedTuple):
  """An answer.

  Attributes:
    level: ``"leak"``: single samples come out; ``"member"``: given ones are told; ``"class"``: no more than likeness of
      the class; ``"none"``: no evidence; ``"open"``: not tried, or not told.
    answer: in one sentence.
    reasons: the sentences after it.
  """

  level: str
  answer: str
  reasons: Sequence[str]

  def __str__(self) -> str:
    """Both."""
    return " ".join([self.answer, *self.reasons])


def with_scores(verdict: Verdict, scored: Scored | None) -> Verdict:
  """The verdict, with what scores of single samples tell (`kkt_jax.auditing.membership.score`), if there are any."""
  if scored is None:
    return verdict
  own, naive = scored.curves[scored.best], scored.curves["loss"]
  point, answer = own.points[0], "These weights tell whether a given sample was among their training data."
  counted = (
    f"{point.members or 'None'} of {scored.members} training samples score above all {scored.others} others by"
    f" {SCORES[scored.best]} (AUC {own.auc:.3f}, 95 %: {own.low:.3f} to {own.high:.3f})"
  )
  if scored.best != "loss":
    counted += f", and {naive.points[0].members} by their loss, which needs no theory (AUC {naive.auc:.3f})"
  if scored.p_value >= SIGNIFICANT:
    said = f"Nor is a given sample told by any score of single samples: {counted[0].lower() + counted[1:]}."
    return verdict._replace(reasons=[*verdict.reasons, said])
  if verdict.level == "leak":
    return verdict._replace(reasons=[*verdict.reasons, f"Given a sample, its score tells, too: {counted}."])
  return Verdict(
    "member", answer, [f"{counted}.", "What can be rebuilt is another question.", verdict.answer, *verdict.reasons]
  )


def with_doubts(verdict: Verdict, doubts: Sequence[str]) -> Verdict:
  """The verdict, in which nothing found is no answer if the description of the classifier or its data is in doubt."""
  if not doubts or verdict.level not in ("none", "open"):
    return verdict
  said = [own for own in verdict.reasons if own not in doubts]
  return Verdict("open", "No verdict: the classifier may not be what its description says.", [*doubts, *said])


def with_limits(verdict: Verdict, remarks: Sequence[str], *, certified: bool = False) -> Verdict:
  """The verdict, which accuses of nothing but what is certified if the data differ without the weights, too."""
  confounded = [own for own in remarks if isinstance(own, Confounded)]
  if not confounded or verdict.level not in ("leak", "member", "class"):
    return verdict
  if certified:
    return verdict._replace(reasons=[*confounded, *(own for own in verdict.reasons if own not in confounded)])
  said = [own for own in verdict.reasons if own not in confounded]
  answer = "No verdict: the held-out data differ from the training data without the weights, too."
  return Verdict("open", answer, [*confounded, f"What would be said otherwise: {verdict.answer}", *said])


def of_candidates(told: Told) -> str:
  """What scores say of samples that were asked about."""
  return (
    f"Of the {told.asked} samples that were asked about, {len(told.marks)} score above all {told.others} held-out ones;"
    f" if none had been trained on, about {told.by_chance:.2g} would."
  )


def refusal(bound: float) -> Verdict:
  """If no generator was trained, for the weights are too far from all conditions."""
  return Verdict(
    "open",
    "The theory of this audit does not cover these weights, so no sample was rebuilt, and nothing follows for whether"
    " others could.",
    [
      f"No data can account for {bound:.0%} of what they would have to be made of: they were not trained to convergence"
      " by gradient descent, with weight decay or from a small initialisation.",
      "An adaptive optimizer, early stopping, and a large initialisation without weight decay are the usual reasons.",
      "It can be forced to try nevertheless.",
    ],
  )


def disobedience(residuals: Residuals) -> Verdict:
  """If no generator was trained, for not even their own training data explain the weights."""
  return Verdict(
    "open",
    "These weights do not obey the equations of this audit, so no sample was rebuilt, and nothing follows for whether"
    " others could.",
    [
      f"Even with the training data that were given, {residuals.own:.0%} of what the equations ask for is missing"
      f" ({residuals.what}: {residuals.other:.0%}).",
      "Adam and other adaptive optimizers, early stopping, another form than was examined (form), and training data"
      " that are not all of them are the usual reasons.",
      "It can be forced to try nevertheless.",
    ],
  )


def of(
  own: Trial | None,
  controls: Mapping[str, Trial],
  certified: Mapping[str, int],
  false: int | None = None,
  remarks: Sequence[str] = (),
) -> Verdict:
  """The verdict on what came out.

  Args:
    own: the trial of what was generated; None without data to compare with.
    controls: the trials of samples that know classes only, named for a sentence.
    certified: how many samples the weights certify as training samples, by the evidence (`EVIDENCE`).
    false: how many of these are not among the training data; None if there are none to compare with.
    remarks: what limits the trial.

  Returns:
    The verdict.

  >>> scores = lambda hits: Trial(np.zeros(100, int), np.arange(100.0, 0, -1) - 100 + hits, np.zeros((100, 5)), 1.0,
  ...                             np.arange(100))
  >>> import textwrap
  >>> print(textwrap.fill(str(of(scores(52), {"class means": scores(20)}, {})), 100))
  These weights reveal individual training samples. Of 100 training samples, 52 (95 %: 42 to 62) could
  be picked out from 6 real samples of their class each, because what was generated comes nearest to
  them; by chance 17. 52 of them came nearer than all 500 others. The odds of that by luck are below
  one in a billion. Likeness of the class alone picks out fewer: class means 20. Corrected for
  guessing, 42% of them (95 %: 31% to 54%) are recognised.
  """
  count = sum(certified.values())
  reasons, right = [_certificates(certified, false)] if count else [], count - (false or 0)
  reveal = "These weights reveal individual training samples."
  if own is None:
    later = "can be said with training data and at least as many held-out data, which need no new generator."
    if right:
      return Verdict("leak", reveal, [*reasons, f"How many others {later}"])
    answer = "No verdict without data to compare with."
    what = "Whether what came out is the training data, or only data of their kind,"
    return Verdict("open", answer, [*reasons, f"{what} {later}"])
  tested, hits, chance = len(own.y), int(own.hits.sum()), own.chance
  interval = stats.binomtest(hits, tested).proportion_ci(method="wilson")
  reasons += [
    f"Of {tested} training samples, {hits} (95 %: {tested * interval.low:.0f} to {tested * interval.high:.0f}) could be"
    f" picked out from {1 / chance:.0f} real samples of their class each, because what was generated comes nearest to"
    f" them; by chance {tested * chance:.0f}.",
    f"{own.leading or 'None'} of them came nearer than all {own.others.size} others.",
  ]
  odds = "below one in a billion" if own.p_value < 1e-9 else f"about one in {float(f'{1 / own.p_value:.2g}'):,.0f}"
  compared = ", ".join(f"{name} {trial.hits.sum()}" for name, trial in controls.items())
  explained = any(more_hits(own, trial) >= _MORE for trial in controls.values())
  if own.p_value < SIGNIFICANT:
    reasons.append(f"The odds of that by luck are {odds}.")
    if explained and not right and not _copies(own):
      answer = (
        "What came out resembles the training data more than other data do, but no more than likeness of the class"
        " explains."
      )
      reasons.append(
        f"Likeness of the class alone picks out about as many: {compared}. So the weights know what their training data"
        " have in common; that they hold single samples is not shown, and not excluded."
      )
      return Verdict("class", answer, [*reasons, *remarks])
    if compared and not explained:
      reasons.append(f"Likeness of the class alone picks out fewer: {compared}.")
    share, low, high = (
      max((value - chance) / (1 - chance), 0) for value in (hits / tested, interval.low, interval.high)
    )
    reasons.append(f"Corrected for guessing, {share:.0%} of them (95 %: {low:.0%} to {high:.0%}) are recognised.")
    return Verdict("leak", reveal, [*reasons, *remarks])
  if right:
    return Verdict("leak", reveal, [*reasons, "That can be luck; the certificates do not rest on it.", *remarks])
  if 2 * chance**tested >= SIGNIFICANT:
    return Verdict("open", "No verdict from so few data.", [*reasons, *remarks])
  least = int(stats.binom.isf(SIGNIFICANT / 2, tested, chance)) + 1
  reasons.append(
    f"As many or more are picked out by luck with probability {own.p_value:.2g}; {min(least, tested)} would have been"
    " evidence. That does not show that they reveal none."
  )
  answer = "No evidence that these weights reveal individual training samples by this method."
  return Verdict("none", answer, [*reasons, *remarks])


def more_hits(own: Trial, other: Trial) -> float:
  """The odds that of the samples that one of two picks out alone, so many would be the first's by luck (McNemar)."""
  first, second = int(np.sum(own.hits & ~other.hits)), int(np.sum(other.hits & ~own.hits))
  return float(stats.binomtest(first, first + second, alternative="greater").pvalue) if first + second else 1.0


def _copies(own: Trial) -> bool:
  """Whether images came out that are a training image each, and none that is another real one."""
  return own.best == 1 and own.others.max() <= EXACT < own.members.max()


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
