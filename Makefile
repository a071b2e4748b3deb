.DEFAULT_GOAL := help
PYTHON ?= python

.PHONY: help setup build check test test-weights test-slow test-busy mutate sanitize bench chat

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:  ## install the package and the test tools into the current environment
	$(PYTHON) -m pip install '.[test]'

build:  ## compile the CPU kernels into the source tree, for work on a checkout
	cmake -S . -B build/dev && cmake --build build/dev -j
	ln -sf ../../../build/dev/quadriga_cpu.so src/quadriga/ops/quadriga_cpu.so

check:  ## lint, formatting, types and layer contracts
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	PYTHONPATH=src lint-imports

test: check  ## everything that must hold on every machine, in minutes on two cores
	$(PYTHON) -m pytest -n 2

test-slow:  ## the long tests as well
	$(PYTHON) -m pytest -n 2 -m 'not gpu'

test-busy:  ## the tests on a busy machine: beside two loops that never rest
	@(while :; do :; done) & one=$$!; (while :; do :; done) & two=$$!; \
	  trap "kill $$one $$two" EXIT INT TERM; $(PYTHON) -m pytest -n 2

mutate:  ## wrong changes that some test must notice, one at a time; ONLY=kernels chooses a room
	$(PYTHON) -m tests.mutants $(ONLY)

sanitize:  ## the kernels' tests under the address and undefined-behaviour sanitizers
	cmake -S . -B build/sanitize -DQUADRIGA_SANITIZE=ON && cmake --build build/sanitize -j
	QUADRIGA_LIBRARY=build/sanitize/quadriga_cpu.so ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(PYTHON) -m pytest -m 'not gpu' tests/model/test_compiled.py tests/ops

chat:  ## talk to the default model
	quadriga chat
