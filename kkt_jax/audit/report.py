"""What `kkt_jax.audit` says at the end: a verdict in plain words, metrics, pictures, and a page."""

from collections.abc import Mapping, Sequence
import dataclasses
import datetime
import hashlib
import pathlib
import platform
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import kkt_jax
from kkt_jax import metrics
from kkt_jax.analysis import Examination
from kkt_jax.audit import matching, pages, pictures, verdict
from kkt_jax.audit.description import Fit, Residuals
from kkt_jax.audit.membership import Scored, SCORES, Told
from kkt_jax.audit.samples import Images, Named
from kkt_jax.classifiers import Classifier
from kkt_jax.cli.progress import Progress
from kkt_jax.cli.workdir import Workdir
from kkt_jax.criteria import Criteria
from kkt_jax.extraction import certificates
from kkt_jax.kkt import Conditions, diagnostics
from kkt_jax.metrics import Trial
from kkt_jax.reconstruction import Reconstruction

_CONTROLS = {
  "class_likeness": "samples that the classifier merely takes for their class",
  "own_means": "class means of what came out",
}
_SHOWN, _WORST = 8, 12  # leaks in pictures, and on the terminal
_LARGEST_RATIO = 1e3
_ROWS = {
  "generated": "generated from the weights alone",
  "class_likeness": "likeness of the class alone",
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
  train: Named | None,
  held_out: Named | None,
  *,
  likeness: Reconstruction | None = None,
  scored: Scored | None = None,
  told: Told | None = None,
  remarks: Sequence[str] = (),
  fit: Fit | None = None,
  residuals: Residuals | None = None,
  command: str = "",
) -> dict[str, Any]:
  """Measures, draws, and writes ``report.html`` and ``metrics.json``.

  Args:
    out: the workdir.
    settings: of the run.
    examination: what the classifier's weights say.
    reconstruction: the trained generator; None if the weights are too far from all conditions for one, or disobey them
      with their own data.
    train: the owner's training data in [0, 1], if given.
    held_out: other data of the same kind, if given.
    likeness: a generator that was trained on likeness of the class alone, if data were given.
    scored: what scores of single samples tell, if data were given.
    told: what they tell of samples that were asked about.
    remarks: what limits the comparison.
    fit: how well the classifier knows the data, if any were given.
    residuals: what the conditions leave with the training data, if these were given and the weights are not too far.
    command: that made this.

  Returns:
    The metrics, with the ``verdict``, the ``summary`` and the ``pictures`` for the terminal.
  """
  rows: dict[str, dict[str, float]] = {}
  drawn: dict[str, str] = {}
  trials: dict[str, Trial] = {}
  leaks: list[Leak] = []
  compared: list[dict[str, int]] = []
  counts = dict.fromkeys(certificates.EVIDENCE, 0)
  certified_rightly = False
  if reconstruction is None and residuals is not None and residuals.disobey:
    answer = verdict.disobedience(residuals)
  elif reconstruction is None:
    answer = verdict.refusal(examination.bound)
  else:
    sets = {"generated": generated(reconstruction)}
    if likeness is not None:
      sets["class_likeness"] = generated(likeness)
    for place, kind in enumerate(certificates.EVIDENCE):
      counts[kind] = sum(int(np.sum(own.evidence == place)) for own in reconstruction.exact)
    false = None
    certified = np.zeros((0, *examination.classifier.input_shape))
    if train is not None:
      compared, certified = matching.exactness(reconstruction, train)
      false = sum(own["false"] for own in compared)
    if train is not None and held_out is not None:
      means = _class_means(sets["generated"])
      trials = {name: matching.trial(own, train, held_out) for name, own in (sets | {"own_means": means}).items()}
      leaks = _leaks(sets["generated"], train, held_out, trials["generated"], certified)
    count = sum(counts.values())
    certified_rightly = count > (false or 0)
    controls = {title: trials[name] for name, title in _CONTROLS.items() if name in trials}
    answer = verdict.of(trials.get("generated"), controls, counts, false, remarks)
    rows = _measure(reconstruction.classifiers[0], reconstruction.conditions[0], sets, train, held_out)
    drawn = _draw(out.path, sets["generated"], train)
    if count:
      own = reconstruction.exact[0]
      caption = "What the weights alone certify as training samples, a row for each class."
      drawn |= {"certified.png": caption} if _grid(out.path / "certified.png", Images(own.unit, own.y)) else {}
  answer = verdict.with_limits(verdict.with_scores(answer, scored), remarks, certified=certified_rightly)
  answer = verdict.with_doubts(answer, () if fit is None else fit.doubts)
  if told is not None:
    answer = answer._replace(reasons=[*answer.reasons, verdict.of_candidates(told)])
  against = _against(trials)
  results = {
    "verdict": str(answer),
    "fit": {} if fit is None else {"guessing": fit.guessing, **fit.known},
    "form": examination.form,
    "bounds": dict(examination.bounds),
    "residuals": None if residuals is None else residuals._asdict(),
    **rows,
    "against_data": against,
    "leaks": [dict(list(own._asdict().items())[:-1]) for own in leaks],
    "scores": {} if scored is None else {name: _plain(curve) for name, curve in scored.curves.items()},
    "scores_p_value": None if scored is None else scored.p_value,
    "candidates": None if told is None else told._asdict(),
    "certified": counts,
    "certificates": compared,
    "criteria": dataclasses.asdict(Criteria()),
    "final_losses": out.last_logged(),
  }
  titled = {_ROWS[name]: row for name, row in rows.items()}
  page = pages.render(
    pathlib.Path(__file__).with_name("page.html.j2"),
    title="What these weights reveal of their training data",
    verdict=answer,
    remarks=remarks,
    against=against,
    leaks=leaks,
    scored=scored,
    score_names=SCORES,
    told=told,
    assumed=[verdict.ASSUMED[kind] for kind, count in counts.items() if count],
    assumed_by_all=verdict.ASSUMED_BY_ALL,
    measured_false=verdict.MEASURED_FALSE,
    findings=[
      *([] if fit is None else [f"{fit}."]),
      *str(examination).splitlines(),
      *([] if residuals is None else [str(residuals)]),
    ],
    pictures={caption: out.path / name for name, caption in drawn.items()},
    rows=titled,
    settings=settings,
    made=_made(settings, command),
  )
  (out.path / "report.html").write_text(page, encoding="utf-8")
  out.finish(results)
  summary = textwrap.fill(str(answer), 100)
  if answer.level == "leak" and leaks:
    worst = ", ".join(own.name for own in leaks[:_WORST])
    summary += f"\n\nThe worst of {len(leaks)} cases: {worst}"
  if told is not None and told.marks:
    summary += "\n\nAbove all held-out samples: " + ", ".join(told.marks)
  if rows:
    shown = ["agreement", "residual", *(["likeness"] if train is not None else [])]
    summary += "\n\n" + matching.table(titled, shown)
  return results | {"summary": summary, "pictures": ["report.html", *drawn]}


