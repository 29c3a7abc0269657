# Each target creates and uses .venv; nothing else needs to be installed.   make demo | make test | make check | make bench
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SERVE  ?= 1
PORT   ?= 8501
# Without a GPU pip must be told which torch to take, or it fetches gigabytes of CUDA; constraints.txt does that.
STAMP  := $(VENV)/.installed

.PHONY: demo test test-slow test-real test-browser test-peer check bench clean

demo: $(STAMP)
	$(BIN)/saelab demo --out runs/demo --port $(PORT) $(if $(filter 0,$(SERVE)),--no-serve)

test: $(STAMP)
	SAELAB_FETCH_DEMO=1 $(BIN)/python -m pytest -m "not slow and not gpu and not peer and not network and not real"

test-slow: $(STAMP)
	SAELAB_FETCH_DEMO=1 $(BIN)/python -m pytest -m "slow"

test-real: $(STAMP)
	$(BIN)/python -m pytest -m "real" -s

test-browser: $(STAMP)
	$(BIN)/python -m pytest -m "browser"

test-peer: $(STAMP) .venv-peer/.installed
	$(BIN)/python -m pytest -m "peer"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks.bench_train

clean:
	rm -rf $(VENV) .venv-peer .pytest_cache .mypy_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-peer/.installed:
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet --constraint constraints.txt torch
	.venv-peer/bin/python -m pip install --quiet 'sae-lens==6.54.*'
	touch $@
