# What the README calls. Each target installs what it needs into .venv first, once.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EVAL_VENV ?= .venv-eval
EVAL_INSTALLED := $(EVAL_VENV)/.installed
WATCH_VENV ?= .venv-watch
BROWSER_VENV ?= .venv-browser
PYTHON_VENV ?= .venv-$(notdir $(PYTHON))

# What `make test-oldest`, `test-newest` and `test-python` run; `TESTS=tests` is the whole suite.
CORE := adapters arguments check cli config demo encode equivalence golden losses losses_scored losses_unscored models \
  packs recipes reference runs sources stores train trainer
TESTS ?= $(CORE:%=tests/test_%.py)

.PHONY: help setup demo test test-avx2 test-oldest test-newest test-python test-eval test-watch test-browser mutants bench gpu lint fmt FORCE

help: ## this list
	@sed -nE 's/^([a-z][a-z0-9 -]*):[^#]* ## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

setup: $(INSTALLED) ## make .venv and install into it
# An environment: torch first, then the rest, each in the version that CONSTRAINTS names.
CONSTRAINTS = constraints.txt
EXTRAS = demo,dev
%/.installed: pyproject.toml constraints.txt
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install -c $(CONSTRAINTS) torch
	$*/bin/python -m pip install $(UPGRADE) -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

demo: $(INSTALLED) ## the whole story on handwritten digits, 1 minute
	$(BIN)/unidpo demo

# One thread per worker: two that fight over the same cores take longer than one.
test: $(INSTALLED) ## all tests, 8 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# As on a CPU without AVX-512, for torch and oneDNN; 4-bit weights are tried with and without it in every run.
test-avx2: $(INSTALLED) ## all tests, as on a CPU without AVX-512
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# What pyproject.toml promises: its lowest bounds, the newest releases beside the pinned torch, other versions of Python
# (`make test-python PYTHON=python3.13`).
test-oldest test-newest: test-%: .venv-%/.installed ## the core tests at the oldest and the newest versions
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n $(WORKERS) $(WARNINGS) $(TESTS)

test-python: $(PYTHON_VENV)/.installed ## the core tests on another Python: PYTHON=python3.13
	OMP_NUM_THREADS=1 $(PYTHON_VENV)/bin/python -m pytest -n $(WORKERS) $(TESTS)

.venv-oldest/.installed: constraints-oldest.txt
.venv-oldest/.installed: CONSTRAINTS = constraints-oldest.txt
# torch 2.11 warns of its own use of an older part.
test-oldest: WARNINGS = -W 'ignore:`torch.jit:DeprecationWarning'
.venv-newest/.installed: CONSTRAINTS = .venv-newest.txt
.venv-newest/.installed: UPGRADE = --upgrade --upgrade-strategy eager
.venv-newest/.installed: .venv-newest.txt FORCE # there may be newer ones than last time

.venv-newest.txt: constraints.txt
	grep '^torch==' $< > $@

# VLMEvalKit lives in an environment of its own: beside a CPU-only torch its torchvision has to come without that
# package's own wishes, and it brings 160 packages that nothing else here needs.
test-eval: $(INSTALLED) $(EVAL_INSTALLED) ## the tests that need VLMEvalKit, in .venv-eval
	OMP_NUM_THREADS=1 UNIDPO_VLMEVAL_PYTHON=$(abspath $(EVAL_VENV))/bin/python $(BIN)/python -m pytest -m vlmeval

$(EVAL_INSTALLED): pyproject.toml constraints.txt constraints-eval.txt
	test -x $(EVAL_VENV)/bin/python || $(PYTHON) -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -m pip install -c constraints.txt torch
	$(EVAL_VENV)/bin/python -m pip install --no-deps "torchvision==0.28.*"
	$(EVAL_VENV)/bin/python -m pip install -c constraints.txt -c constraints-eval.txt ms-vlmeval==0.0.20
	touch $@

# A minute for each dozen of bugs. NAMES="..." for some of them (python -m scripts.plant_bugs --list).
mutants: $(INSTALLED) ## plant each bug of tests/mutants and see a test catch it
	$(BIN)/python -m scripts.plant_bugs --workers $(WORKERS) $(NAMES)

# One thread: process CPU time is compared. About an hour on one core.
gpu: $(INSTALLED) ## what a CUDA GPU has to show, half an hour on one
	$(BIN)/python -m benchmarks.gpu

ANSWERS := "prompt packs" "pair packs" live selective

bench: $(INSTALLED) ## speed and memory against padded rows, an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed --shape cpu --pairs 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed --shape answers --pairs 2 --variants $(ANSWERS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.profile
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.memory
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed --curves

# Weights & Biases, trackio and SwanLab want older versions of packages that are pinned here.
test-watch: $(WATCH_VENV)/.installed ## the trackers of training, with their own packages
	OMP_NUM_THREADS=1 $(WATCH_VENV)/bin/python -m pytest tests/test_watch.py

$(WATCH_VENV)/.installed: CONSTRAINTS = .venv-watch.txt
$(WATCH_VENV)/.installed: EXTRAS = demo,dev,watch
$(WATCH_VENV)/.installed: .venv-watch.txt

.venv-watch.txt: constraints.txt
	grep -vE '^(pillow|protobuf)==' $< > $@

# Debian's chromium (apt-get install chromium); UNIDPO_CHROMIUM names another.
test-browser: $(BROWSER_VENV)/.installed ## the report in a real browser
	OMP_NUM_THREADS=1 $(BROWSER_VENV)/bin/python -m pytest -s tests/test_browser.py

$(BROWSER_VENV)/.installed: EXTRAS = dev,browser

lint: $(INSTALLED) ## ruff, mypy, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(INSTALLED) ## ruff, mending what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
