"""Time, memory and operations of jitted functions; used by `experiments.benchmark`."""

from collections.abc import Callable, Mapping
import dataclasses
import os
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_MEGA, _GIGA = 1e6, 1e9


class Call:
  """A function, compiled for its arguments; calling it runs it on them and waits for the result."""

  def __init__(self, function: Callable[..., Any], *arguments: Any):
    """Compiles the function, with the arguments on the device."""
    self.lowered = jax.jit(function).lower(*arguments)
    self.compiled = self.lowered.compile()
    self._arguments = jax.device_put(arguments)

  def __call__(self) -> Any:
    """Runs it."""
    return jax.block_until_ready(self.compiled(*self._arguments))


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


class Spread(NamedTuple):
  """What repeated measurements gave: the median, and what 5 % and 95 % of them are below."""

  median: float
  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def measure(call: Call, repeats: int) -> Measurement:
  """Times a function, after one call that does not count."""
  analysis: Any = call.compiled.memory_analysis()
  # Compiled for a GPU, matrix products are calls of a library, whose operations XLA does not count.
  counted: Any = (call.compiled if jax.default_backend() == "cpu" else call.lowered).cost_analysis() or {}
  return Measurement(
    milliseconds=1e3 * statistics.median(in_turn({"": call}, repeats)[""]),
    megabytes=analysis.temp_size_in_bytes / _MEGA,
    gigaflops=counted.get("flops", float("nan")) / _GIGA,
    gigabytes=counted.get("bytes accessed", float("nan")) / _GIGA,
  )


def in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
  """Seconds of every call, each called in turn, so that a machine whose speed drifts favours none.

  On a single core (``taskset -c 0``) seconds of the processor: what else runs there does not count.

  >>> sorted(len(seconds) for seconds in in_turn({"a": lambda: 1, "b": lambda: 2}, 3).values())
  [3, 3]
  """
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  cores = getattr(os, "sched_getaffinity", lambda process: "several")(0)
  clock = time.process_time if len(cores) == 1 and jax.default_backend() == "cpu" else time.perf_counter
  for _ in range(repeats + 1):
    for name, call in calls.items():
      begin = clock()
      call()
      seconds[name].append(clock() - begin)
  return {name: durations[1:] for name, durations in seconds.items()}  # the first calls do not count


def spread(values: Any) -> Spread:
  """The spread of some values.

  >>> spread([1.0, 2.0, 3.0]).median
  2.0
  """
  low, median, high = np.percentile(values, (5, 50, 95))
  return Spread(float(median), float(low), float(high))


def paired_ratio(a: Callable[[], Any], b: Callable[[], Any], repeats: int) -> Spread:
  """Time of ``a`` over time of ``b``, called in turn."""
  seconds = in_turn({"a": a, "b": b}, repeats)
  return spread(np.divide(seconds["a"], seconds["b"]))


def matmul_rate(repeats: int) -> float:
  """The device's best rate of float32 matrix products, in the precision that is set, in 1e9 operations a second."""
  size = 2048 if jax.default_backend() == "cpu" else 8192  # enough to fill the device
  call = Call(lambda a: a @ a, jnp.ones((size, size)))
  return 2 * size**3 / _GIGA / min(in_turn({"": call}, repeats)[""])


def fraction(row: Measurement, rate: float) -> float:
  """The rate of a function's operations over that of matrix products."""
  return row.gigaflops / (row.milliseconds / 1e3) / rate
