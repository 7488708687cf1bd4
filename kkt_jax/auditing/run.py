"""The audit: reconstruction and membership inference from a classifier's weights, with controls."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kkt_jax
from kkt_jax import _checks, metrics
from kkt_jax._errors import InputError
from kkt_jax.analysis.examination import Examination, examine
from kkt_jax.analysis.probing import check_outputs
from kkt_jax.auditing import data, description, matching, membership, pictures, verdict
from kkt_jax.auditing.report import AuditReport, CONTROLS, Leak, ROWS
from kkt_jax.auditing.samples import Given, given_samples, Samples
from kkt_jax.checkpoint import fingerprint
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.criteria import AuditCriteria, Criteria
from kkt_jax.extraction.certificates import EVIDENCE
from kkt_jax.generators import table
from kkt_jax.kkt import diagnostics
from kkt_jax.kkt.conditions import Conditions
from kkt_jax.metrics import Trial
from kkt_jax.reconstruction import recipes
from kkt_jax.reconstruction.recipes import Recipe
from kkt_jax.reconstruction.result import Reconstruction
from kkt_jax.reconstruction.stages import reconstruct

_LOG = logging.getLogger(__name__)
_SHOWN = 8  # leaks in pictures
# ``(name, examination, recipe, seed) -> reconstruction``; the name is "generator" or "class_likeness".
TrainFn = Callable[[str, Examination, Recipe, int], Reconstruction]


def _train(name: str, examination: Examination, recipe: Recipe, seed: int) -> Reconstruction:
  return reconstruct([examination.classifier], recipe, seed=seed, examinations=[examination])


@dataclasses.dataclass(frozen=True)
class AuditConfig:
  """How an audit is done.

  Attributes:
    form: which conditions the weights obey; see `kkt_jax.examine`.
    recipe: from an examination to how the generator is trained; `kkt_jax.reconstruction.recipes.default` if None.
    force: go on even if the classifier does not know its training data, cannot have started from its initial
      parameters, or if its weights are too far from all conditions, or do not obey them with these data.
    train: trains a generator; it can keep checkpoints and show progress. `kkt_jax.reconstruct` by default.
    criteria: what counts as evidence, and when the description of the classifier is refused or doubted.
  """

  form: str | None = None
  recipe: Callable[[Examination], Recipe] | None = None
  force: bool = False
  train: TrainFn = _train
  criteria: AuditCriteria = AuditCriteria()


@_checks.annotated
def audit(
  classifier: Classifier,
  train: Given | None = None,
  held_out: Given | None = None,
  *,
  candidates: Given | None = None,
  config: AuditConfig = AuditConfig(),  # noqa: B008
  seed: int = 0,
) -> AuditReport:
  """What the weights of a classifier reveal of its training data: a verdict with its evidence.

  The weights are examined: which conditions they satisfy, and how far they are from every KKT point. Then a generator
  is trained so that its samples satisfy the conditions (reconstruction). With training data and held-out data, which
  the generator never sees, the report says how many training samples were reconstructed, and whether membership can be
  inferred by scores of single samples. Progress is logged (`logging`, logger ``kkt_jax``).

  Args:
    classifier: the classifier.
    train: its training data: `Samples`, or a pair of ``x`` [N, *input_shape], bytes or in the classifier's units, and
      its labels ``y`` [N], integers from 0 unless it has others.
    held_out: non-members: other data of the same source, none of them in the training data.
    candidates: samples whose membership is to be inferred: `Samples` or ``x``; needs ``held_out``.
    config: how it is done.
    seed: of everything random.

  Returns:
    The report.

  Raises:
    InputError: (a `ValueError`) data that do not fit the classifier or one another, or a classifier that does not know
      its training data as it is described, unless ``config.force``.
  """
  try:
    check_outputs(classifier, seed=seed)
  except ValueError as error:
    raise InputError(str(error)) from error
  if candidates is not None and held_out is None:
    raise InputError("candidates needs held_out: a score means nothing without those of non-members.")
  given = data.compared(
    classifier,
    given_samples("train", classifier, train),
    given_samples("held_out", classifier, held_out),
    alone=candidates is not None,
    criteria=config.criteria,
  )
  asked, criteria, labels = given_samples("candidates", classifier, candidates), config.criteria, classifier.labels
  classifier = dataclasses.replace(classifier, labels=tuple(range(classifier.num_classes)))  # as those of samples are
  fit = _fit(classifier, given.train, given.held_out, config)
  remarks = [*(fit.doubts if fit is not None else ()), *given.remarks]
  for remark in remarks:
    _LOG.info("%s", remark)
  _LOG.info("examining the weights")
  try:
    examination = examine(classifier, form=config.form, seed=seed)
  except ValueError as error:
    raise InputError(str(error)) from error
  recipe = recipes.default([examination]) if config.recipe is None else config.recipe(examination)
  _LOG.info("%s", examination)
  obeyed, residuals = examination.explained, None
  if obeyed and given.train is not None:
    residuals = description.residuals(examination, given.train, given.held_out, criteria)
  if residuals is not None:
    _LOG.info("%s", residuals)
    obeyed = not residuals.disobey
  reconstruction = likeness = None
  if config.force or obeyed:
    reconstruction = config.train("generator", examination, recipe, seed + 1)
    if given.train is not None and given.held_out is not None:
      _LOG.info("training the class-level baseline: samples for classification only")
      likeness = config.train("class_likeness", examination, _class_likeness(recipe, reconstruction), seed + 2)
  scored = asked_about = None
  if given.held_out is not None:
    _LOG.info("scoring single samples for membership inference")
    scored = None if given.train is None else membership.score(examination, given.train, given.held_out, criteria)
    asked_about = None if asked is None else membership.suspects(examination, asked, given.held_out, criteria)
  sets = {"training data": given.train, "held-out data": given.held_out, "candidates": asked}
  report = AuditReport(
    verdict=verdict.refusal(examination.bound),
    examination=examination,
    labels=labels,
    reconstruction=reconstruction,
    train=given.train,
    remarks=remarks,
    fit=fit,
    residuals=residuals,
    scored=scored,
    candidates=asked_about,
    criteria=criteria,
    identity=_identity(examination, sets, config.form, config.force, criteria, recipe.schedule.steps, seed),
  )
  return _labelled(_concluded(report, given.held_out, likeness))


def _labelled(report: AuditReport) -> AuditReport:
  """The report with the classifier's own labels of samples in the place of classes."""
  labels, scored, asked = report.labels, report.scored, report.candidates
  return dataclasses.replace(
    report,
    leaks=[leak._replace(label=labels[leak.label]) for leak in report.leaks],
    scored=None if scored is None else scored._replace(risks=membership.labelled(scored.risks, labels)),
    candidates=None if asked is None else membership.labelled(asked, labels),
  )


