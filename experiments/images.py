"""Figs. 6 to 8: a generator of images from nothing but the weights of classifiers; what `mnist` and `faces` share.

Trains classifiers on real images by full-batch gradient descent, with weight decay or with batch norm, forgets the
images, trains a conditional generator so that the classifiers' own stationarity conditions hold for what it generates,
and only then looks at the images again, to compare. The figure shows generated images in odd rows and below each the
most similar training image.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import attacked, common, evaluation, figures
from experiments.data import Split
from experiments.image_config import check, Config
from kkt_jax import generators, networks, priors, training
from kkt_jax.classifier import Classifier
from kkt_jax.conditions import Conditions
from kkt_jax.first_layer import input_span, InputSpan
from kkt_jax.last_layer import collapsed_features


def run(config: Config, workdir: pathlib.Path, data: Split, *, num_samples: int, figure: str) -> Mapping[str, Any]:
  """Runs or resumes the experiment.

  Args:
    config: its settings, resolved (see `common.resolve`).
    workdir: where everything is written.
    data: what the classifiers are trained on, what the judge is trained on, and the control.
    num_samples: samples that every figure of merit is measured on, the same number of each class.
    figure: file name of the picture.

  Returns:
    The final metrics.
  """
  check(config)
  out = common.Workdir(workdir, config, tensorboard=config.tensorboard)
  classifiers = attacked.trained_classifiers(config, data.train, out.path / "classifier")
  method, state, conditions = train_generator(config, classifiers, out)  # sees no data
  return evaluation.evaluate(
    out,
    data,
    classifiers,
    conditions,
    method,
    state,
    seed=config.seed,
    judge_epochs=config.judge_epochs,
    num_samples=num_samples,
    population=config.population,
    figure=figure,
  )


def start(
  config: Config, classifiers: Sequence[Classifier]
) -> tuple[training.Method, training.TrainState, list[Conditions]]:
  """The method, its random start, and the stationarity condition of each classifier; no data enter this function."""
  num_labels = 1 + max(max(c.labels) for c in classifiers)
  spans = _spans(config, classifiers) if config.generator == "span" else []
  # The more of all directions the span fills, the less it says to lie in it, and the more priors must say.
  dimensions = int(np.prod(classifiers[0].input_shape))
  share = float(np.mean([span.strengths.size / dimensions for span in spans])) if spans else 1.0
  init_generator, generate = _generator(config, classifiers, num_labels, spans, share)
  raw_multipliers, eta, keys = None, None, jax.random.split(jax.random.key(config.seed + 1), 3)
  if config.multiplier_form != "softmax":
    network = networks.MultiplierNetwork(
      num_outputs=max(c.num_classes for c in classifiers), num_labels=num_labels, num_classifiers=len(classifiers)
    )
    zero = jnp.zeros(1, jnp.int32)
    eta = network.init(keys[2], jnp.zeros((1, *classifiers[0].input_shape)), zero, zero)
    apply: Any = network.apply
    raw_multipliers = apply
  every_code = config.codes * max(c.num_classes for c in classifiers)
  method = training.Method(
    generate=generate,
    optimizer=training.partitioned(
      _adam(config, config.learning_rate), _adam(config, 2e-3), _adam(config, config.alpha_learning_rate)
    ),
    noise_dim=config.noise_dim,
    batch_size=every_code if config.generator == "span" else config.batch_size,
    weights=_weights(config, share),
    priors=_priors(config),
    residual="cosine" if config.batch_norm else "relative",
    tensor_weights={
      "Dense_0/kernel": config.first_layer_weight,
      "Dense_1/kernel": config.later_layers_weight,
      "Dense_2/kernel": config.later_layers_weight,
      "Dense_2/bias": 0.0,
    },
    multiplier_form=config.multiplier_form,
    raw_multipliers=raw_multipliers,
    learn_scale=config.multiplier_form != "softmax" and not config.batch_norm,  # the cosine is free of it
    delta=config.delta,
    fixed_noise=config.fixed_noise,
    stratified_noise=config.generator == "span",
    num_fresh=config.num_fresh,
  )
  conditions = attacked.conditions_of(config, classifiers)
  theta, statistics = init_generator(keys[0])
  state = training.init_state(
    keys[1],
    method,
    classifiers,
    conditions,
    theta=theta,
    statistics=statistics,
    eta=eta,
    margin=config.margin or attacked.told_margins(config, classifiers),
  )
  return method, state, conditions


def _spans(config: Config, classifiers: Sequence[Classifier]) -> list[InputSpan]:
  """What each classifier's first layer says about the directions of its data."""
  spans = [input_span(c.params["Dense_0"]["kernel"], tolerance=config.span_tolerance) for c in classifiers]
  ranks = ", ".join(str(span.strengths.size) for span in spans)
  common.say(f"the rows of the first layer span {ranks} of {spans[0].basis.shape[0]} dimensions")
  return spans


