# Every target but gpu-report sets up what it needs in .venv. TORCH is the tested version; the package itself accepts a range.
PYTHON ?= python3
TORCH ?= 2.13.0
BIN := .venv/bin
DATA ?=
OUT ?= build/demo
comma := ,

.PHONY: demo test docs sanitize soak bench bench-compare lint gpu-report clean

# The environment and the extension, which compiles against the torch that is there: so torch comes first.
.venv/ready: pyproject.toml setup.py Makefile $(shell find csrc -type f)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/pip install -q torch==$(TORCH) numpy ninja pybind11 "setuptools>=77"
	$(BIN)/pip install -q --no-build-isolation -e .[bench,dev,frameworks] torch==$(TORCH)
	touch $@

# Trains EigenAdam and its peers on digits, and LevenbergMarquardt and its own on an equation: prints tables and writes
# $(OUT)/demo.png. DATA=folder of IDX files uses those.
demo: .venv/ready
	$(BIN)/python -m bench.demo --out $(OUT) $(if $(DATA),--data-dir $(DATA))

# A process a core, whole files to each.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# The documentation site in build/site, of the Markdown pages and the docstrings; fails at a warning, as for a link that leads nowhere.
docs: .venv/ready
	$(BIN)/pip install -q "secondorder[docs]" torch==$(TORCH)
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site

# The operators' tests with the extension built for AddressSanitizer and UBSan, then for ThreadSanitizer, whose memory map
# needs addresses that are not randomised; about 20 minutes. CPU sources alone.
SANITIZED_BUILD = SECONDORDER_CUDA=0 CFLAGS="$(1) -fno-omit-frame-pointer -g1" LDFLAGS="$(1)" \
	$(BIN)/python setup.py -q build --build-base build/$(2) --build-lib build/$(2)/lib
# Not by python -m, which would put the working directory, and so another build, before PYTHONPATH.
SANITIZED_RUN = PYTHONPATH=build/$(1)/lib LD_PRELOAD="$(foreach l,$(2),$(shell gcc -print-file-name=lib$(l).so))" \
	$(BIN)/pytest -s -p no:cacheprovider tests/ops
sanitize: .venv/ready
	$(call SANITIZED_BUILD,-fsanitize=address$(comma)undefined,asan)
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(call SANITIZED_RUN,asan,asan ubsan)
	$(call SANITIZED_BUILD,-fsanitize=thread,tsan)
	TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 setarch -R env $(call SANITIZED_RUN,tsan,tsan)

# 100,000 small steps of each way to step, about 40 minutes: fails where memory grows.
soak: .venv/ready
	$(BIN)/python -m bench.tools.soak

# Microbenchmarks against plain PyTorch, some 12 minutes: prints tables, stores them in $(BENCH_RESULTS), and renders
# docs/performance.md. LARGE=--large: more nets and batches, the ImageNet-10 net among them, and peak memory; 25 minutes, 8 GB.
LARGE ?=
export BENCH_RESULTS ?= bench/results
bench: .venv/ready
	$(BIN)/python -m bench.micro.bias_hessian
	$(BIN)/python -m bench.micro.eacg
	$(BIN)/python -m bench.micro.bfgs
	$(BIN)/python -m bench.micro.jacobian
	$(BIN)/python -m bench.micro.least_squares
	$(BIN)/python -m bench.micro.operators $(LARGE)
	$(BIN)/python -m bench.micro.step $(LARGE)
	$(BIN)/python -m bench.micro.budget $(LARGE)
	$(if $(LARGE),$(BIN)/python -m bench.micro.memory)
	$(if $(filter bench/results,$(BENCH_RESULTS)),$(BIN)/python -m bench.tools.render)

# The same anew, and what got slower against the stored results, by the ratio to plain PyTorch in each run.
bench-compare: .venv/ready
	$(MAKE) bench BENCH_RESULTS=build/bench
	$(BIN)/python -m bench.tools.compare build/bench --old bench/results

lint: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests/helpers/typed_use.py
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests/cuda_on_cpu -regex '.*\.\(cpp\|cuh?\|h\|inc\)')

# On a machine with a GPU, the CUDA toolkit and, in PYTHON's environment, a CUDA build of torch, numpy, ninja, setuptools,
# pytest and hypothesis. Makes no .venv, installs nothing, needs no network; builds in place.
gpu-report:
	$(PYTHON) -m bench.tools.gpu_report --out build/gpu-report

clean:
	rm -rf .venv build *.egg-info secondorder/*.so
