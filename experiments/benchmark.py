"""Speed and memory of the stationarity loss, beside one plain training step of the same classifier.

For the classifier of the MNIST experiment: the value and gradient of the stationarity residual with respect to the
generated samples, by one vector-Jacobian product (the default route) and by explicit per-sample Jacobians (the
reference), at two widths and for ten and a hundred classes; what share of a training step of
`experiments.mnist --nobatch_norm` is spent in the classifier; and what fraction of the machine's measured rate of
matrix products all of it reaches. Then how a step grows with each of its sizes (`experiments.scaling`).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import common, figures, images, mnist, scaling, timing
from kkt_jax import losses, multipliers, networks, training
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import weight_decay_conditions


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  samples: int = common.flag(300, "M, generated samples in the stationarity sum.", lower=2)
  repeats: int = common.flag(25, "Timed calls, of which the median is reported.", lower=1)
  wide: int = common.flag(1000, "The second width, beside 256.", lower=1)
  jacobians: bool = common.flag(True, "Also time explicit Jacobians at width 256; at M = 300 they take 10 GB.")
  greatest: int = common.flag(16384, "Greatest M when steps are timed against their sizes; 0 leaves that out.", lower=0)
  seed: int = common.flag(0, "Seed of the weights and samples; times hardly depend on it.", lower=0)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Measures, prints a table, returns the figures."""
  out = common.Workdir(workdir, config)
  rate = timing.matmul_rate(config.repeats)
  rows: dict[str, timing.Measurement] = {}
  ratios: dict[str, float] = {}
  for width, num_classes in ((256, 10), (256, 100), (config.wide, 10)):
    name = f"width {width}, {num_classes} classes"
    common.say(f"measuring {name}")
    classifier, x, y = problem(config, (width, width), num_classes)
    rows[f"{name}: plain training step"] = timing.measure(_plain_step(classifier), config.repeats, x, y)
    rows[f"{name}: stationarity, vjp"] = timing.measure(_stationarity(classifier, "vjp"), config.repeats, x, y)
    rows[f"{name}: tied and relaxed stationarity"] = timing.measure(
      _tied_stationarity(classifier), config.repeats, x, y
    )
    ratios[name] = timing.paired_ratio(_stationarity(classifier, "vjp"), _plain_step(classifier), config.repeats, x, y)
    if config.jacobians and (width, num_classes) == (256, 10):
      jacobian = timing.measure(_stationarity(classifier, "jacobian"), min(config.repeats, 3), x, y)
      rows[f"{name}: stationarity, explicit Jacobians"] = jacobian

  table = {name: dataclasses.asdict(row) | {"of_matmul_rate": timing.fraction(row, rate)} for name, row in rows.items()}
  step, generator_only = generator_step(config)

  def flops_ratio(name: str, function: str) -> float:
    return rows[f"{name}: {function}"].gigaflops / rows[f"{name}: plain training step"].gigaflops

  base, many = (rows[f"width 256, {count} classes: stationarity, vjp"] for count in (10, 100))
  metrics: dict[str, Any] = {
    "matmul_gigaflops_per_second": rate,
    "functions": table,
    "ratio_of_stationarity_to_plain_step": ratios,
    "ratio_in_operations": {name: flops_ratio(name, "stationarity, vjp") for name in ratios},
    "ratio_in_operations_tied_and_relaxed": {
      name: flops_ratio(name, "tied and relaxed stationarity") for name in ratios
    },
    "ratio_of_100_classes_to_10": {
      "time": many.milliseconds / base.milliseconds,
      "memory": many.megabytes / base.megabytes,
    },
    "generator_step": {
      "milliseconds": step,
      "milliseconds_of_the_generator_alone": generator_only,
      "share_spent_in_the_classifier": 1 - generator_only / step,
    },
  }
  metrics["claim_holds"] = bool(
    max(metrics["ratio_of_stationarity_to_plain_step"].values()) <= 2.0
    and metrics["generator_step"]["share_spent_in_the_classifier"] >= 0.5
  )
  for name, row in table.items():
    common.say(
      f"{name:<52} {row['milliseconds']:9.2f} ms {row['megabytes']:9.1f} MB  {row['of_matmul_rate']:5.0%} of matmul"
    )
  if config.greatest:
    common.say("measuring how a step grows")
    sizes = scaling.sweeps(greatest=config.greatest, devices=jax.device_count())
    metrics["scaling"] = scaling.measure(sizes, repeats=min(config.repeats, 5), rate=rate)
    text = scaling.table(metrics["scaling"])
    (out.path / "scaling.md").write_text(text + "\n")
    common.say(text)
  figures.bars(out.path / "times.png", {name: row.milliseconds for name, row in rows.items()}, "milliseconds a call")
  out.log(0, {name: row.milliseconds for name, row in rows.items()})
  out.finish(metrics)
  return metrics