class Leak(NamedTuple):
  """A training sample that came out.

  Attributes:
    name: its file, or its place from 0.
    label: its class.
    how: "certified" or "picked out".
    ratio: how much farther away than this sample the nearest of its group is; infinite for an equal one.
    pictures: PNG: the sample, what came out, and the real image that was not trained on nearest to that; or none.
  """

  name: str
  label: int
  how: str
  ratio: float | None
  pictures: Sequence[bytes]


def _leaks(samples: Images, train: Named, held_out: Named, trial: Trial, certified: np.ndarray) -> list[Leak]:
  """The training samples that came out: those that are certified, then those picked out by the greatest ratio."""
  ratios = {
    int(place): min(float(ratio), _LARGEST_RATIO) for place, ratio in zip(trial.places, trial.ratios, strict=True)
  }
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
      "certified" if place in exact else "picked out",
      ratios.get(place),
      pictures_of.get(place, ()),
    )
    for place in order
  ]


def _triples(samples: Images, train: Images, held_out: Images, places: np.ndarray) -> list[list[bytes]]:
  """PNG: training images, the samples nearest to them, and the other real images nearest to these."""
  x, y = train.x[places], train.y[places]
  own = samples.x[np.asarray(metrics.ssim_nearest_indices(x, y, samples.x, samples.y))]
  other = held_out.x[np.asarray(metrics.ssim_nearest_indices(own, y, held_out.x, held_out.y))]
  return [[pictures.png(image) for image in row] for row in zip(x, own, other, strict=True)]


