"""A very small experiment, run as a program by tests that start, join, stop and kill processes."""

from collections.abc import Mapping
import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import kkt_jax
from kkt_jax import generators, networks
from kkt_jax.cli import flags
from kkt_jax.cli.training import train_generator
from kkt_jax.cli.workdir import Workdir
from kkt_jax.kkt import losses, weight_decay_conditions
from kkt_jax.reconstruction import recipes, terms

_SHAPE = (4,)
_LABELS = ((0, 1, 2), (3, 4, 5))


@dataclasses.dataclass(frozen=True)
class Config:
  steps: int = flags.flag(20, "Training steps.", lower=1)
  save_every: int = flags.flag(5, "Steps between checkpoints.", lower=1)


def sgd(num_steps: int) -> optax.GradientTransformation:
  return optax.sgd(1e-2, momentum=0.9)


def examined(t: int, *, batch_norm: bool) -> kkt_jax.Examination:
  """What is known of the t-th classifier, one of random weights; examining it would take longer than the training."""
  module = networks.MLPClassifier(num_classes=3, hidden=(16, 8), batch_norm=batch_norm)
  variables = jax.jit(module.init)(jax.random.key(t), jnp.zeros((2, *_SHAPE)))
  classifier = kkt_jax.from_linen(module, variables, input_shape=_SHAPE, labels=_LABELS[t], weight_decay=1.0)
  return kkt_jax.Examination.unexamined(classifier, "weight_decay", weight_decay_conditions(classifier.params))


def problem(
  *, batch_norm: bool = True, num_classifiers: int = 2, batch_size: int = 48, **schedule: Any
) -> tuple[list[kkt_jax.Examination], kkt_jax.Recipe]:
  """What is known of the classifiers, and a recipe with a network generator, with batch norm or without."""

  def module_of(examinations: Any) -> generators.MLPGenerator:
    return generators.MLPGenerator(
      sample_shape=_SHAPE, num_labels=6, num_classifiers=2, hidden=(8,), output_scale=1.0, batch_norm=batch_norm
    )

  recipe = recipes.Recipe(
    generator=generators.network(module_of, noise=generators.normal_noise(3), noise_dim=3, batch_size=batch_size),
    multipliers=recipes.network_multipliers(hidden=(8,), scaled=True),
    stationarity=recipes.Stationarity(1.0, losses.relative_residual, gate_sharpness=0.0),
    terms={"duality": terms.Term(0.1, terms.duality(delta=0.1)), "range": terms.Term(0.1, terms.in_range)},
    schedule=recipes.Schedule(**{"steps": 20, "theta": sgd, "eta": sgd, "alpha": sgd} | schedule),
  )
  return [examined(t, batch_norm=batch_norm) for t in range(num_classifiers)], recipe


def digest(state: Any) -> str:
  """SHA-256 of all the bits of a training state."""
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.statistics, state.opt_state))]
  leaves.append(np.asarray(jax.random.key_data(state.key)))
  return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains; the figures are a digest of the final state's bits, and its numbers' sum."""
  out = Workdir(workdir, config)
  examinations, recipe = problem(steps=config.steps)
  state = train_generator(out, examinations, recipe, seed=2, log_every=1, save_every=config.save_every).state
  leaves = jax.tree.leaves((state.params, state.statistics))
  metrics = {
    "devices": jax.device_count(),
    "digest": digest(state),
    "sum": float(sum(np.sum(np.abs(np.asarray(leaf, np.float64))) for leaf in leaves)),
  }
  out.finish(metrics)
  return metrics


if __name__ == "__main__":
  flags.main(Config, run, jointly=True)
