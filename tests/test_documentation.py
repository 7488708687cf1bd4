"""Every public module has its page on the documentation site, and every page is reachable from the index."""

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


def test_every_public_module_has_its_api_page():
  public = {f"kkt_jax.{module.name}" for module in pkgutil.iter_modules(kkt_jax.__path__) if module.name[0] != "_"}
  listed = re.findall(r"^   (kkt_jax\.\w+)$", (DOCS / "api/index.md").read_text(), re.MULTILINE)
  assert sorted(listed) == sorted(public)


def test_every_page_is_reachable_from_the_index():
  found, waiting = {"index"}, ["index"]
  while waiting:
    new = entries(waiting.pop()) - found
    found |= new
    waiting += new
  assert found == PAGES
