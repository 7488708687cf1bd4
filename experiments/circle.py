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

from experiments import common, figures, ingredients, methods
from kkt_jax import (
  diagnostics,
  first_layer,
  generators,
  homogeneity,
  losses,
  metrics,
  multipliers,
  networks,
  pretrain,
  priors,
  training,
)
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import Conditions
from kkt_jax.last_layer import typical_margin

_NUM_POINTS, _NUM_CLASSES = 18, 3
_RADIUS = 0.15  # what counts as near a training point
_NUM_SAMPLES = 900
_GATE_SHARPNESS = 20.0  # without batch norm; see `kkt_jax.networks.relaxed_relu`
# The flags on which the attacked classifiers depend.
SHARED = ("seed", "labels", "classifiers", "width", "batch_norm", "weight_decay", "init_scale", "pretrain_steps")
GENERATORS = ("codebook", "free", "moments")
_STEPS_PER_CALL = 20  # a step here is shorter than the call of it


def by_batch_norm(with_it: Any, without: Any, help_text: str, **limits: Any) -> Any:
  """A flag with one default for classifiers with batch norm and another for those with weight decay."""
  return common.flag_by("variant", {"batch_norm": with_it, "nobatch_norm": without}, help_text, **limits)


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  seed: int = common.flag(0, "Seed of everything random.", lower=0)
  method: str = common.flag(
    "kkt",
    "kkt: this library's. points, points_published, ce, inversion, means: its neighbours'. The others are ablations."
    " Each sets some of the flags below; see experiments/methods.py.",
    choices=tuple(methods.CIRCLE),
  )
  generator_seed: int = common.flag(
    0, "Further seed of the generator alone: the same classifier, another run.", lower=0
  )
  shared_dir: str = common.flag(
    "", "Folder of the classifiers, for runs that share them. The working folder where empty."
  )
  labels: str = common.flag(
    "alternating", "Classes of neighbouring points: in turn, or six in a row.", choices=("alternating", "contiguous")
  )
  classifiers: int = common.flag(1, "2 splits the points evenly between two classifiers (Fig. 5).", lower=1, upper=2)
  # The attacked classifier.
  width: int = common.flag(64, "Width of its two hidden layers.", lower=3)
  batch_norm: bool = common.flag(True, "Whether it has batch norm; without, it is trained with weight decay.")
  weight_decay: float = common.flag(1e-3, "nobatch_norm: weight decay of its training.", lower=1e-8)
  init_scale: float = common.flag(
    0.05, "batch_norm: scale of its initial weights and of its last batch norm.", lower=1e-6
  )
  pretrain_steps: int = common.flag(20_000, "Steps of full-batch gradient descent.", lower=1)
  # The generator and its training.
  generator: str = common.method_flag(
    "codebook",
    "codebook: a network of learned codes, in the stored mean and covariance. free: free points. moments: Gaussian"
    " points of the stored mean and covariance, without training.",
    choices=GENERATORS,
  )
  restarts: int = common.method_flag(
    6, "Generators that are started; the best by a loss without data goes on.", lower=1
  )
  restart_steps: int = common.method_flag(3200, "Steps of each before the choice.", lower=1)
  steps: int = common.method_flag(8000, "Steps of the chosen one altogether.", lower=0)
  optimizer: str = common.method_flag(
    "adam", "sgd has a momentum of 0.9 and a constant rate.", choices=ingredients.OPTIMIZERS
  )
  learning_rate: float = common.method_flag(3e-3, "Peak learning rate of the generator.", lower=1e-8)
  multiplier_learning_rate: float = common.method_flag(3e-3, "Peak learning rate of the multipliers.", lower=0)
  codes: int = common.method_flag(60, "Learned codes, or free points, a class; each is used once a step.", lower=1)
  code_dim: int = common.flag(8, "Size of a code.", lower=1)
  jitter: float = common.flag(0.1, "Noise on a code before the choice.", lower=0)
  final_jitter: float = common.flag(0.03, "Noise on a code after it.", lower=0)
  rule: str = common.method_flag("balanced", "Which solution for Lambda.", choices=homogeneity.RULES)
  target_scale: bool = common.method_flag(False, "batch_norm: Lambda-bar with the paper's factor of the learned alpha.")
  residual: str = by_batch_norm(
    "cosine",
    "relative",
    "How stationarity is measured; with squared all terms are sums over samples.",
    choices=training.RESIDUALS,
  )
  multiplier_form: str = by_batch_norm(
    "softplus", "softmax", "Where the multipliers come from.", choices=multipliers.FORMS
  )
  least_multiplier: float = common.method_flag(0.0, "runner_up: the least multiplier that costs nothing.", lower=0)
  least_multiplier_weight: float = common.method_flag(0.0, "Weight of what is missing to it.", lower=0)
  cross_entropy_weight: float = common.method_flag(0.0, "Weight of the classification loss.", lower=0)
  stationarity_weight: float = by_batch_norm(1.0, 0.3, "Weight of the stationarity (0 is the ablation).", lower=0)
  beta: float = by_batch_norm(3.0, 10.0, "Weight of the duality loss.", lower=0)
  delta: float = by_batch_norm(
    0.01, 1.0, "Width of the flat bottom of the duality loss, in units of e^-alpha.", lower=0
  )
  statistics_weight: float = by_batch_norm(100.0, 0.0, "Weight of the distance from the stored statistics.", lower=0)
  repulsion_weight: float = common.method_flag(0.3, "Weight of the repulsion at the start; it fades out.", lower=0)
  repulsion_bandwidth: float = common.flag(0.3, "Its reach, in standard deviations of the data.", lower=1e-6)
  # What is written.
  log_every: int = common.flag(100, "Steps between logged metrics.", lower=1)
  checkpoint_every: int = common.flag(1000, "Steps between checkpoints and pictures.", lower=1)
  tensorboard: bool = common.flag(False, "Also write metrics for TensorBoard.")

  @property
  def variant(self) -> str:
    """What the defaults of some flags depend on."""
    return "batch_norm" if self.batch_norm else "nobatch_norm"

  @property
  def preset(self) -> Mapping[str, Any]:
    """The flags that the method sets."""
    flags = dict(methods.CIRCLE[self.method].flags)
    if not self.batch_norm:
      flags.pop("statistics_weight", None)  # there are none
    return flags


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the experiment; returns the final metrics."""
  config = common.resolve(config)
  common.check_config(config)
  if config.steps and config.restart_steps >= config.steps:
    raise common.UsageError(f"--restart_steps must be less than --steps = {config.steps}; got {config.restart_steps}.")
  for name in ("steps", "restart_steps", "log_every", "checkpoint_every"):
    if getattr(config, name) % _STEPS_PER_CALL:
      raise common.UsageError(f"--{name} must be a multiple of {_STEPS_PER_CALL}; got {getattr(config, name)}.")
  if config.multiplier_form == "softmax" and config.batch_norm:
    raise common.UsageError(
      "--multiplier_form must not be softmax with --batch_norm: without weight decay all probabilities are 0 or 1."
    )
  if config.multiplier_form == "runner_up" and config.generator != "free":
    raise common.UsageError(
      f"--generator must be free with --multiplier_form=runner_up: there is one multiplier for each point; got"
      f" {config.generator}."
    )
  out = common.Workdir(workdir, config, tensorboard=config.tensorboard)
  shared = ingredients.shared_folder(config.shared_dir, out.path, {name: getattr(config, name) for name in SHARED})
  x, y = circle(config.labels)
  parts = [np.arange(_NUM_POINTS) // _NUM_CLASSES % config.classifiers == t for t in range(config.classifiers)]
  classifiers = [
    trained_classifier(config, x[part], y[part], t, shared / "classifier" / str(t)) for t, part in enumerate(parts)
  ]
  conditions = ingredients.conditions_of(classifiers, _rates(config, classifiers), weight_decay=config.weight_decay)
  method, state = train_generator(config, classifiers, conditions, out)  # sees no points
  # Whatever the generator was trained with, it is measured by the same conditions.
  rates = _rates(dataclasses.replace(config, rule="balanced"), classifiers)
  conditions = ingredients.conditions_of(classifiers, rates, weight_decay=config.weight_decay)
  return evaluate(config, out, (x, y, parts), classifiers, conditions, method, state)


def circle(labels: str) -> tuple[np.ndarray, np.ndarray]:
  """The training data: 18 points evenly on the unit circle [18, 2] and their labels [18].

  >>> circle("alternating")[1][:6].tolist(), circle("contiguous")[1][:7].tolist()
  ([0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 0, 1])
  """
  angle = 2 * np.pi * np.arange(_NUM_POINTS) / _NUM_POINTS
  x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
  index = np.arange(_NUM_POINTS)
  return x, index % _NUM_CLASSES if labels == "alternating" else index // (_NUM_POINTS // _NUM_CLASSES)


def trained_classifier(config: Config, x: np.ndarray, y: np.ndarray, index: int, directory: pathlib.Path) -> Classifier:
  """Trains one classifier to its convergence point, or restores it; nothing else of the data leaves this function."""
  module = networks.MLPClassifier(
    num_classes=_NUM_CLASSES,
    hidden=(config.width, config.width),
    batch_norm=config.batch_norm,
    init_scale=config.init_scale if config.batch_norm else 1.0,
    gate_sharpness=None if config.batch_norm else _GATE_SHARPNESS,
  )
  variables: Any = module.init(jax.random.fold_in(jax.random.key(config.seed), index), x, train=True)
  if config.batch_norm:
    # A small last normalisation, like small weights: with scale 1 the classifier ends far from its KKT point.
    variables["params"]["BatchNorm_1"]["scale"] *= config.init_scale
  with Checkpointer(directory) as checkpointer:
    restored = checkpointer.restore(variables)
    if restored:
      variables = restored[1]
    else:
      variables = _train_classifier(config, module, variables, jnp.asarray(x), y)
      checkpointer.save(0, variables)
  return networks.from_module(module, variables, input_shape=(2,), labels=range(_NUM_CLASSES))


def _train_classifier(
  config: Config, module: networks.MLPClassifier, variables: PyTree, x: jax.Array, y: np.ndarray
) -> PyTree:
  apply: Any = module.clone(gate_sharpness=None).apply

  def train_mode(params: PyTree, x: jax.Array) -> Any:
    return apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])

  hold = config.pretrain_steps // 5
  falling = optax.schedules.exponential_decay(0.02, config.pretrain_steps - hold, 0.025, transition_begin=hold)
  form: dict[str, Any] = (
    {"learning_rate": falling, "loss_scaled": True}
    if config.batch_norm
    else {"learning_rate": 0.05, "weight_decay": config.weight_decay, "momentum": 0.9}
  )
  progress = common.Progress("classifier", config.pretrain_steps)
  result = pretrain.gradient_descent(
    lambda params, x: train_mode(params, x)[0],
    variables["params"],
    x,
    y,
    num_steps=config.pretrain_steps,
    steps_per_call=1000,
    on_progress=lambda step, log_loss: progress.update(step, {"log loss": log_loss}),
    **form,
  )
  common.say(
    f"classifier: log loss {result.log_loss:.1f}, margins {result.margins.min():.1f} to {result.margins.max():.1f},"
    f" |gradient| / |zeta| {result.relative_gradient:.2g}"
  )
  return {"params": result.params, **train_mode(result.params, x)[1]}


def _rates(config: Config, classifiers: Sequence[Classifier]) -> list[homogeneity.RateSolution]:
  """Lambda, where there is batch norm; it is not needed with weight decay."""
  x = jax.random.normal(jax.random.key(config.seed), (40, 2))
  return ingredients.rates_of(classifiers, x, rule=config.rule) if config.batch_norm else []


def input_moments(classifier: Classifier) -> tuple[jax.Array, jax.Array]:
  """The mean and the covariance's Cholesky factor of the training points, read off the first batch norm.

  Without batch norm they are not to be had; 0 and the identity stand for the region in which points are searched.
  """
  if classifier.statistics is None:
    return jnp.zeros(2), jnp.eye(2)
  layer, stored = classifier.params["Dense_0"], classifier.statistics["BatchNorm_0"]
  mean, covariance = first_layer.input_moments(layer["kernel"], layer["bias"], stored["mean"], stored["var"])
  return mean, jnp.linalg.cholesky(covariance)


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
    steps_per_call=_STEPS_PER_CALL,
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
  batch_size = config.codes * _NUM_CLASSES
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
      list(means), num_labels=_NUM_CLASSES, num_codes=config.codes, deviation=deviation, limits=None
    )
  module = generators.CodebookGenerator(
    sample_shape=(2,),
    num_labels=_NUM_CLASSES,
    num_classifiers=len(classifiers),
    codebook_size=config.codes,
    jitter=jitter,
    output=generators.affine_output(means, factors, bound=2.5),
  )
  return generators.generator_functions(module, 1 + config.code_dim)


def _multiplier_network(classifiers: Sequence[Classifier]) -> networks.MultiplierNetwork:
  return networks.MultiplierNetwork(
    num_outputs=_NUM_CLASSES, num_labels=_NUM_CLASSES, num_classifiers=len(classifiers), hidden=(64,)
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
  step = training.make_train_step(method, steps_per_call=_STEPS_PER_CALL)
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
        log_every=_STEPS_PER_CALL,
        on_log=on_log,
        checkpoint_every=_STEPS_PER_CALL,
      )
    )
  final = [float(np.mean(own[-10:])) for own in scores]  # the jitter makes single values uncertain
  best = int(np.argmin(final))
  common.say(f"restart {best + 1} goes on; losses: {', '.join(f'{value:.3g}' for value in final)}")
  return states[best]


def evaluate(
  config: Config,
  out: common.Workdir,
  data: tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]],
  classifiers: Sequence[Classifier],
  conditions: Sequence[Conditions],
  method: training.Method,
  state: training.TrainState,
) -> Mapping[str, Any]:
  """Looks at the points again: the figure, and every figure of merit beside its controls."""
  x, y, parts = data
  key = jax.random.key(config.seed + 3)
  labels = np.arange(_NUM_SAMPLES) % _NUM_CLASSES
  samples, index = training.sample(method, state, classifiers, key, labels)
  mean, factor = input_moments(classifiers[0])
  gaussian = mean[None] + jax.random.normal(key, samples.shape) @ factor.T
  square = jax.random.uniform(key, samples.shape, minval=-1.5, maxval=1.5)

  def score(points: jax.Array | np.ndarray, point_labels: np.ndarray) -> dict[str, float]:
    return metrics.precision_coverage(points, point_labels, x, y, radius=_RADIUS)

  results: dict[str, Any] = score(samples, labels)
  results["controls"] = {
    "training_data": score(x, y),
    "gaussian_of_the_stored_moments": score(gaussian, labels),
    "uniform_in_the_square": score(square, labels),
  }
  if len(classifiers) > 1:
    results["per_classifier"] = [
      _own_subset(np.asarray(samples)[np.asarray(index) == t], labels[np.asarray(index) == t], data, t)
      for t in range(len(classifiers))
    ]
  results["margin_spread"] = [
    _margin_spread(classifier, samples, labels, index == t) for t, classifier in enumerate(classifiers)
  ]
  results["residual"] = [
    {
      name: diagnostics.diagnose(classifier, condition, points, point_labels).residual
      for name, (points, point_labels) in {
        "training_data": (x[part], y[part]),
        # Equal numbers for both: the more points, the more multipliers there are to fit with.
        "generated": (samples[index == t][:180], labels[np.asarray(index) == t][:180]),
        "gaussian_of_the_stored_moments": (gaussian[:180], labels[:180]),
      }.items()
    }
    for t, (classifier, condition, part) in enumerate(zip(classifiers, conditions, parts, strict=True))
  ]
  results["exp_minus_alpha"] = np.exp(-np.asarray(state.params["alpha"])).tolist()
  results["true_median_margin"] = [
    float(jnp.median(losses.runner_up_margin(c.predict_fn(c.params, jnp.asarray(x[part])), y[part])))
    for c, part in zip(classifiers, parts, strict=True)
  ]
  results["final_losses"] = out.last_logged()
  _figure(out.path, data, classifiers, np.asarray(samples), labels, np.asarray(index))
  out.finish(results)
  return results


def _margin_spread(classifier: Classifier, samples: jax.Array, labels: np.ndarray, own: jax.Array) -> float:
  """5th to 95th percentile of the margins of a classifier's own samples, over their median."""
  chosen = np.asarray(own)
  margin = losses.runner_up_margin(
    classifier.predict_fn(classifier.params, samples[chosen]), jnp.asarray(labels[chosen])
  )
  low, median, high = jnp.percentile(margin, jnp.array([5.0, 50.0, 95.0]))
  return float((high - low) / jnp.abs(median))


