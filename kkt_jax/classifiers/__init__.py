"""The network under attack: what the library needs of it, from another framework, from a function, from files.

What needs flax, orbax, safetensors or another framework is imported when it is first used.
"""

import importlib
from typing import Any, TYPE_CHECKING

from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers.classifier import Classifier, Evaluation, make_classifier, two_logits
from kkt_jax.classifiers.decay import WeightDecay

if TYPE_CHECKING:
  from kkt_jax.classifiers.equinox import from_equinox
  from kkt_jax.classifiers.files import read_weights, WeightsError
  from kkt_jax.classifiers.haiku import from_haiku
  from kkt_jax.classifiers.keras import from_keras
  from kkt_jax.classifiers.sklearn import from_sklearn
  from kkt_jax.classifiers.spec import from_linen, from_nnx, Subject
  from kkt_jax.classifiers.torch import from_torch

_LAZY = {"Subject": "spec", "WeightsError": "files", "from_linen": "spec", "from_nnx": "spec", "read_weights": "files"}
_LAZY |= {f"from_{name}": name for name in ("equinox", "haiku", "keras", "sklearn", "torch")}
__all__ = ["ApplyFn", "Classifier", "Evaluation", "PyTree", "Subject", "WeightDecay", "WeightsError", "from_equinox"]
__all__ += ["from_haiku", "from_keras", "from_linen", "from_nnx", "from_sklearn", "from_torch", "make_classifier"]
__all__ += ["read_weights", "two_logits"]


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
