PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .venv-peers
COMPILE = $(BIN)/uv pip compile --quiet --python-version 3.11 --group dev pyproject.toml \
  --no-emit-index-url --no-emit-find-links --no-annotate --no-header
.DEFAULT_GOAL := setup

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## Build .venv from the pins (needs python3 and a package index)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else f"Parapet needs Python 3.11, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.8
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python requirements.txt
	@touch $(READY)

demo: setup  ## The main job on the bundled digits: classifier, VAE defense, PGD, one table
	$(BIN)/python -m src.train

test: setup  ## The default tests: no network, no data beyond what packages bundle
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-full: setup  ## The slow tests as well
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m 'slow or not slow'

test-checks: setup  ## Do planted faults raise their flags? Prints faults by flags, then runs those tests
	$(BIN)/python -W ignore -m tests.planted
	$(BIN)/python -m pytest -q tests/test_checks.py

test-faults: setup  ## Kill, fill and damage a sweep: is a record lost, doubled or made twice? ARGS="--kills 30 --seed 1"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults $(ARGS)

test-launchers: setup  ## The same sweep by every launcher whose plugin is installed, and on two nodes: the same records?
	$(BIN)/python -m pytest -q -m 'slow or not slow' --timeout 1200 tests/test_launchers.py tests/test_nodes.py

lint: setup  ## ruff and mypy, as pre-commit and CI run them
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

format: setup  ## Let ruff rewrite the sources
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

bench-train: setup  ## Training throughput: ours through Lightning against a bare loop
	$(BIN)/python -m benchmarks.train

peers: $(PEERS)/.ready  ## Build .venv-peers: ours and the other attack libraries, to compare with

$(PEERS)/.ready: requirements-peers.txt $(READY)
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(PEERS)
	@printf 'setuptools<81\n' > $(PEERS)/build.txt  # a dependency of adv-lib still builds with pkg_resources
	$(BIN)/uv pip sync --quiet --python $(PEERS)/bin/python --build-constraints $(PEERS)/build.txt requirements-peers.txt
	@touch $(PEERS)/.ready

bench-parity: peers  ## Are our attacks as strong as other libraries'? ARGS="--root DIR --images 1000"
	$(PEERS)/bin/python -W ignore -m benchmarks.parity $(ARGS)

bench-attacks: peers  ## Are our attacks faster than other libraries'? ARGS="--root DIR"
	$(PEERS)/bin/python -W ignore -m benchmarks.attacks $(ARGS)

bench-twos: setup  ## Which share of MNIST twos do targeted attacks turn into sixes? ARGS="--root DIR"
	$(BIN)/python -W ignore -m benchmarks.twos $(ARGS)

bench-sweep: setup  ## What the cache saves, what a cached cell costs, plan and table of 10,000 cells. ARGS="--root DIR"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.sweep $(ARGS)

bench: bench-train bench-parity bench-attacks bench-twos bench-sweep  ## All benchmarks

pins: setup  ## Compile requirements.txt and requirements-peers.txt from pyproject.toml
	$(COMPILE) --output-file requirements.txt
	@printf 'setuptools<81\n' > $(VENV)/build.txt
	$(COMPILE) --group peers --constraints requirements.txt --build-constraints $(VENV)/build.txt --output-file requirements-peers.txt

clean:  ## Remove the environment and caches (never outputs, artifacts or data)
	rm -rf $(VENV) $(PEERS) .pytest_cache .mypy_cache .ruff_cache

.PHONY: help setup demo test test-full test-checks test-faults test-launchers lint format peers bench-train bench-parity \
  bench-attacks bench-twos bench-sweep bench pins clean
