"""The recipe of `experiments.circle`: few separate points of the plane, from classifiers of it.

A network of continuous noise must bridge the gaps between the points; a codebook need not. Where the weights
can be solved for the points (`experiments.attack.points`), samples are drawn to these. Several generators are trained
to lie where the classifier can have seen data at all (its stored statistics, its common margin), and the one with the
least loss goes on with the stationarity. Nothing in this looks at the training points.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.attack import points
from kkt_jax import generators, priors
from kkt_jax.analysis import Examination
from kkt_jax.classifiers import Classifier, PyTree
from kkt_jax.kkt import losses
from kkt_jax.reconstruction import recipes, terms

_CODE_SIZE, _JITTER, _FINAL_JITTER = 8, 0.1, 0.03
_BANDWIDTH = 0.3  # of the repulsion, in standard deviations of the data


def _moments(examinations: Sequence[Examination]) -> tuple[jax.Array, jax.Array]:
  """Means [T, 2] and factors [T, 2, 2] of the points of each classifier."""
  means, factors = zip(*(points.input_moments(examination.classifier) for examination in examinations), strict=True)
  return jnp.stack(means), jnp.stack(factors)


def gaussian_generator(examinations: Sequence[Examination]) -> generators.Generator:
  """Gaussian points of the stored moments, which need no training."""
  means, factors = _moments(examinations)

  def generate(theta: PyTree, statistics: PyTree, noise: jax.Array, y: jax.Array, t: jax.Array, train: bool) -> Any:
    return means[t] + jnp.einsum("mde,me->md", factors[t], noise), statistics

  return generators.Generator(lambda key: ({}, {}), generate, generators.normal_noise(2), 2, 180)


def recipe(examinations: Sequence[Examination], config: Any, *, solve: bool = True) -> recipes.Recipe:
  """The recipe for classifiers with batch norm, or with weight decay of known strength.

  Args:
    examinations: of the classifiers.
    config: of `experiments.circle`: ``codes``, ``steps``, ``restarts`` (one where the points are solved for),
      ``restart_steps`` and ``learning_rate``, of generator and multipliers.
    solve: whether to solve for the points first.
  """
  steps = config.steps
  coupled = examinations[0].classifier.batch_coupled
  means, factors = _moments(examinations)
  size = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(factors), axis=2)))  # a coordinate's standard deviation

  def module(examinations: Sequence[Examination]) -> generators.CodebookGenerator:
    return generators.CodebookGenerator(
      sample_shape=(2,),
      num_labels=generators.num_labels(examinations),
      num_classifiers=len(examinations),
      codebook_size=config.codes,
      jitter=_FINAL_JITTER,
      output=generators.affine_output(means, factors, bound=2.5),
    )

  begin = config.restart_steps / steps
  noise = generators.stratified_noise(
    1 + _CODE_SIZE, size=lambda progress: jnp.where(progress < begin, _JITTER / _FINAL_JITTER, 1.0)
  )
  cosine = optax.schedules.cosine_decay_schedule(config.learning_rate, max(steps, 1), alpha=0.02)
  # e^-alpha waits until most samples are on their side; moving early, it follows the misplaced ones. Without batch norm
  # it starts near its place.
  hold, pace = steps // 5, 1.0 if coupled else 0.01

  def repulsion(classifier: Classifier, batch: terms.Batch) -> jax.Array:
    return priors.repulsion(batch.x / size, batch.y, bandwidth=_BANDWIDTH)

  fading = lambda progress: jnp.maximum(1.0 - progress / 0.7, 0.0)
  wanted = {"repulsion": terms.Term(0.3, repulsion, fading)}
  solved = [points.solve(examination) for examination in examinations] if solve else []
  if solved and all(len(classes) for _, classes in solved):
    wanted["solved"] = terms.Term(3000.0, _distance(solved, size))
  ramp: dict[str, Any] = {"begin": begin, "ramp": 0.1}
  if coupled:
    multipliers = recipes.network_multipliers(hidden=(64,))
    stationarity = recipes.Stationarity(1.0, losses.cosine_distance, gate_sharpness=0.0, **ramp)
    wanted["duality"] = terms.Term(3.0, terms.duality(delta=0.01))
    wanted["statistics"] = terms.Term(100.0, terms.statistics)
  else:
    multipliers = recipes.softmax_multipliers()
    # Solved points lie on hinges, where the gates are averages of both sides; no gate of a single sample says that.
    weight = 0.0 if "solved" in wanted else 0.3
    stationarity = recipes.Stationarity(weight, losses.relative_residual, **ramp)
    wanted["duality"] = terms.Term(10.0, terms.duality(delta=1.0))
  return recipes.Recipe(
    generator=generators.network(module, noise=noise, noise_dim=1 + _CODE_SIZE, batch_size=3 * config.codes),
    multipliers=multipliers,
    stationarity=stationarity,
    terms=wanted,
    schedule=recipes.Schedule(
      steps=steps,
      theta=lambda num_steps: optax.adam(cosine),
      eta=lambda num_steps: optax.adam(cosine),
      alpha=lambda num_steps: optax.adam(lambda step: jnp.where(step < hold, 0.0, pace * cosine(step))),
      restarts=1 if "solved" in wanted else config.restarts,
      restart_steps=config.restart_steps if steps else 0,
      steps_per_call=20,
    ),
  )


def _distance(solved: Sequence[tuple[Any, Any]], size: jax.Array) -> terms.TermFn:
  """Every sample is near a solved point of its class, and every point near a sample; squared, in units of a size."""

  def distance(classifier: Classifier, batch: terms.Batch) -> jax.Array:
    places, classes = (jnp.asarray(part) for part in solved[batch.t])
    squares = jnp.sum(jnp.square((batch.x[:, None] - places[None]) / size), axis=2)
    squares = jnp.where(batch.classes[:, None] == classes[None], squares, jnp.inf)
    nearest = jnp.min(squares, axis=0)
    return jnp.mean(jnp.min(squares, axis=1)) + jnp.mean(jnp.where(jnp.isfinite(nearest), nearest, 0.0))

  return distance
