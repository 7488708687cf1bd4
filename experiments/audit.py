"""What do my weights give away? A generator from anybody's classifier, and an answer in plain words.

The owner names a Python function that describes the classifier (`kkt_jax.subject`) and a file with its parameters.
First the weights are examined: which conditions they obey, and how far they are from every point that obeys them. Then
a generator is trained so that what it generates obeys them, and ``report.html`` shows what came out. With
``--train_data`` and ``--held_out_data``, which are looked at only then, it says how much of the training data that is.
"""

from collections.abc import Mapping
import dataclasses
import functools
import importlib
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import audit_report, common, ingredients
from experiments.audit_data import read_images
from experiments.audit_findings import describe, examine, Findings, FORMS, HOPELESS
from experiments.data import Images
from kkt_jax import generators, priors, training
from kkt_jax.classifier import Classifier
from kkt_jax.relaxation import relax_gates
from kkt_jax.subject import Subject
from kkt_jax.weights import read_weights, WeightsError


@dataclasses.dataclass(frozen=True)
class Config:
  """Settings of the run; each is a flag of the same name."""

  classifier: str = common.flag("", "module:function that returns the kkt_jax.subject.Subject.")
  checkpoint: str = common.flag("", "Its parameters: a .safetensors or flax .msgpack file, or an orbax folder.")
  train_data: str = common.flag("", "For its owner: the training data, to say how much came out. An .npz or a folder.")
  held_out_data: str = common.flag("", "For its owner: other data of the same kind, without which little can be said.")
  form: str = common.flag("auto", "Which conditions it obeys; auto finds out.", choices=FORMS)
  anyway: bool = common.flag(False, "Train even where the weights are too far from all conditions.")
  codes: int = common.flag(20, "Samples of each class that are generated.", lower=2)
  steps: int = common.flag(1500, "Training steps of the generator.", lower=1)
  warmup: int = common.flag(300, "First steps, in which only the classification counts.", lower=0)
  learning_rate: float = common.flag(0.05, "Peak learning rate of the generator.", lower=1e-8)
  multiplier_learning_rate: float = common.flag(0.02, "Peak learning rate of the multipliers.", lower=0)
  stationarity_weight: float = common.flag(72.0, "Weight of the stationarity (0 is the ablation).", lower=0)
  duality_weight: float = common.flag(14.0, "Weight of the common margin.", lower=0)
  tie_weight: float = common.flag(
    0.3, "Weight decay: last weight of the multipliers' distance from the classifier's own probabilities.", lower=0
  )
  statistics_weight: float = common.flag(
    100.0, "Weight of the stored batch-norm statistics, if there are any.", lower=0
  )
  total_variation_weight: float = common.flag(
    16.0, "Weight of the total variation of images, times the share of all dimensions that the data fill.", lower=0
  )
  range_weight: float = common.flag(8000.0, "Weight of the range that inputs lie in.", lower=0)
  gate_sharpness: float = common.flag(
    20.0, "Smoothness of the ReLU derivatives in the stationarity; 0 is exact.", lower=0
  )
  start: float = common.flag(0.3, "Deviation of the random first samples, in units of the range.", lower=0)
  margin: float = common.flag(0.0, "Margin of the training data in logits, if known; 0 lets it be learned.", lower=0)
  seed: int = common.flag(0, "Seed of everything random.", lower=0)
  log_every: int = common.flag(50, "Steps between logged metrics.", lower=1)
  checkpoint_every: int = common.flag(500, "Steps between checkpoints.", lower=1)


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Runs or resumes the audit; returns its figures, with the verdict in words."""
  for name in ("classifier", "checkpoint"):
    if not getattr(config, name):
      raise common.UsageError(f"--{name} must be given; see --help.")
  if config.warmup >= config.steps:
    raise common.UsageError(f"--warmup must be less than --steps = {config.steps}; got {config.warmup}.")
  out = common.Workdir(workdir, config)
  subject = load_subject(config.classifier)
  train, held_out = (_owners_data(config, name, subject) for name in ("train_data", "held_out_data"))
  classifier = load_classifier(subject, config.checkpoint)
  if config.gate_sharpness:
    gradient_fn = relax_gates(classifier.apply_fn, config.gate_sharpness)
    classifier = dataclasses.replace(classifier, gradient_fn=gradient_fn)
  findings = examine(classifier, form=config.form, seed=config.seed)
  said = describe(classifier, findings)
  common.say(said)
  if findings.bound > HOPELESS and not config.anyway:
    metrics: dict[str, Any] = {"form": findings.form, "least_residual": dict(findings.bounds)}
    metrics["verdict"] = (
      f"No data can account for {findings.bound:.0%} of what these weights would have to be made of. They were not"
      " trained to convergence by gradient descent with weight decay or from a small initialisation (an adaptive"
      " optimizer, early stopping, or a large initialisation without weight decay?). This method can say nothing of"
      " what they give away; others may. Train anyway with --anyway."
    )
    common.say(metrics["verdict"])
    out.finish(metrics)
    return metrics
  method, state = train_generator(config, classifier, findings, out)
  y = np.repeat(np.arange(subject.num_classes), config.codes)
  every = Images(*map(np.asarray, ingredients.every_sample(method, state, [classifier])))
  fresh, _ = training.sample(method, state, [classifier], jax.random.key(config.seed + 3), y)
  metrics = audit_report.write(
    out, classifier, findings, said, fresh=Images(np.asarray(fresh), y), every=every, train=train, held_out=held_out
  )
  common.say(metrics["verdict"])
  common.say(f"the report is {out.path / 'report.html'}")
  return metrics


def load_subject(name: str) -> Subject:
  """The subject that ``module:function`` returns.

  Raises:
    UsageError: there is no such module or function, or it returns something else.
  """
  module_name, separator, function = name.partition(":")
  if not separator:
    raise common.UsageError(f"--classifier must be module:function; got {name!r}.")
  if "" not in sys.path:
    sys.path.insert(0, "")  # the user's own modules lie where the user is
  try:
    subject = getattr(importlib.import_module(module_name), function)()
  except (ImportError, AttributeError) as error:
    raise common.UsageError(f"--classifier={name} cannot be loaded ({error}).") from error
  if not isinstance(subject, Subject):
    raise common.UsageError(f"--classifier={name} must return a kkt_jax.subject.Subject; got {type(subject).__name__}.")
  return subject


def load_classifier(subject: Subject, checkpoint: str) -> Classifier:
  """The subject with the parameters of a file.

  Raises:
    UsageError: the file cannot be read or does not fit.
  """
  try:
    return subject.classifier(read_weights(checkpoint, subject.variables_like()))
  except WeightsError as error:
    raise common.UsageError(f"--checkpoint: {error}") from error
  except ValueError as error:
    raise common.UsageError(f"--classifier and --checkpoint do not make a classifier: {error}") from error


def _owners_data(config: Config, flag: str, subject: Subject) -> Images | None:
  path = getattr(config, flag)
  if not path:
    return None
  return read_images(
    path,
    flag=flag,
    input_shape=subject.input_shape,
    num_classes=subject.num_classes,
    value_range=subject.value_range,
  )


def train_generator(
  config: Config, classifier: Classifier, findings: Findings, out: common.Workdir
) -> tuple[training.Method, training.TrainState]:
  """Trains the generator from the classifier alone, or resumes; no data enter this function."""
  keys = jax.random.split(jax.random.key(config.seed + 1))
  num_classes = classifier.num_classes
  batch_size = config.codes * num_classes
  init, generate = _generator(config, classifier, findings)
  terms = _priors(config, classifier, _share(classifier, findings))
  decay = findings.form == "weight_decay"
  rising = optax.schedules.linear_schedule(0.0, config.tie_weight, max(3 * config.steps // 5, 1), config.warmup)
  adam = functools.partial(ingredients.adam, num_steps=config.steps)
  method = training.Method(
    generate=generate,
    optimizer=training.partitioned(adam(config.learning_rate), adam(config.multiplier_learning_rate), adam(2e-4)),
    noise_dim=1,
    batch_size=batch_size,
    weights={
      "stationarity": lambda step: jnp.where(jnp.asarray(step) < config.warmup, 0.0, config.stationarity_weight),
      "duality": config.duality_weight,
      **({"softmax_distance": rising} if decay and config.tie_weight else {}),
      **{name: weight for name, (weight, _) in terms.items()},
    },
    priors={name: prior for name, (_, prior) in terms.items()},
    residual="cosine",  # neither the weight decay nor the factor of Lambda-bar need be known
    multiplier_form="softplus",
    raw_multipliers=lambda table, x, y, t: table,  # free, for every batch holds the same samples in the same order
    learn_scale=False,
    delta=1.0 if decay else 0.1,
    fixed_noise=True,
    stratified_noise=True,
  )
  theta, statistics = init(keys[0])
  state = training.init_state(
    keys[1],
    method,
    [classifier],
    [findings.conditions],
    theta=theta,
    statistics=statistics,
    eta=jnp.zeros((batch_size, num_classes)),
    margin=config.margin or None,
  )

  def draw(state: training.TrainState) -> None:
    images = Images(*map(np.asarray, ingredients.every_sample(method, state, [classifier])))
    audit_report.grid(out.path / f"samples_{int(state.step):06d}.png", images)

  state = common.train(
    method,
    state,
    [classifier],
    [findings.conditions],
    out,
    num_steps=config.steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint_every,
    on_checkpoint=draw,
  )
  return method, state


def _generator(
  config: Config, classifier: Classifier, findings: Findings
) -> tuple[generators.InitFn, training.GenerateFn]:
  """Samples in the span of the first layer where that is told, else free ones."""
  start = jnp.full(classifier.input_shape, 0.5) if findings.start is None else jnp.clip(findings.start, 0.0, 1.0)
  table: dict[str, Any] = {
    "num_labels": classifier.num_classes,
    "num_codes": config.codes,
    "deviation": config.start,
  }
  if findings.span is None:
    return generators.free_functions([start], **table)
  return generators.span_functions([start], [findings.span], power=_share(classifier, findings), **table)


def _share(classifier: Classifier, findings: Findings) -> float:
  """The share of all dimensions that the data are known to fill."""
  return 1.0 if findings.span is None else findings.span.strengths.size / int(np.prod(classifier.input_shape))


def _priors(config: Config, classifier: Classifier, share: float) -> dict[str, tuple[float, training.Prior]]:
  """Every prior that applies to this kind of inputs and counts, with its weight."""
  terms: dict[str, tuple[float, training.Prior]] = {
    "range": (config.range_weight, lambda classifier, batch: priors.out_of_range(batch.x)),
  }
  if len(classifier.input_shape) == 3 and min(classifier.input_shape[:2]) > 1:
    variation = lambda classifier, batch: priors.total_variation(batch.x)
    terms["total_variation"] = (config.total_variation_weight * share, variation)
  if classifier.statistics_fn is not None:
    terms["statistics"] = (config.statistics_weight, ingredients.statistics)
  return {name: (weight, prior) for name, (weight, prior) in terms.items() if weight}


if __name__ == "__main__":
  common.main(Config, run, jointly=True)
