"""Speed and memory of the stationarity loss and of a whole training step, beside a plain step of the same classifier.

For the classifier of `experiments.mnist`: the value and gradient of the stationarity residual with respect to the
generated samples, by one vector-Jacobian product and by explicit per-sample Jacobians (the reference), at two widths
and for ten and a hundred classes; a whole step of the generator's training; and what fraction of the machine's measured
rate of matrix products all of it reaches. Then how a step grows with each of its sizes
(`experiments.benchmark.scaling`).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any, TYPE_CHECKING

from experiments import images, mnist
from experiments.harness import flags
from experiments.harness.flags import flag

if TYPE_CHECKING:
  import kkt_jax


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  samples: int = flag(300, "M, generated samples in the stationarity sum.", lower=2, upper=1_000_000)
  repeats: int = flag(25, "Timed calls, of which the median is reported.", lower=1)
  wide: int = flag(1000, "The second width, beside 256.", lower=1, upper=100_000)
  jacobians: bool = flag(True, "Also time explicit Jacobians at width 256; at M = 300 they take 10 GB.")
  greatest: int = flag(16384, "Greatest M when steps are timed against their sizes; 0 leaves that out.", lower=0)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Measures; returns the figures."""
  flags.check(config)
  import jax

  from experiments.benchmark import scaling, timing
  from experiments.harness.progress import say
  from experiments.harness.workdir import Workdir
  from experiments.measure import pictures

  out = Workdir(workdir, config)
  rate = timing.matmul_rate(config.repeats)
  rows: dict[str, timing.Measurement] = {}
  ratios: dict[str, dict[str, float]] = {}
  for width, classes in ((256, 10), (256, 100), (config.wide, 10)):
    name = f"width {width}, {classes} classes"
    say(f"measuring {name}")
    classifier, x, y = problem(config, (width, width), classes)
    plain, vjp = _plain_step(classifier), _stationarity(classifier)
    rows[f"{name}: plain training step"] = timing.measure(plain, config.repeats, x, y)
    rows[f"{name}: stationarity, vjp"] = timing.measure(vjp, config.repeats, x, y)
    ratios[name] = {
      "stationarity, time": timing.paired_ratio(vjp, plain, config.repeats, x, y),
      "stationarity, operations": rows[f"{name}: stationarity, vjp"].gigaflops
      / rows[f"{name}: plain training step"].gigaflops,
    }
    if config.jacobians and (width, classes) == (256, 10):
      by_jacobians = _stationarity(classifier, explicit=True)
      jacobian = timing.measure(by_jacobians, min(config.repeats, 3), x, y)
      rows[f"{name}: stationarity, explicit Jacobians"] = jacobian
  base, many = (rows[f"width 256, {count} classes: stationarity, vjp"] for count in (10, 100))
  ratios["100 classes over 10"] = {
    "time": many.milliseconds / base.milliseconds,
    "memory": many.megabytes / base.megabytes,
  }
  for kind, batch_norm in (("batch norm", True), ("weight decay", False)):
    say(f"measuring a whole step, {kind}")
    whole, plain_step = whole_step(config, batch_norm=batch_norm)
    rows |= {f"mnist, {kind}: whole step": whole, f"mnist, {kind}: plain step": plain_step}
    ratios[f"mnist, {kind}: whole step over plain step"] = {
      "time": whole.milliseconds / plain_step.milliseconds,
      "operations": whole.gigaflops / plain_step.gigaflops,
    }
  metrics: dict[str, Any] = {
    "matmul_gigaflops_per_second": rate,
    "functions": {n: dataclasses.asdict(r) | {"of_matmul_rate": timing.fraction(r, rate)} for n, r in rows.items()},
    "ratios": ratios,
    "claim_holds": max(own.get("stationarity, time", 0.0) for own in ratios.values()) <= 2.0,
  }
  lines = [
    f"{name:<52} {row.milliseconds:9.2f} ms {row.megabytes:9.1f} MB  {timing.fraction(row, rate):5.0%} of matmul"
    for name, row in rows.items()
  ]
  lines += [f"{name}: {', '.join(f'{k} {v:.2f}' for k, v in own.items())}" for name, own in ratios.items()]
  if config.greatest:
    say("measuring how a step grows")
    sizes = scaling.sweeps(greatest=config.greatest, devices=jax.device_count())
    metrics["scaling"] = scaling.measure(sizes, repeats=min(config.repeats, 5), rate=rate)
    lines += ["", scaling.table(metrics["scaling"])]
  pictures.bars(out.path / "times.png", {name: row.milliseconds for name, row in rows.items()}, "milliseconds a call")
  metrics |= {"summary": "\n".join(lines), "pictures": [str(out.path / "times.png")]}
  out.log(0, {name: row.milliseconds for name, row in rows.items()})
  out.finish(metrics)
  return metrics


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


