# The few commands a contributor needs. PYTHON names the interpreter whose environment is used.
PYTHON ?= python
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help install test test-all emulate triton sass lint format bench gpu clean

help:      ## list these commands
	@sed -n 's/^\([a-z-]*\): *## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

install:   ## compile and install, against the torch of this environment
	$(PYTHON) -m pip install -v ".[dev]"

test:      ## the test-suite, against the installed package
	$(PYTHON) -P -m pytest -n auto

test-all:  ## the same with the large sweeps and 30 times as many random examples
	FASTCONV_EVERY_SEED=1 $(PYTHON) -P -m pytest -m "" --hypothesis-profile=thorough

emulate:   ## the CUDA kernels on this CPU: instructions, planted faults, every row, all of it under AddressSanitizer
	$(PYTHON) -P -m pytest -m "" tests/test_emulator.py tests/test_emulator_instructions.py
	FASTCONV_EVERY_SEED=1 $(PYTHON) -P -m pytest -m "" -k "emulator or emulated"

triton:    ## the Triton kernels: by the interpreter, and every configuration compiled for sm_80 and sm_90
	$(PYTHON) -P -m pytest -m "" -k triton
	$(PYTHON) benchmarks/triton_resources.py --all

sass:      ## with nvcc, no GPU: each CUDA kernel's registers and spills, and what its machine code holds
	$(PYTHON) benchmarks/kernel_resources.py --compile
	$(PYTHON) benchmarks/kernel_sass.py --compile

lint:      ## ruff and clang-format, changing nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	@clang-format --dry-run -Werror $(CXX_SOURCES)

format:    ## let ruff and clang-format change what lint objects to
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	@clang-format -i $(CXX_SOURCES)

bench:     ## the benchmarks
	$(PYTHON) -P -m pytest benchmarks

gpu:       ## on a machine with a GPU: build, test, sanitize and measure, in slices, into OUT
	PYTHON=$(PYTHON) LIMIT=$(LIMIT) benchmarks/gpu.sh $(or $(OUT),build/gpu) $(SLICES)

clean:     ## remove what builds and tests leave behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks fastconv/_C*.so fastconv/_build_facts.json
	find . -name __pycache__ -prune -exec rm -rf {} +
