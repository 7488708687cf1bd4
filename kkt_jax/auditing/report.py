"""The result of an audit, in words, as JSON, as a page."""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import datetime
import functools
import io
import json
import pathlib
import platform
import textwrap
from typing import Any, NamedTuple

import jax
import numpy as np

import kkt_jax
from kkt_jax import metrics
from kkt_jax.analysis.examination import Examination
from kkt_jax.auditing import matching, pages, pictures, verdict
from kkt_jax.auditing.description import Fit, Residuals
from kkt_jax.auditing.membership import Confounded, Risk, Scored, SCORES
from kkt_jax.auditing.samples import Samples
from kkt_jax.auditing.verdict import Verdict
from kkt_jax.criteria import AuditCriteria
from kkt_jax.extraction.certificates import EVIDENCE
from kkt_jax.metrics import Trial
from kkt_jax.reconstruction.result import Reconstruction

#: Controls of the reconstructed samples, which know classes only, by their names in `AuditReport.trials`.
CONTROLS = {
  "class_likeness": "samples trained for classification only",
  "own_means": "class means of the reconstructed samples",
}
#: What is measured of samples (`AuditReport.measured`), and what they are.
ROWS = {
  "generated": "reconstructed samples",
  "class_likeness": "class-level baseline",
  "real_held_out": "held-out data",
  "training_data": "training data",
  "class_means": "class means of the training data",
  "dataset_mean": "mean of the training data",
  "uniform_noise": "uniform noise",
}
_WORST = 12  # leaks on the terminal