def whole_step(config: Config, *, batch_norm: bool) -> "tuple[Any, Any]":
  """Times of a step of `experiments.mnist`, and of a plain step of its classifier on as many samples."""
  import jax
  import jax.numpy as jnp

  from experiments.benchmark import timing
  import kkt_jax

  settings = images.resolve(mnist.Config(batch_norm=batch_norm), mnist.DEFAULTS)
  module = kkt_jax.networks.MLPClassifier(
    num_classes=10, hidden=(settings.width, settings.second_width), batch_norm=batch_norm
  )
  variables = module.init(jax.random.key(0), jnp.zeros((2, 28, 28, 1)))
  decay = None if batch_norm else settings.weight_decay
  classifier = kkt_jax.from_linen(module, variables, input_shape=(28, 28, 1), weight_decay=decay)
  examinations = [kkt_jax.examine(classifier)]
  recipe = images.recipe_of(settings, examinations, drawings=True)
  begin = kkt_jax.Reconstruction.begin([classifier], recipe, examinations=examinations)
  step: Any = kkt_jax.training.make_train_step(begin.problem)
  conditions = [recipe.stationarity.conditions(own) for own in examinations]
  x = jax.random.uniform(jax.random.key(1), (begin.problem.generator.batch_size, 28, 28, 1))
  y = jnp.arange(len(x)) % 10
  call = lambda *arguments: step(*arguments, None)
  whole = timing.measure(call, config.repeats, begin.state, begin.classifiers, conditions)
  return whole, timing.measure(_plain_step(classifier), config.repeats, x, y)


def _plain_step(classifier: "kkt_jax.Classifier") -> Callable[..., Any]:
  """One step of gradient descent on the cross-entropy: what any training of this classifier costs."""
  import jax
  import jax.numpy as jnp
  import optax

  def step(x: Any, y: Any) -> Any:
    def loss(params: Any) -> Any:
      logits = classifier.apply_fn(params, x)
      return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))

    gradient = jax.grad(loss)(classifier.params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, classifier.params, gradient)

  return step


def _stationarity(classifier: "kkt_jax.Classifier", *, explicit: bool = False) -> Callable[..., Any]:
  """The relative residual with multipliers 1 and its gradient by the samples, by one product or explicit Jacobians."""
  import jax
  import jax.numpy as jnp

  from kkt_jax import conditions, jacobians, losses

  wanted = conditions.weight_decay_conditions(classifier.params)

  def residual(x: Any, y: Any) -> Any:
    mu = jnp.ones((x.shape[0], classifier.num_classes))
    if explicit:
      own = jacobians.per_sample_jacobians(classifier.apply_fn, classifier.params, x)
      return losses.relative_residual(wanted, losses.stationarity_sum_from_jacobians(own, y, mu))
    sums = losses.stationarity_sum(classifier.apply_fn, classifier.params, x, y, mu)
    return losses.relative_residual(wanted, sums)

  return jax.value_and_grad(residual)


if __name__ == "__main__":
  flags.main(Config, run)
