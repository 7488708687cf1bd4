"""Speed and memory of the stationarity loss and of a whole training step, beside a plain step of the same classifier.

For the classifier of `experiments.mnist`: the value and gradient of the stationarity residual with respect to the
generated samples, by one vector-Jacobian product and by explicit per-sample Jacobians (the reference), at two widths
and for ten and a hundred classes; a whole step of the generator's training; and what fraction of the machine's measured
rate of matrix products all of it reaches. Then how a step grows with each of its sizes
(`experiments.benchmark.scaling`). ``--peers`` instead compares with an extraction by others
(`experiments.benchmark.peers`).
"""

from collections.abc import Mapping
import dataclasses
import pathlib
from typing import Any

from kkt_jax.cli import flags
from kkt_jax.cli.flags import flag

# Greatest ratios to a plain training step that are claimed.
_MOST: Mapping[str, Mapping[str, float]] = {
  "stationarity": {"time": 2.0},
  "whole step": {"time": 3.0, "operations": 2.5},
  "whole step in 99 dimensions": {"time": 2.2, "operations": 1.5},
  "whole step in 499 dimensions": {"time": 3.3, "operations": 2.5},
}


@dataclasses.dataclass(frozen=True)
class Config(flags.Checked):
  """Settings of the run; each is a flag of the same name."""

  samples: int = flag(300, "M, generated samples in the stationarity sum.", lower=2, upper=1_000_000)
  repeats: int = flag(25, "Timed calls, of which the median is reported.", lower=1)
  wide: int = flag(1000, "The second width, beside 256.", lower=1, upper=100_000)
  jacobians: bool = flag(True, "Also time explicit Jacobians at width 256; at M = 300 they take 10 GB.")
  greatest: int = flag(16384, "Greatest M when steps are timed against their sizes; 0 leaves that out.", lower=0)
  peers: bool = flag(False, "Instead, compare with the extraction of Haim et al. in PyTorch, if that is installed.")
  peer_seconds: float = flag(300.0, "With --peers: seconds of each run.", lower=1.0)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Measures; returns the figures."""
  if config.peers:
    from experiments.benchmark import peers

    return peers.run(config, workdir)
  import jax

  from experiments.benchmark import scaling, steps, timing
  from kkt_jax.cli.progress import say
  from kkt_jax.cli.workdir import Workdir

  out = Workdir(workdir, config)
  device, rate = jax.devices()[0].device_kind, timing.matmul_rate(config.repeats)
  lines = [f"{device}, {jax.device_count()} of them; rate of matrix products {rate:.0f} GFLOP/s"]
  rows: dict[str, timing.Measurement] = {}
  ratios: dict[str, dict[str, Any]] = {}

  def compare(name: str, kind: str, call: timing.Call, plain: timing.Call) -> None:
    """Times a function beside a plain training step, and says what came out."""
    cost, other = (timing.measure(each, config.repeats) for each in (call, plain))
    rows.update({f"{name}: plain step": other, f"{name}: {kind}": cost})
    time = timing.paired_ratio(call, plain, config.repeats)
    ratios[f"{name}: {kind}"] = {"time": time, "operations": cost.gigaflops / other.gigaflops}
    say(f"{name}: {kind}: {cost.milliseconds:.2f} ms, {time} plain steps")

  for width, classes in ((256, 10), (256, 100), (config.wide, 10)):
    name = f"width {width}, {classes} classes"
    classifier, x, y = steps.problem(config.samples, (width, width), classes)
    compare(name, "stationarity", steps.stationarity(classifier, x, y), steps.plain_step(classifier, x, y))
    if config.jacobians and (width, classes) == (256, 10):
      jacobians = steps.stationarity(classifier, x, y, explicit=True)
      rows[f"{name}: stationarity, explicit Jacobians"] = timing.measure(jacobians, min(config.repeats, 3))
  for kind, batch_norm in (("batch norm", True), ("weight decay", False)):
    for dimensions in (0, 99, 499):  # of spans of 100 and 500 digits
      where = f" in {dimensions} dimensions" if dimensions else ""
      compare(f"mnist, {kind}", f"whole step{where}", *steps.whole_step(batch_norm=batch_norm, dimensions=dimensions))
  base, many = (rows[f"width 256, {count} classes: stationarity"] for count in (10, 100))
  growth = {"time": many.milliseconds / base.milliseconds, "memory": many.megabytes / base.megabytes}
  failures = missed(ratios)
  metrics: dict[str, Any] = {
    "device": device,
    "matmul_gigaflops_per_second": rate,
    "functions": {n: dataclasses.asdict(r) | {"of_matmul_rate": timing.fraction(r, rate)} for n, r in rows.items()},
    "over_plain_step": {name: ratio | {"time": ratio["time"]._asdict()} for name, ratio in ratios.items()},
    "100_classes_over_10": growth,
    "claim_holds": not failures,
    "missed": failures,
  }
  lines += _lines(rows, ratios, growth, rate)
  if config.greatest:
    say("measuring how a step grows")
    sizes = scaling.sweeps(greatest=config.greatest, devices=jax.device_count())
    metrics["scaling"] = scaling.measure(sizes, repeats=min(config.repeats, 5), rate=rate)
    lines += ["", scaling.table(metrics["scaling"])]
  lines += ["", *(failures or ["Every ratio is within what is claimed."])]
  metrics["summary"] = "\n".join(lines)
  out.finish(metrics)
  return metrics


def _lines(rows: Mapping[str, Any], ratios: Mapping[str, Any], growth: Mapping[str, float], rate: float) -> list[str]:
  """The figures of steps and of their ratios, for people."""
  from experiments.benchmark import timing

  lines = [
    f"{name:<56} {row.milliseconds:9.2f} ms {row.megabytes:9.1f} MB  {timing.fraction(row, rate):5.0%} of matmul"
    for name, row in rows.items()
  ]
  lines += ["", "Over a plain training step of as many samples (5 % to 95 % of the calls, in turn):"]
  lines += [f"{name:<56} time {r['time']}, operations {r['operations']:.2f}" for name, r in ratios.items()]
  lines += [f"100 classes over 10: time {growth['time']:.2f}, memory {growth['memory']:.2f}"]
  return lines


def missed(ratios: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """A sentence for every ratio to a plain training step that is above what is claimed.

  >>> missed({"mnist: whole step": {"time": (2.0, 1.9, 2.1), "operations": 2.6}})
  ['MISSED: mnist: whole step over a plain step, operations 2.60; claimed is at most 2.5.']
  """
  return [
    f"MISSED: {name} over a plain step, {what} {value:.2f}; claimed is at most {most}."
    for name, ratio in ratios.items()
    for what, most in _MOST.get(name.split(": ")[-1], {}).items()
    if not (value := ratio["time"][0] if what == "time" else ratio["operations"]) <= most  # NaN is missed, too
  ]


if __name__ == "__main__":
  flags.main(Config, run)
