# What the README calls. Each target installs what it needs into .venv first, once.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EVAL_VENV ?= .venv-eval
EVAL_INSTALLED := $(EVAL_VENV)/.installed
WATCH_VENV ?= .venv-watch
WATCH_INSTALLED := $(WATCH_VENV)/.installed

.PHONY: setup demo test test-eval test-watch mutants bench lint fmt

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

# VLMEvalKit lives in an environment of its own: beside a CPU-only torch its torchvision has to come without that
# package's own wishes, and it brings 160 packages that nothing else here needs.
test-eval: $(INSTALLED) $(EVAL_INSTALLED)
	OMP_NUM_THREADS=1 UNIDPO_VLMEVAL_PYTHON=$(abspath $(EVAL_VENV))/bin/python $(BIN)/python -m pytest -m vlmeval

$(EVAL_INSTALLED): pyproject.toml constraints.txt constraints-eval.txt
	test -x $(EVAL_VENV)/bin/python || $(PYTHON) -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(EVAL_VENV)/bin/python -m pip install --no-deps "torchvision==0.28.*"
	$(EVAL_VENV)/bin/python -m pip install -c constraints.txt -c constraints-eval.txt ms-vlmeval==0.0.20
	touch $@

# A minute for each dozen of bugs. NAMES="..." for some of them (python -m scripts.plant_bugs --list).
mutants: $(INSTALLED)
	$(BIN)/python -m scripts.plant_bugs --workers $(WORKERS) $(NAMES)

# One thread: process CPU time is compared. About an hour on one core.
bench: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed --shape cpu --pairs 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.profile
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed --curves

# Weights & Biases, trackio and SwanLab want older versions of packages that are pinned here.
test-watch: $(WATCH_INSTALLED)
	OMP_NUM_THREADS=1 $(WATCH_VENV)/bin/python -m pytest tests/test_watch.py

$(WATCH_INSTALLED): pyproject.toml constraints.txt
	test -x $(WATCH_VENV)/bin/python || $(PYTHON) -m venv $(WATCH_VENV)
	grep -vE '^(pillow|protobuf)==' constraints.txt > $(WATCH_VENV)/constraints.txt
	$(WATCH_VENV)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(WATCH_VENV)/bin/python -m pip install -c $(WATCH_VENV)/constraints.txt -e ".[demo,dev,watch]"
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
