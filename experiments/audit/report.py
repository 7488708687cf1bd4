"""What `experiments.audit` says at the end: a verdict in plain words, metrics, pictures, and a page."""

from collections.abc import Mapping
import pathlib
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from experiments.data import Images
from experiments.harness import pages
from experiments.harness.progress import Progress
from experiments.harness.workdir import Workdir
from experiments.measure import comparison, pictures
from kkt_jax import diagnostics, metrics
from kkt_jax.classifier import Classifier
from kkt_jax.conditions import Conditions
from kkt_jax.examination import Examination
from kkt_jax.reconstruction import Reconstruction

_SIGNIFICANT = 0.01  # p-value below which hits are no chance
_ROWS = {
  "generated": "generated from the weights alone",
  "real_held_out": "other real data",
  "training_data": "training data",
  "class_means": "mean of the class",
  "dataset_mean": "mean of all",
  "uniform_noise": "noise",
}


def write(
  out: Workdir,
  settings: Mapping[str, Any],
  examination: Examination,
  reconstruction: Reconstruction | None,
  train: Images | None,
  held_out: Images | None,
) -> dict[str, Any]:
  """Measures, draws, and writes ``report.html`` and ``metrics.json``.

  Args:
    out: the workdir.
    settings: of the run.
    examination: what the classifier's weights say.
    reconstruction: the trained generator; None if the weights are too far from all conditions for one.
    train: the owner's training data in [0, 1], if given.
    held_out: other data of the same kind, if given.

  Returns:
    The metrics, with the ``verdict``, the ``summary`` and the ``pictures`` for the terminal.
  """
  rows: dict[str, dict[str, float]] = {}
  found: dict[str, float] = {}
  drawn: dict[str, str] = {}
  if reconstruction is None:
    verdict = _refusal(examination.bound)
  else:
    samples = generated(reconstruction)
    rows = _measure(reconstruction.classifiers[0], reconstruction.conditions[0], samples, train, held_out)
    if train is not None and held_out is not None:
      found = comparison.retrieval(samples, train, held_out)
      found["tested"] = len(np.unique(train.y)) * min(_rarest(train), _rarest(held_out))
    proven = reconstruction.exact[0] if reconstruction.exact else None
    verdict = _verdict(found, 0 if train is None else len(train.y))
    drawn = _draw(out.path, samples, train)
    if proven is not None and len(proven.y):
      verdict = f"{_proof(len(proven.y))} {verdict}"
      caption = "What the weights alone prove to be training samples, a row for each class."
      drawn |= {"proven.png": caption} if _grid(out.path / "proven.png", Images(proven.unit, proven.y)) else {}
  results = {
    "verdict": verdict,
    "form": examination.form,
    "bounds": dict(examination.bounds),
    **rows,
    "against_data": found,
    "certificates": _certificates(reconstruction, train),
    "final_losses": out.last_logged(),
  }
  titled = {_ROWS[name]: row for name, row in rows.items()}
  page = pages.render(
    pathlib.Path(__file__).with_name("page.html.j2"),
    title="What these weights reveal of their training data",
    verdict=verdict,
    findings=str(examination).splitlines(),
    pictures={caption: out.path / name for name, caption in drawn.items()},
    rows=titled,
    settings=settings,
  )
  (out.path / "report.html").write_text(page, encoding="utf-8")
  out.finish(results)
  summary = textwrap.fill(verdict, 100)
  if rows:
    shown = ["agreement", "residual", *(["likeness"] if train is not None else [])]
    summary += "\n\n" + comparison.table(titled, shown)
  return results | {"summary": summary, "pictures": ["report.html", *drawn]}


def generated(reconstruction: Reconstruction) -> Images:
  """All that the generator can draw, in [0, 1]; every metric is measured on these."""
  x, y = reconstruction.every_sample()
  return Images(np.asarray(reconstruction.classifiers[0].to_unit(x)), np.asarray(y))


def draw(folder: pathlib.Path, reconstruction: Reconstruction) -> None:
  """Draws what a generator makes in the course of its training."""
  _grid(folder / f"samples_{int(reconstruction.state.step):06d}.png", generated(reconstruction))


def _grid(path: pathlib.Path, images: Images) -> bool:
  """Draws the first images of every class, a row each, if samples are images; returns whether they are."""
  is_image = images.x.ndim == 4 and images.x.shape[3] in (1, 3)
  if is_image:
    labels = np.unique(images.y)[: pictures.COLUMNS]
    rows = [(f"class {label}", images.x[images.y == label][: pictures.COLUMNS]) for label in labels]
    pictures.image_rows(path, rows)
  return is_image


