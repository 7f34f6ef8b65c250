# Every target sets up what it needs: .venv, torch, the C++ extension, the package. Python >= 3.10 and a C++ compiler suffice.
#   PYTHON=python3.12      the interpreter that makes .venv (first call only)
#   DGATE_RT_BUILD_CUDA=1  auto (default), 0 or 1: see setup.py; `make extension` builds again with it

PYTHON ?= python3
BIN := .venv/bin
CPP := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
CPP_TESTS := $(wildcard tests/simt/*.cpp tests/simt/*.h)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test gpu lint format bench extension clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: .venv/.installed ## .venv with torch, the extension and the package (editable)
	@$(MAKE) --silent .venv/.extension

demo: install ## train, gate, calibrate and run on real images; writes demo/report.html
	$(BIN)/dgate demo

test: install ## the tests
	$(BIN)/pytest

gpu: install ## on a machine with a GPU: the tests that need one, the sanitizers, the times of gates and executors
	DGATE_RT_BUILD_CUDA=1 $(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/pytest -m gpu
	$(BIN)/python -m dgate_rt.bench.gates
	$(BIN)/python -m dgate_rt.bench.gpu_acceptance --no-tests --batch-sizes 1 32 128 512 --mixes 2 5

bench: install ## the benchmarks
	$(BIN)/pytest bench

lint: install ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP) $(CPP_TESTS))

format: install ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(if $(CPP),$(BIN)/clang-format -i $(CPP) $(CPP_TESTS))

extension: .venv/.installed ## build the C++ again where sources or DGATE_RT_BUILD_CUDA changed
	$(BIN)/python setup.py -q build_ext --inplace
	@touch .venv/.extension

clean: ## remove what was built, but for .venv
	rm -rf build dist *.egg-info dgate_rt/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -f .venv/.extension

distclean: clean ## remove .venv too
	rm -rf .venv

# pip is the last thing that venv puts there, so a half-made .venv is made again.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; dgate-rt needs Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and "error: dgate-rt needs Python 3.10 or newer, but $(PYTHON) is " + v + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# torch first: the extension is built against the torch that is installed, not against one of its own.
.venv/.installed: pyproject.toml setup.py constraints.txt | $(BIN)/pip
	$(PIP_INSTALL) setuptools ninja numpy torch
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@ .venv/.extension

# The installation above has built the extension; this builds again what changed since. `install` asks for it in a make of its
# own, because one make would not see that the first rule made both.
.venv/.extension: $(CPP)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
