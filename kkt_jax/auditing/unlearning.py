"""Were samples forgotten? A classifier before and after their removal, and what the difference of the two reveals."""

import dataclasses
import json
import pathlib
import textwrap
from typing import Any

import numpy as np

from kkt_jax import _checks
from kkt_jax._errors import InputError
from kkt_jax.analysis.examination import examine
from kkt_jax.auditing import data, membership, sources
from kkt_jax.auditing.membership import Scored, SCORES
from kkt_jax.auditing.samples import Given, given_samples, Samples
from kkt_jax.auditing.verdict import Verdict
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AuditCriteria
from kkt_jax.membership import candidates

_NO_CLEARANCE = "That is no all-clear: another attack may succeed."


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearningReport:
  """What a classifier holds of samples that were removed from it.

  Attributes:
    remains: whether they are still in the weights: ``"member"`` if so, ``"none"`` if they were found before and are
      not found after, ``"open"`` if they were not found before, either, so that nothing follows.
    change: whether both sets of weights together reveal which samples were removed: ``"member"`` or ``"none"``.
    before: scores of the removed samples in the classifier before, against held-out ones: can the attack see them?
    after: the same in the classifier after.
    retained: the control: samples that were not removed, in the classifier after; None if none were given.
    difference: scores by the change of the weights (`kkt_jax.membership.change_scores`).
    criteria: what counts as evidence.
  """

  remains: Verdict
  change: Verdict
  before: Scored
  after: Scored
  retained: Scored | None
  difference: Scored
  criteria: AuditCriteria

  def __str__(self) -> str:
    """Both answers, for a terminal."""
    return "\n\n".join(textwrap.fill(str(verdict), 100) for verdict in (self.remains, self.change))

  def to_dict(self) -> dict[str, Any]:
    """All figures, of types that JSON has."""
    scored = {"before": self.before, "after": self.after, "retained": self.retained, "difference": self.difference}
    return {
      "remains": self.remains._asdict(),
      "change": self.change._asdict(),
      "criteria": dataclasses.asdict(self.criteria),
      **{
        name: {
          "p_value": scores.p_value,
          "best": scores.best,
          "auc": {score: curve.auc for score, curve in scores.curves.items()},
          "risks": [risk._asdict() for risk in scores.risks],
        }
        for name, scores in scored.items()
        if scores is not None
      },
    }

  def save(self, folder: str | pathlib.Path) -> list[str]:
    """Writes ``unlearning.json``; returns the names of the files."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "unlearning.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
    return ["unlearning.json"]


@_checks.annotated
def audit_unlearning(
  before: Classifier,
  after: Classifier,
  forgotten: Given,
  held_out: Given,
  *,
  retained: Given | None = None,
  criteria: AuditCriteria = AuditCriteria(),  # noqa: B008
) -> UnlearningReport:
  """Whether samples that were to be forgotten are still in the weights, and whether the change gives them away.

  Args:
    before: the classifier that was trained on them.
    after: the same network after they were removed: trained again, fine-tuned, or changed by any unlearning method.
    forgotten: the removed samples: `Samples`, or a pair of ``x`` [N, *input_shape] and integer classes ``y`` [N].
    held_out: non-members: other data of the same source, in neither training set. As many of them take part as have
      the classes of ``forgotten`` in its proportions, for the change tells classes from one another, too. With m of
      them no p-value of a single sample is below 1 / (m + 1).
    retained: samples that stayed in the training set, as a control.
    criteria: what counts as evidence.

  Returns:
    The report.

  Raises:
    InputError: (a `ValueError`) classifiers of two networks or with equal parameters, or data that do not fit.
  """

  def read(name: str, given: Given | None) -> Samples:
    if (samples := given_samples(name, before, given)) is None:
      raise InputError(f"{name} must be given; got None.")
    return data.distinct(name, samples, before)[0]

  asked, source = read("forgotten", forgotten), read("held_out", held_out)
  kept = None if retained is None else read("retained", retained)
  data.check_disjoint("forgotten", asked, source, before)
  others = source.in_proportion("held_out", asked)
  apart = sources.p_value(asked, others, criteria)
  if apart < criteria.significant:
    raise InputError(
      "held_out must be of the source of forgotten; they can be distinguished without any weights"
      f" ({membership.with_p(apart)})."
    )
  x, classes = np.concatenate([asked.x, others.x]), np.concatenate([asked.y, others.y])
  try:
    change = candidates.change_scores(before, after, before.from_unit(x), np.asarray(before.labels)[classes])
    once, now = examine(before), examine(after)
  except ValueError as error:
    raise InputError(str(error)) from error
  count = len(asked.y)
  difference = membership.compared(asked, {name: (values[:count], values[count:]) for name, values in change.items()})
  first, last = (membership.score(examination, asked, others, criteria) for examination in (once, now))
  control = None if kept is None else membership.score(now, kept, source.in_proportion("held_out", kept), criteria)
  named = lambda scored: scored._replace(risks=membership.labelled(scored.risks, before.labels))
  return UnlearningReport(
    remains=_remains(first, last, control, criteria),
    change=_change(difference, criteria),
    before=named(first),
    after=named(last),
    retained=None if control is None else named(control),
    difference=named(difference),
    criteria=criteria,
  )


def _remains(before: Scored, after: Scored, retained: Scored | None, criteria: AuditCriteria) -> Verdict:
  control = "" if retained is None else f" Samples that stayed, for comparison: {membership.with_p(retained.p_value)}."
  known = f"Before, {_counted(before)}; after, {_counted(after)}.{control}"
  if after.p_value < criteria.significant:
    return Verdict("member", "The samples are still in the weights: they were not forgotten.", [known])
  if before.p_value < criteria.significant:
    answer = "No evidence that the samples are still in the weights, in which they were found before."
    return Verdict("none", answer, [known, _NO_CLEARANCE])
  answer = "No verdict on what remains: these scores do not find the samples in the weights before, either."
  return Verdict("open", answer, [known])


def _change(difference: Scored, criteria: AuditCriteria) -> Verdict:
  if difference.p_value < criteria.significant:
    answer = "The change of the weights reveals which samples were removed, to whoever has both."
    return Verdict("member", answer, [f"By the change, {_counted(difference)}."])
  answer = "No evidence that the change of the weights reveals which samples were removed."
  return Verdict("none", answer, [f"By the change, {_counted(difference)}.", _NO_CLEARANCE])


def _counted(scored: Scored) -> str:
  leading = scored.curves[scored.best].points[0].members
  return (
    f"{leading or 'none'} of {scored.members} score above all {scored.others} held-out samples by {SCORES[scored.best]}"
    f" ({membership.with_p(scored.p_value)} over all scores)"
  )
