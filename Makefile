# Each target but test-gpu creates and uses .venv; nothing else needs to be installed.   make demo | make test | make check | make bench
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SERVE  ?= 1
PORT   ?= 8501
# Without a GPU pip must be told which torch to take, or it fetches gigabytes of CUDA; constraints.txt does that.
STAMP  := $(VENV)/.installed

# Tests run in JOBS processes of one thread each; those in a browser, which look at times, alone.
JOBS   ?= 2
SHARED  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile
QUICK   = not slow and not long and not gpu and not fused and not peer and not network and not real

# Triton decides at its import whether kernels are interpreted, so these tests have processes of their own.
INTERPRETED_TESTS = TRITON_INTERPRET=1 $(SHARED) -m "fused and not gpu and not slow and not long" tests/kernels

.PHONY: demo test test-kernels test-gpu test-slow test-long test-real test-browser test-peer check bench bench-peers clean

demo: $(STAMP)
	$(BIN)/saelab demo --out runs/demo --port $(PORT) $(if $(filter 0,$(SERVE)),--no-serve)

test: $(STAMP)
	SAELAB_FETCH_DEMO=1 $(SHARED) -m "$(QUICK) and not browser"
	SAELAB_FETCH_DEMO=1 $(BIN)/python -m pytest -m "$(QUICK) and browser"
	$(INTERPRETED_TESTS)

# Triton kernels without a GPU: run by the interpreter, and compiled for two GPUs
test-kernels: $(STAMP)
	$(INTERPRETED_TESTS)
	$(BIN)/python -m pytest tests/kernels/test_kernels_compile.py

# for a machine with a GPU, where torch, triton, numpy and pytest are enough: hence no .venv and none of its plugins
test-gpu:
	$(PYTHON) -m pytest -o addopts="--strict-markers -ra" -m "gpu or fused" tests/kernels

test-slow: $(STAMP)
	SAELAB_FETCH_DEMO=1 $(SHARED) -m "slow and not gpu and not fused"

test-long: $(STAMP)
	SAELAB_FETCH_DEMO=1 $(BIN)/python -m pytest -m "long and not gpu"

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
	$(BIN)/python -m benchmarks all --device cpu

bench-peers: .venv-peer/.installed

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
	.venv-peer/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers/requirements.txt
	touch $@
