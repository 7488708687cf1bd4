"""The wheel: what it holds, and that it installs beside a user's own package of the name ``experiments``."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MINE = 'MINE = "the user\'s own"\n'
USE = """
import importlib.metadata, pathlib
import experiments.models, kkt_jax, kkt_jax.cli.audit
site = pathlib.Path(kkt_jax.__file__).parent.parent
assert pathlib.Path(experiments.__file__).parent.parent == site, experiments.__file__
own = importlib.metadata.Distribution.at(next(site.glob("kkt_jax-*.dist-info")))
(script,) = own.entry_points
assert script.name == "kkt-audit" and callable(script.load())
print(experiments.models.MINE, site)
"""


def pip(*arguments):
  quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
  subprocess.run([sys.executable, "-m", "pip", arguments[0], *quiet, *arguments[1:]], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from a copy, so that the checkout stays clean; by the environment's own setuptools, so without a network."""
  folder = tmp_path_factory.mktemp("wheel")
  for package in ("kkt_jax", "experiments"):
    shutil.copytree(ROOT / package, folder / "copy" / package, ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, folder / "copy")
  pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "copy"))
  return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_library_and_nothing_of_the_experiments(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert {name.partition("/")[0].partition("-")[0] for name in names} == {"kkt_jax"}
  sources = {str(path.relative_to(ROOT)) for path in (ROOT / "kkt_jax").rglob("*") if path.suffix in (".py", ".j2")}
  assert sources | {"kkt_jax/py.typed"} == {name for name in names if name.startswith("kkt_jax/")}


def test_it_installs_beside_a_users_own_package_of_that_name_and_both_work(wheel, tmp_path):
  (tmp_path / "experiments").mkdir()
  (tmp_path / "experiments" / "__init__.py").write_text("")
  (tmp_path / "experiments" / "models.py").write_text(MINE)
  pip("install", "--target", str(tmp_path), str(wheel))
  assert (tmp_path / "experiments" / "models.py").read_text() == MINE
  done = subprocess.run(
    [sys.executable, "-c", USE], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == f"the user's own {tmp_path}"