def _class_means(images: Images) -> Images:
  """The mean of every class."""
  labels = np.unique(images.y)
  return Images(np.stack([images.x[images.y == label].mean(axis=0) for label in labels]), labels)


def _against(trials: Mapping[str, Trial]) -> dict[str, Any]:
  """The trial in numbers, beside its controls."""
  if "generated" not in trials:
    return {}
  own = trials["generated"]
  shuffled = own.shuffled()
  found: dict[str, Any] = {
    "hits": int(own.hits.sum()),
    "tested": len(own.y),
    "chance": own.chance,
    "leading": own.leading,
    "others": own.others.size,
    "p_value": own.p_value,
    "shuffled_mean": float(shuffled.mean()),
    "shuffled_most": int(shuffled.max()),
    **{f"{name}_hits": int(trial.hits.sum()) for name, trial in trials.items() if name != "generated"},
  }
  found["p_values_over_controls"] = {
    name: verdict.more_hits(own, trial) for name, trial in trials.items() if name in _CONTROLS
  }
  return found | {"roc": _plain(metrics.roc(own.members, own.others.ravel()))}


def _plain(curve: metrics.Roc) -> dict[str, Any]:
  return curve._asdict() | {"points": [point._asdict() for point in curve.points]}


def _made(settings: Mapping[str, Any], command: str) -> dict[str, str]:
  """When, how, from what and on what the report was made."""
  given = {name: settings[name] for name in ("checkpoint", "train_data", "held_out_data") if settings.get(name)}
  return {
    "Date": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
    "Program": f"kkt_jax {kkt_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}",
    "Machine": f"{platform.system()} {platform.machine()}, {jax.devices()[0].device_kind}",
    "Command": command,
    **{f"SHA-256 of {name.replace('_', ' ')}": digest(pathlib.Path(path)) for name, path in given.items()},
  }


def digest(path: pathlib.Path) -> str:
  """SHA-256 of a file; of a folder that of the names and the digests of its files, in their order."""
  if path.is_file():
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  inside = sorted(own for own in path.rglob("*") if own.is_file())
  lines = (f"{digest(own)}  {own.relative_to(path).as_posix()}\n" for own in inside)
  return hashlib.sha256("".join(lines).encode()).hexdigest()


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
    if train is not None and matching.comparable(samples):
      columns = max(pictures.COLUMNS // len(np.unique(samples.y)), 1)
      matching.similar_pairs(folder / "pairs.png", samples, train, columns=columns)
      drawn = {"pairs.png": "Generated in odd rows, the most similar training image below each.", **drawn}
  return drawn


def _measure(
  classifier: Classifier,
  conditions: Conditions,
  sets: dict[str, Images],
  train: Images | None,
  held_out: Images | None,
) -> dict[str, dict[str, float]]:
  """What the classifier and its conditions say of samples and of what they are compared with, and the likeness."""
  key, samples = jax.random.key(0), sets["generated"]
  if train is None:
    sets = sets | {"uniform_noise": matching.uniform_noise(samples, key)}
  else:
    sets = sets | matching.controls(train, held_out, samples.y, key)
  if classifier.value_range is None:
    del sets["uniform_noise"]  # there is no range to draw it from
  rows, progress = {}, Progress("measuring", len(sets))
  for number, (name, images) in enumerate(sets.items(), 1):
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
    progress.update(number, _ROWS[name])
  return rows
