# Every target makes what it needs in .venv; nothing else has to be installed by hand but Python 3.10 or later.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test bench bench-baseline bench-compare benchmark lint format clean

demo: $(VENV)/.demo
	$(BIN)/sparsebreg info
	$(BIN)/sparsebreg compare --data digits --model mlp --methods sgd,ml-linbreg --epochs 40 --out $(OUT)

test: $(VENV)/.test
	$(BIN)/pytest -q

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
	$(PIP) 'clang-format>=18' 'ruff>=0.6'
	touch $@
