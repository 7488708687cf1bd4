"""The direction of knowledge: what may see data, what may train, what may only measure, and no circles."""

import ast
import functools
import pathlib

import pytest

import kkt_jax

ROOT = pathlib.Path(__file__).parent.parent
FILES = {
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
  for package in ("kkt_jax", "experiments")
  for path in sorted((ROOT / package).rglob("*.py"))
}
# From the ground up. Packages of one floor do not know each other but on the ground, and none knows a later one.
FLOORS = [
  [
    "_checks",
    "_descent",
    "_errors",
    "_precision",
    "_tree",
    "_typing",
    "checkpoint",
    "criteria",
    "deformations",
    "sharding",
  ],
  ["classifiers", "metrics", "networks", "priors"],
  ["kkt"],
  ["analysis"],
  ["extraction", "generators"],
  ["membership", "reconstruction"],
  ["auditing"],
  ["cli"],
]


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


def reachable(name):
  """What a module imports, directly or through others."""
  found, waiting = set(), [name]
  while waiting:
    for module in imported(waiting.pop()) - found:
      found.add(module)
      waiting.append(module)
  return found


def package_of(name):
  return name.split(".")[1] if name.startswith("kkt_jax.") else None


def test_every_module_has_its_floor_and_there_are_eight():
  assert sorted(sum(FLOORS, [])) == sorted({package_of(name) for name in FILES} - {None})
  assert len(FLOORS) == 8


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("kkt_jax.")])
def test_no_package_knows_a_later_one(name):
  floor = next(i for i, packages in enumerate(FLOORS) if package_of(name) in packages)
  allowed = {package_of(name), None, *FLOORS[0]}.union(*FLOORS[:floor])
  assert {package_of(module) for module in imported(name) if module.startswith("kkt_jax")} <= allowed
  assert not any(module.startswith("experiments") for module in imported(name))


def test_no_module_imports_itself_through_others_but_by_the_face_of_its_package():
  faces = {name for name, path in FILES.items() if path.name == "__init__.py"}
  direct = {name: imported(name) - faces for name in FILES}

  def beyond(name):
    found, waiting = set(), [name]
    while waiting:
      for module in direct[waiting.pop()] - found:
        found.add(module)
        waiting.append(module)
    return found

  assert [name for name in FILES if name in beyond(name)] == []


def test_every_name_of_a_face_is_there():
  for package in (
    "analysis",
    "classifiers",
    "extraction",
    "generators",
    "kkt",
    "membership",
    "metrics",
    "reconstruction",
  ):
    face = getattr(kkt_jax, package)
    assert all(hasattr(face, name) for name in face.__all__), package


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiments.attack")])
def test_what_trains_sees_no_data_and_measures_nothing(name):
  assert not {
    m for m in reachable(name) if m.startswith(("experiments.data", "experiments.measure", "kkt_jax.auditing"))
  }


TRAINING = {f"kkt_jax.reconstruction.{name}" for name in ("loop", "recipes", "result", "stages", "step", "trainer")}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("experiments.measure")])
def test_what_measures_trains_no_generator(name):
  assert not imported(name) & TRAINING
  assert not {m for m in reachable(name) if m.startswith("experiments.attack")}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("kkt_jax.kkt")])
def test_the_conditions_need_jax_numpy_scipy_and_optax_alone(name):
  needed = {name} | reachable(name) - {"kkt_jax.classifiers.spec", "kkt_jax.classifiers.files"}
  outside = set()
  for module in needed:
    for node in parsed(module).body:  # what is imported when it is first used does not count
      if isinstance(node, ast.Import):
        outside |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom) and node.module:
        outside.add(node.module.split(".")[0])
  assert not outside & {"flax", "orbax", "safetensors", "absl", "chex", "matplotlib"}, outside


def body_lines(function):
  """Lines of a function's body without its docstring."""
  body = function.body[ast.get_docstring(function) is not None :]
  return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("name", FILES)
def test_no_module_is_longer_than_450_lines_and_no_body_of_a_function_than_60(name):
  assert len(FILES[name].read_text().splitlines()) <= 450
  functions = [node for node in ast.walk(parsed(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
  assert [function.name for function in functions if body_lines(function) > 60] == []


@pytest.mark.parametrize("name", FILES)
def test_no_public_function_has_more_than_eight_parameters(name):
  def parameters(function):
    own = function.args
    return [arg.arg for arg in (*own.posonlyargs, *own.args, *own.kwonlyargs) if arg.arg not in ("self", "cls")]

  functions = [node for node in ast.walk(parsed(name)) if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
  assert [function.name for function in functions if len(parameters(function)) > 8] == []
