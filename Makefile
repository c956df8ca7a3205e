# Every target makes what it needs in .venv; nothing else has to be installed by hand but Python 3.10 or later.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-kernels test-neon bench bench-baseline bench-compare benchmark lint format clean

demo: $(VENV)/.demo
	$(BIN)/sparsebreg info
	$(BIN)/sparsebreg compare --data digits --model mlp --methods sgd,ml-linbreg --epochs 40 --coarse-steps 99 --out $(OUT)

test: $(VENV)/.test
	$(BIN)/pytest -q

# The kernels alone, without Python.
TESTED := csrc/tests/kernels.cpp $(wildcard csrc/*.cpp csrc/isa/*.cpp)
TEST_FLAGS := -std=c++17 -O2 -ffp-contract=fast -fno-math-errno -fopenmp -Wall -Wextra -Wno-psabi -Icsrc

# Passive: the kernels are short, and threads that spin for the next one would take the cores from those at work.
test-kernels: build/test-kernels
	OMP_WAIT_POLICY=passive $<

test-neon: build/test-neon
	OMP_WAIT_POLICY=passive qemu-aarch64 -L /usr/aarch64-linux-gnu $<

build/test-kernels: $(shell find csrc -type f)
	mkdir -p $(@D)
	$(CXX) $(TEST_FLAGS) $(TESTED) -o $@

build/test-neon: $(shell find csrc -type f)
	@type aarch64-linux-gnu-g++ qemu-aarch64 >/dev/null || \
		{ echo "test-neon: expected the Debian packages g++-aarch64-linux-gnu and qemu-user"; exit 1; }
	mkdir -p $(@D)
	aarch64-linux-gnu-g++ $(TEST_FLAGS) $(TESTED) -o $@

# Options of the benchmark: make bench BENCH='--suite conv --full'.
BENCH ?=

bench: $(VENV)/.bench
	$(BIN)/sparsebreg bench $(BENCH) --out runs/bench

bench-baseline: $(VENV)/.bench
	$(BIN)/sparsebreg bench $(BENCH) --repeats 3 --out runs/bench-baseline
	cp runs/bench-baseline/bench.json bench/baseline.json

bench-compare: $(VENV)/.bench
	$(BIN)/sparsebreg bench $(BENCH) --compare bench/baseline.json --out runs/bench-compare

benchmark: $(VENV)/.bench
	$(BIN)/pytest bench --benchmark-columns=median,iqr,rounds --benchmark-autosave

lint: $(VENV)/.lint
	$(BIN)/lint-imports --no-cache
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h')

clean:
	rm -rf $(VENV) build runs *.egg-info sparsebreg/_C*.so

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: the constraint keeps later steps from fetching another build.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	touch $@

SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) -e '.[train,numba]'
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SOURCES)
	$(PIP) -e '.[train,numba,test]'
	touch $@

$(VENV)/.bench: $(VENV)/.torch $(SOURCES)
	$(PIP) -e '.[train,numba,bench]'
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(PIP) 'clang-format>=18' 'import-linter>=2.7' 'ruff>=0.6'
	touch $@