def _fit(
  classifier: Classifier, train: Samples | None, held_out: Samples | None, config: AuditConfig
) -> description.Fit | None:
  """How the classifier fits its data; raises InputError if, as it is described, it does not know them."""
  wrong_start = description.check_start(classifier, train, config.criteria)
  if wrong_start and not config.force:
    raise InputError(f"initial_params: {wrong_start}")
  fit = description.check(classifier, train, held_out, config.criteria)
  if fit is not None:
    _LOG.info("%s", fit)
    if fit.refusal and not config.force:
      raise InputError(fit.refusal)
  return fit


def _identity(examination: Examination, sets: Mapping[str, Samples | None], *settings: Any) -> dict[str, str]:
  """What decides on the result: SHA-256 of weights, data and settings, and the version of this program."""
  classifier, data_of = examination.classifier, {what: data.digest() for what, data in sets.items() if data is not None}
  decided = {"weights": (classifier.params, classifier.statistics), "settings": (*settings, examination.criteria)}
  digests = data_of | {what: fingerprint(value).hex() for what, value in decided.items()}
  return {f"Identity of {what}": digest for what, digest in digests.items()} | {"Version": kkt_jax.__version__}


def _concluded(report: AuditReport, held_out: Samples | None, likeness: Reconstruction | None) -> AuditReport:
  """The report with the reconstructed samples, the data and the controls compared, and the verdict."""
  reconstruction, train, certified_rightly = report.reconstruction, report.train, False
  if reconstruction is None and report.residuals is not None and report.residuals.disobey:
    report = dataclasses.replace(report, verdict=verdict.disobedience(report.residuals))
  elif reconstruction is not None:
    sets = {"generated": generated(reconstruction)}
    if likeness is not None:
      sets["class_likeness"] = generated(likeness)
    counts = {kind: sum(exact.counts[kind] for exact in reconstruction.exact) for kind in EVIDENCE}
    false: int | None = None
    compared: list[dict[str, int]] = []
    trials: dict[str, Trial] = {}
    leaks: Sequence[Leak] = []
    if train is not None:
      compared, certified = matching.exactness(reconstruction, train)
      false = sum(row["false"] for row in compared)
      if held_out is not None:
        means = _class_means(sets["generated"])
        trials = {name: matching.trial(made, train, held_out) for name, made in (sets | {"own_means": means}).items()}
        leaks = _leaks(sets["generated"], train, held_out, trials["generated"], certified, report.criteria.most_ratio)
    certified_rightly = sum(counts.values()) > (false or 0)
    controls = {title: trials[name] for name, title in CONTROLS.items() if name in trials}
    report = dataclasses.replace(
      report,
      verdict=verdict.of(trials.get("generated"), controls, counts, false, report.remarks, report.criteria),
      generated=sets["generated"],
      trials=trials,
      leaks=leaks,
      certified=counts,
      compared=compared,
      measured=_measure(reconstruction.classifiers[0], reconstruction.conditions[0], sets, train, held_out),
    )

  def limited(answer: verdict.Verdict, *, certified: bool = False) -> verdict.Verdict:
    answer = verdict.with_limits(answer, report.remarks, certified=certified)
    return verdict.with_doubts(answer, () if report.fit is None else report.fit.doubts)

  answers = {"Reconstruction": limited(report.verdict, certified=certified_rightly)}
  if report.scored is not None:
    inferred = verdict.of_scores(report.scored, report.criteria)
    if not report.confounded:
      named = verdict.of_risks(report.scored.risks, "members", report.criteria)
      inferred = inferred._replace(reasons=[*inferred.reasons, named])
    answers["Membership inference"] = limited(inferred)
  answer = limited(verdict.with_scores(report.verdict, report.scored, report.criteria), certified=certified_rightly)
  if report.candidates is not None and not report.confounded:
    named = verdict.of_risks(report.candidates, "candidates", report.criteria)
    answer = answer._replace(reasons=[*answer.reasons, named])
    if report.scored is None:
      answers["Membership inference"] = verdict.Verdict("member" if report.at_risk else "none", named, [])
  return dataclasses.replace(report, verdict=answer, answers=answers)