def _own_subset(
  samples: np.ndarray, labels: np.ndarray, data: tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]], t: int
) -> dict[str, float]:
  """How well samples with fixed t stay on D_t (Fig. 5): nearest point of all in D_t, precision, coverage."""
  x, y, parts = data
  nearest = np.asarray(metrics.pairwise_distance(samples, x)).argmin(axis=1)
  own = metrics.precision_coverage(samples, labels, x[parts[t]], y[parts[t]], radius=_RADIUS)
  return {"nearest_in_own_subset": float(parts[t][nearest].mean()), **own}


def _figure(
  path: pathlib.Path,
  data: tuple[np.ndarray, np.ndarray, Sequence[np.ndarray]],
  classifiers: Sequence[Classifier],
  samples: np.ndarray,
  labels: np.ndarray,
  index: np.ndarray,
) -> None:
  x, y, parts = data
  panels: list[tuple[str, Any]] = []
  for t, (classifier, part) in enumerate(zip(classifiers, parts, strict=True)):
    of = f" of classifier {t + 1}" if len(classifiers) > 1 else ""

    def logits(points: np.ndarray, classifier: Classifier = classifier) -> jax.Array:
      return classifier.predict_fn(classifier.params, jnp.asarray(points))

    panels += [(f"training data{of}", ("points", x[part], y[part])), (f"regions{of}", ("regions", logits))]
    if len(classifiers) > 1:
      panels.append((f"generated, t = {t + 1}", ("points", samples[index == t], labels[index == t])))
  panels.append(("generated from fresh noise", ("points", samples, labels)))
  figures.plane(path / ("fig4.png" if len(classifiers) == 1 else "fig5.png"), panels, num_classes=_NUM_CLASSES)


if __name__ == "__main__":
  common.main(Config, run)
