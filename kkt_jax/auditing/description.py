"""Whether the classifier, as it is described, knows its training data: the first thing that an audit measures.

A slip in the description (the order of pixels or labels, black for white, the range, a mean, padding) makes the
weights say nothing, which would look as if they revealed nothing. What a correct one has however badly the classifier
was trained: more than chance or a loss below that of guessing, and no more confidence than it deserves. Then, before
minutes are spent, whether its weights obey the equations with its own training data at all.
"""

from collections.abc import Mapping
import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize, special, stats  # type: ignore[import-untyped]

from kkt_jax.analysis import Examination
from kkt_jax.auditing import neighbours
from kkt_jax.auditing.matching import uniform_noise
from kkt_jax.auditing.samples import Samples
from kkt_jax.classifiers import Classifier
from kkt_jax.criteria import AuditCriteria
from kkt_jax.kkt import diagnostics

_DEFAULT = AuditCriteria()
_CAUSES = (
  "Likely causes: the order of pixels or channels, black for white, the range of the inputs, a mean or deviation left"
  " out or applied twice, labels in another order, padding, the epsilon of batch norm, or data that it never saw"
)


@dataclasses.dataclass(frozen=True)
class Fit:
  """How well the classifier knows the data.

  Attributes:
    known: by "training data" or "held-out data": ``accuracy``, ``loss`` in nats, and ``chance``, the accuracy of the
      same predictions in random order.
    guessing: the loss of equal probabilities, log C.
    refusal: why the audit stops, in one message; empty if it goes on.
    doubts: why finding nothing would mean nothing, in sentences.
  """

  known: Mapping[str, Mapping[str, float]]
  guessing: float
  refusal: str = ""
  doubts: tuple[str, ...] = ()

  def __str__(self) -> str:
    """Accuracy and loss of each set, beside chance."""
    of_set = lambda row: f"accuracy {row['accuracy']:.1%} ({row['chance']:.1%} by chance), loss {row['loss']:.3g}"
    return "; ".join(f"{name}: {of_set(row)}" for name, row in self.known.items()) + f" (guessing {self.guessing:.3g})"


def check(
  classifier: Classifier, train: Samples | None, held_out: Samples | None, criteria: AuditCriteria = _DEFAULT
) -> Fit | None:
  """Accuracy and loss on the data, and what follows for the description; None without data.

  The audit stops if on the training data

  - the accuracy is no more than chance (binomial, p at least .01), and the loss not below that of the class shares, or
  - the loss is more than 1.2 times that of equal probabilities, or
  - the accuracy is no more than on held-out data (Fisher, p at least .01) and 15 points below the mean confidence,
    which cross-entropy keeps from exceeding the accuracy on what it was trained on, or
  - another order of the labels, fitted to each half of the data and tested on the other, or another preprocessing of
    the inputs halves the errors at least (McNemar), or makes no more of them and tells training from held-out data
    better by their margins (DeLong), p below .001 after Bonferroni. If the classifier is not too sure, the other must
    come 95 % of the way from chance to perfection; and both must hold if the given one comes 30 % of it; or
  - with other inputs the weights are 20 times as near to what up to 1,000 training samples would make of them
    (`kkt_jax.auditing.neighbours`); from 5 times on it is a doubt.

  Without training data only the last is asked, of held-out data.
  """
  sets = {"training data": train, "held-out data": held_out}
  answers = {name: _Answers(classifier, given, criteria=criteria) for name, given in sets.items() if given is not None}
  if not answers:
    return None
  name, main = next(iter(answers.items()))
  guessing = float(np.log(classifier.num_classes))
  fit = Fit({name: of_set.summary() for name, of_set in answers.items()}, guessing)
  other = answers.get("held-out data") if train is not None else None
  doubts, wrong = [], train is not None and (main.is_chance() or main.loss > criteria.worse * guessing)
  if train is not None and main.is_overconfident():
    wrong |= other is not None and not main.is_better_than(other)
    doubts.append(
      f"The accuracy on the training data is {main.accuracy:.0%}, the mean confidence {main.confidence:.0%}: no"
      " training leaves it so. The description may be wrong, or the data are not those of the training."
    )
  elif main.confidence - main.chance < criteria.unsure * (main.accuracy - main.chance):
    doubts.append(
      f"The accuracy on the {name} is {main.accuracy:.0%}, but the mean confidence only {main.confidence:.0%}: the"
      " classifier was hardly trained, or the range of the inputs is wrong."
    )
  labels = main.other_labels()
  near = neighbours.Neighbour()
  if train is not None and not labels and len(train.y) <= criteria.classified:
    near = neighbours.nearest(classifier, train.x, train.y, criteria)
  if main.median_margin > criteria.flat and not near.confirmed:
    doubts.append(
      f"The median margin of the {name}, {main.median_margin:.3g} logits, is beyond where cross-entropy has a gradient:"
      " the range of the inputs may be wrong."
    )
  better, p_value = labels, 0.0 if labels else 1.0
  if not better and (wrong or main.kappa < criteria.mostly or main.images.x.size <= criteria.values):
    better, p_value = _other_inputs(classifier, main, other, wrong)
  better = str(near) or better
  known = not wrong and p_value >= criteria.fits
  if known and near.ratio < criteria.nearer:
    if train is not None and not better:
      x = np.asarray(classifier.from_unit(train.x))
      better = neighbours.between_norms(classifier, x, criteria) or (
        neighbours.other_decay(classifier, x, train.y, criteria) if len(train.y) <= criteria.classified else ""
      )
    if better:
      doubts.append(f"The description may be wrong: {better[0].lower()}{better[1:]}")
    return dataclasses.replace(fit, doubts=tuple(doubts))
  reason = better or "None of the usual slips that were tried explains it."
  fails = f"was hardly trained on the {name} in this form" if known else f"does not know its {name}"
  refusal = f"the classifier, as it is described, {fails}: {fit}. {reason} {_CAUSES}."
  return dataclasses.replace(fit, refusal=refusal, doubts=(f"T{refusal[1:]}", *doubts))


