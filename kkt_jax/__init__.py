"""kkt_jax: from a trained classifier's weights back to a generator of its training data.

An implementation of *Generator Born from Classifier* (Yu and Wang, NeurIPS 2023). One way through it:

>>> import kkt_jax, jax
>>> import jax.numpy as jnp
>>> classifier = kkt_jax.make_classifier(lambda w, x: x @ w, jnp.ones((2, 3)), input_shape=(2,))
>>> classifier.num_classes
3

and then ``kkt_jax.examine(classifier)`` and ``kkt_jax.reconstruct([classifier])``. Modules and names are imported when
they are first used. The modules, in the order of the method:

- `kkt_jax.classifier`: what the library needs of a classifier.
- `kkt_jax.subject`: from a flax module, or any function, to a classifier; without its numbers, too.
- `kkt_jax.weights`: these numbers, read from files without trusting them.
- `kkt_jax.jacobians`: per-sample parameter Jacobians.
- `kkt_jax.homogeneity`: the rates Lambda (Eqs. 8-10).
- `kkt_jax.conditions`: what the weighted gradients must add up to (Eqs. 2a, 4).
- `kkt_jax.losses`: margins, stationarity and duality (Eqs. 5, 6).
- `kkt_jax.multipliers`: the KKT multipliers mu.
- `kkt_jax.priors`: what chooses among the solutions, such as total variation.
- `kkt_jax.deformations`: new images of the kind of given ones.
- `kkt_jax.relaxation`: relaxed ReLU gates in a network that somebody else wrote.
- `kkt_jax.symmetries`: how far a classifier is from every KKT point, from its weights alone.
- `kkt_jax.first_layer`, `kkt_jax.last_layer`: what single layers reveal: the span and the margin of the data.
- `kkt_jax.examination`: all that the weights say, in one call.
- `kkt_jax.networks`, `kkt_jax.generators`: flax modules.
- `kkt_jax.recipes`, `kkt_jax.terms`: how a generator is trained, as a tree of parts.
- `kkt_jax.training`, `kkt_jax.reconstruction`: the joint training of theta, eta and alpha.
- `kkt_jax.certificates`, `kkt_jax.criteria`: which samples are certified to be training samples, and on what grounds;
  `kkt_jax.signals`, `kkt_jax.vertices`, `kkt_jax.exact`: the equations of one sample, vertices, and the search.
- `kkt_jax.candidates`: of given samples, which were in the training set.
- `kkt_jax.parallel`, `kkt_jax.checkpoint`: many devices and processes; saving and resuming.
- `kkt_jax.pretrain`: gradient descent to the convergence point.
- `kkt_jax.diagnostics`, `kkt_jax.metrics`: how well conditions are satisfied, and how good samples are.
"""

import importlib
import importlib.util
import pkgutil
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
  from kkt_jax.classifier import Classifier, make_classifier
  from kkt_jax.examination import Examination, examine
  from kkt_jax.recipes import Recipe
  from kkt_jax.reconstruction import reconstruct, Reconstruction
  from kkt_jax.subject import from_linen, from_nnx, Subject
  from kkt_jax.weights import read_weights

__all__ = ["Classifier", "Examination", "Recipe", "Reconstruction", "Subject", "examine", "from_linen", "from_nnx"]
__all__ += ["make_classifier", "read_weights", "reconstruct"]
_HOMES = {  # by name, for the rest its own name in lower case
  "Recipe": "recipes",
  "examine": "examination",
  "from_linen": "subject",
  "from_nnx": "subject",
  "make_classifier": "classifier",
  "read_weights": "weights",
  "reconstruct": "reconstruction",
}


def __dir__() -> list[str]:
  modules = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
  return sorted([*__all__, *modules, "__version__"])


def __getattr__(name: str) -> Any:
  if name == "__version__":
    from importlib import metadata  # as slow as all the rest

    try:
      return metadata.version("kkt-jax")
    except metadata.PackageNotFoundError:  # a checkout on the path
      return "unknown"
  if name in __all__:
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, name.lower())}"), name)
  if importlib.util.find_spec(f"{__name__}.{name}") is not None:
    return importlib.import_module(f"{__name__}.{name}")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
