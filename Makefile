# What the README calls. Each target installs what it needs into .venv first, once.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test lint fmt

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo,dev]"
	touch $@

demo: $(INSTALLED)
	$(BIN)/unidpo demo

# One thread per worker: two that fight over the same cores take longer than one.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