def check_start(classifier: Classifier, train: Samples | None, criteria: AuditCriteria = _DEFAULT) -> str:
  """Why training cannot have started from ``classifier.initial_params``, in a sentence; "" if it can.

  What is left of a start stands in some kernel, of which random other weights hold one part in the root of its size;
  and training data fit the weights that were trained on them better than the start. That another start of the same
  origin, such as an earlier or later state of the same training, was given is not detected.
  """
  if classifier.initial_params is None:
    return ""
  pairs = zip(
    *(map(np.asarray, jax.tree.leaves(tree)) for tree in (classifier.initial_params, classifier.params)), strict=True
  )
  kernels = [(a.ravel() - a.mean(), b.ravel() - b.mean()) for a, b in pairs if a.ndim > 1]
  lengths = [(np.linalg.norm(a) * np.linalg.norm(b), a.size) for a, b in kernels]
  held = [
    (a @ b) / length > max(criteria.held, 5 / size**0.5)
    for (a, b), (length, size) in zip(kernels, lengths, strict=True)
    if length > 0
  ]
  if held and not any(held):
    return (
      "the weights hold nothing of this start: in no kernel do they correlate with it. Either training started"
      " elsewhere, or so much weight decay has shrunk it that it tells nothing: then leave it out."
    )
  if train is None:
    return ""
  first = dataclasses.replace(classifier, params=classifier.initial_params)
  before, after = (_Answers(model, train, criteria=criteria).loss for model in (first, classifier))
  if before < after:
    return (
      f"the training data fit the start better (loss {before:.3g}) than the weights that were trained on them"
      f" ({after:.3g}). Were params and initial_params exchanged?"
    )
  return ""


class Residuals(NamedTuple):
  """The squared share of the weights that the stationarity conditions leave unexplained, with the best multipliers.

  Attributes:
    own: with the training data.
    other: with as many other samples of the same classes; 1 without any.
    what: what these are.
    disobey: whether the training data explain the weights hardly better than others do.
  """

  own: float
  other: float
  what: str
  disobey: bool

  @classmethod
  def of(cls, own: float, other: float, what: str, criteria: AuditCriteria = _DEFAULT) -> Self:
    """With what they mean."""
    return cls(own, other, what, own > criteria.unexplained and own > criteria.beside * other)

  def __str__(self) -> str:
    """Both in a sentence."""
    return (
      f"With the training data, the stationarity conditions leave {self.own:.2%} of the weights unexplained, with"
      f" {self.what} {self.other:.0%}."
    )


