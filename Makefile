# `make demo` and `make test` need Python 3.10+ and nothing else. TORCH=system uses the torch that is installed.
PYTHON ?= python3
TORCH ?= pinned
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
BIN := $(VENV)/bin
# One process a core with one thread each: most of the time goes to Triton's interpreter, in Python.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
export HF_HUB_DISABLE_TELEMETRY := 1

ifeq ($(TORCH),system)
VENV_FLAGS := --system-site-packages
PINS := grep -v '^torch=='
else
PINS := cat
endif

.PHONY: demo test test-full test-tl4 lint bench clean

demo: $(VENV)/.train-$(TORCH)
	$(BIN)/fastsae demo

test: $(VENV)/.test-$(TORCH) lint
	$(PYTEST) -m "not slow"

test-full: $(VENV)/.test-$(TORCH) lint
	$(PYTEST)

# TransformerLens 4, which sae-lens does not install beside: an environment of its own.
test-tl4: .venv-tl4/.ready
	HF_HUB_OFFLINE=1 .venv-tl4/bin/python -m pytest tests/test_hosts.py tests/test_analysis.py tests/test_transformer_lens.py

.venv-tl4/.ready: pyproject.toml constraints.txt requirements-demo.txt
	$(PYTHON) -m venv --clear .venv-tl4
	grep -v '^transformer-lens==' constraints.txt > .venv-tl4/constraints.txt
	.venv-tl4/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-tl4/constraints.txt torch
	.venv-tl4/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-tl4/constraints.txt -e ".[train,test]" "transformer-lens>=4"
	.venv-tl4/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	touch $@

lint: $(VENV)/.test-$(TORCH)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.test-$(TORCH)
	HF_HUB_OFFLINE=1 $(BIN)/fastsae bench

$(VENV)/.base-$(TORCH): pyproject.toml constraints.txt requirements-demo.txt requirements-peers.txt
	$(PYTHON) -m venv --clear $(VENV_FLAGS) $(VENV)
	$(PINS) constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt torch
	touch $@

$(VENV)/.train-$(TORCH): $(VENV)/.base-$(TORCH)
	$(PIP) -c $(VENV)/constraints.txt -e ".[train]"
	$(PIP) --no-deps -r requirements-demo.txt
	touch $@

$(VENV)/.test-$(TORCH): $(VENV)/.train-$(TORCH)
	$(PIP) -c $(VENV)/constraints.txt -e ".[train,peers,test,dev]"
	$(PIP) --no-deps -r requirements-peers.txt
	$(PIP) --no-deps --target $(VENV)/triton-3.6.0 triton==3.6.0  # kernels are compiled with it too
	touch $@

clean:
	rm -rf $(VENV) .venv-tl4
