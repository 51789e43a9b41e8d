# make run    set up, then the whole pipeline on the embedded default; results under results/. Without ARGS it ends after a
#             quarter of an hour at most; where that is too short, a second one goes on from there
# make test   set up, then lint and the test suite
# make sanitize   the C++ kernels compiled with address and undefined-behaviour sanitisers, under their tests (Linux, g++)
# ARGS="..."  more flags for either: make run ARGS="--quick", make test ARGS="-k quality"
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.requirements

.PHONY: run test sanitize setup lint interpreter

setup: $(STAMP)

# The stamp is newer than the requirement files once everything in them is installed.
$(STAMP): requirements.txt requirements-embedded.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-embedded.txt
	touch $(STAMP)

run: setup
	$(BIN)/python run_optimization.py $(or $(ARGS),--model smollm2-135m --minutes 11)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Triton, which torch's build for CUDA brings along, also on a Linux without a GPU: its interpreter then runs the kernels for
# one. Tests of these are skipped where it cannot be had.
interpreter: setup
	-@if [ "$$(uname -s)" = Linux ] && ! $(BIN)/python -c "import triton" 2>/dev/null; then \
		$(BIN)/python -m pip install --quiet --no-deps triton==3.7.1; fi

# Files of tests side by side: one process cannot use two cores, as tiny models run on one thread. In the order of their
# names: the default, most tests first, leaves the few slow ones of test_faults.py to one process at the end.
test: setup lint interpreter
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# Python itself is not instrumented: the sanitisers' libraries are loaded before it, and what it leaks is not looked for.
# Classic is left out: torch's own product, whose rounding is upset by sums in another order.
SANITIZERS = $(shell for name in asan ubsan; do $(or $(CXX),g++) -print-file-name=lib$$name.so; done)
sanitize: setup
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 TINYOPT_SANITIZE=1 \
		$(BIN)/python -m pytest tests/test_kernels.py tests/test_attention.py tests/test_lean.py -k "not classic" $(ARGS)