def residuals(
  examination: Examination, train: Samples, held_out: Samples | None, criteria: AuditCriteria = _DEFAULT
) -> Residuals | None:
  """Whether the weights obey the equations with their training data, beside held-out data, or noise without these.

  None if there are more than 1,000 training samples: a part of them explains a part of the weights only, and all are
  too many at once.
  """
  if len(train.y) > criteria.classified:
    return None
  classifier, key = examination.classifier, jax.random.key(0)
  beside: Samples | None = None if classifier.value_range is None else uniform_noise(train, key)
  what = "no data" if beside is None else "noise"
  if held_out is not None:
    counts = [(held_out.y == label, int(np.sum(train.y == label))) for label in np.unique(train.y)]
    places = np.concatenate([np.flatnonzero(of_class)[:count] for of_class, count in counts])
    beside, what = Samples(held_out.x[places], held_out.y[places]), "held-out data"
  diagnose = lambda images, steps: diagnostics.diagnose(
    classifier, examination.conditions, classifier.from_unit(images.x), images.y, num_steps=steps
  )
  for steps in criteria.searches:
    residual = diagnose(train, steps).residual
    other = 1.0 if beside is None else diagnose(beside, steps).residual
    measured = Residuals.of(residual, other, what, criteria)
    if not measured.disobey:
      break
  return measured


