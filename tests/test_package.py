"""The top level: quick to import, everything there by name, and the losses without flax."""

import importlib.metadata
import subprocess
import sys

import kkt_jax


def run(code):
  return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_else():
  assert run("import sys, kkt_jax; print([n for n in ('jax', 'numpy', 'flax') if n in sys.modules])") == "[]\n"


def test_names_and_modules_are_there_when_asked_for():
  assert kkt_jax.make_classifier is kkt_jax.classifiers.make_classifier
  assert {"Classifier", "classifiers", "kkt", "read_weights"} <= set(dir(kkt_jax))
  assert not any(name.startswith("_") for name in dir(kkt_jax) if name != "__version__")
  assert all(hasattr(kkt_jax, name) for name in dir(kkt_jax))
  assert not hasattr(kkt_jax, "nonsense")
  assert kkt_jax.__version__ == importlib.metadata.version("kkt-jax")


def test_the_losses_need_neither_flax_nor_orbax():
  run("import sys; sys.modules.update(flax=None, orbax=None); import kkt_jax; kkt_jax.kkt, kkt_jax.priors")
