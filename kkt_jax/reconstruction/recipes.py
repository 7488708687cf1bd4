"""How a generator is trained: a recipe of named parts, and the defaults that follow from what the weights say.

`default` is the one place where a classifier's kind (batch norm, weight decay known or not, subspace revealed or not)
decides on settings. A user's classifier and those of the experiments go through it alike.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import difflib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kkt_jax import _checks, generators, networks
from kkt_jax._typing import PyTree
from kkt_jax.analysis.examination import Examination
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.generators.base import Generator, GeneratorFactory
from kkt_jax.generators.flows import Flow
from kkt_jax.kkt import losses, multipliers
from kkt_jax.kkt.conditions import Conditions, weigh_tensors
from kkt_jax.reconstruction import terms
from kkt_jax.reconstruction.terms import Batch, Term

Measure = Callable[[Conditions, PyTree], jax.Array]
OptimizerFactory = Callable[[int], optax.GradientTransformation]
_CHOSEN: Any = None  # what `default` fills in
RESERVED = ("stationarity", "residual", "total", "margin", "gradient_norm")  # names of other logged metrics


class Multipliers(NamedTuple):
  """Where the multipliers mu come from, as functions.

  Attributes:
    init: ``key -> eta``.
    apply: ``(eta, classifier, batch) -> mu [M, C]``.
    scaled: whether a learned positive factor for each classifier multiplies them. Measures that depend on the size of
      the sum need one, unless the size is known, as with a known weight decay.
  """

  init: Callable[[jax.Array], PyTree]
  apply: Callable[[PyTree, Classifier, Batch], jax.Array]
  scaled: bool = False


MultipliersFactory = Callable[[Sequence[Examination], Generator], Multipliers]


@dataclasses.dataclass(frozen=True)
class Stationarity:
  """The equations that the samples must satisfy (Eq. 5): what they are, how they are measured, when they count.

  Attributes:
    weight: of the term; 0 leaves it out, which is the ablation.
    measure: ``(conditions, sums) -> scalar``, one of `kkt_jax.kkt.losses`: `cosine_distance`, `relative_residual`,
      `mean_relative_residual`, `absolute_residual` (the paper's), `squared_residual`, or your own.
    conditions: from an examination to the conditions; its own by default.
    begin: share of the training after which the term counts.
    ramp: share of the training over which its weight grows from 0 after that.
    gate_sharpness: of the relaxed ReLU gates (`kkt_jax.classifiers.relaxation`); 0 is exact.
    free_gates: whether each sample of a finite generator has relaxed gates of its own at kinks, learned by theta's
      optimizer: there a gate of the training data is any number from 0 to 1. As many numbers for a sample as units.
    equalised: the power of its singular value by which the residual of each direction of a first kernel is divided,
      where samples are given by their coordinates in the subspace: samples that are hardly written into the weights
      stand in its last directions.
    compute_dtype: of the classifier's gradients, such as ``"bfloat16"``; that of its parameters if None.
    target_exponent: how the target follows alpha, ``e^(alpha target_exponent)`` times what it is, with a gradient: the
      paper's Lambda-bar (Eq. 3) with 2 lambda_max - 1. Only for measures that are not relative.
  """

  weight: float
  measure: Measure = losses.cosine_distance
  conditions: Callable[[Examination], Conditions] = lambda examination: examination.conditions
  begin: float = 0.0
  ramp: float = 0.0
  gate_sharpness: float = 20.0
  free_gates: bool = False
  equalised: float = 0.0
  compute_dtype: str | None = None
  target_exponent: float = 0.0

  def __post_init__(self) -> None:
    for name in ("weight", "begin", "ramp", "gate_sharpness", "equalised"):
      _checks.check_at_least(name, getattr(self, name), 0)
    _checks.check_finite("weight", self.weight)
    if self.free_gates and not self.gate_sharpness:
      raise ValueError("gate_sharpness must be positive with free_gates, which are relaxed; got 0.")
    scale_free = (losses.cosine_distance, losses.relative_residual, losses.mean_relative_residual)
    if self.target_exponent and self.measure in scale_free:
      raise ValueError(
        "target_exponent must be 0 with a relative measure, which a target that follows alpha would fool; got"
        f" {self.target_exponent}."
      )


def adam(peak: float, *, held: float = 1 / 3) -> OptimizerFactory:
  """Adam with a constant learning rate for a share of the training and a cosine after it."""

  def make(num_steps: int) -> optax.GradientTransformation:
    first = int(held * num_steps)
    schedule = optax.schedules.join_schedules(
      [
        optax.schedules.constant_schedule(peak),
        optax.schedules.cosine_decay_schedule(peak, max(num_steps - first, 1), alpha=0.02),
      ],
      boundaries=[first],
    )
    return optax.adam(schedule, b2=0.99)

  return make


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long, from how many starts, and with which optimizers.

  Attributes:
    steps: training steps; 0 leaves the generator at its random start.
    theta: optimizer of the generator, from the number of steps.
    eta: that of the multipliers; chosen by `default` if None.
    alpha: that of the scale of the margin.
    margin: e^-alpha at the start, in logits; what the last layer reveals if None, else that of the first samples.
    restarts: generators that are started; the one with the least loss without stationarity and without terms that have
      a schedule goes on.
    restart_steps: steps of each before the choice; stationarity does not count in them.
    looks: shares of the training after which it ends, if polishing certifies all training samples then.
    hopeful: share of a few samples that polishing must certify then, and more, before all are polished; and of all, for
      another look.
    polish_rounds: most rounds of polishing after the training, where the subspace of the data is revealed and the
      generator is finite; 0 leaves it out. See `kkt_jax.reconstruction.polish`.
    match_steps: steps of fitting a network of continuous noise to the generator's samples; 0 keeps the generator.
      See `kkt_jax.reconstruction.distil`.
    nearly_all: share of the training samples that makes a further table not worth its time.
    tables: how often the generator is trained, from different starts, at most. Where samples are certified, a further
      one brings others, until more than ``nearly_all`` are: with weight decay these are held while it is trained. Else
      that network is fitted to the samples of all.
    joint_steps: steps of training that network by the equations.
    joint: optimizer of its parameters and of the multipliers then.
    joint_factors: factors on the weights of terms then, by name.
    steps_per_call: steps in one compiled call; more than 1 pays for tiny networks, whose steps are shorter than the
      call.
  """

  steps: int = 1500
  theta: OptimizerFactory = adam(0.05)
  eta: OptimizerFactory = _CHOSEN
  alpha: OptimizerFactory = adam(2e-4)
  margin: float | None = None
  restarts: int = 1
  restart_steps: int = 0
  looks: tuple[float, ...] = (0.4, 0.7)
  hopeful: float = 0.5
  nearly_all: float = 0.9
  polish_rounds: int = 12
  match_steps: int = 0
  tables: int = 1
  joint_steps: int = 50
  joint: OptimizerFactory = adam(1e-5, held=0.0)
  joint_factors: Mapping[str, float] = dataclasses.field(default_factory=dict)
  steps_per_call: int = 1

  def __post_init__(self) -> None:
    for name in ("steps", "restart_steps", "polish_rounds", "match_steps", "joint_steps"):
      _checks.check_at_least(name, getattr(self, name), 0)
    for name in ("restarts", "tables", "steps_per_call"):
      _checks.check_at_least(name, getattr(self, name), 1)
    if self.margin is not None:
      _checks.check_positive("margin", self.margin)
    if self.restarts > 1 and not self.restart_steps or 0 < self.steps <= self.restart_steps:
      raise ValueError(
        f"restart_steps must be at least 1 with restarts, and less than steps = {self.steps}; got {self.restart_steps}."
      )

  def optimizer(self) -> optax.GradientTransformation:
    """One optimizer for the three groups of unknowns (`optax.partition`); free gates belong to theta."""
    groups = {"theta": self.theta, "eta": self.eta, "alpha": self.alpha}
    labels = lambda params: {name: "theta" if name == "gates" else name for name in params}
    return optax.partition({name: make(self.steps) for name, make in groups.items()}, labels)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How a generator is trained. A part that is not given is chosen by `default` from what the weights say.

  Attributes:
    generator: makes the generator g(noise, y, t; theta); see `kkt_jax.generators`.
    multipliers: makes the multipliers h(x, y, t; eta).
    stationarity: the equations.
    terms: all other terms of the loss by name: duality (Eq. 6) and the priors that choose among the solutions.
    schedule: steps, starts, optimizers.
    flow: the network of continuous noise that takes the generator's place if the schedule has ``match_steps``;
      `kkt_jax.generators.Flow` with its defaults, and as many samples in a step as the generator, if None.
    label_weights: relative frequency of each label in the batches, the paper's p(y); balanced if None.
  """

  generator: GeneratorFactory = _CHOSEN
  multipliers: MultipliersFactory = _CHOSEN
  stationarity: Stationarity = _CHOSEN
  terms: Mapping[str, Term] = _CHOSEN
  schedule: Schedule = _CHOSEN
  flow: Flow | None = None
  label_weights: Mapping[int, float] | None = None

  def __post_init__(self) -> None:
    taken = sorted(set(self.terms or ()) & set(RESERVED))
    if taken:
      raise ValueError(f"terms must not be named like other metrics, {', '.join(RESERVED)}; got {', '.join(taken)}.")

  def _check_chosen(self, *parts: str) -> None:
    """Raises ValueError if one of the parts is still to be chosen by `default`, so that there is nothing to change."""
    for part in parts:
      if getattr(self, part) is None:
        raise ValueError(
          f"{part} must be given before it can be changed; this recipe leaves it to the classifiers. Change the one"
          " that they get: kkt_jax.reconstruction.recipes.complete(recipe, examinations)."
        )

  def with_weights(self, **weights: float) -> "Recipe":
    """The recipe with other weights, by the names of its terms and ``stationarity``.

    Raises:
      ValueError: there is no such term, or terms and stationarity are not chosen yet (see `complete`).
    """
    self._check_chosen("stationarity", "terms")
    known = ["stationarity", *self.terms]
    for name in weights:
      if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"weights must name terms of the recipe, {', '.join(known)}; got {name!r}.{hint}")
    stationarity = dataclasses.replace(self.stationarity, weight=weights.get("stationarity", self.stationarity.weight))
    changed = {n: dataclasses.replace(t, weight=weights.get(n, t.weight)) for n, t in self.terms.items()}
    return dataclasses.replace(self, stationarity=stationarity, terms=changed)

  def with_factors(self, **factors: float) -> "Recipe":
    """The recipe with factors on the weights of those terms that it has; raises as `with_weights`."""
    self._check_chosen("stationarity", "terms")
    weights = {"stationarity": self.stationarity.weight} | {name: term.weight for name, term in self.terms.items()}
    return self.with_weights(**{name: weights[name] * factor for name, factor in factors.items() if name in weights})

  def with_terms(self, **added: Term) -> "Recipe":
    """The recipe with further or other terms; raises a ValueError if its own are not chosen yet (see `complete`)."""
    self._check_chosen("terms")
    return dataclasses.replace(self, terms={**self.terms, **added})

  def with_schedule(self, **changes: Any) -> "Recipe":
    """The recipe with changes to its schedule."""
    return dataclasses.replace(self, schedule=dataclasses.replace(self.schedule or Schedule(), **changes))

  def joint(self, flow: Flow) -> "Recipe":
    """The recipe for a network of continuous noise once it is fitted; this recipe must be complete."""
    schedule, recipe = self.schedule, dataclasses.replace(self, generator=flow)
    recipe = recipe.with_stationarity(begin=0.0, ramp=0.0).with_factors(**schedule.joint_factors)
    return recipe.with_schedule(
      steps=schedule.joint_steps, theta=schedule.joint, eta=schedule.joint, restarts=1, restart_steps=0
    )

  def with_stationarity(self, **changes: Any) -> "Recipe":
    """The recipe with changes to its stationarity; raises a ValueError if it is not chosen yet (see `complete`)."""
    self._check_chosen("stationarity")
    return dataclasses.replace(self, stationarity=dataclasses.replace(self.stationarity, **changes))


def default(examinations: Sequence[Examination]) -> Recipe:
  """The recipe that suits the classifiers, chosen from what their weights say; no part is None.

  - **Batch norm**: the multipliers are the network h; stationarity is measured by its angle. The stored statistics, the
    common margin and the common features of each class, where the weights reveal them, are priors. A network of
    continuous noise is trained on with 100 times the stationarity and a tenth of the statistics.
  - **Weight decay of known strength**: the multipliers are the classifier's own probabilities, and the sum has a known
    size. Gates are free at kinks, where gradient descent with weight decay leaves a sixth of all units.
  - **Anything else**: free multipliers, one for each sample and class, drawn to the classifier's probabilities in the
    course of the training if the form is weight decay; stationarity is measured by its angle. Twenty samples of each
    class, and at least a fifth more in all than the subspace has dimensions: there are as many training samples.

  Everywhere: samples in the subspace of the first layer if that is revealed; inputs in their range; total variation of
  images, the heavier, the more of all dimensions it fills. The numbers were found on digits (BUILD_NOTES.md).
  Stationarity does not count in the first fifth of the training.
  """
  classifiers = [examination.classifier for examination in examinations]
  share = float(np.mean([examination.share for examination in examinations]))
  coupled = all(classifier.batch_coupled for classifier in classifiers)
  decay = all(examination.form == "weight_decay" for examination in examinations)
  converged = all(examination.form == "max_margin" for examination in examinations)
  known = decay and all(classifier.weight_decay is not None for classifier in classifiers)
  shared: dict[str, Term] = {}
  if all(classifier.value_range is not None for classifier in classifiers):
    shared["range"] = Term(8000.0, terms.in_range)
  shape = classifiers[0].input_shape
  if len(shape) == 3 and min(shape[:2]) > 1:
    shared["total_variation"] = Term((25.0 if coupled else 16.0) * share, terms.total_variation)
  begin, schedule = 0.2, Schedule(eta=adam(2e-3))
  if coupled:
    schedule = dataclasses.replace(schedule, joint_factors={"stationarity": 100.0, "statistics": 0.1})
    shared["statistics"] = Term(1000.0, terms.statistics)
    features = [examination.class_features for examination in examinations]
    if all(features):
      shared["class_features"] = Term(30.0, terms.class_features([pair for pair in features if pair]))
    return Recipe(
      generators.table(generators.codes_for(examinations)),
      network_multipliers(),
      Stationarity(8.0, losses.cosine_distance, weighed_conditions, begin),
      {"duality": Term(14.0, terms.duality(delta=0.01)), **shared},
      schedule,
    )
  if known:
    return Recipe(
      generators.table(generators.codes_for(examinations)),
      softmax_multipliers(),
      Stationarity(72.0, losses.mean_relative_residual, weighed_conditions, begin, free_gates=True, equalised=0.25),
      {"duality": Term(14.0, terms.duality(delta=1.0)), **shared},
      dataclasses.replace(schedule, steps=3000, nearly_all=0.99),
    )
  if decay:
    rising = lambda progress: jnp.clip((progress - begin) / 0.6, 0.0, 1.0)
    shared["softmax_distance"] = Term(0.3, terms.softmax_distance, rising)
  return Recipe(
    generators.table(generators.codes_for(examinations, free=True)),
    free_multipliers(),
    Stationarity(72.0, losses.cosine_distance, begin=begin),
    {"duality": Term(14.0, terms.duality(delta=0.1 if converged else 1.0)), **shared},
    dataclasses.replace(schedule, eta=adam(0.02)),
  )


def complete(recipe: Recipe, examinations: Sequence[Examination]) -> Recipe:
  """The recipe with every part that is None, and the schedule's eta, taken from `default`."""
  chosen = default(examinations)
  if recipe.schedule is not None and recipe.schedule.eta is None:
    recipe = recipe.with_schedule(eta=chosen.schedule.eta)
  given = {f.name: v for f in dataclasses.fields(recipe) if (v := getattr(recipe, f.name)) is not None}
  return dataclasses.replace(chosen, **given)


def weighed_conditions(examination: Examination) -> Conditions:
  """The examination's conditions with the first kernel weighed 8, the others 4, and without the last bias."""
  weight = {"first kernel": 8.0, "kernel": 4.0, "other": 1.0, "last bias": 0.0}
  return weigh_tensors(examination.conditions, jax.tree.map(weight.__getitem__, examination.roles))


def classification_only(recipe: Recipe, examinations: Sequence[Examination]) -> Recipe:
  """The same generator, trained for classification only: the baseline that needs no theory.

  Images keep total variation, times the mean share of all dimensions that the subspaces fill, and 600 steps.
  """
  changed = recipe.with_terms(cross_entropy=Term(1.0, terms.cross_entropy))
  weights = dict.fromkeys({"stationarity", *changed.terms} - {"range", "cross_entropy"}, 0.0)
  if "total_variation" in recipe.terms:
    weights["total_variation"] = sum(examination.share for examination in examinations) / len(examinations)
    changed = changed.with_schedule(steps=600)
  return changed.with_weights(**weights).with_schedule(polish_rounds=0, match_steps=0)


def softmax_multipliers() -> MultipliersFactory:
  """The classifier's own probabilities; see `kkt_jax.kkt.multipliers.from_softmax`."""
  apply = lambda eta, classifier, batch: multipliers.from_softmax(batch.logits)
  return lambda examinations, generator: Multipliers(lambda key: None, apply)


def network_multipliers(
  *, positive: Callable[[jax.Array], jax.Array] = jax.nn.softplus, hidden: Sequence[int] = (8, 32), scaled: bool = False
) -> MultipliersFactory:
  """The network h(x, y, t; eta) of section 4.

  Args:
    positive: makes its output non-negative: softplus, or the paper's `jax.nn.relu`, which dies when started at random.
    hidden: widths of its hidden layers.
    scaled: see `Multipliers`.
  """

  def make(examinations: Sequence[Examination], generator: Generator) -> Multipliers:
    network = networks.MultiplierNetwork(
      num_outputs=max(examination.classifier.num_classes for examination in examinations),
      num_labels=generators.num_labels(examinations),
      num_classifiers=len(examinations),
      hidden=hidden,
    )
    raw: Any = network.apply
    init = jax.jit(network.init)
    place_of = generators.places_of(examinations)
    zero = np.zeros(1, np.int32)
    probe = np.zeros((1, *examinations[0].classifier.input_shape), np.float32)

    def apply(eta: PyTree, classifier: Classifier, batch: Batch) -> jax.Array:
      t = jnp.full(batch.y.shape, batch.t)
      outputs = raw(eta, batch.x, place_of(batch.y), t)[:, : classifier.num_classes]
      return multipliers.from_network(outputs, positive=positive)

    return Multipliers(lambda key: init(key, probe, zero, zero), apply, scaled)

  return make


def free_multipliers(*, positive: Callable[[jax.Array], jax.Array] = jax.nn.softplus) -> MultipliersFactory:
  """One free number for each sample of a finite generator (`kkt_jax.generators.table`) and each class.

  The factory raises a ValueError if the generator's samples are endless.
  """

  def make(examinations: Sequence[Examination], generator: Generator) -> Multipliers:
    classes = max(examination.classifier.num_classes for examination in examinations)
    shape = _one_for_each_sample(examinations, generator, classes)
    place_of = generators.places_of(examinations)

    def apply(eta: PyTree, classifier: Classifier, batch: Batch) -> jax.Array:
      values = eta[batch.t, place_of(batch.y), batch.code]
      return multipliers.from_network(values[:, : classifier.num_classes], positive=positive)

    return Multipliers(lambda key: jnp.zeros(shape), apply)

  return make


def runner_up_multipliers(*, scaled: bool = False) -> MultipliersFactory:
  """One free number for each sample of a finite generator, on the runner-up class (Buzaglo et al. 2023).

  The factory raises a ValueError if the generator's samples are endless.
  """

  def make(examinations: Sequence[Examination], generator: Generator) -> Multipliers:
    shape = _one_for_each_sample(examinations, generator, 1)
    place_of = generators.places_of(examinations)

    def apply(eta: PyTree, classifier: Classifier, batch: Batch) -> jax.Array:
      values = eta[batch.t, place_of(batch.y), batch.code]
      return multipliers.on_runner_up(values, batch.logits, batch.classes)

    return Multipliers(lambda key: jax.random.uniform(key, shape), apply, scaled)

  return make


def _one_for_each_sample(examinations: Sequence[Examination], generator: Generator, width: int) -> tuple[int, ...]:
  """The shape of multipliers [T, labels, codes, width] that belong to samples."""
  if not generator.codes:
    raise ValueError("multipliers of single samples need a generator of finitely many, such as generators.table.")
  return len(examinations), generators.num_labels(examinations), generator.codes, width
