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

from experiments import common
from kkt_jax import generators, networks, priors, training
from kkt_jax.conditions import Conditions, weight_decay_conditions

_SHAPE = (4,)
_LABELS = ((0, 1, 2), (3, 4, 5))


@dataclasses.dataclass(frozen=True)
class Config:
  steps: int = common.flag(20, "Training steps.", lower=1)
  checkpoint_every: int = common.flag(5, "Steps between checkpoints.", lower=1)


def problem(
  *, batch_norm: bool = True, num_classifiers: int = 2, batch_size: int = 48, **settings: Any
) -> tuple[training.Method, training.TrainState, list[networks.Classifier], list[Conditions]]:
  """Classifiers of random weights, a generator with batch norm or without, and a network of multipliers."""
  classifiers = []
  for t, labels in enumerate(_LABELS[:num_classifiers]):
    module = networks.MLPClassifier(num_classes=3, hidden=(16, 8), batch_norm=batch_norm)
    variables = module.init(jax.random.key(t), jnp.zeros((2, *_SHAPE)))
    classifiers.append(networks.from_module(module, variables, input_shape=_SHAPE, labels=labels))
  sizes: dict[str, Any] = {"num_labels": 6, "num_classifiers": num_classifiers, "hidden": (8,)}
  generator = generators.MLPGenerator(sample_shape=_SHAPE, output_scale=1.0, batch_norm=batch_norm, **sizes)
  init, generate = generators.generator_functions(generator, noise_dim=3)
  network = networks.MultiplierNetwork(num_outputs=3, **sizes)
  zero = jnp.zeros(1, jnp.int32)
  method = training.Method(
    generate=generate,
    optimizer=training.partitioned(*(optax.sgd(1e-2, momentum=0.9) for _ in range(3))),
    noise_dim=3,
    batch_size=batch_size,
    weights={"stationarity": 1.0, "duality": 0.1, "range": 0.1},
    priors={"range": lambda classifier, batch: priors.out_of_range(batch.x)},
    raw_multipliers=network.apply,
    **settings,
  )
  conditions = [weight_decay_conditions(classifier.params) for classifier in classifiers]
  theta, statistics = init(jax.random.key(1))
  eta = network.init(jax.random.key(3), jnp.zeros((1, *_SHAPE)), zero, zero)
  state = training.init_state(
    jax.random.key(2), method, classifiers, conditions, theta=theta, statistics=statistics, eta=eta
  )
  return method, state, classifiers, conditions


def run(config: Config, workdir: pathlib.Path) -> Mapping[str, Any]:
  """Trains; the figures are a digest of the final state's bits, and its numbers' sum."""
  out = common.Workdir(workdir, config)
  method, state, classifiers, conditions = problem()
  state = common.train(
    method,
    state,
    classifiers,
    conditions,
    out,
    num_steps=config.steps,
    log_every=1,
    checkpoint_every=config.checkpoint_every,
  )
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.statistics, state.opt_state))]
  leaves.append(np.asarray(jax.random.key_data(state.key)))
  metrics = {
    "devices": jax.device_count(),
    "digest": hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest(),
    "sum": float(sum(np.sum(np.abs(leaf.astype(np.float64))) for leaf in leaves[:-1])),
  }
  out.finish(metrics)
  return metrics


if __name__ == "__main__":
  common.main(Config, run, jointly=True)
