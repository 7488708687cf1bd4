"""The direction of knowledge: what may see data, what may train, what may only measure, and no circles."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = {
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
  for package in ("kkt_jax", "experiments")
  for path in sorted((ROOT / package).rglob("*.py"))
}


@functools.cache
def parsed(name):
  return ast.parse(FILES[name].read_text())


@functools.cache
def imported(name):
  """The project's modules that a module imports, wherever in its source, but for type checking."""
  tree = parsed(name)
  guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
  left_out = {id(inner) for block in guarded for inner in ast.walk(block)}
  found = set()
  for node in ast.walk(tree):
    if id(node) in left_out:
      continue
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return {module for module in found if module in FILES} - {name}


def reachable(name, *, without=()):
  """What a module imports, directly or through others."""
  found, waiting = set(), [name]
  while waiting:
    for module in imported(waiting.pop()) - found - set(without):
      found.add(module)
      waiting.append(module)
  return found


def test_nothing_imports_itself_through_others():
  assert [name for name in FILES if name in reachable(name)] == []


def test_the_library_does_not_know_the_experiments():
  assert {name for name in FILES if name.startswith("kkt_jax")} >= {
    module for name in FILES if name.startswith("kkt_jax") for module in imported(name)
  }


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiments.attack")])
def test_what_trains_sees_no_data_and_measures_nothing(name):
  assert not {m for m in reachable(name) if m.startswith(("experiments.data", "experiments.measure"))}


TRAINING = {"kkt_jax.reconstruction.training", "kkt_jax.reconstruction.recipes", "kkt_jax.reconstruction"}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiments.measure")])
def test_what_measures_trains_no_generator(name):
  assert not reachable(name) & TRAINING
  assert not {m for m in reachable(name) if m.startswith("experiments.attack")}


LOSSES = ("losses", "conditions", "multipliers", "homogeneity", "priors", "jacobians")


@pytest.mark.parametrize("name", LOSSES)
def test_losses_need_jax_numpy_and_optax_alone(name):
  needed = {f"kkt_jax.{name}"} | reachable(f"kkt_jax.{name}")
  outside = set()
  for module in needed:
    for node in ast.walk(parsed(module)):
      if isinstance(node, ast.Import):
        outside |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module:
        outside.add(node.module.split(".")[0])
  assert not outside & {"flax", "orbax", "safetensors", "absl", "chex", "matplotlib"}, outside
