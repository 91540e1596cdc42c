# Set-up on a bare machine with Python 3.11 and make: `make quickstart` or `make test` install what they need, once.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STUDY ?= studies/quickstart.yaml
# One thread and one process a core: tests are many small models, and OpenMP's threads would wait for each other.
RUN_TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST)

.PHONY: quickstart test test-all lint format install wheel clean
.DELETE_ON_ERROR:

install: $(VENV)/.quickstart

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: an open range would fetch gigabytes of CUDA packages.
$(VENV)/.quickstart: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q torch==2.13.0
	$(PIP) install -q -c constraints.txt -e '.[quickstart]'
	@touch $@

$(VENV)/.dev: $(VENV)/.quickstart
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(VENV)/.quickstart
	$(BIN)/lat-optuna quickstart $(STUDY)

test: $(VENV)/.dev
	$(RUN_TESTS) -m 'not slow'

test-all: $(VENV)/.dev
	$(RUN_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
