"""Figs. 6 to 8: a generator of images from nothing but the weights of classifiers; what `mnist` and `faces` share.

Trains classifiers on real images by full-batch gradient descent, with weight decay or with batch norm, forgets the
images, trains a conditional generator so that the classifiers' own stationarity conditions hold for what it generates,
and only then looks at the images again, to compare. The figure shows generated images in odd rows and below each the
most similar training image.
"""

from collections.abc import Mapping, Sequence
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import attacked, common, evaluation, figures, ingredients
from experiments.data import Split
from experiments.image_config import check, Config, SHARED
from kkt_jax import generators, homogeneity, networks, priors, training
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
  shared = ingredients.shared_folder(config.shared_dir, out.path, _shared_settings(config, data))
  classifiers = attacked.trained_classifiers(config, data.train, shared / "classifier")
  method, state = train_generator(config, classifiers, out)  # sees no data
  # Whatever the generator was trained with, it is measured by the same conditions.
  conditions = ingredients.conditions_of(
    classifiers, _rates(config, classifiers, rule="balanced"), weight_decay=config.weight_decay
  )
  return evaluation.evaluate(
    out,
    shared,
    data,
    classifiers,
    conditions,
    method,
    state,
    seed=config.seed,
    judge_epochs=config.judge_epochs,
    thorough=config.thorough,
    num_samples=num_samples,
    population=config.population,
    figure=figure,
  )


def _shared_settings(config: Config, data: Split) -> dict[str, Any]:
  """What runs must agree in to share classifiers, judge and controls."""
  digest = hashlib.sha256()
  for images in (data.train, data.evaluation, data.held_out, data.distractors):
    digest.update(np.ascontiguousarray(images.x).tobytes() + np.ascontiguousarray(images.y).tobytes())
  return {name: getattr(config, name) for name in SHARED} | {"data": digest.hexdigest()}


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
  keys = jax.random.split(jax.random.key(config.seed + 1 + 1000 * config.generator_seed), 3)
  from_table = config.generator in ("span", "free")
  batch_size = config.codes * max(c.num_classes for c in classifiers) if from_table else config.batch_size
  network = networks.MultiplierNetwork(
    num_outputs=max(c.num_classes for c in classifiers), num_labels=num_labels, num_classifiers=len(classifiers)
  )
  rates = _rates(config, classifiers, rule=config.rule)
  weights = _weights(config, share, batch_size, dimensions)
  method = training.Method(
    generate=generate,
    optimizer=training.partitioned(
      _optimizer(config, config.learning_rate),
      _optimizer(config, config.multiplier_learning_rate),
      _optimizer(config, config.alpha_learning_rate),
    ),
    noise_dim=config.noise_dim,
    batch_size=batch_size,
    weights=weights,
    priors={name: prior for name, prior in _priors(config).items() if weights[name]},
    residual=config.residual,
    target_exponent=2 * float(rates[0].target_rate) - 1 if config.target_scale else 0.0,
    tensor_weights={
      "Dense_0/kernel": config.first_layer_weight,
      "Dense_1/kernel": config.later_layers_weight,
      "Dense_2/kernel": config.later_layers_weight,
      "Dense_2/bias": 0.0,
    },
    multiplier_form=config.multiplier_form,
    raw_multipliers=ingredients.raw_multipliers(config.multiplier_form, network),
    least_multiplier=config.least_multiplier,
    learn_scale=ingredients.learns_scale(config.multiplier_form, config.residual),
    delta=config.delta,
    fixed_noise=config.fixed_noise,
    stratified_noise=from_table,
    num_fresh=config.num_fresh,
    microbatch_size=config.microbatch_size or None,
  )
  conditions = ingredients.conditions_of(classifiers, rates, weight_decay=config.weight_decay)
  theta, statistics = init_generator(keys[0])
  state = training.init_state(
    keys[1],
    method,
    classifiers,
    conditions,
    theta=theta,
    statistics=statistics,
    eta=ingredients.init_multipliers(
      config.multiplier_form, network, keys[2], batch_size=batch_size, input_shape=classifiers[0].input_shape
    ),
    margin=config.margin or attacked.told_margins(config, classifiers),
  )
  return method, state, conditions


