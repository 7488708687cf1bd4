# Everything runs in .venv, which holds exactly the versions in requirements.lock. It needs Python 3.11+ and make.
# Another interpreter:  make test PYTHON=python3.12        Another number of test processes:  make test WORKERS=4

PYTHON ?= python3
WORKERS ?= logical

VENV := .venv
PY := $(VENV)/bin/python

# Tests compile thousands of tiny functions once: compiling fast matters more to them than fast code, and workers share
# what they have compiled. A fresh checkout starts with an empty cache.
TEST_ENV := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" \
  JAX_COMPILATION_CACHE_DIR=$(VENV)/test_compilation_cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
  JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
PYTEST := $(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --maxprocesses=8 --dist=worksteal

# Stops unless PYTHON is one that the locked packages have wheels for.
define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || { \
  echo "This needs Python 3.11 to 3.14, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)" >&2; \
  echo "Name another one, for example: make setup PYTHON=python3.12" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo check test lint format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed ## create .venv with the locked versions and this project

demo: setup ## train on 100 MNIST digits, forget them, rebuild them from the weights (minutes)
	$(PY) -m experiments.mnist --samples_per_class=10 --workdir=runs/demo
	@echo "The picture is in runs/demo/fig6.png: generated digits in odd rows, the most similar training digit below each."

check: lint ## lint, types, doctests and closed-form tests (two minutes)
	$(PYTEST) -m "not slow"

test: lint ## everything: what check does, and the tests that train, start processes or draw many cases
	$(PYTEST)

lint: setup ## check style, formatting and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup ## fix style and formatting in place
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# One version of a package for every Python and platform, so that what was tested is what everybody gets. setuptools, which
# builds the project, is locked with the rest. uv finds the versions; it is not needed for anything else.
lock: ## write requirements.lock anew, with the newest versions
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install --quiet uv
	echo setuptools | build/lock/bin/uv pip compile --quiet --no-config --upgrade \
	  --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	  --extra test --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml -
	rm -rf build

clean: ## remove .venv, caches and build files (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find kkt_jax experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

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
