"""Draws that are new and still of their kind: bent by smooth deformations, whose size is a temperature.

Trains a generator as `mnist` does, in the folder ``mnist`` of the workdir, or goes on from there. Its draws are bent by
more and more pixels (`kkt_jax.deformations`). For each size: how many are training digits, repeated or new; whether an
independent judge reads them; how they fill the space of real digits that nothing was trained on; and what they are
worth as training data, of a classifier of their labels and of one that the attacked classifier teaches. Beside them the
training digits bent alike, and other real digits. ``novelty.png`` shows the same draws in a row for each size, and
``curve.png`` the curve.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any, TYPE_CHECKING

from experiments import images, mnist
from kkt_jax.cli import flags
from kkt_jax.cli.flags import UsageError
from kkt_jax.cli.workdir import Workdir

if TYPE_CHECKING:
  from experiments.data import Split
  from experiments.measure.judge import Judge
  import kkt_jax
  from kkt_jax.auditing.samples import Samples

_FEW = 20  # draws of each class in the smaller of two sets, and those whose novelty is measured
_SEEN, _EPOCHS = 40_000, 40  # images that a classifier sees in its training, repetitions included, and most passes
_CURVES = ("new", "accuracy", "coverage", "useful", "taught")


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  seed: int = flags.flag(0, "Seed of the run, of draws and of deformations.", lower=0)
  samples_per_class: int = flags.flag(10, "Training digits of each class.", lower=2)
  sizes: str = flags.flag("0,1,1.5,2,3,4,6", "Root mean square lengths of displacements, in pixels.")
  draws: int = flags.flag(200, "Draws of each class.", lower=_FEW)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Draws, bends and measures; returns the figures."""
  sizes = _sizes(config)
  settings = mnist.Config(seed=config.seed, samples_per_class=config.samples_per_class)
  attacked = images.resolve(settings, mnist.DEFAULTS)
  import jax
  import numpy as np

  from experiments.measure import pictures
  from experiments.measure.judge import train_judge
  from kkt_jax import deformations
  from kkt_jax.auditing import matching
  from kkt_jax.auditing import pictures as audit_pictures
  from kkt_jax.auditing.samples import Samples
  from kkt_jax.cli.progress import Progress

  data = mnist.digits(attacked)
  out = Workdir(workdir, config)
  folder = out.path / "mnist"
  if not (folder / "network").exists():
    mnist.run(attacked, folder)
  reconstruction = _restored(attacked, folder, data)
  judge = train_judge(data.evaluation, seed=attacked.seed + 2, directory=folder / "judge", epochs=attacked.judge_epochs)
  (classifier,) = reconstruction.classifiers
  measure = _Measure(config.seed, data, judge, classifier, float(reconstruction.margins[0]))
  sample_key, bend_key = jax.random.split(jax.random.key(config.seed))
  y = np.tile(np.arange(10, dtype=np.int32), config.draws)  # the first of them are some of each class

  def like(real: Samples) -> Samples:
    """Real images with the labels of the draws, repeated as needed."""
    chosen = np.stack([np.resize(np.flatnonzero(real.y == label), config.draws) for label in range(10)], axis=1)
    return Samples(real.x[chosen.reshape(-1)], y)

  bend = lambda draws, size: Samples(np.asarray(deformations.warp(bend_key, draws.x, size=size)), y)
  drawn, trained = Samples(np.asarray(reconstruction.sample(sample_key, y)), y), like(data.train)
  sets = {f"draws, {size:g}": bend(drawn, size) for size in sizes}
  picture = [(f"{size:g} pixels", sets[f"draws, {size:g}"].x[: audit_pictures.COLUMNS]) for size in sizes]
  sets |= {f"training digits, {size:g}": bend(trained, size) for size in sizes}
  sets["as many other digits"] = like(matching.first_of_each_class(data.distractors, attacked.samples_per_class))
  sets["200 other digits"] = like(matching.first_of_each_class(data.distractors, _FEW))
  rows, progress = {}, Progress("sets", len(sets))
  for done, (name, draws) in enumerate(sets.items(), 1):
    rows[name] = measure(draws)
    progress.update(done, name)
  (out.path / "novelty.png").write_bytes(audit_pictures.image_rows(picture))
  curves = {name: [rows[f"draws, {size:g}"][name] for size in sizes] for name in _CURVES}
  pictures.curves(out.path / "curve.png", sizes, curves, "root mean square displacement in pixels")
  right = np.asarray(classifier.predict(jax.numpy.asarray(data.evaluation.x))).argmax(axis=1) == data.evaluation.y
  results: dict[str, Any] = {"sets": rows, "classifier": float(np.mean(right))}
  remark = f"The attacked classifier itself reads {results['classifier']:.3f} of the real digits."
  summary = matching.table(rows, list(next(iter(rows.values())))) + "\n\n" + remark
  results |= {"summary": summary, "pictures": ["novelty.png", "curve.png"]}
  out.finish({name: results[name] for name in ("sets", "classifier")})
  return results


