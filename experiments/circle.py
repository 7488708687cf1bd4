"""Figs. 4 and 5: points on a circle, recovered from the weights of classifiers of the plane.

Eighteen points lie evenly on the unit circle in three classes. A classifier, with batch norm or with weight decay, is
trained on them by full-batch gradient descent, the points are forgotten, and a generator is trained so that the
classifier's conditions hold for what it generates. ``fig4.png`` shows the points, the classifier's regions and
generated samples.

Training has two phases. In the first, several generators are trained to lie where the classifier can have seen data at
all (its stored statistics, its common margin), and the one with the least loss goes on; in the second the stationarity
joins. Nothing in either looks at the points.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import circle_evaluation, common, ingredients
from experiments.circle_classifier import circle, input_moments, NUM_CLASSES, NUM_POINTS, trained_classifier
from experiments.circle_config import check, Config, SHARED, STEPS_PER_CALL
from kkt_jax import generators, homogeneity, networks, priors, training
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import Conditions
from kkt_jax.last_layer import typical_margin


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the experiment; returns the final metrics."""
  config = common.resolve(config)
  check(config)
  out = common.Workdir(workdir, config, tensorboard=config.tensorboard)
  shared = ingredients.shared_folder(config.shared_dir, out.path, {name: getattr(config, name) for name in SHARED})
  x, y = circle(config.labels)
  parts = [np.arange(NUM_POINTS) // NUM_CLASSES % config.classifiers == t for t in range(config.classifiers)]
  classifiers = [
    trained_classifier(config, x[part], y[part], t, shared / "classifier" / str(t)) for t, part in enumerate(parts)
  ]
  conditions = ingredients.conditions_of(classifiers, _rates(config, classifiers), weight_decay=config.weight_decay)
  method, state = train_generator(config, classifiers, conditions, out)  # sees no points
  # Whatever the generator was trained with, it is measured by the same conditions.
  rates = _rates(dataclasses.replace(config, rule="balanced"), classifiers)
  conditions = ingredients.conditions_of(classifiers, rates, weight_decay=config.weight_decay)
  data = (x, y, parts)
  return circle_evaluation.evaluate(out, data, classifiers, conditions, method, state, seed=config.seed)


def _rates(config: Config, classifiers: Sequence[Classifier]) -> list[homogeneity.RateSolution]:
  """Lambda, where there is batch norm; it is not needed with weight decay."""
  x = jax.random.normal(jax.random.key(config.seed), (40, 2))
  return ingredients.rates_of(classifiers, x, rule=config.rule) if config.batch_norm else []


def train_generator(
  config: Config, classifiers: Sequence[Classifier], conditions: Sequence[Conditions], out: common.Workdir
) -> tuple[training.Method, training.TrainState]:
  """Trains the generator from the classifiers alone, or resumes; no points enter this function."""
  init, generate = _generator(config, classifiers, jitter=config.jitter)
  _, generate_calmly = _generator(config, classifiers, jitter=config.final_jitter)
  first = _method(config, classifiers, generate, stationarity=False)
  final = _method(config, classifiers, generate_calmly, stationarity=True)
  with Checkpointer(out.path / "generator") as checkpointer:
    resuming = bool(checkpointer.steps())
  # A resumed run needs a state of the right shapes only, and one without training nothing else.
  start = _start if resuming or not config.steps else _best_start
  state = start(config, first, init, classifiers, conditions)
  state = common.train(
    final,
    state,
    classifiers,
    conditions,
    out,
    num_steps=config.steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    steps_per_call=STEPS_PER_CALL,
  )
  return final, state


def _method(
  config: Config,
  classifiers: Sequence[Classifier],
  generate: training.GenerateFn,
  *,
  stationarity: bool,
) -> training.Method:
  _, factors = _moments(classifiers)
  size = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(factors), axis=2)))  # a coordinate's standard deviation
  ramp = optax.schedules.linear_schedule(0.0, config.stationarity_weight, config.steps // 10, config.restart_steps)
  schedule = optax.schedules.cosine_decay_schedule(config.learning_rate, max(config.steps, 1), alpha=0.02)
  hold = config.steps // 5
  batch_size = config.codes * NUM_CLASSES
  rates = _rates(config, classifiers)

  def repulsion(classifier: Classifier, batch: training.Batch) -> jax.Array:
    del classifier
    return priors.repulsion(batch.x / size, batch.y, bandwidth=config.repulsion_bandwidth)

  def optimizer(peak: float) -> optax.GradientTransformation:
    if config.optimizer == "sgd":
      return optax.sgd(peak, momentum=0.9)
    return optax.adam(lambda step: schedule(step) * peak / config.learning_rate)

  return training.Method(
    generate=generate,
    optimizer=training.partitioned(
      optimizer(config.learning_rate),
      optimizer(config.multiplier_learning_rate),
      # e^-alpha waits until most samples are on their side; moving early, it follows the misplaced ones. Without batch
      # norm it starts near its place.
      optax.adam(lambda step: jnp.where(step < hold, 0.0, schedule(step)) * (1.0 if config.batch_norm else 0.01)),
    ),
    noise_dim=1 + config.code_dim,
    batch_size=batch_size,
    weights={
      "stationarity": ramp if stationarity and config.stationarity_weight else 0.0,
      "duality": config.beta,
      "statistics": config.statistics_weight,
      "cross_entropy": config.cross_entropy_weight,
      # The losses of Haim et al. are sums over samples.
      "least_multiplier": config.least_multiplier_weight * (batch_size if config.residual == "squared" else 1),
      "repulsion": optax.schedules.linear_schedule(config.repulsion_weight, 0.0, max(int(0.7 * config.steps), 1)),
    },
    priors={"repulsion": repulsion, "cross_entropy": ingredients.cross_entropy}
    | ({"statistics": ingredients.statistics} if config.batch_norm else {}),
    residual=config.residual,
    target_exponent=2 * float(rates[0].target_rate) - 1 if config.target_scale else 0.0,
    multiplier_form=config.multiplier_form,
    raw_multipliers=ingredients.raw_multipliers(config.multiplier_form, _multiplier_network(classifiers)),
    least_multiplier=config.least_multiplier,
    learn_scale=ingredients.learns_scale(config.multiplier_form, config.residual),
    delta=config.delta,
    stratified_noise=True,
  )


def _moments(classifiers: Sequence[Classifier]) -> tuple[jax.Array, jax.Array]:
  """Means [T, 2] and factors [T, 2, 2] of the points of each classifier; see `input_moments`."""
  means, factors = zip(*(input_moments(classifier) for classifier in classifiers), strict=True)
  return jnp.stack(means), jnp.stack(factors)


def _generator(
  config: Config, classifiers: Sequence[Classifier], *, jitter: float
) -> tuple[generators.InitFn, training.GenerateFn]:
  means, factors = _moments(classifiers)
  if config.generator == "moments":

    def gaussian(theta: PyTree, statistics: PyTree, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool) -> Any:
      return means[t] + jnp.einsum("mde,me->md", factors[t], noise[:, :2]), statistics

    return lambda key: ({}, {}), gaussian
  if config.generator == "free":
    deviation = float(jnp.sqrt(jnp.mean(jnp.sum(jnp.square(factors), axis=2))))
    return generators.free_functions(
      list(means), num_labels=NUM_CLASSES, num_codes=config.codes, deviation=deviation, limits=None
    )
  module = generators.CodebookGenerator(
    sample_shape=(2,),
    num_labels=NUM_CLASSES,
    num_classifiers=len(classifiers),
    codebook_size=config.codes,
    jitter=jitter,
    output=generators.affine_output(means, factors, bound=2.5),
  )
  return generators.generator_functions(module, 1 + config.code_dim)


def _multiplier_network(classifiers: Sequence[Classifier]) -> networks.MultiplierNetwork:
  return networks.MultiplierNetwork(
    num_outputs=NUM_CLASSES, num_labels=NUM_CLASSES, num_classifiers=len(classifiers), hidden=(64,)
  )


def _start(
  config: Config,
  method: training.Method,
  init: generators.InitFn,
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  restart: int = 0,
) -> training.TrainState:
  """A random start of the generator and of the multipliers."""
  seed = (config.seed + 1) * 1000 + 100 * config.generator_seed + restart
  generator_key, multiplier_key, state_key = jax.random.split(jax.random.key(seed), 3)
  theta, statistics = init(generator_key)
  network = _multiplier_network(classifiers)
  eta = ingredients.init_multipliers(
    config.multiplier_form, network, multiplier_key, batch_size=method.batch_size, input_shape=(2,)
  )
  margin = None
  if not config.batch_norm:
    margin = [typical_margin(c.params["Dense_2"]["kernel"], weight_decay=config.weight_decay) for c in classifiers]
  return training.init_state(
    state_key, method, classifiers, conditions, theta=theta, statistics=statistics, eta=eta, margin=margin
  )


def _best_start(
  config: Config,
  method: training.Method,
  init: generators.InitFn,
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
) -> training.TrainState:
  """Trains several generators without stationarity and returns the one with the least loss; the points are not used."""
  weights = {
    "duality": config.beta,
    "statistics": config.statistics_weight,
    "cross_entropy": config.cross_entropy_weight,
  }
  step = training.make_train_step(method, steps_per_call=STEPS_PER_CALL)
  scores: list[list[float]] = [[] for _ in range(config.restarts)]
  states = []
  progress = common.Progress("restarts", config.restarts * config.restart_steps)
  for restart, own in enumerate(scores):

    def on_log(number: int, now: Mapping[str, float], restart: int = restart, own: list[float] = own) -> None:
      terms = {name: sum(v for k, v in now.items() if k.startswith(name)) for name, w in weights.items() if w}
      own.append(sum(weights[name] * term for name, term in terms.items()))
      progress.update(restart * config.restart_steps + number, terms)

    state = _start(config, method, init, classifiers, conditions, restart)
    states.append(
      training.fit(
        step,
        state,
        classifiers,
        conditions,
        num_steps=config.restart_steps,
        log_every=STEPS_PER_CALL,
        on_log=on_log,
        checkpoint_every=STEPS_PER_CALL,
      )
    )
  final = [float(np.mean(own[-10:])) for own in scores]  # the jitter makes single values uncertain
  best = int(np.argmin(final))
  common.say(f"restart {best + 1} goes on; losses: {', '.join(f'{value:.3g}' for value in final)}")
  return states[best]


if __name__ == "__main__":
  common.main(Config, run, jointly=True)
