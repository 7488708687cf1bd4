"""The network under attack: what the library needs of it, from flax, from a function, from files.

What needs flax, orbax or safetensors is imported when it is first used.
"""

import importlib
from typing import Any, TYPE_CHECKING

from kkt_jax._typing import ApplyFn, PyTree
from kkt_jax.classifiers.classifier import Classifier, Evaluation, make_classifier, two_logits, WeightDecay

if TYPE_CHECKING:
  from kkt_jax.classifiers.files import read_weights, WeightsError
  from kkt_jax.classifiers.spec import from_linen, from_nnx, Subject

__all__ = ["ApplyFn", "Classifier", "Evaluation", "PyTree", "Subject", "WeightDecay", "WeightsError", "from_linen"]
__all__ += ["from_nnx", "make_classifier", "read_weights", "two_logits"]
_LAZY = {"Subject": "spec", "WeightsError": "files", "from_linen": "spec", "from_nnx": "spec", "read_weights": "files"}


def __getattr__(name: str) -> Any:
  if name in _LAZY:
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
