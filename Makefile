# Everything happens in $(VENV), which `make` sets up by itself. `make help` lists what there is.

VENV ?= .venv
PYTHON ?= python3
# The torch to install, and an index to take it from instead of PyPI. The one from PyPI may be a CUDA build of several GB;
# for a CPU only:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

BIN := $(VENV)/bin
# A machine with a GPU may have its own torch, and `make gpu` wants little else: it makes no $(VENV).
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),$(PYTHON))
STAMP := $(VENV)/.installed
# Tests that share something expensive run in one process, and what takes longest is begun first: see tests/conftest.py.
JOBS ?= 2
# A thread for each: more of them wait for one another.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test quick test-stack check bench ingredients peers gpu soak constraints clean distclean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP) ## the main job on a real language model and three domains, in .demo/
	$(BIN)/copal demo

test: $(STAMP) ## the tests but for those of a stack, in two processes or as many as JOBS says: make test JOBS=4
	$(PYTEST)

quick: $(STAMP) ## the tests that need no workspace, registry or server: a minute, for in between
	$(PYTEST) -m quick

check: $(STAMP) ## lint, format, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## what a step costs, as ratios; fails where one is past its limit
	$(BIN)/python tests/bench/cost.py

ingredients: $(STAMP) ## what each ingredient of a step is worth, on six domains
	$(BIN)/python tests/bench/ingredients.py

peers: $(STAMP) ## copal beside llm-compressor's SparseGPT and Wanda, which get a virtual environment of their own
	test -e .bench/peers/.installed || { $(PYTHON) -m venv --clear .bench/peers \
	  && .bench/peers/bin/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)' \
	  && .bench/peers/bin/pip install llmcompressor==0.14.0.1 && touch .bench/peers/.installed; }
	$(BIN)/python tests/bench/peers.py

gpu: ## what needs a GPU, in under ten minutes, into bench/gpu.md (wants torch, transformers, safetensors, accelerate)
	$(GPU_PYTHON) tests/gpu/run.py

test-stack: $(STAMP) ## a whole stack, and a ledger on PostgreSQL (on Debian and Ubuntu: apt-get install postgresql)
	$(PYTEST) -m "team and not soak"

soak: $(STAMP) ## the long tests
	$(BIN)/python -m pytest -m soak

# The line of torch is left out, and so is what only its CUDA builds need: the Makefile and the user choose the build.
constraints: $(STAMP) ## write constraints.txt anew from what is installed
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(PIP) freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==' \
	  | grep -ivE '^(torch|triton|cuda-[a-z-]+|nvidia-[a-z0-9-]+)=='; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

clean: ## remove the demo, what benchmarks run on, caches and build outputs
	rm -rf .bench .demo .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find copal flows tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV)

# torch first, so that the line after it finds the build that was asked for and keeps it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "copal needs Python 3.11 or newer as $(PYTHON); name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(PIP) install --editable '.[dev]' --constraint constraints.txt
	touch $@
