"""Speed and memory of the stationarity loss and of a whole training step, beside a plain step of the same classifier.

For the classifier of `experiments.mnist`: the value and gradient of the stationarity residual with respect to the
generated samples, by one vector-Jacobian product and by explicit per-sample Jacobians (the reference), at two widths
and for ten and a hundred classes; a whole step of the generator's training; and what fraction of the machine's measured
rate of matrix products all of it reaches. Then how a step grows with each of its sizes
(`experiments.benchmark.scaling`). ``--peers`` instead compares with an extraction by others
(`experiments.benchmark.peers`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any, TYPE_CHECKING

from experiments import images, mnist
from kkt_jax.cli import flags
from kkt_jax.cli.flags import flag

if TYPE_CHECKING:
  from experiments.benchmark import timing
  import kkt_jax

# Greatest ratios to a plain training step that are claimed.
_MOST: Mapping[str, Mapping[str, float]] = {
  "stationarity": {"time": 2.0},
  "whole step": {"time": 3.0, "operations": 2.5},
}


@dataclasses.dataclass(frozen=True)
class Config:
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
  flags.check(config)
  if config.peers:
    from experiments.benchmark import peers

    return peers.run(config, workdir)
  import jax

  from experiments.benchmark import scaling, timing
  from experiments.measure import pictures
  from kkt_jax.cli.progress import say
  from kkt_jax.cli.workdir import Workdir

  out = Workdir(workdir, config)
  device, rate = jax.devices()[0].device_kind, timing.matmul_rate(config.repeats)
  lines = [f"{device}, {jax.device_count()} of them; rate of matrix products {rate:.0f} GFLOP/s"]
  rows: dict[str, timing.Measurement] = {}
  ratios: dict[str, dict[str, Any]] = {}

  def compare(name: str, kind: str, call: timing.Call, plain: timing.Call) -> None:
    """Times a function beside a plain training step, and says what came out."""
    own, other = (timing.measure(each, config.repeats) for each in (call, plain))
    rows.update({f"{name}: plain step": other, f"{name}: {kind}": own})
    time = timing.paired_ratio(call, plain, config.repeats)
    ratios[f"{name}: {kind}"] = {"time": time, "operations": own.gigaflops / other.gigaflops}
    say(f"{name}: {kind}: {own.milliseconds:.2f} ms, {time} plain steps")

  for width, classes in ((256, 10), (256, 100), (config.wide, 10)):
    name = f"width {width}, {classes} classes"
    classifier, x, y = problem(config, (width, width), classes)
    compare(name, "stationarity", _stationarity(classifier, x, y), _plain_step(classifier, x, y))
    if config.jacobians and (width, classes) == (256, 10):
      jacobians = _stationarity(classifier, x, y, explicit=True)
      rows[f"{name}: stationarity, explicit Jacobians"] = timing.measure(jacobians, min(config.repeats, 3))
  for kind, batch_norm in (("batch norm", True), ("weight decay", False)):
    for in_span in (False, True):
      whole, plain = whole_step(batch_norm=batch_norm, in_span=in_span)
      compare(f"mnist, {kind}", "whole step in a span" if in_span else "whole step", whole, plain)
  base, many = (rows[f"width 256, {count} classes: stationarity"] for count in (10, 100))
  growth = {"time": many.milliseconds / base.milliseconds, "memory": many.megabytes / base.megabytes}
  failures = missed(ratios)
  metrics: dict[str, Any] = {
    "device": device,
    "matmul_gigaflops_per_second": rate,
    "functions": {n: dataclasses.asdict(r) | {"of_matmul_rate": timing.fraction(r, rate)} for n, r in rows.items()},
    "over_plain_step": {name: own | {"time": own["time"]._asdict()} for name, own in ratios.items()},
    "100_classes_over_10": growth,
    "claim_holds": not failures,
    "missed": failures,
  }
  lines += [
    f"{name:<56} {row.milliseconds:9.2f} ms {row.megabytes:9.1f} MB  {timing.fraction(row, rate):5.0%} of matmul"
    for name, row in rows.items()
  ]
  lines += ["", "Over a plain training step of as many samples (5 % to 95 % of the calls, in turn):"]
  lines += [f"{name:<56} time {r['time']}, operations {r['operations']:.2f}" for name, r in ratios.items()]
  lines += [f"100 classes over 10: time {growth['time']:.2f}, memory {growth['memory']:.2f}"]
  if config.greatest:
    say("measuring how a step grows")
    sizes = scaling.sweeps(greatest=config.greatest, devices=jax.device_count())
    metrics["scaling"] = scaling.measure(sizes, repeats=min(config.repeats, 5), rate=rate)
    lines += ["", scaling.table(metrics["scaling"])]
  lines += ["", *(failures or ["Every ratio is within what is claimed."])]
  pictures.bars(out.path / "times.png", {name: row.milliseconds for name, row in rows.items()}, "milliseconds a call")
  metrics |= {"summary": "\n".join(lines), "pictures": [str(out.path / "times.png")]}
  out.log(0, {name: row.milliseconds for name, row in rows.items()})
  out.finish(metrics)
  return metrics


def missed(ratios: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """A sentence for every ratio to a plain training step that is above what is claimed.

  >>> missed({"mnist: whole step": {"time": (2.0, 1.9, 2.1), "operations": 2.6}})
  ['MISSED: mnist: whole step over a plain step, operations 2.60; claimed is at most 2.5.']
  """
  values = {name: {"time": own["time"][0], "operations": own["operations"]} for name, own in ratios.items()}
  return [
    f"MISSED: {name} over a plain step, {what} {values[name][what]:.2f}; claimed is at most {most}."
    for name in values
    for what, most in _MOST.get(name.split(": ")[-1], {}).items()
    if not values[name][what] <= most
  ]


def problem(config: Config, hidden: Sequence[int], num_classes: int) -> "tuple[kkt_jax.Classifier, Any, Any]":
  """The MNIST classifier with random weights, random samples and classes: times do not depend on their values."""
  import jax
  import jax.numpy as jnp

  import kkt_jax

  module = kkt_jax.networks.MLPClassifier(num_classes=num_classes, hidden=hidden)
  key = jax.random.key(0)
  x = jax.random.uniform(key, (config.samples, 28, 28, 1))
  classifier = kkt_jax.from_linen(module, module.init(key, x), input_shape=(28, 28, 1), weight_decay=0.02)
  return classifier, x, jnp.arange(config.samples) % num_classes


def whole_step(*, batch_norm: bool, in_span: bool = False) -> "tuple[timing.Call, timing.Call]":
  """A step of the table's training in `experiments.mnist`, and a plain step of its classifier on as many samples.

  The classifier has random weights. What a step costs does not depend on their values, but on what they reveal: of
  trained weights the span of the data is known, and samples lie in it.

  Args:
    batch_norm: whether the classifier has batch norm; weight decay if not.
    in_span: with a random span of as many dimensions as that of the run's digits; without, samples are free.
  """
  import jax
  import jax.numpy as jnp

  from experiments.benchmark import timing
  import kkt_jax
  from kkt_jax.analysis import InputSpan

  settings, examination = _examined(batch_norm)
  if in_span:
    dimensions = 10 * settings.samples_per_class - 1  # one less, as their mean is subtracted
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (784, dimensions)))[0]
    examination = dataclasses.replace(examination, span=InputSpan(basis, jnp.ones(dimensions)))
  recipe = images.recipe_of(settings, [examination], drawings=True)
  begin = kkt_jax.reconstruction.start([examination.classifier], recipe, examinations=[examination])
  step: Any = kkt_jax.reconstruction.step.make_train_step(begin.problem)
  conditions = [recipe.stationarity.conditions(examination)]
  x = jax.random.uniform(jax.random.key(1), (begin.problem.generator.batch_size, 28, 28, 1))
  call = timing.Call(lambda *arguments: step(*arguments, None), begin.state, begin.classifiers, conditions)
  return call, _plain_step(examination.classifier, x, jnp.arange(len(x)) % 10)


@functools.cache
def _examined(batch_norm: bool) -> "tuple[mnist.Config, kkt_jax.Examination]":
  """The settings of `experiments.mnist`, and what its classifier says with random weights."""
  import jax
  import jax.numpy as jnp

  import kkt_jax

  settings = images.resolve(mnist.Config(batch_norm=batch_norm), mnist.DEFAULTS)
  hidden = (settings.width, settings.second_width)
  module = kkt_jax.networks.MLPClassifier(num_classes=10, hidden=hidden, batch_norm=batch_norm)
  variables = module.init(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
  decay = None if batch_norm else settings.weight_decay
  return settings, kkt_jax.examine(kkt_jax.from_linen(module, variables, input_shape=(28, 28, 1), weight_decay=decay))


def _plain_step(classifier: "kkt_jax.Classifier", x: Any, y: Any) -> "timing.Call":
  """One step of gradient descent on the cross-entropy: what any training of this classifier costs."""
  import jax
  import jax.numpy as jnp
  import optax

  from experiments.benchmark import timing

  def step(params: Any, x: Any, y: Any) -> Any:
    def loss(params: Any) -> Any:
      logits = classifier.apply_fn(params, x)
      return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

  return timing.Call(step, classifier.params, x, y)


def _stationarity(classifier: "kkt_jax.Classifier", x: Any, y: Any, *, explicit: bool = False) -> "timing.Call":
  """The relative residual with multipliers 1 and its gradient by the samples, by one product or explicit Jacobians."""
  import jax
  import jax.numpy as jnp

  from experiments.benchmark import timing
  from kkt_jax.kkt import conditions, jacobians, losses

  def residual(x: Any, params: Any, y: Any) -> Any:
    wanted, mu = conditions.weight_decay_conditions(params), jnp.ones((x.shape[0], classifier.num_classes))
    if explicit:
      own = jacobians.per_sample_jacobians(classifier.apply_fn, params, x)
      return losses.relative_residual(wanted, losses.stationarity_sum_from_jacobians(own, y, mu))
    return losses.relative_residual(wanted, losses.stationarity_sum(classifier.apply_fn, params, x, y, mu))

  return timing.Call(jax.value_and_grad(residual), x, classifier.params, y)


if __name__ == "__main__":
  flags.main(Config, run)
