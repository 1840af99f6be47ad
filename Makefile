# All that is needed: Python >= 3.10, a C++ compiler and a package index.
#   make test ARGS="-k golden"      make demo PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
constraints := $(VENV)/adatape-constraints.txt
ready := $(VENV)/.adatape-ready
lint_ready := $(VENV)/.adatape-lint-ready
cpp_files := $(shell find csrc -type f)

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 14

demo: $(ready)  ## train on real digits, compare elastic with padded, write adatape-demo/
	$(bin)/adatape-kernels demo $(ARGS)

test: $(ready)  ## run the tests
	$(bin)/pytest -q $(ARGS)

lint: $(lint_ready)  ## check style and types
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(cpp_files)

format: $(lint_ready)  ## apply the style
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(cpp_files)

clean:  ## remove what was built; the environment stays
	rm -rf build dist *.egg-info adatape_kernels/*.so adatape_kernels/_build_note.txt $(ready)

# The constraints are CI's, save for a torch that the environment already has: that one stays, and
# with it the triton that it came with.
$(ready): pyproject.toml setup.py CMakeLists.txt .ci/constraints.txt $(cpp_files)
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	if torch=$$($(bin)/python -c 'import torch; print(torch.__version__)' 2>/dev/null); then \
	  { sed '/^torch==/d; /^triton==/d' .ci/constraints.txt; echo "torch==$$torch"; }; \
	else cat .ci/constraints.txt; fi > $(constraints)
	$(pip) install -c $(constraints) torch setuptools pybind11 cmake ninja
	$(pip) install --no-build-isolation -c $(constraints) -e '.[test]'
	@if [ -f adatape_kernels/_build_note.txt ]; then \
	  echo "Installed as plain Python: $$(cat adatape_kernels/_build_note.txt)"; fi
	touch $@

$(lint_ready): $(ready)
	$(pip) install -c $(constraints) clang-format mypy ruff
	touch $@

.PHONY: help demo test lint format clean
