# make run    set up, then the whole pipeline on the embedded default; results under results/
# make test   set up, then lint and the test suite
# ARGS="..."  more flags for either: make run ARGS="--quick", make test ARGS="-k quality"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.requirements

.PHONY: run test setup lint

setup: $(STAMP)

# The stamp is newer than the requirement files once everything in them is installed.
$(STAMP): requirements.txt requirements-embedded.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-embedded.txt
	touch $(STAMP)

run: setup
	$(BIN)/python run_optimization.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: setup lint
	$(BIN)/python -m pytest $(ARGS)