def _rates(config: Config, classifiers: Sequence[Classifier], *, rule: str) -> list[homogeneity.RateSolution]:
  """Lambda, where there is batch norm; it is not needed with weight decay."""
  x = jax.random.uniform(jax.random.key(config.seed), (40, *classifiers[0].input_shape))
  return ingredients.rates_of(classifiers, x, rule=rule) if config.batch_norm else []


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
  if config.generator in ("span", "free"):
    # The random first samples deviate from the mean image as much as black and white pixels of that mean would.
    means = [_offset(c) for c in classifiers]
    deviation = jnp.sqrt(jnp.mean(jnp.stack([jnp.clip(mean * (1 - mean), 0.01) for mean in means])))
    table: dict[str, Any] = {
      "num_labels": num_labels,
      "num_codes": config.codes,
      "deviation": config.start * float(deviation),
    }
    if config.generator == "free":
      return generators.free_functions(means, **table)
    return generators.span_functions(means, spans, power=config.power if config.power >= 0 else share, **table)
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


def _optimizer(config: Config, peak: float) -> optax.GradientTransformation:
  """Adam, or plain momentum with a constant rate."""
  if config.optimizer == "sgd":
    return optax.sgd(peak, momentum=0.9)
  return ingredients.adam(peak, num_steps=config.steps)


def train_generator(
  config: Config, classifiers: Sequence[Classifier], out: common.Workdir
) -> tuple[training.Method, training.TrainState]:
  """Trains the generator from the classifiers alone, or resumes; no data enter this function."""
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
  return method, state


def _weights(config: Config, share: float, batch_size: int, dimensions: int) -> dict[str, Any]:
  """Only the classification counts in the warm-up; afterwards the stationarity takes its place.

  Args:
    config: the settings.
    share: the share of all dimensions that the span fills.
    batch_size: samples of a batch.
    dimensions: numbers in a sample.
  """
  # The losses of Haim et al. are sums over samples and pixels.
  samples, pixels = (batch_size, batch_size * dimensions) if config.residual == "squared" else (1, 1)

  def switch(before: float, after: float) -> training.Schedule:
    return lambda step: jnp.where(jnp.asarray(step) < config.warmup, before, after)

  return {
    "stationarity": switch(0.0, config.stationarity_weight),
    "duality": switch(config.warmup_beta, config.beta),
    "fresh_duality": config.fresh_weight,
    "least_multiplier": config.least_multiplier_weight * samples,
    "range": config.range_weight * pixels,
    "binarisation": config.binarisation_weight,
    "mean": config.mean_weight,
    "ink": config.ink_weight,
    "statistics": config.statistics_weight,
    "collapse": config.collapse_weight,
    "mode_seeking": config.mode_seeking_weight,
    "cross_entropy": config.cross_entropy_weight,
    "l2": config.l2_weight,
    "total_variation": config.total_variation_weight * share,
  }


def _priors(config: Config) -> dict[str, training.Prior]:
  """Every prior that the flags know, by the name of its weight."""

  def mode_seeking(classifier: Classifier, batch: training.Batch) -> jax.Array:
    return priors.mode_seeking(_first_layer(classifier, batch.x), batch.noise, batch.y)

  terms: dict[str, training.Prior] = {
    "range": lambda classifier, batch: priors.out_of_range(batch.x),
    "binarisation": lambda classifier, batch: priors.binarisation(batch.x),
    "mode_seeking": mode_seeking,
    "total_variation": lambda classifier, batch: priors.total_variation(batch.x),
    "cross_entropy": ingredients.cross_entropy,
    "l2": lambda classifier, batch: jnp.mean(jnp.square(batch.x.reshape(batch.x.shape[0], -1)), axis=1),
  }
  if config.batch_norm:
    terms |= {"statistics": ingredients.statistics, "collapse": _collapse}
  if config.mean_image:
    terms["mean"] = lambda classifier, batch: priors.mean_distance(batch.x, _offset(classifier))
    terms["ink"] = lambda classifier, batch: priors.ink(batch.x, _offset(classifier))
  return terms


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
