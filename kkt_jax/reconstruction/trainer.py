"""What a reconstruction is trained with: examinations and a recipe, and the functions that follow from them."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from kkt_jax import sharding
from kkt_jax._precision import full_precision
from kkt_jax.analysis.examination import Examination, examine
from kkt_jax.checkpoint import CheckpointError, fingerprint
from kkt_jax.classifiers.classifier import Classifier
from kkt_jax.classifiers.relaxation import relaxed
from kkt_jax.reconstruction import recipes
from kkt_jax.reconstruction.coordinates import Equations, in_coordinates, OF_NORMS
from kkt_jax.reconstruction.recipes import Recipe
from kkt_jax.reconstruction.step import class_sequence, init_state, make_train_step, Problem, TrainState


def _of_one(one: Classifier, other: Classifier) -> bool:
  """Whether two classifiers have the same parameters, so that what weights say of one is true of the other."""
  leaves, others = (jax.tree.leaves(classifier.params) for classifier in (one, other))
  return len(leaves) == len(others) and all(a is b or np.array_equal(a, b) for a, b in zip(leaves, others, strict=True))


@dataclasses.dataclass(frozen=True)
class Trainer:
  """What is fixed while a generator is trained; what it compiles is compiled once.

  Attributes:
    examinations: what each classifier's weights said.
    recipe: how the generator is trained; no part is None.
    microbatch_size: samples in memory at once while training, all if None.
    mesh: devices over which training splits the samples.
  """

  examinations: tuple[Examination, ...]
  recipe: Recipe
  microbatch_size: int | None = None
  mesh: Mesh | None = None

  @classmethod
  def of(
    cls,
    classifiers: Sequence[Classifier],
    recipe: Recipe | None = None,
    *,
    examinations: Sequence[Examination] | None = None,
    microbatch_size: int | None = None,
    mesh: Mesh | None = None,
  ) -> "Trainer":
    """The trainer of some classifiers; arguments and errors are those of `kkt_jax.reconstruct`."""
    if not isinstance(classifiers, Sequence) or not classifiers:
      got = "none" if isinstance(classifiers, Sequence) else f"a {type(classifiers).__name__}"
      raise ValueError(f"classifiers must hold at least one classifier, in a sequence; got {got}.")
    if strange := [type(other).__name__ for other in classifiers if not isinstance(other, Classifier)]:
      cure = " Its classifier(variables) makes one." if strange[0] == "Subject" else ""
      raise ValueError(f"each of classifiers must be a kkt_jax.Classifier; got {strange[0]}.{cure}")
    if not isinstance(recipe, Recipe | None):
      raise ValueError(f"recipe must be a kkt_jax.Recipe; got {type(recipe).__name__}.")
    shapes = {classifier.input_shape for classifier in classifiers}
    if len(shapes) > 1:
      raise ValueError(f"classifiers must have inputs of one shape; got {sorted(shapes)}.")
    if examinations is None:
      examinations = [examine(classifier) for classifier in classifiers]
    if len(examinations) != len(classifiers):
      raise ValueError(
        f"examinations must hold one for each of {len(classifiers)} classifiers; got {len(examinations)}."
      )
    pairs = list(zip(examinations, classifiers, strict=True))
    for examination, classifier in pairs:
      if not _of_one(examination.classifier, classifier):
        raise ValueError("examinations must be those of the classifiers, in their order; one is of other parameters.")
    examined = tuple(dataclasses.replace(examination, classifier=classifier) for examination, classifier in pairs)
    return cls(examined, recipes.complete(recipe or Recipe(), examined), microbatch_size, mesh)

  @functools.cached_property
  def classifiers(self) -> list[Classifier]:
    """The classifiers, with the derivatives that the stationarity uses."""
    return [
      relaxed(examination.classifier, self.recipe.stationarity.gate_sharpness) for examination in self.examinations
    ]

  @functools.cached_property
  @full_precision
  def equations(self) -> list[Equations]:
    """What is evaluated of each classifier, in the coordinates of its subspace where samples are given by them."""
    stationarity, found = self.recipe.stationarity, list[Equations]()
    for classifier, examination in zip(self.classifiers, self.examinations, strict=True):
      conditions, within = stationarity.conditions(examination), None
      if self.problem.generator.coordinates is not None and stationarity.measure in OF_NORMS:
        within = in_coordinates(classifier, conditions, examination, stationarity.equalised)
      if within is not None:
        relaxed_within = relaxed(within.classifier, stationarity.gate_sharpness)
        within = dataclasses.replace(within, classifier=relaxed_within)
      found.append(within or Equations(classifier, conditions))
    return found

  @functools.cached_property
  @full_precision
  def problem(self) -> Problem:
    """What a training step is made of."""
    recipe, generator = self.recipe, self.recipe.generator(self.examinations)
    return Problem(
      generator=generator,
      multipliers=recipe.multipliers(self.examinations, generator),
      stationarity=recipe.stationarity,
      terms=recipe.terms,
      optimizer=recipe.schedule.optimizer(),
      classes=[
        class_sequence(examination.classifier, generator.batch_size, recipe.label_weights)
        for examination in self.examinations
      ],
      num_steps=recipe.schedule.steps,
      microbatch_size=self.microbatch_size,
      mesh=self.mesh,
    )

  @functools.cached_property
  def step(self) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """``(state, count) -> (state, metrics)``; see `kkt_jax.reconstruction.step.make_train_step`."""
    step = make_train_step(self.problem)
    classifiers, equations = self.placed((self.classifiers, self.equations))
    return lambda state, count: step(state, classifiers, equations, count)

  @functools.cached_property
  def generate(self) -> Callable[[TrainState, jax.Array, jax.Array, jax.Array], jax.Array]:
    """``(state, noise, y, t) -> x``, at inference."""
    generate = self.problem.generator.generate
    of_state = lambda state, noise, y, t: generate(state.params["theta"], state.statistics, noise, y, t, False)[0]
    return jax.jit(full_precision(of_state))

  @functools.cached_property
  def _origin(self) -> jax.Array:
    """Digests of the classifiers and of the recipe [2, 8], by which saved states are recognised."""
    classifiers = [
      (c.params, c.input_shape, c.labels, c.value_range) for c in (e.classifier for e in self.examinations)
    ]
    return jnp.asarray(np.stack([np.frombuffer(fingerprint(part), np.int32) for part in (classifiers, self.recipe)]))

  @full_precision
  def init(self, seed: int) -> TrainState:
    """The state from which training starts, at random from a seed."""
    generator_key, state_key, multiplier_key = jax.random.split(jax.random.key(seed), 3)
    theta, statistics = self.problem.generator.init(generator_key)
    given = self.recipe.schedule.margin
    state = init_state(
      state_key,
      self.problem,
      self.classifiers,
      self.equations,
      theta=theta,
      statistics=statistics,
      eta=self.problem.multipliers.init(multiplier_key),
      margins=[examination.margin if given is None else given for examination in self.examinations],
    )
    return self.mark(state)

  def mark(self, state: TrainState) -> TrainState:
    """A state on one device, marked as trained from these classifiers by this recipe."""
    return (state if self.mesh is None else sharding.fetch(state))._replace(origin=self._origin)

  def check(self, state: TrainState) -> None:
    """Raises a CheckpointError if a state was trained from other classifiers or by another recipe."""
    same = np.all(np.asarray(state.origin) == np.asarray(self._origin), axis=1)
    for name, fits in zip(("classifiers", "recipe"), same, strict=True):
      if not fits:
        raise CheckpointError(
          f"{name} must be what the saved state was trained with, and are not. Give the same, or another folder."
        )

  def placed(self, tree: Any) -> Any:
    """A tree of arrays, laid out on the devices of a training step."""
    return tree if self.mesh is None else sharding.replicate(tree, self.mesh)
