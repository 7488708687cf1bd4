"""The methods that `--method` chooses from, as changes of a recipe: ours, its ablations, and its neighbours'.

Every method attacks the same classifiers and is measured in the same way. Each changes the recipe of ``kkt``, which is
`kkt_jax.reconstruction.recipes.default` with what is known of the kind of data. `kkt_jax` loads its parts when they are
used, so that the names of the methods cost nothing.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import inspect
import math
from typing import Any

import kkt_jax


@dataclasses.dataclass(frozen=True)
class Setting:
  """What a method may use.

  Attributes:
    examinations: what the weights of the attacked classifiers say.
    codes: samples that the generator learns of each class.
    num_samples: training samples of each class, which only the baselines are told.
    deviation: of the random first samples, see `kkt_jax.generators.table`.
    hidden: widths of the multiplier network.
  """

  examinations: "Sequence[kkt_jax.Examination]"
  codes: int
  num_samples: int
  deviation: float = 1.0
  hidden: Sequence[int] = (128, 128)

  @property
  def share(self) -> float:
    """The mean share of all dimensions that the data are known to fill."""
    return sum(examination.share for examination in self.examinations) / len(self.examinations)


Change = Callable[["kkt_jax.Recipe", Setting], "kkt_jax.Recipe"]


def _ours(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """A conditional generator, as by Yu and Wang (2023), with everything else that the weights reveal.

  Its samples satisfy the conditions that gradient descent left in the weights.
  """
  return recipe


@dataclasses.dataclass(frozen=True)
class Method:
  """A method.

  Attributes:
    title: its name for people.
    kind: ``"method"``, ``"baseline"`` or ``"ablation"``.
    change: what it makes of the recipe.
  """

  title: str
  kind: str
  change: Change = _ours

  @property
  def explanation(self) -> str:
    """What it does, for someone who has not read the paper; empty where the title says it."""
    return " ".join((inspect.getdoc(self.change) or "").split())


def recipe_of(method: Method, recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """A method's recipe, made of ours; of the baselines only the blind search knows of polishing, none of a network."""
  without = {"polish_rounds": 0, "match_steps": 0} if method.kind == "baseline" else {}
  return method.change(recipe.with_schedule(**without), setting)


def _weights(recipe: "kkt_jax.Recipe", **weights: float) -> "kkt_jax.Recipe":
  """Other weights for those terms that the recipe has."""
  known = {"stationarity", *recipe.terms}
  return recipe.with_weights(**{name: weight for name, weight in weights.items() if name in known})


def _only(recipe: "kkt_jax.Recipe", *kept: str, **weights: float) -> "kkt_jax.Recipe":
  """The recipe with these weights, and those of the range and of the terms that are kept; all others are 0."""
  off = {name: 0.0 for name in ("stationarity", *recipe.terms) if name not in ("range", *kept)}
  return _weights(recipe, **off | weights)


def _table(setting: Setting, *, in_span: bool = False, **changes: Any) -> Any:
  settings = {"codes": setting.codes, "deviation": setting.deviation} | changes
  return kkt_jax.generators.table(in_span=in_span, **settings)


def _term(weight: float, name: str) -> Any:
  return kkt_jax.reconstruction.Term(weight, getattr(kkt_jax.reconstruction.terms, name))


# --- neighbours ---


def _points(recipe: "kkt_jax.Recipe", setting: Setting, *, total_variation: float = 3.0) -> "kkt_jax.Recipe":
  """One free sample for each unknown one, twice as many as there are (Haim et al. 2022, Buzaglo et al. 2023).

  Each has its own multiplier; stationarity with relaxed gates, no multiplier below a least one; angle of the residual,
  Adam and total variation as in our method.
  """
  adam = kkt_jax.reconstruction.recipes.adam(0.05)
  least = kkt_jax.reconstruction.Term(5.0, kkt_jax.reconstruction.terms.least_multiplier(0.2))
  changed = _only(recipe, "stationarity", "binarisation", total_variation=total_variation)
  return dataclasses.replace(
    changed.with_terms(least_multiplier=least)
    .with_stationarity(begin=0, ramp=0, free_gates=False)
    .with_schedule(theta=adam, eta=adam, restarts=1, restart_steps=0),
    generator=_table(setting, codes=2 * setting.num_samples),
    multipliers=kkt_jax.reconstruction.recipes.runner_up_multipliers(),
  )


