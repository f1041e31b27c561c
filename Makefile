# Everything a person or a CI does with this repository. `make help` lists it.
#
# All that is needed beforehand: python3 (3.11 or newer) with venv, make, PyPI.
# Every target sets itself up: .venv is made from the lock files and remade
# when they change.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The rings share two cores: one after the other, also under `make -j`.
.NOTPARALLEL:

PYTHON ?= python3
BIN := .venv/bin
# Compiled once, beside the sources nothing: a process of ours that compiles what it
# imports needs half as long again to start, and the rings start hundreds.
export PYTHONPYCACHEPREFIX := $(CURDIR)/build/bytecode
unexport PYTHONDONTWRITEBYTECODE
# Two workers are what a small machine has; one world or cluster is one worker.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadscope --no-loadscope-reorder
# How many seeds `make sim` runs, from which on, and for how long at most. A campaign:
# make sim SEEDS=100000 FIRST_SEED=$RANDOM SIM_SECONDS=36000
SEEDS ?= 1000
FIRST_SEED ?= 0
SIM_SECONDS ?= 1200
# Steps of all machines of tests/model together; `make test` does 25000. A campaign:
# make model STEPS=1000000 MODEL="--model-seed $RANDOM"
STEPS ?= 250000
test: STEPS = 25000
# Arguments for `make model`.
MODEL ?=
# Which mutants `make mutants` tries, all where empty: conformance, model or sim.
LAYER ?=
# How often `make survival` kills a service; `make cluster` does it 15 times.
KILLS ?= 200
# How long `make fuzz-kernel` plays.
SECONDS ?= 60
# Arguments for `make demo`, e.g. DEMO="--payload /bin/ls --json".
DEMO ?=
# Arguments for `make bench`, e.g. BENCH="--row a,c --rounds 3".
BENCH ?=
# Debian packages that tests need beside Python: the base image is made with it.
APT_PACKAGES := fuse3 mmdebstrap

# The lock files are complete, so nothing is left to resolve. A pip that resolves all the
# same fails when a newer version of a pin exists that is wanted with an extra.
LOCKED := --no-deps --require-hashes --requirement

REPORTS := build/reports
# A run that cannot even take a signal (a fault parked in the kernel) is ended
# from outside; SIGABRT first, because faulthandler then prints every stack.
# $(call pytest,NAME,SECONDS,ARGUMENTS)
define pytest
@mkdir -p $(REPORTS)
timeout --signal=ABRT --kill-after=20 $(2) \
    $(BIN)/python -X faulthandler -m pytest --junitxml=$(REPORTS)/$(1).xml $(3) < /dev/null
endef
COVERAGE := --cov --cov-report=term --cov-report=xml:build/coverage/coverage.xml

# What takes long comes first, so that the workers end together.
QUICK := tests/contract tests/unit tests/mutants tests/tidy tests/support
SOURCES := protos/generate.py deploy services clients tests docs/examples

# What people want

.PHONY: demo
demo: setup ## one VM with 1G pages from boot to teardown, in real processes
	$(BIN)/gmemctl demo $(DEMO)

.PHONY: test
test: setup coverage sim model cluster conformance mutants ## every test: with branch coverage of the cores

.PHONY: check
check: format-check lint types layers protos-lint ## the gate for each commit
	$(call pytest,check,900,$(PARALLEL) tests/sim --seeds 200 --first-seed 0 $(QUICK))

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Parts of `make test`

.PHONY: unit
unit: setup ## does each file do what it says?
	$(call pytest,unit,900,$(PARALLEL) tests/unit)

.PHONY: contract
contract: setup ## does the wire change the meaning?
	$(call pytest,contract,900,$(PARALLEL) tests/contract)

.PHONY: sim
sim: setup ## does any interleaving break an invariant? SEEDS=1000 FIRST_SEED=0
	$(call pytest,sim,$(SIM_SECONDS),$(PARALLEL) tests/sim --seeds $(SEEDS) --first-seed $(FIRST_SEED))

.PHONY: model
model: setup ## do the cores do what a small reference model does? STEPS=250000
	$(call pytest,model,7200,-n $(WORKERS) tests/model --steps $(STEPS) $(MODEL))

.PHONY: mutants
mutants: setup ## do the tests find known mistakes? LAYER=conformance|model|sim
	timeout --signal=INT --kill-after=60 2400 \
	    $(BIN)/python -m tests.mutants $(addprefix --layer ,$(LAYER)) < /dev/null

.PHONY: cluster
cluster: setup ## do real processes agree?
	$(call pytest,cluster,2400,$(PARALLEL) -m cluster tests)

.PHONY: conformance
conformance: setup ## does an emulated host do what the list of docs/semantics.md says?
	$(call pytest,conformance,1800,-m conformance tests/conformance)

.PHONY: survival
survival: setup ## is a killed service felt? KILLS=200
	$(call pytest,survival,3600,-m cluster tests/cluster/test_survival.py --kills $(KILLS))

