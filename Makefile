# Everything runs in .venv, which holds exactly the versions in requirements.lock, and in requirements-docs.lock once the
# documentation is built. It needs Python 3.11+ and make.
# Another interpreter:  make test PYTHON=python3.12        Another number of test processes:  make test WORKERS=4

PYTHON ?= python3
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.12
WORKERS ?= logical

VENV := .venv
PY := $(VENV)/bin/python
OLDEST := .venv-oldest
NEWEST := .venv-newest
TORCH := .venv-torch
# The pair that works: the stable torchax fails with torch 2.13 and later. Processors alone will do.
TORCH_PACKAGES := torch==2.13.0 torchax==0.0.14.dev20261026
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# Tests compile thousands of tiny functions once: compiling fast matters more to them than fast code (the older emitters
# of fused loops compile a third faster), and workers share what they have compiled. A fresh checkout starts with an
# empty cache.
FAST_COMPILATION := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
  --xla_cpu_use_fusion_emitters=false
# $(call PYTEST,directory of an environment)
PYTEST = XLA_FLAGS="$(FAST_COMPILATION)" JAX_COMPILATION_CACHE_DIR=$(1)/test_compilation_cache \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 \
  $(1)/bin/python -m pytest -n $(WORKERS) --maxprocesses=8 --dist=worksteal

# Stops unless PYTHON is one that the locked packages have wheels for.
define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || { \
  echo "This needs Python 3.11 to 3.14, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)" >&2; \
  echo "Name another one, for example: make setup PYTHON=python3.12" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-oldest test-newest test-torch docs site lint format lock lock-oldest clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed ## create .venv with the locked versions and this project

demo: setup ## train on 100 MNIST digits, forget them, rebuild them from the weights (minutes)
	$(PY) -m experiments.mnist --samples_per_class=10 --workdir=runs/demo
	@echo "The picture is in runs/demo/fig6.png: generated digits in odd rows, the most similar training digit below each."

check: lint ## lint, types, doctests and closed-form tests (two minutes)
	$(call PYTEST,$(VENV)) -m "not slow"

test: lint site ## everything: what check does, the documentation, and tests that train, start processes or draw many cases
	$(call PYTEST,$(VENV))

# Packages of different ages warn of one another, which is no error here.
test-oldest: $(OLDEST)/.installed ## the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	PYTEST_ADDOPTS="-W default" $(call PYTEST,$(OLDEST))

# Newer compilers know no such emitters of fused loops, and refuse a flag that they do not know.
test-newest: FAST_COMPILATION := $(filter-out --xla_cpu_use_fusion_emitters=%,$(FAST_COMPILATION))
test-newest: $(NEWEST)/.installed ## the tests with the newest versions there are, in .venv-newest; needs Python 3.12 or later
	PYTEST_ADDOPTS="-W default" $(call PYTEST,$(NEWEST))

test-torch: $(TORCH)/.installed ## the tests of from_torch, in .venv-torch, with PyTorch and torchax
	$(call PYTEST,$(TORCH)) tests/classifiers/test_torch.py tests/classifiers/test_bridges.py

docs: $(VENV)/.docs build/docs/.library ## the documentation in build/docs/html; runs its notebooks, warnings are errors
	$(PY) -m sphinx -q -W --keep-going -d build/docs/doctrees docs build/docs/html
	@echo "The documentation is in build/docs/html/index.html."

# Without running its notebooks, which takes minutes. Pages of modules that are gone would be warnings.
site: $(VENV)/.docs
	rm -rf docs/api/kkt_jax*.rst build/site/html
	$(PY) -m sphinx -q -W --keep-going -E -D nb_execution_mode=off -d build/site/doctrees docs build/site/html

# What notebooks gave is kept for as long as neither they nor the library nor the configuration change.
build/docs/.library: $(shell find kkt_jax docs -name '*.py')
	rm -rf build/docs docs/api/kkt_jax*.rst
	@mkdir -p $(@D) && touch $@

lint: setup ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup ## fix style and formatting in place
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

COMPILE := build/lock/bin/uv pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes

# One version of a package for every Python and platform, so that what was tested is what everybody gets. setuptools, which
# builds the project, is locked with the rest. uv finds the versions; it is not needed for anything else.
# Those of the documentation are in a file of their own, so that nobody waits for them who does not build it.
lock: ## write requirements.lock and requirements-docs.lock anew, with the newest versions
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet uv
	echo setuptools | $(COMPILE) --extra test --upgrade --fork-strategy fewest \
	  --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml -
	$(COMPILE) --extra docs --upgrade --fork-strategy fewest --constraint requirements.lock \
	  --custom-compile-command "make lock" --output-file requirements-docs.lock pyproject.toml
	rm -rf build

# What pyproject.toml names at its least version, the rest at its newest; from wheels, but for the one that has none.
lock-oldest: ## write requirements-oldest.lock anew, with the oldest versions
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet uv
	echo "setuptools>=77" | $(COMPILE) --extra test --upgrade --resolution lowest-direct --only-binary :all: --no-binary promise \
	  --custom-compile-command "make lock-oldest" --output-file requirements-oldest.lock pyproject.toml -
	rm -rf build

clean: ## remove all environments, caches, build files and the documentation (runs/ stays)
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(TORCH) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f docs/api/kkt_jax*.rst
	find kkt_jax experiments tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# A new lock file makes a new .venv; a changed pyproject.toml only installs the project again.
$(VENV)/.locked: requirements.lock
	$(CHECK_PYTHON)
	@echo "Installing the packages of requirements.lock into $(VENV): about a minute, or longer on a slow connection."
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PY) -m pip check
	@touch $@

$(VENV)/.docs: requirements-docs.lock | $(VENV)/.installed
	@echo "Installing the packages of requirements-docs.lock into $(VENV): half a minute."
	$(PY) -m pip install --quiet --require-hashes -r requirements-docs.lock
	@touch $@

$(OLDEST)/.installed: requirements-oldest.lock pyproject.toml
	@$(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "The oldest versions need Python 3.11. Name it, for example: make test-oldest OLDEST_PYTHON=python3.11" >&2; \
	  exit 1; }
	$(OLDEST_PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --require-hashes -r requirements-oldest.lock
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(OLDEST)/bin/python -m pip check
	@touch $@

$(NEWEST)/.installed: pyproject.toml
	@$(NEWEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 12))' 2>/dev/null || { \
	  echo "The newest JAX needs Python 3.12 or later. Name it, for example: make test-newest NEWEST_PYTHON=python3.13" >&2; \
	  exit 1; }
	$(NEWEST_PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[test]'
	$(NEWEST)/bin/python -m pip check
	@touch $@

$(TORCH)/.installed: requirements.lock pyproject.toml
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --require-hashes -r requirements.lock
	$(TORCH)/bin/python -m pip install --quiet --extra-index-url $(TORCH_INDEX) $(TORCH_PACKAGES)
	$(TORCH)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(TORCH)/bin/python -m pip check
	@touch $@
