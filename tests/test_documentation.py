"""Every package and module has its page on the documentation site, and every page is reachable from the index."""

import importlib
import pathlib
import pkgutil
import re

import kkt_jax

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}


def entries(page):
  """The pages in the tables of contents of a page."""
  text, folder = (DOCS / f"{page}.md").read_text(), pathlib.PurePosixPath(page).parent
  blocks = re.findall(r"```{toctree}\n(.*?)```", text, re.DOTALL)
  lines = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
  return {found for line in lines for found in PAGES if pathlib.PurePosixPath(found).match(f"{folder / line}")}


def listed(block):
  """The names in the summaries of the API's index, of the blocks that have an option or have it not."""
  text = (DOCS / "api/index.md").read_text()
  summaries = re.findall(r"^.. autosummary::\n(.*?)(?=\n\n\.\.|^```)", text, re.DOTALL | re.MULTILINE)
  return sorted(
    name for summary in summaries if block(summary) for name in re.findall(r"^   (kkt_jax\.\w+)$", summary, re.M)
  )


def test_every_package_and_module_has_its_api_page_and_every_top_level_name_its_line():
  public = {module.name: module.ispkg for module in pkgutil.iter_modules(kkt_jax.__path__) if module.name[0] != "_"}
  of = lambda *templates: listed(lambda summary: any(f":template: {name}" in summary for name in templates))
  assert of("package.rst") == sorted(f"kkt_jax.{name}" for name, is_package in public.items() if is_package)
  assert of("module.rst") == sorted(f"kkt_jax.{name}" for name, is_package in public.items() if not is_package)
  names = sorted(f"kkt_jax.{name}" for name in kkt_jax.__all__ if name not in public)
  assert listed(lambda summary: ":toctree:" not in summary) == names


def test_every_page_is_reachable_from_the_index():
  found, waiting = {"index"}, ["index"]
  while waiting:
    new = entries(waiting.pop()) - found
    found |= new
    waiting += new
  assert found == PAGES


def test_the_page_of_equations_names_functions_and_tests_that_there_are():
  text, tests = (DOCS / "equations.md").read_text(), DOCS.parent / "tests"
  there = {name for path in tests.rglob("test_*.py") for name in re.findall(r"def (test_\w+)\(", path.read_text())}
  assert set(re.findall(r"`(test_\w+)`", text)) <= there
  assert set(re.findall(r"`(test_\w+\.py)`", text)) <= {path.name for path in tests.rglob("test_*.py")}
  paths = [module.name for module in pkgutil.walk_packages(kkt_jax.__path__, "kkt_jax.")]
  modules = {path.rpartition(".")[2]: path for path in paths if "._" not in path}
  named = [(modules[own], name) for own, name in re.findall(r"`(\w+)\.(\w+)[`(]", text) if own in modules]
  assert len(named) > 40
  assert [name for path, name in named if not hasattr(importlib.import_module(path), name)] == []