.PHONY: fuzz-kernel
fuzz-kernel: setup ## does the emulated host answer as this kernel? SECONDS=60
	timeout --signal=INT --kill-after=60 $$(( $(SECONDS) + 300 )) \
	    $(BIN)/python -X faulthandler -m tests.fuzz --seconds $(SECONDS) < /dev/null

.PHONY: tidy
tidy: setup ## does the text keep its promises?
	$(call pytest,tidy,400,$(PARALLEL) tests/tidy)

.PHONY: bench
bench: setup ## how fast is it, and against what? BENCH="--row a,c --rounds 3"
	timeout --signal=INT --kill-after=60 2400 \
	    $(BIN)/python -X faulthandler -m tests.bench $(BENCH) < /dev/null

.PHONY: coverage
coverage: setup ## unit, contract and tidy, with branch coverage of the cores
	@mkdir -p build/coverage
	$(call pytest,covered,1200,$(PARALLEL) $(COVERAGE) $(QUICK))

# Containers; docs/deploy.md

.PHONY: image
image: setup ## the container image, named after its content (BASE_IMAGE=python:3.11-slim)
	deploy/image.sh

.PHONY: compose-up
compose-up: image ## start a host in containers, and wait until it answers
	deploy/compose up --detach
	deploy/compose run --rm client gmemctl status --wait 60

.PHONY: compose-down
compose-down: ## end it; no container, network or volume is left
	deploy/compose --profile demo --profile client down --volumes --remove-orphans

.PHONY: test-compose
test-compose: setup ## does all of it work in containers? Needs a container engine
	$(call pytest,compose,1500,-m compose tests/compose)

# Static checks

.PHONY: format
format: setup ## rewrite the sources in the one format
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix-only --quiet $(SOURCES)

.PHONY: format-check
format-check: setup
	$(BIN)/ruff format --check $(SOURCES)

.PHONY: lint
lint: setup ## ruff
	$(BIN)/ruff check $(SOURCES)

.PHONY: types
types: setup ## mypy --strict
	$(BIN)/mypy

.PHONY: layers
layers: setup ## import-linter: who may import whom
	$(BIN)/lint-imports --no-logo --cache-dir build/import-linter

.PHONY: protos-lint
protos-lint: setup
	cd protos && ../$(BIN)/buf lint

# Generated files

.PHONY: protos
protos: setup protos-lint ## regenerate the stubs beside the .proto files
	$(BIN)/python protos/generate.py

.PHONY: tables
tables: setup ## write the table of the lineages into docs/semantics.md
	$(BIN)/python -m tests.support.lineage_table

# Hashes for every platform and every Python we support; no index is written
# into the files, so each machine uses the one that it is set up with.
COMPILE := pip compile pyproject.toml --quiet --universal --python-version 3.11 \
    --fork-strategy fewest --generate-hashes --no-emit-index-url \
    --no-emit-find-links --no-annotate --no-header

.PHONY: lock
lock: ## pin the dependencies again, after a change in pyproject.toml (LOCK=--upgrade)
	@test -x $(BIN)/uv || { $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet uv; }
	$(BIN)/uv $(COMPILE) $(LOCK) --output-file requirements.lock
	$(BIN)/uv $(COMPILE) $(LOCK) --group dev --constraint requirements.lock \
	    --output-file requirements-dev.lock

.PHONY: wheel
wheel: setup ## build the wheel; install it into an empty venv; gmemctl --help there
	rm -rf build/wheel-venv dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install --quiet $(LOCKED) requirements.lock
	build/wheel-venv/bin/python -m pip install --quiet --no-deps dist/*.whl
	build/wheel-venv/bin/python -m pip check
	cd build/wheel-venv && bin/gmemctl --help
	rm -rf build/wheel-venv
	@ls -l dist

# Set-up

.PHONY: setup
setup: .venv/.stamp-editable

.venv/.stamp-locked: requirements-dev.lock
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "gmem needs Python 3.11 or newer with venv; $(PYTHON) is not:" \
	         "install python3-venv, or say make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setting up .venv from requirements-dev.lock"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    $(LOCKED) requirements-dev.lock
	@$(BIN)/python -m pip check
	@touch $@

.venv/.stamp-editable: .venv/.stamp-locked pyproject.toml
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	    --no-deps --no-build-isolation --editable .
	@touch $@

.PHONY: tools
tools: ## Debian packages that tests need (as root)
ifeq ($(strip $(APT_PACKAGES)),)
	@echo "no Debian package is needed"
else
	@if dpkg-query --show $(APT_PACKAGES) > /dev/null 2>&1; then \
	    echo "already installed: $(APT_PACKAGES)"; \
	elif [ "$$(id -u)" -ne 0 ]; then \
	    echo "not root: ask for 'apt-get install $(APT_PACKAGES)';" \
	         "tests that need them are skipped until then"; \
	else \
	    apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes \
	        --no-install-recommends $(APT_PACKAGES) < /dev/null; \
	fi
endif

.PHONY: clean
clean: ## remove what was built, and .venv
	rm -rf .venv build dist .pytest_cache .hypothesis .coverage
	find protos services clients tests -name __pycache__ -type d -prune -exec rm -rf {} +
