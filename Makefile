# make demo    train a tiny zoo, merge and route it, print one table of scores
# make test    the whole suite
# make lint    style and types
# make bench   time and memory of a merge, beside a plain copy and mergekit
#
# The first of these makes .venv and fills it: a few minutes, once, and again when pyproject.toml changes.
# Another interpreter: make test PYTHON=python3.12    Another torch: make test TORCH='torch>=2.4'

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip
READY := .venv/.ready

.PHONY: help demo test lint bench

help: ; @sed -n 's/^# make/make/p' Makefile
demo: $(READY) ; $(BIN)/python examples/demo.py
test: $(READY) ; $(BIN)/python -P -m pytest -q -n auto --dist worksteal
lint: $(READY) ; $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
bench: $(READY) ; $(BIN)/python examples/bench_merge.py

# torch goes first, and only where there is none: pip keeps any that pyproject.toml allows.
$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Run: make PYTHON=path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv >/dev/null 2>&1 || true
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null 2>&1 || { echo \
		"$(PYTHON) cannot make a .venv with pip. Install its venv module (Debian: python3-venv)." >&2; exit 1; }
	@echo "Installing into .venv: a few minutes, once."
	@$(PIP) show --quiet torch 2>/dev/null || $(PIP) install --quiet '$(TORCH)'
	@$(PIP) install --quiet -e '.[dev]'
	@touch $@