class Leak(NamedTuple):
  """A training sample that was reconstructed well enough to be recognised.

  Attributes:
    name: its file, or its place from 0.
    label: of its class.
    how: "certified" or "identified" (among real samples of its class).
    ratio: how much farther away than this sample the nearest of its group is; infinite for an equal one.
    pictures: PNG: the sample, the reconstructed one, and the held-out image nearest to that; or none.
  """

  name: str
  label: int
  how: str
  ratio: float | None
  pictures: Sequence[bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditReport:
  """What the weights of a classifier reveal of its training data.

  Attributes:
    verdict: in words.
    answers: the verdict's two parts: ``"Reconstruction"``, and ``"Membership inference"`` if there are scores.
    examination: what the weights reveal without any data. It and all samples here have classes from 0 for labels.
    labels: the classifier's own, which stand for these classes in `leaks`, `scored`, `candidates` and `by_class`.
    reconstruction: the trained generator; None if the weights are too far from all conditions, or do not satisfy them
      with their own data.
    generated: all that it can draw, in [0, 1].
    train: the training data, if they were given.
    remarks: what limits the comparison.
    fit: accuracy and loss of the classifier on the data, if any were given.
    residuals: what the conditions leave with the training data, if these were given and the weights are not too far.
    trials: identification by the reconstructed samples and by their controls (`CONTROLS`), if data were given.
    leaks: the training samples that were certified or identified, the surest first.
    scored: membership inference by scores of single samples, if data were given.
    candidates: how far each candidate stands out by the same scores, the surest first, if there are any.
    certified: how many samples are certified, by the evidence.
    compared: these against the training data, for each classifier; see `kkt_jax.auditing.matching.exactness`.
    measured: what the classifier and its conditions say of samples and of their controls (`ROWS`).
    criteria: by what the audit decided.
    identity: what was audited, and how: SHA-256 of weights, data and settings, and the version of this program.
  """

  verdict: Verdict
  answers: Mapping[str, Verdict] = dataclasses.field(default_factory=dict)
  examination: Examination
  labels: Sequence[int]
  reconstruction: Reconstruction | None = None
  generated: Samples | None = None
  train: Samples | None = None
  remarks: Sequence[str] = ()
  fit: Fit | None = None
  residuals: Residuals | None = None
  trials: Mapping[str, Trial] = dataclasses.field(default_factory=dict)
  leaks: Sequence[Leak] = ()
  scored: Scored | None = None
  candidates: Sequence[Risk] | None = None
  certified: Mapping[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(EVIDENCE, 0))
  compared: Sequence[Mapping[str, int]] = ()
  measured: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
  criteria: AuditCriteria = AuditCriteria()
  identity: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def states(self) -> dict[str, tuple[str, Verdict | None]]:
    """For each question what became of it (`kkt_jax.auditing.verdict.state`), and the answer if there is one."""
    rebuilt, inferred = self.answers.get("Reconstruction", self.verdict), self.answers.get("Membership inference")
    return {
      "Reconstruction": (verdict.state(rebuilt, applicable=self.reconstruction is not None), rebuilt),
      "Membership inference": (verdict.state(inferred), inferred),
    }

  @functools.cached_property
  def by_class(self) -> list[dict[str, int]]:
    """For each class, how many members were tested and identified, and how many were scored and named."""
    trial, named = self.trials.get("generated"), set(self.at_risk)
    risks = () if self.scored is None else self.scored.risks
    return [
      {
        "class": label,
        "tested": 0 if trial is None else int(np.sum(trial.y == place)),
        "identified": 0 if trial is None else int(np.sum(trial.hits[trial.y == place])),
        "scored": sum(risk.label == label for risk in risks),
        "named": sum(risk.label == label and risk in named for risk in risks),
      }
      for place, label in enumerate(self.labels)
    ]

  @property
  def members(self) -> list[str]:
    """Names of inferred members: certified or identified training samples, and samples named by their scores.

    Scores name training samples and candidates so that the false-discovery rate is at most
    `AuditCriteria.false_discovery_rate`.
    """
    shown = [leak.name for leak in self.leaks] if self.verdict.level == "leak" else []
    return list(dict.fromkeys([*shown, *(risk.name for risk in self.at_risk)]))

  @property
  def confounded(self) -> bool:
    """Whether the held-out data can be distinguished from the training data without the weights."""
    return any(isinstance(remark, Confounded) for remark in self.remarks)

  @property
  def at_risk(self) -> list[Risk]:
    """Training samples and candidates that are named as members by their scores, each kind with the surest first.

    An empty list if the data are `confounded`.
    """
    if self.confounded:
      return []
    every = [*(() if self.scored is None else self.scored.risks), *(self.candidates or ())]
    return [risk for risk in every if risk.q_value <= self.criteria.false_discovery_rate]

  def __str__(self) -> str:
    """The verdict, the worst cases, and a table of metrics, for a terminal."""
    text = textwrap.fill(str(self.verdict), 100)
    if self.verdict.level == "leak" and self.leaks:
      worst = ", ".join(leak.name for leak in self.leaks[:_WORST])
      text += f"\n\nThe worst of {len(self.leaks)} cases: {worst}"
    if self.at_risk:
      surest = ", ".join(risk.name for risk in self.at_risk[:_WORST])
      text += f"\n\nThe surest of {len(self.at_risk)} named as members by their scores: {surest}"
    if self.measured:
      shown = ["agreement", "residual", *(["likeness"] if self.train is not None else [])]
      text += "\n\n" + matching.table({ROWS[name]: row for name, row in self.measured.items()}, shown)
    return text

  def to_dict(self) -> dict[str, Any]:
    """All figures, of types that JSON has."""
    return {
      "verdict": str(self.verdict),
      "level": self.verdict.level,
      "answers": {name: answer._asdict() for name, answer in self.answers.items()},
      "states": {name: state for name, (state, _) in self.states.items()},
      "identity": dict(self.identity),
      "fit": {} if self.fit is None else {"guessing": self.fit.guessing, **self.fit.known},
      "form": self.examination.form,
      "bounds": dict(self.examination.bounds),
      "residuals": None if self.residuals is None else self.residuals._asdict(),
      **self.measured,
      "against_data": self._against,
      "leaks": [dict(list(leak._asdict().items())[:-1]) for leak in self.leaks],
      "scores": {} if self.scored is None else {name: _plain(curve) for name, curve in self.scored.curves.items()},
      "scores_p_value": None if self.scored is None else self.scored.p_value,
      "epsilon_lower_bound": None if self.scored is None else self.scored.epsilon,
      "by_class": self.by_class,
      "training_samples": [risk._asdict() for risk in (self.scored.risks if self.scored else ())],
      "candidates": None if self.candidates is None else [risk._asdict() for risk in self.candidates],
      "certified": dict(self.certified),
      "certificates": list(self.compared),
      "criteria": [
        dataclasses.asdict(exact.criteria) for exact in (self.reconstruction.exact if self.reconstruction else ())
      ],
      "analysis_criteria": dataclasses.asdict(self.examination.criteria),
      "audit_criteria": dataclasses.asdict(self.criteria),
    }

  def to_json(self) -> str:
    """All figures as JSON."""
    return json.dumps(self.to_dict(), indent=2) + "\n"

  def to_csv(self) -> str:
    """A line for each training sample and candidate that was scored, the surest first; see `Risk`."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(["given_as", *Risk._fields, "named_as_member"])
    named = set(self.at_risk)
    for given_as, risks in (
      ("training sample", self.scored.risks if self.scored else ()),
      ("candidate", self.candidates),
    ):
      writer.writerows([given_as, *risk, risk in named] for risk in risks or ())
    return content.getvalue()

  @functools.cached_property
  def pictures(self) -> dict[str, tuple[str, bytes]]:
    """Captions and PNG files by file name, the first that which says most; none if samples are no images."""
    drawn: dict[str, tuple[str, bytes]] = {}
    if self.generated is None or not _are_images(self.generated):
      return drawn
    if self.train is not None and matching.comparable(self.generated):
      columns = max(pictures.COLUMNS // len(np.unique(self.generated.y)), 1)
      caption = "Reconstructed samples in odd rows, the most similar training image below each."
      drawn["pairs.png"] = (caption, matching.similar_pairs(self.generated, self.train, columns=columns))
    drawn["samples.png"] = (
      "Reconstructed samples, a row for each class, unselected.",
      rows_of_classes(self.generated, self.labels),
    )
    if self.reconstruction is not None and any(self.certified.values()):
      exact = self.reconstruction.exact[0]
      caption = "Samples that the weights alone certify as training samples, a row for each class."
      drawn["certified.png"] = (caption, rows_of_classes(Samples(exact.unit, exact.y), self.labels))
    return drawn

  def to_html(self, settings: Mapping[str, Any] | None = None, made: Mapping[str, str] | None = None) -> str:
    """One page with everything in it.

    Args:
      settings: of the run, shown as a table.
      made: how the report was made, by whatever name, beside date, program and machine.
    """
    return pages.render(
      pathlib.Path(__file__).with_name("page.html.j2"),
      title="What these weights reveal of their training data",
      report=self,
      against=self._against,
      score_names=SCORES,
      curves=self._curves,
      thumbnails=self._thumbnails,
      images=self.train is not None and _are_images(self.train),
      assumed=[verdict.ASSUMED[kind] for kind, count in self.certified.items() if count],
      assumed_by_all=verdict.ASSUMED_BY_ALL,
      measured_false=verdict.MEASURED_FALSE,
      findings=[
        *([] if self.fit is None else [f"{self.fit}."]),
        *str(self.examination).splitlines(),
        *([] if self.residuals is None else [str(self.residuals)]),
      ],
      pictures=dict(self.pictures.values()),
      rows={ROWS[name]: row for name, row in self.measured.items()},
      settings={} if settings is None else settings,
      made={
        "Date": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        "Program": f"kkt_jax {kkt_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}",
        "Machine": f"{platform.system()} {platform.machine()}, {jax.devices()[0].device_kind}",
        **({} if made is None else made),
        **self.identity,
      },
    )

  def save(
    self, folder: str | pathlib.Path, settings: Mapping[str, Any] | None = None, made: Mapping[str, str] | None = None
  ) -> list[str]:
    """Writes ``report.html``, ``report.json`` and the pictures, with scores ``members.csv``; returns their names."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"report.html": self.to_html(settings, made).encode(), "report.json": self.to_json().encode()}
    if self.scored or self.candidates:
      files["members.csv"] = self.to_csv().encode()
    if self._curves:
      files["scores.png"] = self._curves
    files |= {name: content for name, (_, content) in self.pictures.items()}
    for name, content in files.items():
      (folder / name).write_bytes(content)
    return list(files)

  @functools.cached_property
  def _curves(self) -> bytes | None:
    """PNG of the best score beside the loss, if there are scores."""
    if self.scored is None:
      return None
    return pictures.scores({SCORES[name]: self.scored.values[name] for name in (self.scored.best, "loss")})

  @property
  def _thumbnails(self) -> dict[str, bytes]:
    """PNG of the first training samples at risk, by name, if they are images."""
    if self.train is None or not _are_images(self.train):
      return {}
    places = {name: place for place, name in enumerate(self.train.names)}
    first = [risk.name for risk in self.at_risk if risk.name in places][: 2 * _WORST]
    return {name: pictures.png(self.train.x[places[name]]) for name in first}

  @functools.cached_property
  def _against(self) -> dict[str, Any]:
    """Identification in numbers, with its controls."""
    if "generated" not in self.trials:
      return {}
    reconstructed = self.trials["generated"]
    shuffled = reconstructed.shuffled()
    return {
      "hits": int(reconstructed.hits.sum()),
      "tested": len(reconstructed.y),
      "chance": reconstructed.chance,
      "leading": reconstructed.leading,
      "others": reconstructed.others.size,
      "p_value": reconstructed.p_value,
      "shuffled_mean": float(shuffled.mean()),
      "shuffled_most": int(shuffled.max()),
      **{f"{name}_hits": int(trial.hits.sum()) for name, trial in self.trials.items() if name != "generated"},
      "p_values_over_controls": {
        name: verdict.more_hits(reconstructed, trial) for name, trial in self.trials.items() if name in CONTROLS
      },
      "roc": _plain(metrics.roc(reconstructed.members, reconstructed.others.ravel())),
    }


def rows_of_classes(samples: Samples, labels: Sequence[int]) -> bytes:
  """PNG of the first images of every class, a row each, with the labels that stand for the classes."""
  classes = np.unique(samples.y)[: pictures.COLUMNS]
  rows = [(f"class {labels[k]}", samples.x[samples.y == k][: pictures.COLUMNS]) for k in classes]
  return pictures.image_rows(rows)


def _are_images(samples: Samples) -> bool:
  return samples.x.ndim == 4 and samples.x.shape[3] in (1, 3)


def _plain(curve: metrics.Roc) -> dict[str, Any]:
  return curve._asdict() | {"points": [point._asdict() for point in curve.points]}
