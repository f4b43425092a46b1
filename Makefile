# `make` lists the targets. Each makes its own virtual environment first, from python3.11 or newer and nothing else.
#
# pip finds packages as it is configured (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS). On a machine without a
# GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := configs/constraints.txt
TORCH := $(shell grep '^torch==' $(CONSTRAINTS))
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check soak audit format clean
.DELETE_ON_ERROR:

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make the virtual environment, with tpdist and all that its tests need

demo: $(INSTALLED) ## serve the built-in tiny model from two nodes on this machine, and check its answers
	$(BIN)/tpdist demo

test: $(INSTALLED) ## run all tests
	$(BIN)/pytest

check: $(INSTALLED) ## format, lint, types and the fast tests, in some three minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow and not e2e and not gpu"

soak: $(INSTALLED) ## do one fault after another to a cluster under load, for ten minutes
	$(BIN)/pytest tests/e2e/faults -k storm --soak 600

audit: $(INSTALLED) ## look for dangerous code and for dependencies with known vulnerabilities
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive tpdist
	$(BIN)/python tests/dependency_audit.py $(CONSTRAINTS)

format: $(INSTALLED) ## rewrite the source files as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove the virtual environment and all caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: whatever build it is, nothing that follows replaces it.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tpdist needs Python 3.11 or newer, not " + sys.version.split()[0] + ": make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@
