# Every target sets up what it needs in .venv. TORCH is the tested version; the package itself accepts a range.
PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
DATA ?=
OUT ?= build/demo

.PHONY: demo test bench lint gpu-report clean

# The environment and the extension, which compiles against the torch that is there: so torch comes first.
.venv/ready: pyproject.toml setup.py Makefile $(shell find csrc -type f)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/pip install -q torch==$(TORCH) numpy ninja pybind11 "setuptools>=77"
	$(BIN)/pip install -q --no-build-isolation -e .[bench,dev]
	touch $@

# Trains SGD, Adam and EA-CG on digits: prints a table and writes $(OUT)/demo.png. DATA=folder of IDX files uses those.
demo: .venv/ready
	$(BIN)/python -m bench.demo --out $(OUT) $(if $(DATA),--data-dir $(DATA))

test: .venv/ready
	$(BIN)/python -m pytest

# Microbenchmarks against plain PyTorch: prints a table and stores it in bench/results/.
bench: .venv/ready
	$(BIN)/python -m bench.bench_bias_hessian
	$(BIN)/python -m bench.bench_eacg
	$(BIN)/python -m bench.bench_step
	$(BIN)/python -m bench.bench_bfgs

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Needs a GPU, the CUDA toolkit and a CUDA build of torch (TORCH=).
gpu-report: .venv/ready
	$(BIN)/python -m bench.gpu_report --out build/gpu-report

clean:
	rm -rf .venv build *.egg-info secondorder/*.so
