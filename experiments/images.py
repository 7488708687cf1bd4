"""Figs. 6 to 8: a generator of images from nothing but the weights of classifiers; what `mnist` and `faces` share.

Trains classifiers on real images by full-batch gradient descent, with weight decay or with batch norm, forgets the
images, trains a conditional generator so that the classifiers' own stationarity conditions hold for what it generates,
and only then looks at the images again, to compare. The figure shows generated images in odd rows and below each the
most similar training image.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common, evaluation, figures
from experiments.data import Images, Split
from kkt_jax import generators, homogeneity, multipliers, networks, pretrain, priors, training
from kkt_jax.checkpoint import Checkpointer
from kkt_jax.classifier import Classifier, PyTree
from kkt_jax.conditions import Conditions, max_margin_conditions, weight_decay_conditions
from kkt_jax.first_layer import input_span, InputSpan
from kkt_jax.last_layer import collapsed_features, collapsed_margin, typical_margin

GENERATORS = ("span", "mlp", "conv")
_SMALL_INIT = 0.05  # of a batch-normalised classifier's later kernels and of its last batch norm's scale


def by_variant(span: Any, network: Any, help_text: str, *, batch_norm: Any = None, **limits: Any) -> Any:
  """A flag with a default for ``--generator=span``, one for it with ``--batch_norm``, and one for the networks."""
  normalised = span if batch_norm is None else batch_norm
  defaults = {"span": span, "batch_norm": normalised, "mlp": network, "conv": network}
  return common.flag_by("variant", defaults, help_text, **limits)


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  seed: int = common.flag(0, "Seed of everything random.", lower=0)
  samples_per_class: int = common.flag(50, "Training images a class.", lower=2)
  classifiers: int = common.flag(1, "Number of classifiers among which the classes are shared out.", lower=1, upper=5)
  # The attacked classifier.
  width: int = common.flag(
    600, "Width of its first layer; above the number of training images it gives away their span.", lower=1
  )
  second_width: int = common.flag(256, "Width of its second layer.", lower=1)
  batch_norm: bool = common.flag(
    False, "Batch norm and small initial weights instead of weight decay, the paper's classifier. With span only."
  )
  weight_decay: float = common.flag(0.02, "Weight decay of its training, without batch norm.", lower=1e-6)
  first_init_scale: float = common.flag(
    5e-5, "batch_norm: scale of the first layer's initial weights; what is left of them blurs the span.", lower=1e-8
  )
  pretrain_steps: int = by_variant(4000, 4000, "Steps of full-batch gradient descent.", batch_norm=6000, lower=1)
  pretrain_learning_rate: float = by_variant(
    0.1, 0.1, "Their step size; with batch norm the first of loss-scaled steps.", batch_norm=0.5, lower=1e-6
  )
  # The generator and its training.
  generator: str = common.flag(
    "span",
    "span: images in the span of the first layer, one for each value of a discrete noise. mlp: a network of continuous"
    " noise. conv: the paper's network, for accelerators.",
    choices=GENERATORS,
  )
  codes: int = common.flag(50, "span: images that the noise picks from, for each class and classifier.", lower=1)
  span_tolerance: float = by_variant(
    2e-7,
    2e-7,
    "span: singular values below this share of the first layer's greatest are not data.",
    batch_norm=2e-5,
    lower=1e-12,
    upper=0.5,
  )
  power: float = common.flag(
    -1.0,
    "span: how much the weights' own strengths scale the search directions, from 0, not at all, to 1; if negative, the"
    " share of all dimensions that the span fills.",
  )
  start: float = common.flag(
    1.0, "span: first deviation from the mean image, over that of black and white pixels of this mean.", lower=1e-3
  )
  steps: int = by_variant(1500, 1000, "Training steps of the generator.", lower=1)
  warmup: int = by_variant(300, 150, "First steps, in which only the classification counts.", lower=0)
  learning_rate: float = by_variant(0.05, 2e-3, "Peak learning rate of Adam.", lower=1e-8)
  alpha_learning_rate: float = by_variant(2e-4, 2e-3, "Peak learning rate of alpha.", lower=0)
  batch_size: int = common.flag(500, "mlp, conv: M, samples for each classifier in each step.", lower=2)
  num_fresh: int = by_variant(0, 100, "Never-trained samples that must be classified right.", lower=0)
  noise_dim: int = by_variant(1, 8, "Size of the noise.", lower=1)
  fixed_noise: bool = common.flag(True, "Train on M fixed noise vectors for each classifier instead of new ones.")
  blur: float = common.flag(1.0, "mlp, conv: blur inside the generator, in pixels.", lower=0.0)
  mean_image: bool = common.flag(True, "Start from the mean image that the classifier stores for its preprocessing.")
  gate_sharpness: float = by_variant(
    20.0, 30.0, "Smoothness of the ReLU derivative in the stationarity; 0 is exact.", lower=0
  )
  multiplier_form: str = by_variant(
    "softmax", "softmax", "Where the multipliers come from.", batch_norm="softplus", choices=multipliers.FORMS
  )
  stationarity_weight: float = by_variant(
    72.0, 8.0, "Weight of the stationarity (0 is the ablation).", batch_norm=8.0, lower=0
  )
  first_layer_weight: float = common.flag(8.0, "Weight of the first layer's residual among the tensors'.", lower=0)
  later_layers_weight: float = by_variant(4.0, 1.0, "Weight of the later layers' kernels among them.", lower=0)
  margin: float = by_variant(
    0.0, 3.0, "e^-alpha at the start, the margin that samples are pushed to; 0 reads it off the last layer.", lower=0
  )
  delta: float = by_variant(
    1.0, 1.0, "Width of the flat bottom of the duality loss, in units of e^-alpha.", batch_norm=0.01, lower=0
  )
  warmup_beta: float = by_variant(14.0, 3.0, "Weight of the duality loss in the warm-up.", lower=0)
  beta: float = by_variant(14.0, 0.0, "Weight of the duality loss after the warm-up.", lower=0)
  fresh_weight: float = common.flag(1.0, "Weight of the duality loss of never-trained samples.", lower=0)
  range_weight: float = by_variant(8000.0, 0.0, "Weight of the prior that pixels lie in [0, 1].", lower=0)
  statistics_weight: float = by_variant(
    0.0, 0.0, "Weight of the distance from the stored batch-norm statistics.", batch_norm=1000.0, lower=0
  )
  collapse_weight: float = by_variant(
    0.0, 0.0, "Weight of the distance from the common features of the class.", batch_norm=30.0, lower=0
  )
  binarisation_weight: float = by_variant(
    12.0, 2.0, "Weight of the prior that pixels are black or white.", batch_norm=6.0, lower=0
  )
  mean_weight: float = by_variant(0.0, 2.0, "Weight of the distance from the stored mean image.", lower=0)
  ink_weight: float = by_variant(0.0, 1.0, "Weight of the prior that no image is almost blank.", lower=0)
  mode_seeking_weight: float = by_variant(0.0, 0.3, "Weight of the diversity term.", lower=0)
  total_variation_weight: float = by_variant(
    16.0,
    0.0,
    "Weight of the total variation; with span times the share of all dimensions that it fills.",
    batch_norm=25.0,
    lower=0,
  )
  judge_epochs: int = common.flag(8, "Passes over the data of the independent judge's training.", lower=1)
  population: int = common.flag(
    20_000, "Fresh samples of which the residual of the generator's whole distribution is measured.", lower=2
  )
  # What is written.
  log_every: int = common.flag(50, "Steps between logged metrics.", lower=1)
  grid_every: int = common.flag(500, "Steps between sample grids and checkpoints.", lower=1)
  tensorboard: bool = common.flag(False, "Also write metrics for TensorBoard.")

  @property
  def variant(self) -> str:
    """What the defaults of many flags depend on: the generator, or batch norm."""
    return "batch_norm" if self.batch_norm else self.generator


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
  _check(config)
  out = common.Workdir(workdir, config, tensorboard=config.tensorboard)
  classifiers = trained_classifiers(config, data.train, out.path / "classifier")
  method, state = train_generator(config, classifiers, out)  # sees no data
  return evaluation.evaluate(
    out,
    data,
    classifiers,
    conditions_of(config, classifiers),
    method,
    state,
    seed=config.seed,
    judge_epochs=config.judge_epochs,
    num_samples=num_samples,
    population=config.population,
    figure=figure,
  )


def _check(config: Config) -> None:
  """What the bounds of single flags cannot say."""
  common.check_config(config)
  if config.warmup >= config.steps:
    raise common.UsageError(f"--warmup must be less than --steps = {config.steps}; got {config.warmup}.")
  if config.batch_norm and config.generator != "span":
    raise common.UsageError(f"--generator must be span with --batch_norm; got {config.generator} (--nobatch_norm?).")
  if config.batch_norm and config.multiplier_form == "softmax":
    raise common.UsageError(
      "--multiplier_form must be softplus or relu with --batch_norm: without weight decay all probabilities are 0 or 1."
    )
  if (config.statistics_weight or config.collapse_weight) and not config.batch_norm:
    raise common.UsageError("--statistics_weight and --collapse_weight must be 0 without --batch_norm.")
  if config.generator == "span" and (config.num_fresh or not config.fixed_noise):
    raise common.UsageError(
      "--num_fresh must be 0 and --fixed_noise set with --generator=span: every image that its noise can pick is"
      " trained in every step."
    )
  if not config.mean_image and (config.mean_weight or config.ink_weight):
    raise common.UsageError(
      "--mean_weight and --ink_weight must be 0 with --nomean_image: there is then no mean image to compare with."
    )


def label_groups(num_labels: int, num_classifiers: int) -> list[tuple[int, ...]]:
  """The labels shared out in order: 0-4 and 5-9 of ten digits for two classifiers, as in Fig. 8.

  >>> label_groups(10, 2)
  [(0, 1, 2, 3, 4), (5, 6, 7, 8, 9)]
  """
  return [tuple(int(label) for label in part) for part in np.array_split(np.arange(num_labels), num_classifiers)]


def trained_classifiers(config: Config, train: Images, directory: pathlib.Path) -> list[Classifier]:
  """Trains the attacked classifiers, or restores them; nothing else of the data leaves this function.

  Each classifier stores the mean of its training images, which it subtracts from its inputs.
  """
  classifiers = []
  shape = train.x.shape[1:]
  for index, labels in enumerate(label_groups(len(np.unique(train.y)), config.classifiers)):
    module = networks.MLPClassifier(
      num_classes=len(labels),
      hidden=(config.width, config.second_width),
      batch_norm=config.batch_norm,
      init_scale=_SMALL_INIT if config.batch_norm else 1.0,
      gate_sharpness=config.gate_sharpness or None,
    )
    like = {"variables": _initial_variables(config, module, shape, index), "mean": jnp.zeros(shape)}
    with Checkpointer(directory / str(index)) as checkpointer:
      restored = checkpointer.restore(like)
      stored = restored[1] if restored else _train_classifier(config, module, like["variables"], train, labels)
      if not restored:
        checkpointer.save(0, stored)
    offset = stored["mean"] if config.mean_image else None
    classifiers.append(
      networks.from_module(module, stored["variables"], input_shape=shape, labels=labels, offset=offset)
    )
  return classifiers


def _initial_variables(config: Config, module: networks.MLPClassifier, shape: Sequence[int], index: int) -> PyTree:
  key = jax.random.fold_in(jax.random.key(config.seed), index)
  variables: Any = module.init(key, jnp.zeros((1, *shape)))
  if config.batch_norm:
    params = variables["params"]
    params["Dense_0"]["kernel"] *= config.first_init_scale / _SMALL_INIT
    params["BatchNorm_1"]["scale"] *= _SMALL_INIT  # as in `experiments.circle`
  return variables


def _train_classifier(
  config: Config, module: networks.MLPClassifier, variables: PyTree, train: Images, labels: Sequence[int]
) -> dict[str, PyTree]:
  own = np.isin(train.y, labels)
  x, y = jnp.asarray(train.x[own]), jnp.asarray(np.searchsorted(labels, train.y[own]))
  mean = jnp.mean(x, axis=0) if config.mean_image else jnp.zeros(x.shape[1:])
  exact: Any = module.clone(gate_sharpness=None).apply

  def train_mode(params: PyTree, x: jax.Array) -> tuple[jax.Array, PyTree]:
    """Logits and the statistics that batch norm stores, if any."""
    return exact({**variables, "params": params}, x, train=True, mutable=["batch_stats"])

  steps, rate = config.pretrain_steps, config.pretrain_learning_rate
  hold = steps // 5
  form: dict[str, Any] = (
    {
      "learning_rate": optax.schedules.exponential_decay(rate, steps - hold, 1e-3, transition_begin=hold),
      "loss_scaled": True,
    }
    if config.batch_norm
    else {"learning_rate": rate, "weight_decay": config.weight_decay, "momentum": 0.9}
  )
  progress = common.Progress("classifier", steps)
  result = pretrain.gradient_descent(
    lambda params, x: train_mode(params, x)[0],
    variables["params"],
    x - mean[None],
    y,
    num_steps=steps,
    on_progress=lambda step, log_loss: progress.update(step, {"log loss": log_loss}),
    **form,
  )
  low, median, high = np.percentile(result.margins, [5, 50, 95])
  common.say(
    f"classifier of {labels[0]}-{labels[-1]}: log loss {result.log_loss:.4g}, |gradient| / |zeta|"
    f" {result.relative_gradient:.2g}, margins {low:.4g}, {median:.4g}, {high:.4g} (5%, median, 95%)"
  )
  return {"variables": {"params": result.params, **train_mode(result.params, x - mean[None])[1]}, "mean": mean}


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
  conditions = conditions_of(config, classifiers)
  theta, statistics = init_generator(keys[0])
  state = training.init_state(
    keys[1],
    method,
    classifiers,
    conditions,
    theta=theta,
    statistics=statistics,
    eta=eta,
    margin=config.margin or _told_margins(config, classifiers),
  )
  return method, state, conditions


def _told_margins(config: Config, classifiers: Sequence[Classifier]) -> list[float]:
  """The margin of each classifier's training samples as its last layer tells it."""
  margins = []
  for params in (classifier.params for classifier in classifiers):
    kernel, bias = params["Dense_2"]["kernel"], params["Dense_2"]["bias"]
    if config.batch_norm:
      margins.append(collapsed_margin(kernel, bias, params["BatchNorm_1"]["scale"], params["BatchNorm_1"]["bias"]))
    else:
      margins.append(typical_margin(kernel, weight_decay=config.weight_decay))
  common.say(f"the last layer tells a typical margin of {', '.join(f'{margin:.4g}' for margin in margins)}")
  return margins


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


def conditions_of(config: Config, classifiers: Sequence[Classifier]) -> list[Conditions]:
  """The stationarity condition of each classifier: weight decay's, or with batch norm the max-margin problem's."""
  if not config.batch_norm:
    return [weight_decay_conditions(c.params, weight_decay=config.weight_decay) for c in classifiers]
  conditions = []
  for classifier in classifiers:
    x = jax.random.uniform(jax.random.key(config.seed), (40, *classifier.input_shape))
    equations = homogeneity.derivative_equations(classifier.apply_fn, classifier.params, x)
    conditions.append(max_margin_conditions(classifier.params, homogeneity.solve_rates(equations, classifier.params)))
  return conditions


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