def _generator(
  config: Config, classifiers: Sequence[Classifier], num_labels: int, spans: Sequence[InputSpan], share: float
) -> tuple[generators.InitFn, training.GenerateFn]:
  shape = classifiers[0].input_shape
  if config.generator == "span":
    # The random first samples deviate from the mean image as much as black and white pixels of that mean would.
    means = [_offset(c) for c in classifiers]
    deviation = jnp.sqrt(jnp.mean(jnp.stack([jnp.clip(mean * (1 - mean), 0.01) for mean in means])))
    return generators.span_functions(
      means,
      spans,
      num_labels=num_labels,
      num_codes=config.codes,
      deviation=config.start * float(deviation),
      power=config.power if config.power >= 0 else share,
    )
  # Without a stored mean image the generator starts from dark grey, which every drawing on black is near.
  starts = [jnp.full(shape, 0.1) if c.offset is None else c.offset for c in classifiers]
  modules = {"mlp": generators.MLPGenerator, "conv": generators.ConvGenerator}
  module = modules[config.generator](
    sample_shape=shape,
    num_labels=num_labels,
    num_classifiers=len(classifiers),
    output=generators.pixel_output(jnp.mean(jnp.stack(starts), axis=0), blur=config.blur),
  )
  return generators.generator_functions(module, config.noise_dim)


def _adam(config: Config, peak: float) -> optax.GradientTransformation:
  """Adam with a constant learning rate for a third of the training and a cosine after it."""
  held = config.steps // 3
  schedule = optax.schedules.join_schedules(
    [
      optax.schedules.constant_schedule(peak),
      optax.schedules.cosine_decay_schedule(peak, config.steps - held, alpha=0.02),
    ],
    boundaries=[held],
  )
  return optax.adam(schedule, b2=0.99)


def train_generator(
  config: Config, classifiers: Sequence[Classifier], out: common.Workdir
) -> tuple[training.Method, training.TrainState, list[Conditions]]:
  """Trains the generator from the classifiers alone, or resumes; no data enter this function.

  Returns:
    The method, the trained state, and the stationarity condition of each classifier.
  """
  method, state, conditions = start(config, classifiers)
  labels = np.unique([label for c in classifiers for label in c.labels])
  grid_labels = np.tile(np.repeat(labels, figures.COLUMNS // len(labels)), 4)

  def draw_grid(state: training.TrainState) -> None:
    x, _ = training.sample(method, state, classifiers, jax.random.key(0), grid_labels)
    rows = [("fresh noise", row) for row in np.split(np.asarray(x), 4)]
    figures.image_rows(out.path / f"samples_{int(state.step):06d}.png", rows)

  state = common.train(
    method,
    state,
    classifiers,
    conditions,
    out,
    num_steps=config.steps,
    log_every=config.log_every,
    checkpoint_every=config.grid_every,
    on_checkpoint=draw_grid,
  )
  return method, state, conditions


def _weights(config: Config, share: float) -> dict[str, Any]:
  """Only the classification counts in the warm-up; afterwards the stationarity takes its place."""

  def switch(before: float, after: float) -> training.Schedule:
    return lambda step: jnp.where(jnp.asarray(step) < config.warmup, before, after)

  return {
    "stationarity": switch(0.0, config.stationarity_weight),
    "duality": switch(config.warmup_beta, config.beta),
    "fresh_duality": config.fresh_weight,
    "range": config.range_weight,
    "binarisation": config.binarisation_weight,
    "mean": config.mean_weight,
    "ink": config.ink_weight,
    "statistics": config.statistics_weight,
    "collapse": config.collapse_weight,
    "mode_seeking": config.mode_seeking_weight,
    "total_variation": config.total_variation_weight * share,
  }


def _priors(config: Config) -> dict[str, training.Prior]:
  def mode_seeking(classifier: Classifier, batch: training.Batch) -> jax.Array:
    return priors.mode_seeking(_first_layer(classifier, batch.x), batch.noise, batch.y)

  terms: dict[str, training.Prior] = {
    "range": lambda classifier, batch: priors.out_of_range(batch.x),
    "binarisation": lambda classifier, batch: priors.binarisation(batch.x),
    "mode_seeking": mode_seeking,
    "total_variation": lambda classifier, batch: priors.total_variation(batch.x),
  }
  if config.batch_norm:
    terms |= {"statistics": _statistics, "collapse": _collapse}
  if config.mean_image:
    terms["mean"] = lambda classifier, batch: priors.mean_distance(batch.x, _offset(classifier))
    terms["ink"] = lambda classifier, batch: priors.ink(batch.x, _offset(classifier))
  return terms


def _statistics(classifier: Classifier, batch: training.Batch) -> jax.Array:
  assert classifier.statistics_fn is not None  # a classifier with batch norm
  return priors.statistics_distance(classifier.statistics_fn(classifier.params, batch.x), classifier.statistics)


def _collapse(classifier: Classifier, batch: training.Batch) -> jax.Array:
  assert classifier.features_fn is not None  # a classifier with batch norm
  norm = classifier.params["BatchNorm_1"]
  of_class = collapsed_features(classifier.params["Dense_2"]["kernel"], norm["scale"], norm["bias"])
  features = classifier.features_fn(classifier.params, batch.x)
  return priors.collapse(features, of_class[classifier.local_labels(batch.y)], norm["scale"])


def _offset(classifier: Classifier) -> jax.Array:
  return jnp.zeros(classifier.input_shape) if classifier.offset is None else classifier.offset


def _first_layer(classifier: Classifier, x: jax.Array) -> jax.Array:
  """The first layer's outputs, in units of the size they would have for independent black and white pixels."""
  kernel = classifier.params["Dense_0"]["kernel"]
  mean = jnp.clip(_offset(classifier), 0.05, 0.95) if classifier.offset is None else classifier.offset
  variance = (mean * (1 - mean)).reshape(1, -1)
  size = jnp.sqrt(jnp.mean(variance @ jnp.square(kernel)))
  return (x.reshape(x.shape[0], -1) @ kernel) / size
