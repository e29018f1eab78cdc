# Every target sets up .venv first, so that each of them works on a fresh clone. `make` alone prints this list.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TORCH  := $(shell grep '^torch==' constraints.txt)
OLDEST := .venv-oldest
TESTS  ?= tests
SEED   ?= 0

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-gpu test-kernels test-oldest fuzz crash-test lint format type docs docs-check wheel-check check bench clean

help: ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

install: $(READY) ## set up .venv with the pinned dependencies and kvqtool itself

# torch goes in first and by exact version: a range in the same call may pick a larger build of a newer release.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: constraints.txt needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## compress, measure and use the built-in model's KV cache; no network, no GPU
	PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/demo.sh

test: $(READY) ## run the tests: CPU, offline
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

test-gpu: $(READY) ## run the GPU tests; a machine without a GPU is a failure, not a skip
	KVQTOOL_REQUIRE_GPU=1 $(BIN)/python -m pytest -m gpu

test-kernels: $(READY) ## run every kernel variant on the CPU, memory checked too, and compile all for every GPU where NVRTC is installed
	$(BIN)/python -m pytest -m 'slow or not slow' tests/test_attend_shim.py tests/test_packing.py tests/test_appending.py tests/test_dequantize.py tests/test_matvec.py tests/test_bounds.py tests/test_compile.py

test-oldest: $(OLDEST)/.ready ## run the tests (or TESTS=...) with the oldest transformers that is allowed, in .venv-oldest
	$(OLDEST)/bin/python -m pytest --numprocesses auto --maxprocesses 8 $(TESTS)

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt $(TORCH)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[dev]'
	@touch $@

fuzz: $(READY) ## read 10,000 mutated bundles and saved caches; SEED=1 for others
	$(BIN)/python tests/fuzz.py --count 10000 --seed $(SEED)

crash-test: $(READY) ## kill -9 every writing command, 200 times in all, at random moments
	$(BIN)/python tests/crash.py --kills 200 --seed $(SEED)

lint: $(READY) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## write what lint checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(READY) ## check types
	$(BIN)/mypy

docs: $(READY) ## write the generated pages of docs/
	$(BIN)/python docs/generate.py

docs-check: $(READY) ## fail if a generated page is stale
	$(BIN)/python docs/generate.py --check

wheel-check: $(READY) ## build sdist and wheel, install the wheel into a clean environment and use it there
	$(BIN)/python -m pytest tests/test_wheel.py -m slow

check: lint type docs-check wheel-check test ## everything that must hold before a change lands

bench: $(READY) ## run every benchmark
	@set -e; for script in $(wildcard benchmarks/bench_*.py); do echo "== $$script"; $(BIN)/python $$script; done

clean: ## remove .venv, .venv-oldest and everything that tools wrote
	rm -rf $(VENV) $(OLDEST) build dist demo-out .pytest_cache .mypy_cache .ruff_cache
	find kvqtool tests benchmarks docs -name __pycache__ -prune -exec rm -rf {} +