def problem(config: Config, hidden: Sequence[int], num_classes: int) -> tuple[Classifier, jax.Array, jax.Array]:
  """The MNIST classifier with random weights, random samples and labels: times do not depend on their values."""
  module = networks.MLPClassifier(num_classes=num_classes, hidden=hidden, gate_sharpness=30.0)
  key = jax.random.key(config.seed)
  x = jax.random.uniform(key, (config.samples, 28, 28, 1))
  classifier = networks.from_module(
    module, {"params": module.init(key, x)["params"]}, input_shape=(28, 28, 1), labels=range(num_classes)
  )
  return classifier, x, jnp.arange(config.samples) % num_classes


def generator_step(config: Config) -> tuple[float, float]:
  """Milliseconds of a step of `experiments.mnist --nobatch_norm`, and of it with a loss that skips the classifier."""
  config_of_step = common.resolve(mnist.Config(batch_norm=False))
  classifier, _, _ = problem(config, (config_of_step.width, config_of_step.second_width), 10)
  method, state, conditions = images.start(config_of_step, [classifier])
  step = training.make_train_step(method).call
  whole = timing.measure(step, config.repeats, state, [classifier], conditions)

  def without_classifier(state: training.TrainState) -> PyTree:
    y = training.balanced_labels(classifier, method.batch_size)
    t = jnp.zeros_like(y)
    assert state.noise is not None  # it trains on fixed noise

    def loss(theta: PyTree, noise: jax.Array) -> jax.Array:
      x, _ = method.generate(theta, state.statistics, noise, y, t, True)
      return jnp.mean(jnp.square(x))

    gradient = jax.grad(loss)(state.params["theta"], state.noise[0])
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = method.optimizer.update({**zeros, "theta": gradient}, state.opt_state, state.params)
    return optax.apply_updates(state.params, updates)

  return whole.milliseconds, timing.measure(without_classifier, config.repeats, state).milliseconds


def _plain_step(classifier: Classifier) -> Callable[..., PyTree]:
  """One step of gradient descent on the cross-entropy: what any training of this classifier costs."""

  def step(x: jax.Array, y: jax.Array) -> PyTree:
    def loss(params: PyTree) -> jax.Array:
      logits = classifier.apply_fn(params, x)
      return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))

    gradient = jax.grad(loss)(classifier.params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, classifier.params, gradient)

  return step


def _stationarity(classifier: Classifier, route: str) -> Callable[..., PyTree]:
  """The relative residual with given multipliers and its gradient by the samples."""
  conditions = weight_decay_conditions(classifier.params)

  def residual(x: jax.Array, y: jax.Array) -> jax.Array:
    mu = jnp.ones((x.shape[0], classifier.num_classes))
    sums = losses.stationarity_sum(classifier.apply_fn, classifier.params, x, y, mu, route=route)
    return losses.stationarity_residual(conditions, sums).relative

  return jax.value_and_grad(residual)


def _tied_stationarity(classifier: Classifier) -> Callable[..., PyTree]:
  """The same with multipliers tied to the softmax and relaxed gates, through which gradients flow as well."""
  conditions = weight_decay_conditions(classifier.params)

  def residual(x: jax.Array, y: jax.Array) -> jax.Array:
    mu = multipliers.from_softmax(classifier.gradient_fn(classifier.params, x))
    sums = losses.stationarity_sum(classifier.gradient_fn, classifier.params, x, y, mu)
    return losses.stationarity_residual(conditions, sums).relative

  return jax.value_and_grad(residual)


if __name__ == "__main__":
  common.main(Config, run)
