# Every target sets up what it needs in .venv. TORCH is the tested version; the package itself accepts a range.
PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
DATA ?=
OUT ?= build/demo

.PHONY: demo test bench lint clean

# The environment: torch first, since the extension compiles against the one that is installed.
.venv/installed: pyproject.toml setup.py Makefile csrc/sources.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/pip install -q torch==$(TORCH) numpy ninja pybind11 "setuptools>=77"
	$(BIN)/pip install -q --no-build-isolation -e .[bench,dev]
	touch $@

# The extension, rebuilt where a source has changed.
.venv/compiled: .venv/installed $(shell find csrc -type f)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Trains SGD, Adam and EA-CG on digits: prints a table and writes $(OUT)/demo.png. DATA=folder of IDX files uses those.
demo: .venv/compiled
	$(BIN)/python -m bench.demo --out $(OUT) $(if $(DATA),--data-dir $(DATA))

test: .venv/compiled
	$(BIN)/python -m pytest

# Microbenchmarks against plain PyTorch: prints a table and stores it in bench/results/.
bench: .venv/compiled
	$(BIN)/python -m bench.bench_bias_hessian
	$(BIN)/python -m bench.bench_eacg
	$(BIN)/python -m bench.bench_step

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv build *.egg-info secondorder/*.so
