"""How a training step grows: time against samples, parameters, classes, classifiers and devices, and flat memory.

Each sweep changes one number and holds the others; the exponent is the slope of the
logarithm of the time against the logarithm of that number: 1 is proportional, 0 is free.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from experiments.benchmark import steps, timing
from kkt_jax import generators, reconstruction, sharding
from kkt_jax.analysis import Examination
from kkt_jax.classifiers import Classifier
from kkt_jax.kkt import losses, weight_decay_conditions
from kkt_jax.reconstruction import recipes, terms

_SHAPE = (28, 28, 1)
_MICROBATCH = 64


@dataclasses.dataclass(frozen=True)
class Size:
  """What a training step depends on.

  Attributes:
    samples: M, for each classifier.
    width: of both hidden layers of a classifier.
    classes: C.
    classifiers: T.
    devices: among which the samples are split.
    microbatch: samples that are in memory at once; all if None.
    table: whether each sample is a free one of a table, and not made by a network.
  """

  samples: int = 256
  width: int = 256
  classes: int = 10
  classifiers: int = 1
  devices: int = 1
  microbatch: int | None = None
  table: bool = False

  @property
  def parameters(self) -> int:
    """P, of one classifier."""
    shapes = ((np.prod(_SHAPE), self.width), (self.width, self.width), (self.width, self.classes))
    return int(sum((inputs + 1) * outputs for inputs, outputs in shapes))


def step(size: Size) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """A training step of a generator without batch norm and tied multipliers, and its arguments."""
  groups = [range(t * size.classes, (t + 1) * size.classes) for t in range(size.classifiers)]
  make = lambda t: steps.mlp((size.width, size.width), size.classes, seed=t, labels=groups[t], weight_decay=0.02)
  classifiers = list(map(make, range(size.classifiers)))
  network = generators.MLPGenerator(
    sample_shape=_SHAPE,
    num_labels=size.classes * size.classifiers,
    num_classifiers=size.classifiers,
    hidden=(64,),
    batch_norm=False,
  )
  noise = generators.normal_noise(8)
  of_network = generators.network(lambda examinations: network, noise=noise, noise_dim=8, batch_size=size.samples)
  recipe = recipes.Recipe(
    generator=generators.table(codes=size.samples // size.classes) if size.table else of_network,
    multipliers=recipes.softmax_multipliers(),
    stationarity=recipes.Stationarity(1.0, losses.relative_residual, gate_sharpness=30.0),
    terms={"duality": terms.Term(1.0, terms.duality(delta=0.1))},
    schedule=recipes.Schedule(margin=1.0),
  )
  mesh = sharding.device_mesh(jax.devices()[: size.devices]) if size.devices > 1 else None
  begin = reconstruction.start(
    classifiers, recipe, examinations=list(map(_unexamined, classifiers)), microbatch_size=size.microbatch, mesh=mesh
  )
  call, *arguments = steps.training_step(begin)
  return call, sharding.replicate(tuple(arguments), mesh) if mesh else tuple(arguments)


def _unexamined(classifier: Classifier) -> Examination:
  """Nothing but the condition: examining wide classifiers takes minutes, and a step does not need it."""
  return Examination.unexamined(classifier, "weight_decay", weight_decay_conditions(classifier.params))


def sweeps(*, greatest: int, devices: int) -> dict[str, list[tuple[int, Size]]]:
  """What each sweep changes and the size it gives, by a name for people.

  Args:
    greatest: M of the longest sweep over samples.
    devices: how many there are.
  """
  samples = [m for m in (64, 256, 1024, 4096, 16384) if m <= greatest] or [greatest]
  sizes = [Size(width=width) for width in (128, 256, 512, 1024, 4000)]
  shares = [d for d in (1, 2, 4, 8, 16, 32, 64) if d <= devices]
  return {
    "samples M": [(m, Size(samples=m)) for m in samples if m <= 4096],
    "samples M, by microbatches": [(m, Size(samples=m, microbatch=min(_MICROBATCH, m))) for m in samples],
    "digits in a table": [(n, Size(samples=n, table=True)) for n in (100, 500, 5000) if n <= greatest],
    "parameters P": [(size.parameters, size) for size in sizes],
    "classes C": [(c, Size(classes=c)) for c in (2, 10, 50, 200)],
    "classifiers T": [(t, Size(classifiers=t)) for t in (1, 2, 4)],
  } | ({"devices": [(d, Size(samples=1024, devices=d)) for d in shares]} if devices > 1 else {})


def measure(sizes: Mapping[str, Sequence[tuple[int, Size]]], *, repeats: int, rate: float) -> dict[str, Any]:
  """Times every step of every sweep.

  Args:
    sizes: from `sweeps`.
    repeats: timed calls of each.
    rate: the machine's measured rate of matrix products, in 1e9 operations a second.

  Returns:
    For each sweep its ``rows`` and the ``exponent`` of the time (none for one size only). A row has ``size``, which was
    changed, ``milliseconds``, ``megabytes`` of working memory, ``gigaflops`` and ``gigabytes`` that one step computes
    and moves by XLA's count, and the fraction ``of_matmul_rate``. XLA counts a loop once: by microbatches the last
    three are None.
  """
  results: dict[str, Any] = {}
  for name, chosen in sizes.items():
    rows = []
    for number, size in chosen:
      call, arguments = step(size)
      cost = timing.measure(timing.Call(call, *arguments), repeats)
      row = {"size": number, **dataclasses.asdict(cost), "of_matmul_rate": timing.fraction(cost, rate)}
      if size.microbatch is not None:
        row |= dict.fromkeys(("gigaflops", "gigabytes", "of_matmul_rate"))
      rows.append(row)
    results[name] = {"rows": rows, "exponent": exponent([r["size"] for r in rows], [r["milliseconds"] for r in rows])}
  return results


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float | None:
  """The slope of log time against log size; None for fewer than two sizes.

  >>> exponent([1, 10, 100], [3, 30, 300])
  1.0
  """
  if len(sizes) < 2:
    return None
  return round(float(np.polyfit(np.log(sizes), np.log(times), 1)[0]), 6)


def table(results: Mapping[str, Any]) -> str:
  """The figures as a Markdown table for people."""
  units = {"milliseconds": " ms", "megabytes": " MB", "gigaflops": " G", "gigabytes": " GB", "of_matmul_rate": ""}
  lines = ["| | size | time | memory | operations | moved | of the matmul rate | exponent of time |", "|---" * 8 + "|"]
  for name, sweep in results.items():
    slopes = [None] * (len(sweep["rows"]) - 1) + [sweep["exponent"]]
    for row, slope in zip(sweep["rows"], slopes, strict=True):
      cells = ["" if row[key] is None else f"{row[key]:.2f}{unit}" for key, unit in units.items()]
      last = "" if slope is None else f"{slope:.2f}"
      lines.append("| " + " | ".join([name, f"{row['size']:,}", *cells, last]) + " |")
  return "\n".join(lines)
