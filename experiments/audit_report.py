"""What `experiments.audit` says at the end: figures, pictures, a page, and a verdict in plain words."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import common, comparison, figures, report
from experiments.audit_findings import Findings
from experiments.data import Images
from kkt_jax import diagnostics, metrics
from kkt_jax.classifier import Classifier

_SIGNIFICANT = 0.01  # p-value below which hits are no chance
_COLUMNS = 20  # images in a row

_ROWS = {  # name: title, what it is, kind
  "generated": ("generated", "Fresh draws of the generator that was trained from the weights alone.", "method"),
  "real_held_out": ("other real data", "Data of the same kind that were not trained on.", "control"),
  "training_data": ("training data", "What perfect recovery would give.", "control"),
  "class_means": ("class means", "The mean of the training data of each class.", "control"),
  "dataset_mean": ("mean", "The mean of all training data.", "control"),
  "uniform_noise": ("noise", "Every value drawn evenly from the range.", "control"),
}
_FIGURES = [
  report.Figure("agreement", "classified as wanted", "Share of samples that the audited classifier gives the wanted class.", "higher", 2, "By the classifier itself"),
  report.Figure("confidence", "confidence", "Mean probability that it gives the wanted class.", "", 3, "By the classifier itself"),
  report.Figure("margin", "margin", "Median margin to the runner-up, in logits.", "", 2, "By the classifier itself"),
  report.Figure("residual", "residual", "What the stationarity conditions lack with the best multipliers: 0 is perfect, 1 is nothing.", "lower", 3, "By the classifier itself"),
  report.Figure("diversity", "diversity", "Mean distance of two samples of a class, per input value.", "", 3, "By the classifier itself"),
  report.Figure("cover", "likeness", "Mean similarity of a training sample and the sample of its class nearest to it.", "higher", 3, "Against the owner's data"),
  report.Figure("retrieved", "picked out", "Share of training samples that some sample resembles more than any of a group of other real ones.", "", 2, "Against the owner's data"),
  report.Figure("chance", "picked out by chance", "What a generator that knows only the kind of data reaches.", "", 2, "Against the owner's data"),
  report.Figure("p_value", "p-value", "How likely that many would be picked out by chance.", "", 4, "Against the owner's data"),
  report.Figure("nearer", "nearer to training", "Share of samples nearer to the training data than to other real data; 0.5 is chance.", "", 2, "Against the owner's data"),
]  # fmt: skip


def write(
  out: common.Workdir,
  classifier: Classifier,
  findings: Findings,
  said: str,
  *,
  fresh: Images,
  every: Images,
  train: Images | None,
  held_out: Images | None,
) -> dict[str, Any]:
  """Measures, draws, and writes ``report.html``, ``report.md`` and ``metrics.json``.

  Args:
    out: the workdir.
    classifier: the audited classifier.
    findings: what its weights said.
    said: the same in words.
    fresh: samples from noise that was never trained on.
    every: all that the generator can draw.
    train: the owner's training data, if given.
    held_out: other data of the same kind, if given.

  Returns:
    The figures, with the ``verdict``.
  """
  sets = {"generated": fresh} | _controls(fresh, train, held_out)
  values = {}
  for number, (name, images) in enumerate(sets.items()):
    common.say(f"measuring {number + 1} of {len(sets)}: {_ROWS[name][0]}")
    values[name] = _by_classifier(classifier, findings, images)
  known: dict[str, Any] = {}
  if train is not None:
    known = _against_data(every, train, held_out)
    values["generated"] |= {name: value for name, value in known.items() if name in {f.name for f in _FIGURES}}
    whole = sets | {"training_data": train} | ({} if held_out is None else {"real_held_out": held_out})
    for name in values.keys() - {"generated"}:
      values[name]["cover"] = float(np.mean(_similarity(whole[name], train)))
  verdict = _verdict(known)
  pictures = _pictures(out.path, every, train)
  lines = [json.loads(line) for line in (out.path / "metrics.jsonl").read_text().splitlines()]
  curve = ("loss", [line["step"] for line in lines], [line["total"] for line in lines])
  rows = [
    report.Row(
      name,
      *_ROWS[name],
      {figure: [value] for figure, value in own.items()},
      pictures if name == "generated" else [],
      [curve] if name == "generated" and lines else [],
    )
    for name, own in values.items()
  ]
  shown = {name for own in values.values() for name in own}
  page = report.Report(
    title="What these weights give away",
    introduction=[
      verdict,
      "A classifier's weights are sums over its training data. Here a generator was trained, from the weights alone,"
      " until what it generates adds up to the same. The pictures show what came out.",
      *([] if train is not None else ["No training data were given (--train_data), so nothing is compared with them."]),
    ],
    figures=[figure for figure in _FIGURES if figure.name in shown],
    rows=rows,
    headline=[
      f.name
      for f in _FIGURES
      if f.name in shown and f.name in ("agreement", "cover", "retrieved", "p_value", "residual")
    ],
    settings={
      "what the weights say": said,
      **{k: str(v) for k, v in json.loads((out.path / "config.json").read_text()).items()},
    },
    notes=[
      "A poor reconstruction is no proof that a classifier is safe to publish: another attack may do better.",
      "One run of one method with one seed. Its settings were found on digits and faces, not on these data.",
    ],
  )
  report.write(page, out.path)
  results = {
    "verdict": verdict,
    "form": findings.form,
    "least_residual": dict(findings.bounds),
    **values,
    "against_data": known,
  }
  out.finish(results)
  return results


def grid(path: pathlib.Path, images: Images) -> None:
  """The first images of every class, a row each; nothing where samples are no images."""
  if images.x.ndim == 4 and images.x.shape[3] in (1, 3):
    labels = np.unique(images.y)[:_COLUMNS]
    figures.image_rows(path, [(f"class {label}", images.x[images.y == label][:_COLUMNS]) for label in labels])


def _pictures(path: pathlib.Path, every: Images, train: Images | None) -> list[tuple[str, pathlib.Path]]:
  if every.x.ndim != 4 or every.x.shape[3] not in (1, 3):
    return []
  grid(path / "samples.png", every)
  pictures = [("What was generated, a row for each class, unselected.", path / "samples.png")]
  if train is not None:
    columns = max(_COLUMNS // len(np.unique(every.y)), 1)
    comparison.similar_pairs(path / "pairs.png", every, train, columns=columns)
    pictures.append(("Generated in odd rows, the most similar training image below each.", path / "pairs.png"))
  return pictures


def _controls(fresh: Images, train: Images | None, held_out: Images | None) -> dict[str, Images]:
  """As many of everything that generated samples are compared with as there are of them, or as there are."""
  key = jax.random.key(0)
  if train is None:
    return {"uniform_noise": comparison.uniform_noise(fresh, key)}
  return comparison.controls(train, held_out, fresh.y, key)


def _by_classifier(classifier: Classifier, findings: Findings, images: Images) -> dict[str, float]:
  """What the audited classifier and its conditions say of samples."""
  x, y = jnp.asarray(images.x), images.y
  probabilities = jax.nn.softmax(classifier.predict_fn(classifier.params, x))
  diagnosis = diagnostics.diagnose(classifier, findings.conditions, x, y, num_steps=100)
  flat = np.asarray(x).reshape(len(y), -1)
  return {
    "agreement": diagnosis.accuracy,
    "confidence": float(jnp.mean(probabilities[jnp.arange(len(y)), y])),
    "margin": diagnosis.median_margin,
    "residual": diagnosis.residual,
    "diversity": metrics.within_class_distance(flat, y) / flat.shape[1] ** 0.5,
  }


def _similarity(samples: Images, data: Images) -> np.ndarray:
  """How near samples come to each of the data [N]: structural similarity of images, else the negative distance."""
  if samples.x.ndim == 4 and min(samples.x.shape[1:3]) >= 8:
    return np.asarray(metrics.best_similarity(samples.x, samples.y, data.x, data.y))
  distances = np.asarray(
    metrics.pairwise_distance(samples.x.reshape(len(samples.y), -1), data.x.reshape(len(data.y), -1))
  )
  return -np.where(samples.y[:, None] == data.y[None], distances, np.inf).min(axis=0)


def _against_data(every: Images, train: Images, held_out: Images | None) -> dict[str, Any]:
  """How near all that the generator can draw comes to the training data, beside how near it comes to other data."""
  own = _similarity(every, train)
  known: dict[str, Any] = {"cover": float(own.mean())}
  if held_out is None:
    return known
  count = min(int(np.unique(data.y, return_counts=True)[1].min()) for data in (train, held_out))
  trained, other = (comparison.first_of_each_class(data, count) for data in (train, held_out))
  group = int(np.unique(held_out.y, return_counts=True)[1].min()) // count
  many = comparison.first_of_each_class(held_out, group * count)
  retrieved = metrics.retrieval(_similarity(every, trained), _similarity(every, many))
  nearer = metrics.nearer_to_training(every.x, trained.x, other.x)
  return known | {
    "trained": len(trained.y),
    "group": group,
    "retrieved": retrieved["top1"],
    "chance": retrieved["chance"],
    "p_value": retrieved["p_value"],
    "nearer": nearer["share"],
  }


def _verdict(known: Mapping[str, Any]) -> str:
  """The answer in plain words, with its uncertainty."""
  if "p_value" not in known:
    return (
      "No verdict: whether what came out is the training data, or only data of their kind, cannot be said without"
      " --train_data and at least as many --held_out_data."
    )
  hits, number = round(known["retrieved"] * known["trained"]), known["trained"]
  expected = known["chance"] * number
  counted = (
    f"of {number} training samples, {hits} could be picked out of {known['group'] + 1} real ones of their class by"
    f" what was generated; by chance it would be {expected:.0f} (p = {known['p_value']:.2g})."
  )
  excess = known["retrieved"] - known["chance"]
  if known["p_value"] >= _SIGNIFICANT or excess <= 0:
    return (
      f"No evidence that these weights give away individual training samples by this method: {counted} That is no proof"
      " that they do not."
    )
  uncertain = 2 * (known["retrieved"] * (1 - known["retrieved"]) / number) ** 0.5
  return (
    f"These weights give training samples away: {counted} About {excess:.0%} of them (give or take {uncertain:.0%}) are"
    " told beyond chance."
  )
