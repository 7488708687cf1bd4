"""Strict settings for every test: no silent rank promotion, parsed absl flags, optional x64.

``JAX_ENABLE_X64=1 pytest`` runs the whole suite in double precision.
"""

from collections.abc import Iterator

from absl import flags
import jax
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
  parser.addoption("--kills", type=int, default=2, help="How often a training run is killed and resumed.")


@pytest.fixture(autouse=True)
def _strict_jax() -> Iterator[None]:
  with jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture(autouse=True, scope="session")
def _parsed_flags() -> None:
  flags.FLAGS.mark_as_parsed()  # pytest owns the command line
