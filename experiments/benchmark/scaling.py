"""How a training step grows: time against samples, parameters, classes, classifiers and devices, and flat memory.

Each sweep changes one number and holds the others; the exponent is the slope of the
logarithm of the time against the logarithm of that number: 1 is proportional, 0 is free.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import timing
from kkt_jax import (
  examination,
  generators,
  losses,
  networks,
  parallel,
  recipes,
  reconstruction,
  subject,
  terms,
  training,
)
from kkt_jax.classifier import Classifier

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
  """

  samples: int = 256
  width: int = 256
  classes: int = 10
  classifiers: int = 1
  devices: int = 1
  microbatch: int | None = None


def step(size: Size) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """A training step of a generator network without batch norm and tied multipliers, and its arguments."""
  classifiers = []
  for t in range(size.classifiers):
    module = networks.MLPClassifier(num_classes=size.classes, hidden=(size.width, size.width))
    variables = module.init(jax.random.key(t), jnp.zeros((1, *_SHAPE)))
    labels = range(t * size.classes, (t + 1) * size.classes)
    classifiers.append(subject.from_linen(module, variables, input_shape=_SHAPE, labels=labels, weight_decay=0.02))

  def module_of(examinations: Sequence[examination.Examination]) -> generators.MLPGenerator:
    return generators.MLPGenerator(
      sample_shape=_SHAPE,
      num_labels=size.classes * size.classifiers,
      num_classifiers=size.classifiers,
      hidden=(64,),
      batch_norm=False,
    )

  recipe = recipes.Recipe(
    generator=generators.network(module_of, noise=generators.normal_noise(8), noise_dim=8, batch_size=size.samples),
    multipliers=recipes.softmax_multipliers(),
    stationarity=recipes.Stationarity(1.0, losses.relative_residual, gate_sharpness=30.0),
    terms={"duality": terms.Term(1.0, terms.duality(delta=0.1))},
    schedule=recipes.Schedule(margin=1.0),
  )
  mesh = parallel.device_mesh(jax.devices()[: size.devices]) if size.devices > 1 else None
  begin = reconstruction.Reconstruction.begin(classifiers, recipe, microbatch_size=size.microbatch, mesh=mesh)
  one = training.make_train_step(begin.problem)
  arguments = (begin.state, begin.classifiers, begin.conditions)
  call = lambda state, classifiers, conditions: one(state, classifiers, conditions, None)
  return call, parallel.replicate(arguments, mesh) if mesh else arguments


def sweeps(*, greatest: int, devices: int) -> dict[str, list[Size]]:
  """The sizes of each sweep, by what it changes.

  Args:
    greatest: M of the longest sweep over samples.
    devices: how many there are.
  """
  samples = [m for m in (64, 256, 1024, 4096, 16384) if m <= greatest] or [greatest]
  sizes = {
    "samples M": [Size(samples=m) for m in samples if m <= 4096],
    "samples M, by microbatches": [Size(samples=m, microbatch=min(_MICROBATCH, m)) for m in samples],
    "parameters P": [Size(width=w) for w in (128, 256, 512, 1024)],
    "classes C": [Size(classes=c) for c in (2, 10, 50, 200)],
    "classifiers T": [Size(classifiers=t) for t in (1, 2, 4)],
  }
  shares = [d for d in (1, 2, 4, 8, 16, 32, 64) if d <= devices]
  return sizes | ({"devices": [Size(samples=1024, devices=d) for d in shares]} if devices > 1 else {})


def measure(sizes: Mapping[str, Sequence[Size]], *, repeats: int, rate: float) -> dict[str, Any]:
  """Times every step of every sweep.

  Args:
    sizes: from `sweeps`.
    repeats: timed calls of each.
    rate: the machine's measured rate of matrix products, in 1e9 operations a second.

  Returns:
    For each sweep its ``rows`` and the ``exponent`` of the time (none for one size only). A row has what was changed,
    ``milliseconds``, ``megabytes`` of working memory, ``gigaflops`` and ``gigabytes`` that one step computes and moves
    by XLA's count (which counts a loop once: not given by microbatches), and the fraction ``of_matmul_rate``.
  """
  results: dict[str, Any] = {}
  for name, chosen in sizes.items():
    rows = []
    for size in chosen:
      call, arguments = step(size)
      cost = timing.measure(call, repeats, *arguments)
      row = {"size": _changed(name, size, arguments[1]), **dataclasses.asdict(cost)}
      if size.microbatch is None:
        row["of_matmul_rate"] = timing.fraction(cost, rate)
      else:
        row = {key: value for key, value in row.items() if key not in ("gigaflops", "gigabytes")}
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
  lines = ["| | size | time | memory | operations | moved | of the matmul rate | exponent of time |", "|---" * 8 + "|"]
  for name, sweep in results.items():
    for index, row in enumerate(sweep["rows"]):
      known = (
        f"{row['gigaflops']:.2f} G | {row['gigabytes']:.2f} GB | {row['of_matmul_rate']:.0%}"
        if "gigabytes" in row
        else "| |"
      )
      slope = sweep["exponent"] if index == len(sweep["rows"]) - 1 else None
      lines.append(
        f"| {name} | {row['size']:,} | {row['milliseconds']:.1f} ms | {row['megabytes']:.1f} MB | {known} |"
        f" {'' if slope is None else f'{slope:.2f}'} |"
      )
  return "\n".join(lines)


def _changed(name: str, size: Size, classifiers: Sequence[Classifier]) -> int:
  """What a sweep changes."""
  if name == "parameters P":
    return sum(leaf.size for leaf in jax.tree.leaves(classifiers[0].params))
  return {"samples M": size.samples, "classes C": size.classes, "classifiers T": size.classifiers}.get(
    name, size.devices if name == "devices" else size.samples
  )
