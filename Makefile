# `make help` lists the targets. Everything runs from .venv, which the first of them sets up.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.moesaic-installed
EXTRAS := train,datasets,dev,release

NPROC  ?= 4
LAYOUT ?= --tp 2 --ep 2 --etp 2
ARGS   ?=

# Every process of a launch would otherwise start a thread per core and they would fight for the cores.
CORES   := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
THREADS := $(shell t=$$(( $(CORES) / $(NPROC) )); [ $$t -ge 1 ] && echo $$t || echo 1)

# Tests and ranks are many processes that import the same modules. Each would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

# Where there is a compiler, an install without the CPU kernels is a mistake.
KERNELS := $(if $(and $(shell command -v c++),$(shell command -v cmake)),MOESAIC_REQUIRE_CPU_KERNELS=1)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test test-slow test-isa test-long test-torch test-references test-torchtitan lint format docs wheel bench bench-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# The stamp is written last: an interrupted or failed install leaves none, so the next call repairs it.
# The build back end is installed first and used without isolation, so that its version is pinned as well.
$(STAMP): pyproject.toml constraints.txt tests/torchtitan/package.txt $(wildcard csrc/*.cpp csrc/*.hpp csrc/*.h csrc/CMakeLists.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt scikit-build-core setuptools-scm
	$(KERNELS) $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip check
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --upgrade --target $(VENV)/torchtitan -r tests/torchtitan/package.txt
	@touch $@

setup: $(STAMP) ## create or refresh .venv from pyproject.toml and constraints.txt

train: export OMP_NUM_THREADS ?= $(THREADS)
train: $(STAMP) ## train on NPROC=4 processes; options: LAYOUT='--tp 2 --ep 2 --etp 2' ARGS='--help'
	@$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) -m moesaic train $(LAYOUT) $(ARGS)

# Each worker runs whole files, with one thread: many tests start processes of their own.
WORKERS := $(shell [ $(CORES) -gt 4 ] && echo 4 || echo $(CORES))
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP) ## run the tests; options: ARGS='tests/ops -k permute'
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: export OMP_NUM_THREADS ?= 1
test-slow: $(STAMP) ## run what is too much for `make test`: proofs, transforms, families on ranks, programs of the docs, Triton's interpreter
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "slow and not long" $(ARGS)

# Tests that run the kernels run them on every instruction set; these are the others, which get the default.
OPERATORS := $(addprefix tests/,$(addsuffix .py,ops/test_experts_mlp ops/test_grouped_mm ops/test_accumulate_weight_grad layers/test_moe))
test-isa: export OMP_NUM_THREADS ?= 1
test-isa: $(STAMP) ## run tests of the operators on each instruction set that `make test` does not choose; sanitizers; a sample of kernels for GPUs
	@set -e; for isa in $$($(BIN)/python -m tests.ops.cpu_isa); do \
	  echo "MOESAIC_CPU_ISA=$$isa"; \
	  MOESAIC_CPU_ISA=$$isa $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(OPERATORS); \
	done
	$(BIN)/python -m pytest -q -m long tests/ops/test_cpu_sanitized.py tests/ops/test_triton_compiled.py -k "sanitized or sample"

test-long: $(STAMP) ## what takes too long for CI; docs/testing.md has its last results
	@set -e; step() { echo "== $$*"; start=$$(date +%s); "$$@"; echo "== $$*: ok, $$(($$(date +%s) - start)) s"; }; \
	step $(BIN)/python -m pytest -m long; \
	step $(BIN)/python -m tests.faults; \
	step env HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest --timeout 3600 tests/ops tests/layers; \
	step $(MAKE) test-torch TORCH=2.11.0; \
	step $(MAKE) test-torch TORCH=2.15.0

# The pins of constraints.txt go with the pinned torch, and what another torch warns of is its own affair.
TORCH ?= 2.15.0
OTHER := .venv-torch-$(TORCH)
test-torch: ## run the tests that depend on torch's version with TORCH=2.15.0 (a download of gigabytes)
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --disable-pip-version-check 'torch==$(TORCH)' -e '.[test]'
	@$(OTHER)/bin/python -c 'import torch; print("torch", torch.__version__)'
	$(OTHER)/bin/python -m pytest -W default -m "not long" $(or $(ARGS),tests/ops tests/sharding)

REFERENCES := .venv-references
test-references: ## compare with Megatron-Core and torchtitan, in a venv of their own
	test -x $(REFERENCES)/bin/python || $(PYTHON) -m venv $(REFERENCES)
	$(REFERENCES)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(REFERENCES)/bin/python -m pip install --disable-pip-version-check --no-deps -r tests/references/megatron.txt -r tests/torchtitan/package.txt
	$(REFERENCES)/bin/python -m pytest $(or $(ARGS),tests/references)

TORCHTITAN := .venv-torchtitan
test-torchtitan: ## compare with stock torchtitan in its Trainer, in a venv of its own with TORCH=2.15.0 (gigabytes)
	test -x $(TORCHTITAN)/bin/python || $(PYTHON) -m venv $(TORCHTITAN)
	$(TORCHTITAN)/bin/python -m pip install --disable-pip-version-check 'torch==$(TORCH)' -r tests/torchtitan/package.txt -e '.[test,torchtitan]'
	$(TORCHTITAN)/bin/python -m pytest -W default $(or $(ARGS),tests/torchtitan)

lint: $(STAMP) ## style, format, types and import contracts; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## fix what can be fixed by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP) ## build the site in build/site; it runs the notebook, and a warning is an error
	$(BIN)/python -m sphinx -q -n -W --keep-going -b html docs build/site
	@echo "build/site/index.html"

# The names of files have the version, which is that of the newest tag.
wheel: $(STAMP) ## build the sdist and a wheel for manylinux in dist/, and check both
	rm -rf dist build/wheel
	MOESAIC_REQUIRE_CPU_KERNELS=1 $(BIN)/python -m build --no-isolation --sdist -o dist .
	mkdir -p build/wheel && tar -xzf dist/moesaic-*.tar.gz --strip-components 1 -C build/wheel
	MOESAIC_REQUIRE_CPU_KERNELS=1 $(BIN)/python -m build --no-isolation --wheel -o build/wheel/dist build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/dist/*.whl
	$(BIN)/twine check --strict dist/*

bench: $(STAMP) ## run every benchmark; each prints one table
	@set -e; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS); done

bench-gpu: $(STAMP) ## measure on a GPU; ARGS='--dry-run' where there is none
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean: ## delete .venv and every cache; runs/ stays
	rm -rf csrc/CMake[CFI]* csrc/cmake_install.cmake csrc/build.ninja csrc/.[a-z]* src/moesaic/ops/*.so
	rm -rf $(VENV) .venv-torch-* $(REFERENCES) $(TORCHTITAN) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
