# Everything that is done with this checkout. `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

# Settings: ARGS (for `hydro demo`), PYTEST_ARGS, BENCH (one benchmark), QUICK=1 (shorter benchmarks), PYTHON (makes the virtual environment).
ARGS ?=
PYTEST_ARGS ?=
BENCH ?=
PYTHON ?=

python := .venv/bin/python
export PYTHON
export PATH := $(CURDIR)/.venv/bin:$(PATH):/usr/sbin:/sbin

# Set after set-up only: hosts and bundles run on one core each, and DeepSpeed loads the extension that set-up built.
demo test test-slow bench: export TORCH_EXTENSIONS_DIR := $(CURDIR)/build/torch_extensions
demo test test-slow bench: export DS_ACCELERATOR := cpu
demo test test-slow bench: export OMP_NUM_THREADS := 1
demo test test-slow bench: export PYTHONUNBUFFERED := 1
test test-slow: export HYDRO_REQUIRE_SLURM := 1

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s  %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: ## Install what is missing: packages (as root), .venv, DeepSpeed's CPU extension
	@tools/setup.sh

.PHONY: demo
demo: setup ## Fill the bubbles of a real pipeline job on a private Slurm cluster (ARGS=…)
	@.venv/bin/hydro demo $(ARGS)

.PHONY: test
test: setup ## Run the tests (PYTEST_ARGS=…)
	@$(python) -m pytest -m "not slow" $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: setup ## Run the slow matrix of tests (PYTEST_ARGS=…)
	@$(python) -m pytest -m slow $(PYTEST_ARGS) || { [[ $$? -eq 5 ]] && echo "no test is marked slow"; }

.PHONY: check
check: setup ## Lint, format, types, import arrows, documentation
	@ruff check
	@ruff format --check
	@mypy
	@mypy tools
	@$(python) tools/check_arrows.py
	@$(python) tools/format_tables.py --check
	@$(python) tools/check_docs.py

.PHONY: format
format: setup ## Format the code, and renew the tables in docs/formats.md
	@ruff check --fix-only
	@ruff format
	@$(python) tools/format_tables.py

.PHONY: bench
bench: setup ## Run every benchmark, or one: BENCH=name; each writes build/bench/NAME.json
	@tools/bench.sh $(BENCH)

.PHONY: clean
clean: ## Remove build/ and every cache; .venv stays
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## Remove .venv too
	@rm -rf .venv