def _points_published(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """Free samples with the settings of decoreco's second multi-class run, 50 images of each class of CIFAR-10.

  Published step sizes, momentum, gates and norm; 8,000 of 50,000 steps.
  """
  import optax  # slow

  sgd = lambda rate: lambda num_steps: optax.sgd(rate, momentum=0.9)
  changed = _points(recipe, setting, total_variation=0.0)
  # Their losses are sums over samples and pixels.
  batch = 2 * setting.num_samples * max(examination.classifier.num_classes for examination in setting.examinations)
  pixels = batch * math.prod(setting.examinations[0].classifier.input_shape)
  least = kkt_jax.reconstruction.Term(5.0 * batch, kkt_jax.reconstruction.terms.least_multiplier(0.2032089016))
  changed = _weights(
    changed.with_terms(least_multiplier=least), stationarity=1.0, range=float(pixels), binarisation=0.0
  )
  return dataclasses.replace(
    changed.with_stationarity(measure=kkt_jax.kkt.losses.squared_residual, gate_sharpness=39.51743621).with_schedule(
      steps=8000, theta=sgd(0.0013623494), eta=sgd(0.4793320031)
    ),
    generator=_table(setting, codes=2 * setting.num_samples, deviation=2e-4),
  )


def _classification(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """The same generator, trained only to be classified as wanted; images with total variation."""
  return kkt_jax.reconstruction.recipes.classification_only(recipe, setting.examinations)


def _inversion(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """Free samples that are classified as wanted and reproduce the stored batch-norm statistics (Yin et al. 2020).

  Images with total variation and small squares.
  """
  changed = recipe.with_terms(cross_entropy=_term(1.0, "cross_entropy"))
  if "range" in recipe.terms:
    changed = changed.with_terms(mean_square=_term(0.1, "mean_square")).with_schedule(steps=1200)
  changed = _only(changed, "statistics", cross_entropy=1.0, mean_square=0.1, total_variation=3.0)
  return dataclasses.replace(changed, generator=_table(setting))


def _contrastive(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """DeepInversion whose samples differ from one another in the classifier's features (CMI, Fang et al. 2021).

  Views are smooth deformations, and neither a head on the features nor a student is learned.
  """
  return _weights(_inversion(recipe, setting), contrast=0.8)


def _start_only(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """The mean training image, which the classifier stores, for every sample: what can be had without any training."""
  changed = recipe.with_schedule(steps=0, restarts=1, restart_steps=0)
  return dataclasses.replace(changed, generator=_table(setting, codes=1, deviation=0.0))


def _blind(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """Random points of the first layer's span, polished until most of their pixels are black or white; no training."""
  changed = recipe.with_schedule(steps=0, restarts=1, restart_steps=0, polish_rounds=12)
  return dataclasses.replace(changed, generator=_table(setting, in_span=True))


def _moments(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """Gaussian points of the mean and covariance that the first batch norm stores: what can be had without training."""
  from experiments.attack import plane  # slow

  changed = recipe.with_schedule(steps=0, restarts=1, restart_steps=0)
  return dataclasses.replace(changed, generator=plane.gaussian_generator)


# --- ablations ---


def _without(what: str, *names: str, **schedule: int) -> Method:
  """This library's method without some terms of the loss, or with another schedule."""
  change = lambda recipe, setting: _weights(recipe.with_schedule(**schedule), **dict.fromkeys(names, 0.0))
  return Method(f"without {what}", "ablation", change)


def _without_span(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  full = recipe.terms["total_variation"].weight / setting.share
  changed = recipe.with_weights(total_variation=full).with_schedule(theta=kkt_jax.reconstruction.recipes.adam(0.02))
  return dataclasses.replace(changed, generator=_table(setting))


def _least_norm(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """Lambda by the least sum of squares over all tensors."""

  def conditions(examination: "kkt_jax.Examination") -> Any:
    classifier, kkt = examination.classifier, kkt_jax.kkt
    equations = kkt.derivative_equations(classifier.apply_fn, classifier.params, examination.probes)
    rates = kkt.least_norm(equations, classifier.params)
    changed = kkt_jax.kkt.max_margin_conditions(classifier.params, rates)
    return recipe.stationarity.conditions(dataclasses.replace(examination, conditions=changed))

  return recipe.with_stationarity(conditions=conditions)


def _relu(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """The paper's ReLU for what keeps multipliers from being negative."""
  import jax  # slow

  scaled = recipe.stationarity.measure is not kkt_jax.kkt.cosine_distance
  multipliers = kkt_jax.reconstruction.recipes.network_multipliers(
    positive=jax.nn.relu, hidden=setting.hidden, scaled=scaled
  )
  return dataclasses.replace(recipe, multipliers=multipliers)


def _unsquared(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """Eq. 5's norm, which needs multipliers of the right size."""
  multipliers = kkt_jax.reconstruction.recipes.network_multipliers(hidden=setting.hidden, scaled=True)
  changed = recipe.with_stationarity(measure=kkt_jax.kkt.losses.absolute_residual)
  return dataclasses.replace(changed, multipliers=multipliers)


def _target_scale(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """Lambda-bar with the factor of the learned alpha."""
  rate = float(setting.examinations[0].rates.target_rate)
  return _unsquared(recipe, setting).with_stationarity(target_exponent=2 * rate - 1)


def _paper(recipe: "kkt_jax.Recipe", setting: Setting) -> "kkt_jax.Recipe":
  """Lambda of least norm, ReLU multipliers, unsquared norm, learned scale, and of the priors only total variation.

  In the first layer's span, or of the stored moments.
  """
  changed = _relu(_least_norm(_unsquared(recipe, setting), setting), setting)
  changed = changed.with_stationarity(target_exponent=1.0)  # of least norm the last bias has the greatest rate, 1
  return _weights(changed, statistics=0.0, class_features=0.0, binarisation=0.0, repulsion=0.0)


_BOTH: Mapping[str, Method] = {
  "kkt": Method("this library", "method"),
  "points": Method("free samples, our settings", "baseline", _points),
  "points_published": Method("free samples, published settings", "baseline", _points_published),
  "ce": Method("classification only", "baseline", _classification),
  "inversion": Method("DeepInversion", "baseline", _inversion),
  "no_stationarity": _without("stationarity", "stationarity"),
  "no_duality": _without("duality", "duality"),
  "no_statistics": _without("batch-norm statistics", "statistics"),
  "least_norm": Method("Lambda of least norm", "ablation", _least_norm),
  "relu": Method("ReLU multipliers", "ablation", _relu),
  "unsquared": Method("unsquared norm", "ablation", _unsquared),
  "target_scale": Method("learned scale of the target", "ablation", _target_scale),
  "paper": Method("the paper to the letter", "ablation", _paper),
}
IMAGES: Mapping[str, Method] = {
  **_BOTH,
  "cmi": Method("contrastive inversion", "baseline", _contrastive),
  "means": Method("mean image", "baseline", _start_only),
  "blind": Method("blind search", "baseline", _blind),
  "no_polish": _without("polishing", polish_rounds=0),
  "no_class_features": _without("class features", "class_features"),
  "no_binarisation": _without("black and white", "binarisation"),
  "no_total_variation": _without("total variation", "total_variation"),
  "no_span": Method("without the first layer's span", "ablation", _without_span),
}
BY_DESCENT = ("no_solved", "paper")  # and the baselines: methods of the circle that do not solve for the points first
CIRCLE: Mapping[str, Method] = {
  **_BOTH,
  "means": Method("stored moments", "baseline", _moments),
  "no_solved": _without("solved points"),
  "no_repulsion": _without("repulsion", "repulsion"),
  "no_restarts": _without("restarts", restarts=1),
}