def _class_likeness(recipe: Recipe, reconstruction: Reconstruction) -> Recipe:
  """The class-level baseline: as many free samples, trained for classification only."""
  codes = reconstruction.every_sample()[1].size // reconstruction.classifiers[0].num_classes
  changed = recipes.classification_only(recipe, reconstruction.examinations)
  changed = changed.with_schedule(steps=min(changed.schedule.steps, recipe.schedule.steps))
  return dataclasses.replace(changed, generator=table(codes=codes, in_span=False))


def generated(reconstruction: Reconstruction) -> Samples:
  """All that the generator can draw, in [0, 1]; every metric is measured on these."""
  x, y = reconstruction.every_sample()
  return Samples(np.asarray(reconstruction.classifiers[0].to_unit(x)), np.asarray(y))


def _leaks(
  samples: Samples, train: Samples, held_out: Samples, trial: Trial, certified: np.ndarray, most_ratio: float
) -> Sequence[Leak]:
  """The training samples that are certified, then those identified by the greatest ratio."""
  ratios = {int(place): min(float(ratio), most_ratio) for place, ratio in zip(trial.places, trial.ratios, strict=True)}
  hits = {int(place) for place in trial.places[trial.hits]}
  nearest, differences = matching.nearest_by_value(certified, train.x)
  exact = set(nearest[differences < Criteria().same].tolist())
  nth = {place: int(np.sum(train.y[:place] == train.y[place])) for place in hits | exact}  # classes in turn in ties
  order = sorted(nth, key=lambda place: (place not in exact, -ratios.get(place, 0.0), nth[place], place))
  shown = order[:_SHOWN] if matching.comparable(train) else []
  pictures_of = dict(zip(shown, _triples(samples, train, held_out, np.array(shown)), strict=True)) if shown else {}
  return [
    Leak(
      train.names[place],
      int(train.y[place]),
      "certified" if place in exact else "identified",
      ratios.get(place),
      pictures_of.get(place, ()),
    )
    for place in order
  ]


def _triples(samples: Samples, train: Samples, held_out: Samples, places: np.ndarray) -> list[list[bytes]]:
  """PNG: training images, the samples nearest to them, and the other real images nearest to these."""
  x, y = train.x[places], train.y[places]
  rebuilt = samples.x[np.asarray(metrics.ssim_nearest_indices(x, y, samples.x, samples.y))]
  other = held_out.x[np.asarray(metrics.ssim_nearest_indices(rebuilt, y, held_out.x, held_out.y))]
  return [[pictures.png(image) for image in row] for row in zip(x, rebuilt, other, strict=True)]


def _class_means(samples: Samples) -> Samples:
  """The mean of every class."""
  labels = np.unique(samples.y)
  return Samples(np.stack([samples.x[samples.y == label].mean(axis=0) for label in labels]), labels)


def _measure(
  classifier: Classifier,
  conditions: Conditions,
  sets: Mapping[str, Samples],
  train: Samples | None,
  held_out: Samples | None,
) -> dict[str, dict[str, float]]:
  """Metrics of the reconstructed samples and of their controls."""
  key, samples = jax.random.key(0), sets["generated"]
  if train is None:
    sets = {**sets, "uniform_noise": matching.uniform_noise(samples, key)}
  else:
    sets = {**sets, **matching.controls(train, held_out, samples.y, key)}
  if classifier.value_range is None:
    del sets["uniform_noise"]  # there is no range to draw it from
  rows: dict[str, dict[str, Any]] = {}
  for name, images in sets.items():
    _LOG.info("measuring: %s", ROWS[name])
    x, y = classifier.from_unit(images.x), images.y
    probabilities = jax.nn.softmax(classifier.predict(x))
    diagnosis = diagnostics.diagnose(classifier, conditions, x, y, num_steps=100)
    rows[name] = {
      "agreement": diagnosis.accuracy,
      "confidence": float(jnp.mean(probabilities[jnp.arange(len(y)), classifier.classes_of(y)])),
      "margin": diagnosis.median_margin,
      "residual": diagnosis.residual,
      "diversity": metrics.within_class_distance(images.x, y) / images.x[0].size ** 0.5,
    }
    if train is not None:
      rows[name]["likeness"] = float(matching.similarity(images, train).mean())
  return rows