def _draw(folder: pathlib.Path, samples: Images, train: Images | None) -> dict[str, str]:
  """The pictures that can be drawn: captions by file name."""
  drawn = {}
  if _grid(folder / "samples.png", samples):
    drawn["samples.png"] = "What was generated, a row for each class, unselected."
    if train is not None and min(samples.x.shape[1:3]) >= comparison.LEAST_SIDE:
      columns = max(pictures.COLUMNS // len(np.unique(samples.y)), 1)
      comparison.similar_pairs(folder / "pairs.png", samples, train, columns=columns)
      drawn = {"pairs.png": "Generated in odd rows, the most similar training image below each.", **drawn}
  return drawn


def _measure(
  classifier: Classifier, conditions: Conditions, samples: Images, train: Images | None, held_out: Images | None
) -> dict[str, dict[str, float]]:
  """What the classifier and its conditions say of samples and of what they are compared with, and the likeness."""
  key = jax.random.key(0)
  if train is None:
    sets = {"uniform_noise": comparison.uniform_noise(samples, key)}
  else:
    sets = comparison.controls(train, held_out, samples.y, key)
  if classifier.value_range is None:
    del sets["uniform_noise"]  # there is no range to draw it from
  rows, progress = {}, Progress("measuring", 1 + len(sets))
  for number, (name, images) in enumerate(({"generated": samples} | sets).items(), 1):
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
      rows[name]["likeness"] = float(comparison.similarity(images, train).mean())
    progress.update(number, _ROWS[name])
  return rows


def _certificates(reconstruction: Reconstruction | None, train: Images | None) -> list[dict[str, int]]:
  """How many training samples the weights prove, beside the truth where the owner gave it and samples are images."""
  if reconstruction is None or train is None or train.x.ndim != 4 or min(train.x.shape[1:3]) < comparison.LEAST_SIDE:
    return []
  return comparison.exactness(reconstruction, train)[0]


def _proof(count: int) -> str:
  return (
    f"Without any data, the weights prove {count} samples to be training samples, value by value: far more of their"
    " values lie at an end of the range than chance or kinship explains."
  )


def _rarest(images: Images) -> int:
  return int(np.unique(images.y, return_counts=True)[1].min())


def _refusal(bound: float) -> str:
  return (
    "The theory of this audit does not cover these weights, so nothing was tried, and nothing follows for what they"
    f" reveal. No data can account for {bound:.0%} of what they would have to be made of: they were not trained to"
    " convergence by gradient descent, with weight decay or from a small initialisation. An adaptive optimizer, early"
    " stopping, and a large initialisation without weight decay are the usual reasons. --force tries nevertheless."
  )


def _verdict(found: Mapping[str, float], num_training: int) -> str:
  """The answer in plain words, with its uncertainty; the first sentence alone says what it is.

  >>> found = {"retrieval_hits": 52, "tested": 100, "retrieval_chance": 1 / 6, "retrieval_candidates": 6,
  ...          "retrieval_p_value": 1e-14}
  >>> print(textwrap.fill(_verdict(found, 100), 100))
  These weights reveal individual training samples. Of 100 training samples, 52 (95 %: 42 to 62) could
  be picked out from 6 real samples of their class each, because what was generated comes nearest to
  them; by chance 17. The odds of that by luck are below one in a billion. Corrected for guessing, 42%
  of them (95 %: 31% to 54%) are recognised.
  """
  if not found:
    return (
      "No verdict without data to compare with. Whether what came out is the training data, or only data of their kind,"
      " can be said with --train_data and at least as many --held_out_data, which need no further training."
    )
  hits, tested, chance = int(found["retrieval_hits"]), int(found["tested"]), found["retrieval_chance"]
  interval = stats.binomtest(hits, tested).proportion_ci(method="wilson")
  counted = (
    f"Of {tested} training samples, {hits} (95 %: {tested * interval.low:.0f} to {tested * interval.high:.0f}) could be"
    f" picked out from {found['retrieval_candidates']:.0f} real samples of their class each, because what was generated"
    f" comes nearest to them; by chance {tested * chance:.0f}."
  )
  if tested < num_training:
    counted += (
      f" The other {num_training - tested} were not tested, for that needs as many --held_out_data of every class."
    )
  p_value = found["retrieval_p_value"]
  if p_value >= _SIGNIFICANT:
    return (
      f"No evidence that these weights reveal individual training samples by this method. {counted} As many or more are"
      f" picked out by luck with probability {p_value:.2g}. That is no proof that they reveal none."
    )
  odds = "below one in a billion" if p_value < 1e-9 else f"about one in {float(f'{1 / p_value:.2g}'):,.0f}"
  share, low, high = (max((value - chance) / (1 - chance), 0) for value in (hits / tested, interval.low, interval.high))
  return (
    f"These weights reveal individual training samples. {counted} The odds of that by luck are {odds}. Corrected for"
    f" guessing, {share:.0%} of them (95 %: {low:.0%} to {high:.0%}) are recognised."
  )
