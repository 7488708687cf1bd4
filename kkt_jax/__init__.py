"""kkt_jax: from a trained classifier's weights back to a generator of its training data.

An implementation of *Generator Born from Classifier* (Yu and Wang, NeurIPS 2023). One way through it:

>>> import kkt_jax, jax
>>> import jax.numpy as jnp
>>> classifier = kkt_jax.make_classifier(lambda w, x: x @ w, jnp.ones((2, 3)), input_shape=(2,))
>>> classifier.num_classes
3

and then ``kkt_jax.examine(classifier)`` and ``kkt_jax.reconstruct([classifier])``. The packages, each of which knows
only those before it:

- `kkt_jax.classifiers`: the network under attack, from a framework, from a function, from files.
- `kkt_jax.kkt`: the paper's conditions (Eqs. 2 to 10) as pure functions, which need neither flax nor orbax.
- `kkt_jax.analysis`: what the weights reveal without any data, in one call, `examine`.
- `kkt_jax.generators`: tables of samples, networks and flows.
- `kkt_jax.extraction`: certified training samples, and on what grounds.
- `kkt_jax.membership`: of given samples, which were in the training set.
- `kkt_jax.reconstruction`: the joint training of theta, eta and alpha, as a recipe of parts.
- `kkt_jax.metrics`: how good samples and decisions are.
- `kkt_jax.auditing`: a verdict on what a classifier reveals, with its evidence.
- `kkt_jax.cli`: flags, folders of runs and progress of programs.

Beside them `kkt_jax.priors` (which choose among solutions), `kkt_jax.deformations`, `kkt_jax.networks` (flax modules),
`kkt_jax.criteria` (thresholds of claims), `kkt_jax.checkpoint` and `kkt_jax.sharding`. All of them and the names
below are imported when they are first used, so that flax and orbax are needed by those alone who use them.
"""

import importlib
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
  from kkt_jax import (
    analysis,
    auditing,
    checkpoint,
    classifiers,
    cli,
    criteria,
    deformations,
    extraction,
    generators,
    kkt,
    membership,
    metrics,
    networks,
    priors,
    reconstruction,
    sharding,
  )
  from kkt_jax._tree import tensor_names
  from kkt_jax.analysis import Examination, examine
  from kkt_jax.auditing import audit, audit_unlearning, AuditReport, Samples
  from kkt_jax.classifiers import (
    Classifier,
    from_equinox,
    from_haiku,
    from_keras,
    from_linen,
    from_nnx,
    from_sklearn,
    from_torch,
    make_classifier,
    read_weights,
    Subject,
  )
  from kkt_jax.criteria import Criteria
  from kkt_jax.reconstruction import Recipe, reconstruct, Reconstruction

_FACES = {
  "_tree": ["tensor_names"],
  "analysis": ["Examination", "examine"],
  "auditing": ["AuditReport", "Samples", "audit", "audit_unlearning"],
  "classifiers": ["Classifier", "Subject", "from_linen", "from_nnx", "make_classifier", "read_weights"]
  + [f"from_{name}" for name in ("equinox", "haiku", "keras", "sklearn", "torch")],
  "criteria": ["Criteria"],
  "reconstruction": ["Recipe", "Reconstruction", "reconstruct"],
}
_HOMES = {name: package for package, names in _FACES.items() for name in names}
__all__ = ["AuditReport", "Classifier", "Criteria", "Examination", "Recipe", "Reconstruction", "Samples", "Subject"]
__all__ += ["analysis", "audit", "audit_unlearning", "auditing", "checkpoint", "classifiers", "cli", "criteria"]
__all__ += ["deformations", "examine", "extraction", "from_equinox", "from_haiku", "from_keras", "from_linen"]
__all__ += ["from_nnx", "from_sklearn", "from_torch", "generators", "kkt", "make_classifier", "membership", "metrics"]
__all__ += ["networks", "priors", "read_weights", "reconstruct", "reconstruction", "sharding", "tensor_names"]


def __dir__() -> list[str]:
  return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
  if name == "__version__":
    from importlib import metadata  # as slow as all the rest

    try:
      return metadata.version("kkt-jax")
    except metadata.PackageNotFoundError:  # a checkout on the path
      return "unknown"
  if name in _HOMES:
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
  if name in __all__:  # a package
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