class _Answers:
  """The classifier's predictions for labelled samples."""

  def __init__(
    self, classifier: Classifier, images: Samples, x: np.ndarray | None = None, criteria: AuditCriteria = _DEFAULT
  ):
    """Classifies the samples, or others in their place, ``x`` in the classifier's units."""
    count = np.clip(2 * criteria.values // images.x[0].size, criteria.least_classified, criteria.classified)
    self.images = images = images.at_most(int(count))
    self.num_classes, self.criteria = classifier.num_classes, criteria
    inputs = classifier.from_unit(images.x) if x is None else jnp.asarray(x, jnp.float32)
    logits = np.nan_to_num(np.asarray(classifier.predict(inputs), np.float64))
    logs = special.log_softmax(logits, axis=1)
    rows, y = np.arange(len(images.y)), images.y
    self.losses, self.taken = -logs[rows, y], np.argmax(logits, axis=1)
    self.hits, self.sure = self.taken == y, np.exp(logs.max(axis=1))
    self.accuracy, self.loss = float(self.hits.mean()), float(self.losses.mean())
    self.confidence = float(self.sure.mean())
    deviation = (np.sum(self.sure * (1 - self.sure)) + 0.25) ** 0.5
    self.excess = float(np.sum(self.sure) - self.hits.sum()) / deviation  # confidence over accuracy, in deviations
    ordered = np.sort(logits, axis=1)
    self.median_margin = float(np.median(ordered[:, -1] - ordered[:, -2]))
    runner_up = np.where(self.taken == y, ordered[:, -2], ordered[:, -1])
    self.margins = logits[rows, y] - runner_up
    shares = [np.bincount(classes, minlength=self.num_classes) / len(y) for classes in (self.taken, y)]
    self.chance = float(shares[0] @ shares[1])
    self.kappa = (self.accuracy - self.chance) / max(1 - self.chance, 1e-9)
    self.gains = -np.log(shares[1][y]) - self.losses  # over a constant answer

  def summary(self) -> dict[str, float]:
    return {"accuracy": self.accuracy, "loss": self.loss, "chance": self.chance}

  def is_chance(self) -> bool:
    """Whether labels and probabilities are predicted no better than by the frequencies of the classes."""
    above = stats.binomtest(int(self.hits.sum()), len(self.hits), self.chance, alternative="greater").pvalue
    error = max(self.gains.std() / len(self.gains) ** 0.5, 1e-6)
    return above >= self.criteria.significant and self.kappa < self.criteria.half and self.gains.mean() < 2 * error

  def is_overconfident(self) -> bool:
    return self.confidence - self.accuracy > self.criteria.overconfident and self.excess > self.criteria.too_sure

  def is_better_than(self, other: "_Answers") -> bool:
    table = [[int(answers.hits.sum()), int((~answers.hits).sum())] for answers in (self, other)]
    return bool(stats.fisher_exact(table, alternative="greater").pvalue < self.criteria.significant)

  def p_value_of(self, hits: np.ndarray) -> float:
    """The p-value of more ``hits`` by another description (McNemar); 1 if more than half of the errors remain."""
    more, fewer = int(np.sum(hits & ~self.hits)), int(np.sum(self.hits & ~hits))
    if more == 0 or np.sum(~hits) > 0.5 * np.sum(~self.hits):
      return 1.0
    return float(stats.binomtest(more, more + fewer, alternative="greater").pvalue)

  def other_labels(self) -> str:
    """Which order of the classes fits better, in a sentence; empty if none does."""
    place = np.zeros(len(self.hits), int)
    for label in np.unique(self.images.y):
      of_class = self.images.y == label
      place[of_class] = np.arange(of_class.sum())
    half, hits = place % 2 == 1, np.zeros(len(self.hits), bool)
    for fitted in (half, ~half):
      hits[~fitted] = self._order(fitted)[self.images.y[~fitted]] == self.taken[~fitted]
    if self.p_value_of(hits) >= self.criteria.fits:
      return ""
    order, labels = self._order(np.ones(len(self.hits), bool)), np.arange(self.num_classes)
    changed = [f"{other} for {label}" for label, other in enumerate(order) if other != label]
    what = "class " + ", ".join(changed[:6]) + (", ..." if len(changed) > 6 else "")
    shift = int(order[0])
    if np.array_equal(order, (labels + shift) % self.num_classes) and self.num_classes > 2:
      what = f"labels shifted by {shift if shift <= self.num_classes / 2 else shift - self.num_classes}"
    right = np.mean(order[self.images.y] == self.taken)
    return f"With {what}, {right:.1%} would be right: the labels are in another order."

  def _order(self, some: np.ndarray) -> np.ndarray:
    """The class for each label with which most of some samples are classified correctly."""
    counts = 1e-3 * np.eye(self.num_classes)
    np.add.at(counts, (self.images.y[some], self.taken[some]), 1)
    return np.asarray(optimize.linear_sum_assignment(counts, maximize=True)[1])


def _other_inputs(classifier: Classifier, now: _Answers, other: _Answers | None, wrong: bool) -> tuple[str, float]:
  """Which other preprocessings of the inputs fit better, in a sentence, and a p-value; "" and 1.0 if none does.

  They leave half of the errors at most; or they make no more errors, and margins tell the data better from held-out
  ones, ``other``, which a correct description does best. See `check`; ``wrong`` if it is refused for other reasons.
  """
  together = [now.images.x] if other is None else [now.images.x, other.images.x]
  tried: dict[str, tuple[_Answers, _Answers | None]] = {}
  for what, x in neighbours.preprocessed(classifier, np.concatenate(together)):
    split = [x[: len(now.hits)], x[len(now.hits) :]]
    beside = None if other is None else _Answers(classifier, other.images, split[1], now.criteria)
    tried[what] = _Answers(classifier, now.images, split[0], now.criteria), beside
  p_values: dict[str, float] = {}
  for what, (of, beside) in tried.items():
    fewer, farther = now.p_value_of(of.hits), 1.0
    if other is not None and beside is not None and of.hits.sum() >= now.hits.sum():
      farther = _p_value_of_areas((now, other), (of, beside))
    least_kappa = now.criteria.half
    if not wrong and now.excess <= now.criteria.not_too_sure:  # and hardly trained: it may do better on centred inputs
      fewer, least_kappa = (fewer if now.kappa < now.criteria.hardly else max(fewer, farther)), now.criteria.nearly
    p_values[what] = min(fewer, farther) if of.kappa >= least_kappa else 1.0
  least = min(p_values.values(), default=1.0)
  p_value = min(1.0, 2 * len(tried) * least)
  if p_value >= now.criteria.doubted:
    return "", 1.0
  fitting = {what: tried[what][0].accuracy for what, p in p_values.items() if 2 * len(tried) * p < now.criteria.doubted}
  best = sorted(fitting, key=lambda what: (-fitting[what], p_values[what]))
  close = [what for what in best if fitting[what] > fitting[best[0]] - 0.03][:3]
  said = "; or ".join(f"with {what} {fitting[what]:.1%} would be right" for what in close)
  return f"{said[0].upper()}{said[1:]}{', farther from held-out data' if other is not None else ''}.", p_value


def _p_value_of_areas(given: tuple[_Answers, _Answers], changed: tuple[_Answers, _Answers]) -> float:
  """The p-value of margins separating two sets of samples better than before: paired AUCs (DeLong et al. 1988).

  The others are weighted so that both kinds have the same mixture of classes, on which margins depend, too.
  """
  counts = [np.bincount(answers.images.y, minlength=answers.num_classes) for answers in given]
  weights = (counts[0] / np.maximum(counts[1], 1))[given[1].images.y]
  weights /= weights.sum()
  parts = []
  for trained, other in (given, changed):
    one, two = trained.margins[:, None], other.margins[None]
    wins = (one > two) + 0.5 * (one == two)
    parts.append((wins @ weights, wins.mean(axis=0)))
  above, below = (after - before for before, after in zip(*parts, strict=True))
  error = (above.var() / len(above) + float(np.sum(np.square(weights * (below - above.mean()))))) ** 0.5
  return float(stats.norm.sf(above.mean() / max(error, 1e-9)))
