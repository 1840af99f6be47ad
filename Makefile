# All that is needed: Python >= 3.10, a C++ compiler and a package index.
#   make test ARGS="-k golden"      make demo PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
NEWEST_VENV ?= .venv-newest
ARGS ?=
OUT ?= benchmarks/results
SECONDS ?= 60
SANITIZED_SECONDS ?= 20
SEED ?=
BACKENDS ?=
CASE ?=

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
constraints := $(VENV)/adatape-constraints.txt
ready := $(VENV)/.adatape-ready
module_tree = build/cmake-$$($(bin)/python -c 'import sys; print(sys.implementation.cache_tag)')
lint_ready := $(VENV)/.adatape-lint-ready
docs_ready := $(VENV)/.adatape-docs-ready
cpp_files := $(shell find csrc docs/examples -type f)
cuda_host := build/cuda_host/adatape_cuda_host.so
cuda_host_files := $(wildcard tests/cuda_host/*)
tiles_files := $(wildcard tests/tiles/*)

# $(call sanitized,FLAG,NAME,MARKER) builds a copy of the package, with a compiled part for which
# -fsanitize=FLAG was given, into build/NAME, and runs the ops' tests with MARKER, which
# tests/selection.py gives, on it. torch itself is not instrumented:
# its leaks and its pool's synchronisation are not ours to report.
comma := ,
site = build/$(2)/site
define sanitized
	PATH="$(abspath $(bin)):$$PATH" cmake -S . -B build/$(2) -G Ninja -DADATAPE_SANITIZE=$(1) \
	  -DPython_EXECUTABLE=$(abspath $(bin))/python
	PATH="$(abspath $(bin)):$$PATH" cmake --build build/$(2) --target all adatape_cuda_host
	rm -rf $(site) && mkdir -p $(site) && cp -r adatape_kernels $(site) && rm -f $(site)/*/_C*
	PATH="$(abspath $(bin)):$$PATH" cmake --install build/$(2) --prefix $(site)
	$(call under_sanitizer,$(2)) $(bin)/pytest -q --capture=sys -p no:cacheprovider tests/ops -m $(3) $(ARGS)
endef
# $(call under_sanitizer,NAME) is what stands before a command that is to run on that copy. gcc's
# ThreadSanitizer does not start at every random place that Linux may load it to, so addresses are not
# random, where a container allows that. pytest's --capture=sys lets a sanitizer's last words through.
fixed_addresses := $(shell setarch -R true 2>/dev/null && echo setarch -R)
under_sanitizer = LD_PRELOAD="$$($(CXX) -print-file-name=lib$(1).so) \
  $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
  TSAN_OPTIONS="allocator_may_return_null=1 suppressions=$(abspath tests/tsan.supp) ignore_noninstrumented_modules=1" \
  ADATAPE_SANITIZER=$(1) ADATAPE_CUDA_HOST=$(abspath build/$(1))/adatape_cuda_host.so \
  PYTHONPATH=$(abspath build/$(1)/site) $(fixed_addresses)

# $(call run_fuzzer,SECONDS,BACKENDS), or with CASE that case again. It runs in tests/, so that Python
# does not find the package of the working tree first.
run_fuzzer = $(abspath $(bin))/python -m fuzz $(if $(CASE),--case '$(CASE)',--seconds $(1) \
  $(if $(SEED),--seed $(SEED)) $(if $(2),--backends $(2)))

newest := $(abspath $(NEWEST_VENV))/bin
newest_constraints := $(NEWEST_VENV)/adatape-constraints.txt
# What a new torch is most likely to break: not what we refuse, nor the choice of instructions, which
# are ours alone. Without Triton, whose interpreter takes four times as
# long as all the rest; then whole models, by Triton's kernels too, against the public code's values.
# Of each test's cases three for each dtype, op and backend (tests/case_sample.py): a new torch breaks
# the way of a call, and `make test` computes the numbers of every size.
sample := --cases-of-a-kind 3 tests/ops tests/layers tests/models tests/build/test_build.py::test_facts_of_the_compiled_part \
  --ignore=tests/ops/test_instruction_sets.py --ignore-glob='*_refusals.py' \
  tests/recipes/test_export_onnx.py
golden := tests/test_scenic.py
OLDEST_TORCH := 2.11.0
oldest_headers := build/oldest/torch/include

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 14

venv: $(lint_ready)  ## make the environment that the other targets use, with the package built in place

demo: $(ready)  ## train on real digits, compare elastic with padded, write adatape-demo/
	$(bin)/adatape-kernels demo $(ARGS)

imagenet: $(ready)  ## train the true S/16 for two steps, on a drawn miniature of ImageNet
	rm -rf build/imagenet && $(bin)/python -m adatape_kernels.data.imagenet_miniature build/imagenet/images
	$(bin)/adatape-kernels train --config imagenet-s16.yaml --data-dir build/imagenet/images \
	  --epochs 1 --batch 12 --workers 1 --out build/imagenet/run $(ARGS)

test: $(ready) $(cuda_host) tiles  ## run the tests
	$(bin)/pytest -q -n auto --dist worksteal $(ARGS)

# The tree in which pip built the module has the kernels' objects already.
serve: $(ready)  ## compile a small model by AOTInductor, and run it from C++
	tree=$(module_tree) && \
	  PATH="$(abspath $(bin)):$$PATH" cmake --build $$tree --target adatape_serve && \
	  ADATAPE_SERVE="$(CURDIR)/$$tree/adatape_serve" \
	  $(bin)/pytest -q -n 0 tests/recipes/test_export_compiled.py $(ARGS)

fuzz: $(ready) $(cuda_host)  ## run random calls, models and files for SECONDS=60, from SEED=
	cd tests && $(call run_fuzzer,$(SECONDS),$(BACKENDS))

asan: $(ready)  ## run the C++ and CUDA kernels under AddressSanitizer and UBSan
	$(call sanitized,address$(comma)undefined,asan,sanitize)
	PATH="$(abspath $(bin)):$$PATH" cmake --build build/asan --target adatape_emulated_tiles
	ADATAPE_EMULATED_TILES=$(abspath build/asan)/adatape_emulated_tiles.so $(call under_sanitizer,asan) \
	  $(bin)/pytest -q --capture=sys -p no:cacheprovider -p no:faulthandler -m sanitize \
	  tests/ops/test_attention_bfloat16_lengths.py tests/ops/test_elastic_attention_tiles.py
	cd tests && $(call under_sanitizer,asan) $(call run_fuzzer,$(SANITIZED_SECONDS),cpp$(comma)cuda)

tsan: $(ready)  ## run the C++ and CUDA kernels under ThreadSanitizer
	$(call sanitized,thread,tsan,sanitize_threads)

nvcc: $(ready)  ## compile the CUDA kernels for GPUs that are not here, and check what comes out
	$(bin)/python -m adatape_kernels.benchmarks.audit.cuda_audit

# timm, torchvision and ONNX are here alone: torchvision's wheels do not fit every build of torch.
# The package is installed as a user gets it, from a source distribution, and its tests are copied:
# the working tree holds a module for another torch. pip's cache would keep the first build for ever.
newest:  ## build for the newest torch with CUDA, in an environment of its own; run a sample of the tests
	test -x $(newest)/python || $(PYTHON) -m venv $(NEWEST_VENV)
	sed '/^torch==/d; /^triton==/d' .ci/constraints.txt > $(newest_constraints)
	$(newest)/python -m pip install -c $(newest_constraints) --upgrade \
	  torch torchvision timm setuptools pybind11 cmake ninja
	rm -rf build/newest && mkdir -p build/newest && cp -r tests pyproject.toml build/newest
	$(newest)/python setup.py --quiet sdist --dist-dir build/newest
	ADATAPE_BUILD=require ADATAPE_CUDA=require $(newest)/python -m pip install \
	  -c $(newest_constraints) --no-build-isolation --no-cache-dir \
	  "$$(echo build/newest/*.tar.gz)[test,pretrained,export]"
	$(newest)/adatape-kernels info
	$(newest)/adatape-kernels check --device cpu
	cd build/newest && TRITON_INTERPRET=0 $(newest)/pytest -q -n auto $(sample)
	cd build/newest && $(newest)/pytest -q -n auto $(golden)

# Of that torch only the headers are taken, which is all that a compiler needs to say what they lack.
# The CUDA files are read as tests/cuda_host compiles them.
oldest: $(ready) $(oldest_headers)  ## read csrc beside the headers of the oldest torch that it supports
	for file in $(filter-out csrc/cpu/choose_kernels.cpp,$(wildcard csrc/cpu/*.cpp csrc/cuda/*.cu)); do \
	  $(CXX) -fsyntax-only -std=c++20 -Wall -Wextra -Werror -Wno-unknown-pragmas -fvisibility=hidden \
	    $$(case $$file in *.cu) echo -DADATAPE_CUDA_HOST -Itests/cuda_host -include cuda_host.h -xc++;; esac) \
	    $(shell sed -n 's/^set(stable_abi \(.*\))/-D\1/p' CMakeLists.txt) \
	    -isystem $(oldest_headers) $$file || exit 1; \
	done

$(oldest_headers):
	$(pip) download --no-deps --dest build/oldest torch==$(OLDEST_TORCH)
	$(bin)/python -c "import glob, zipfile; wheel = zipfile.ZipFile(*glob.glob('build/oldest/*.whl')); \
	  wheel.extractall('build/oldest', [n for n in wheel.namelist() if n.startswith('torch/include/')])"
	rm build/oldest/*.whl

# Not part of CI, which has no GPU.
memcheck: $(ready)  ## run the CUDA kernels under compute-sanitizer, on a GPU
	for tool in memcheck racecheck initcheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	    $(bin)/pytest -q -n 0 tests/ops -m "cuda and sanitize_threads" || exit 1; \
	done

audit: $(ready)  ## compile the kernels for GPUs that are not here and look at what comes out; run nothing
	$(bin)/python -m adatape_kernels.benchmarks.audit.triton_audit $(ARGS)

bench: $(ready)  ## measure every op and the models beside their peers, on this machine
	$(bin)/adatape-kernels bench --out $(OUT) $(ARGS)

# Takes $(PYTHON) as it is, so that nothing has to be installed where the GPU is.
gpu:  ## on a machine with a GPU: build in place, test and measure within 8 minutes, into OUT=
	$(PYTHON) -m adatape_kernels.benchmarks.gpu --out $(OUT) $(ARGS)

report: $(ready)  ## make plots and tables from the recorded rows, README's too
	$(bin)/python -m adatape_kernels.benchmarks.reports.result_tables \
	  --results benchmarks/results --readme README.md --readme docs/guides/halting.md \
	  --readme docs/guides/read-the-benchmarks.md $(ARGS)
	$(bin)/python -m adatape_kernels.benchmarks.reports.gpu_performance docs/gpu-performance.md

lint: $(lint_ready)  ## check style
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/clang-format --dry-run -Werror $(filter-out %.cmake,$(cpp_files)) $(filter %.h %.cpp %.cu,$(cuda_host_files) $(tiles_files))

types: $(lint_ready)  ## check types
	$(bin)/mypy

format: $(lint_ready)  ## apply the style
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(filter-out %.cmake,$(cpp_files)) $(filter %.h %.cpp %.cu,$(cuda_host_files) $(tiles_files))

docs: $(docs_ready)  ## build the pages and the reference as a site, into build/site
	$(bin)/python -m sphinx -W --keep-going -q docs build/site

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

# The CUDA kernels as C++ on the host, with which the tests run them.
$(cuda_host): $(ready) $(cuda_host_files)
	PATH="$(abspath $(bin)):$$PATH" cmake -S . -B $(@D) -G Ninja \
	  -DPython_EXECUTABLE=$(abspath $(bin))/python
	PATH="$(abspath $(bin)):$$PATH" cmake --build $(@D) --target $(basename $(@F))
	touch $@

# Attention's kernels for AMX with what runs them on a processor without it, out of the objects of the
# tree in which pip built the module.
tiles: $(ready)
	PATH="$(abspath $(bin)):$$PATH" cmake --build $(module_tree) --target adatape_emulated_tiles

$(lint_ready): $(ready)
	$(pip) install -c $(constraints) clang-format mypy ruff
	touch $@

$(docs_ready): $(ready)
	$(pip) install -c $(constraints) furo myst-parser sphinx
	touch $@

.PHONY: help venv demo imagenet test tiles serve fuzz asan tsan nvcc newest oldest memcheck audit bench gpu report lint types format docs clean
