# All that is needed: Python >= 3.10, a C++ compiler and a package index.
#   make test ARGS="-k golden"      make demo PYTHON=python3.12 VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
OUT ?= benchmarks/results

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check
constraints := $(VENV)/adatape-constraints.txt
ready := $(VENV)/.adatape-ready
lint_ready := $(VENV)/.adatape-lint-ready
cpp_files := $(shell find csrc -type f)
cuda_host := build/cuda_host/adatape_cuda_host.so
cuda_host_files := $(wildcard tests/cuda_host/*)

# What emulated threads take too long for, and Triton's interpreter, to which some calls fall back.
not_slow := and not batch and not threads and not scalars and not many_tiles
# A copy of the package whose compiled part is built with a sanitizer, and the ops' tests on it.
# torch itself is not instrumented: its leaks and its pool's synchronisation are not ours to report.
comma := ,
site = build/$(2)/site
kernel_tests := $(addprefix tests/test_,tape_select.py tape_gather.py elastic_attention.py \
  elastic_attention_cuda.py dual_ffn.py)
define sanitized
	PATH="$(abspath $(bin)):$$PATH" cmake -S . -B build/$(2) -G Ninja -DADATAPE_SANITIZE=$(1) \
	  -DPython_EXECUTABLE=$(abspath $(bin))/python
	PATH="$(abspath $(bin)):$$PATH" cmake --build build/$(2) --target all adatape_cuda_host
	rm -rf $(site) && mkdir -p $(site) && cp -r adatape_kernels $(site) && rm -f $(site)/*/_C*
	PATH="$(abspath $(bin)):$$PATH" cmake --install build/$(2) --prefix $(site)
	LD_PRELOAD="$$($(CXX) -print-file-name=lib$(2).so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 \
	  TSAN_OPTIONS="suppressions=tests/tsan.supp ignore_noninstrumented_modules=1" \
	  ADATAPE_CUDA_HOST=build/$(2)/adatape_cuda_host.so \
	  PYTHONPATH=$(site) $(bin)/pytest -q -p no:cacheprovider $(kernel_tests) \
	  -k "not compile and not opcheck and (cpp $(3) or cpu-cuda $(4))" $(ARGS)
endef

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 14

demo: $(ready)  ## train on real digits, compare elastic with padded, write adatape-demo/
	$(bin)/adatape-kernels demo $(ARGS)

test: $(ready) $(cuda_host)  ## run the tests
	$(bin)/pytest -q -n auto $(ARGS)

asan: $(ready)  ## run the C++ and CUDA kernels under AddressSanitizer and UBSan
	$(call sanitized,address$(comma)undefined,asan,,$(not_slow))

tsan: $(ready)  ## run the C++ and CUDA kernels under ThreadSanitizer
	$(call sanitized,thread,tsan,and threads,and matches_the_literal_loop and not any)

nvcc: $(ready)  ## compile the CUDA kernels for GPUs that are not here, and check what comes out
	$(bin)/python -m adatape_kernels.benchmarks.audit.cuda_audit

# Not part of CI, which has no GPU.
memcheck: $(ready)  ## run the CUDA kernels under compute-sanitizer, on a GPU
	for tool in memcheck racecheck initcheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all \
	    $(bin)/pytest -q -n 0 $(kernel_tests) -k "cuda-cuda and matches_the_literal" || exit 1; \
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
	  --results benchmarks/results --readme README.md $(ARGS)

lint: $(lint_ready)  ## check style and types
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/clang-format --dry-run -Werror $(cpp_files) $(filter %.h %.cpp %.cu,$(cuda_host_files))

format: $(lint_ready)  ## apply the style
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(cpp_files) $(filter %.h %.cpp %.cu,$(cuda_host_files))

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

$(lint_ready): $(ready)
	$(pip) install -c $(constraints) clang-format mypy ruff
	touch $@

.PHONY: help demo test asan tsan nvcc memcheck audit bench gpu report lint format clean
