"""Strict settings for every test: no silent rank promotion, parsed absl flags, few examples of hypothesis.

``HYPOTHESIS_PROFILE=thorough pytest`` tries more examples.
"""

from collections.abc import Iterator
import os
import pathlib

from absl import flags
import hypothesis
import jax
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")

hypothesis.settings.register_profile("quick", max_examples=25, deadline=None)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption("--kills", type=int, default=2, help="How often a training run is killed and resumed.")


# What these do takes seconds: they examine, train or measure.
SLOW_DOCTESTS = {"README.md", "kkt_jax.analysis.examination.examine", "kkt_jax.reconstruction.stages.reconstruct"}
SLOW_FIXTURES = {"examinations", "measured", "on_the_circle"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  for item in items:
    doctest = isinstance(item, pytest.DoctestItem)
    if item.name in SLOW_DOCTESTS if doctest else SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
      item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _strict_jax() -> Iterator[None]:
  with jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture(autouse=True)
def _room_for_programs() -> Iterator[None]:
  """Every compiled program holds memory maps, of which Linux allows a process 65,530: at the limit it crashes."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def _parsed_flags() -> None:
  flags.FLAGS.mark_as_parsed()  # pytest owns the command line
