"""What a run says while it works, on stderr: stdout is for its result."""

from collections.abc import Mapping
import functools
import logging
import math
import sys
import time

from absl import logging as absl_logging


def say(text: str) -> None:
  """Prints a line for the person who watches."""
  print(text, file=sys.stderr, flush=True)


def say_what_is_logged() -> None:
  """Prints what the library logs, for the person who watches."""
  log = logging.getLogger("kkt_jax")
  if not log.handlers:
    handler = logging.Handler()
    handler.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    absl_logging.get_absl_handler().addFilter(
      lambda record: not record.name.startswith("kkt_jax")
    )  # would say it again


class Clock:
  """How long a run takes, and how much of that JAX compiles in this process."""

  def __init__(self) -> None:
    """Starts the clock."""
    self._began, self._compiled = time.monotonic(), _compiling()[0]

  def __str__(self) -> str:
    """Both, for people."""
    took, compiled = time.monotonic() - self._began, _compiling()[0] - self._compiled
    return f"took {_duration(took)}, of which this process compiled for {_duration(compiled)}"


@functools.cache
def _compiling() -> list[float]:
  """The seconds that JAX has compiled, or read what was compiled, since this was first called."""
  import jax.monitoring

  seconds = [0.0]

  def add(event: str, duration_secs: float, **kwargs: str | int) -> None:
    seconds[0] += duration_secs * event.endswith("/backend_compile_duration")

  jax.monitoring.register_event_duration_secs_listener(add)
  return seconds


class Progress:
  """Progress with a rate and a time left: one line that rewrites itself on a terminal, plain lines elsewhere.

  Attributes:
    total: number of steps altogether; may change.
  """

  def __init__(self, what: str, total: int, *, start: int = 0):
    """Starts the clock.

    Args:
      what: what is going on, a word or two.
      total: number of steps altogether.
      start: steps done by an earlier run.
    """
    self.total = total
    self._what, self._start = what, start
    self._began = self._shown = time.monotonic()
    self._terminal = sys.stderr.isatty()

  def update(self, step: int, shown: Mapping[str, float] | str = "") -> None:
    """Shows that ``step`` steps are done, and some metrics or a word; cheap enough to call often."""
    now = time.monotonic()
    finished = step >= self.total
    if not finished and now - self._shown < (0.2 if self._terminal else 15):
      return
    self._shown = now
    rate = (step - self._start) / max(now - self._began, 1e-9)
    left = (self.total - step) / rate if rate > 0 else math.inf
    speed = f"{rate:.1f}/s" if rate >= 0.1 else f"{60 * rate:.1f}/min"
    text = shown if isinstance(shown, str) else "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    line = f"{self._what} {step}/{self.total}  {speed}  {_duration(left)} left  {text}".rstrip()
    if self._terminal:
      print(f"\r\033[K{line}", end="\n" if finished else "", file=sys.stderr, flush=True)
    else:
      say(line)


def _duration(seconds: float) -> str:
  """A time for people.

  >>> _duration(75), _duration(math.inf)
  ('1:15', '?')
  """
  if not math.isfinite(seconds):
    return "?"
  minutes, seconds = divmod(round(seconds), 60)
  return f"{minutes}:{seconds:02d}"