def _sizes(config: Config) -> list[float]:
  """The lengths of displacements."""
  try:
    sizes = [float(size) for size in config.sizes.split(",")]
  except ValueError as error:
    raise UsageError(f"--sizes must be numbers, separated by commas; got {config.sizes!r}.") from error
  if not all(0 <= size < float("inf") for size in sizes):
    raise UsageError(f"--sizes must be finite and at least 0; got {config.sizes!r}.")
  return sizes


@dataclasses.dataclass(frozen=True)
class _Measure:
  """What draws are measured by: real data, a judge, and the attacked classifier with its margin as a teacher."""

  seed: int
  data: "Split"
  judge: "Judge"
  classifier: "kkt_jax.Classifier"
  margin: float

  def __call__(self, draws: "Samples") -> dict[str, float]:
    """The figures of draws that are sorted so that the first of them are some of each class."""
    import numpy as np

    from experiments.measure import comparison
    from kkt_jax import metrics
    from kkt_jax.auditing.samples import Samples

    data, few = self.data, Samples(draws.x[: 10 * _FEW], draws.y[: 10 * _FEW])
    real, features = (np.asarray(self.judge.features(images.x)) for images in (data.held_out, draws))
    filled = metrics.precision_recall(real, data.held_out.y, features, draws.y, k=5)
    return {
      **comparison.novelty(few, data.train),
      "accuracy": self.judge.accuracy(draws.x, draws.y),
      "label": metrics.faithfulness(few.x, few.y, data.train.x, data.train.y)["label_agreement"],
      **{name: filled[name] for name in ("density", "coverage", "recall")},
      "useful": self.worth(draws),
      "taught": self.worth(draws, taught=True),
      f"useful, {len(few.y)}": self.worth(few),
      f"taught, {len(few.y)}": self.worth(few, taught=True),
    }

  def worth(self, draws: "Samples", *, taught: bool = False) -> float:
    """The accuracy of a classifier that is trained on them, by their labels or by the attacked classifier's."""
    from experiments.measure.judge import soft_labels, usefulness

    lessons = soft_labels(self.classifier, self.margin, draws.x) if taught else None
    epochs = min(max(_SEEN // len(draws.y), 1), _EPOCHS)
    return usefulness(draws, self.data.evaluation, seed=self.seed, epochs=epochs, lessons=lessons)


def _restored(attacked: mnist.Config, folder: pathlib.Path, data: "Split") -> "kkt_jax.Reconstruction":
  """The network of a finished run."""
  from experiments.attack import classifiers
  import kkt_jax

  trained = classifiers.of_images(attacked, data.train.x, data.train.y, folder / "classifier", seed=attacked.seed)
  examinations = [kkt_jax.examine(classifier, seed=attacked.seed) for classifier in trained]
  recipe = images.recipe_of(attacked, examinations, drawings=True)
  network = recipe.joint(recipe.flow or kkt_jax.generators.Flow())
  return kkt_jax.Reconstruction.load(folder / "network", trained, network, examinations=examinations)


if __name__ == "__main__":
  flags.main(Config, run)
