"""Time, memory and operations of jitted functions; used by `experiments.benchmark` and `experiments.scaling`."""

from collections.abc import Callable
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

_MEGA, _GIGA = 1e6, 1e9


@dataclasses.dataclass(frozen=True)
class Measurement:
  """One timed function.

  Attributes:
    milliseconds: median time of a call.
    megabytes: memory of the compiled function beside its arguments and results.
    gigaflops: floating-point operations of a call by XLA's count, in units of 1e9.
    gigabytes: what a call reads and writes by XLA's count.
  """

  milliseconds: float
  megabytes: float
  gigaflops: float
  gigabytes: float


def measure(function: Callable[..., Any], repeats: int, *args: Any) -> Measurement:
  """Compiles a function for its arguments, and times it after one call that does not count."""
  compiled = jax.jit(function).lower(*args).compile()
  analysis: Any = compiled.memory_analysis()
  cost: Any = compiled.cost_analysis()
  jax.block_until_ready(compiled(*args))
  times = []
  for _ in range(repeats):
    begin = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    times.append(time.perf_counter() - begin)
  return Measurement(
    milliseconds=1e3 * statistics.median(times),
    megabytes=analysis.temp_size_in_bytes / _MEGA,
    gigaflops=cost.get("flops", float("nan")) / _GIGA,
    gigabytes=cost.get("bytes accessed", float("nan")) / _GIGA,
  )


def paired_ratio(a: Callable[..., Any], b: Callable[..., Any], repeats: int, *args: Any) -> float:
  """Time of ``a`` over time of ``b``: the median over calls in turn, which a drifting machine speed does not move."""
  compiled = [jax.jit(function).lower(*args).compile() for function in (a, b)]
  ratios = []
  for _ in range(repeats + 1):
    times = []
    for function in compiled:
      begin = time.perf_counter()
      jax.block_until_ready(function(*args))
      times.append(time.perf_counter() - begin)
    ratios.append(times[0] / times[1])
  return statistics.median(ratios[1:])  # the first calls do not count


def matmul_rate(repeats: int, size: int = 2048) -> float:
  """The machine's rate of float32 matrix products, in 1e9 operations a second."""
  a = jnp.ones((size, size))
  row = measure(lambda a: a @ a, repeats, a)
  return 2 * size**3 / _GIGA / (row.milliseconds / 1e3)


def fraction(row: Measurement, rate: float) -> float:
  """The rate of a function's operations over that of matrix products."""
  return row.gigaflops / (row.milliseconds / 1e3) / rate
