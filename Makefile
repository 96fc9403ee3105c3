# The few commands a contributor needs. PYTHON names the interpreter whose environment is used.
PYTHON ?= python
CXX_SOURCES = $(shell find csrc -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help install test test-all lint format bench clean

help:      ## list these commands
	@sed -n 's/^\([a-z-]*\): *## /  make \1|/p' $(MAKEFILE_LIST) | column -t -s '|'

install:   ## compile and install, against the torch of this environment
	$(PYTHON) -m pip install -v ".[dev]"

test:      ## the test-suite, against the installed package
	$(PYTHON) -P -m pytest

test-all:  ## the same with the large sweeps and 30 times as many random examples
	$(PYTHON) -P -m pytest -m "" --hypothesis-profile=thorough

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

clean:     ## remove what builds and tests leave behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks fastconv/_C*.so fastconv/_build_facts.json
	find . -name __pycache__ -prune -exec rm -rf {} +
