"""Types that all modules share."""

from collections.abc import Callable
from typing import Any

import jax

PyTree = Any
ApplyFn = Callable[[PyTree, jax.Array], jax.Array]  # of parameters and samples [M, ...] to logits [M, C]
