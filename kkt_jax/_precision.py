"""Matrix products in float32 proper, on accelerators, too, and JAX's own promotion of types.

Left alone, JAX rounds the factors of a float32 product to 11 bits (TF32) on a GPU and to 8 (bfloat16) on a TPU. That is
too coarse for equations that hold to a thousandth: on an H200 the examination then finds no margin, and the training's
residual stays at .09 where it reaches .007.

With ``jax_numpy_dtype_promotion="strict"`` JAX lets no integer meet a float. Optax does that everywhere.
"""

from collections.abc import Callable
import functools
from typing import Any, ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R")


def full_precision(function: Callable[_P, _R]) -> Callable[_P, _R]:
  """The function, with matrix products in full precision unless the user has set another precision in JAX.

  And with JAX's standard promotion of types.

  What is compiled inside keeps that precision, gradients included. The user's word is ``jax_default_matmul_precision``
  or ``jax.default_matmul_precision``.
  """
  config: Any = jax.config

  @functools.wraps(function)
  def precise(*args: _P.args, **kwargs: _P.kwargs) -> _R:
    precision = jax.default_matmul_precision(config.jax_default_matmul_precision or "highest")
    with precision, jax.numpy_dtype_promotion("standard"):
      return function(*args, **kwargs)

  return precise
