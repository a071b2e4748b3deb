.DEFAULT_GOAL := help
PYTHON ?= python
JOBS ?= 2
BUILD := build/dev
FAST := tests/model tests/nn tests/quant tests/text tests/ops tests/runners tests/engine/test_scheduler.py tests/engine/test_sampler.py

.PHONY: help setup build bindings fmt check test test-fast test-busy test-slow sanitize mutate bench docs serve chat clean gpu-check

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:  ## install this checkout, editable, with the test tools; compile the kernels into it
	$(PYTHON) -m pip install --quiet -e '.[test]' -C wheel.cmake=false -C editable.mode=inplace
	$(MAKE) build

build:  ## compile the CPU kernels into the source tree; does nothing where they are up to date
	@test -f $(BUILD)/CMakeCache.txt || cmake -S . -B $(BUILD) >/dev/null
	@cmake --build $(BUILD) -j $(JOBS) | grep -vE 'Built target|up to date' || true
	@cmake --build $(BUILD) >/dev/null
	@ln -sf ../../../../$(BUILD)/quadriga_cpu.so src/quadriga/kernels/cpu/quadriga_cpu.so

bindings:  ## write Python's side of the kernels' interface from quadriga.h
	$(PYTHON) tools/bindings.py

fmt:  ## format the code and mend what the linter can mend by itself
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

check:  ## lint, formatting, types, layer contracts, and that bindings are up to date
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	PYTHONPATH=src lint-imports
	$(PYTHON) tools/bindings.py --check

test: check build  ## everything that must hold on every machine, in minutes on two cores
	$(PYTHON) -m pytest -n $(JOBS)

test-fast: build  ## a minute's worth: arithmetic, scheduling, vocabularies, quantisation, kernels; no model is loaded
	$(PYTHON) -m pytest -n $(JOBS) $(FAST)

test-slow: build  ## the long tests as well
	$(PYTHON) -m pytest -n $(JOBS) -m 'not gpu'

test-busy: build  ## the tests on a busy machine: beside two loops that never rest
	@(while :; do :; done) & one=$$!; (while :; do :; done) & two=$$!; \
	  trap "kill $$one $$two" EXIT INT TERM; $(PYTHON) -m pytest -n 2

mutate: build  ## wrong changes that some test must notice, one at a time; ONLY=kernels chooses a room
	$(PYTHON) -m tests.mutants $(ONLY)

gpu-check:  ## the kernels for GPUs without a GPU: interpreted beside the reference, compiled for sm_80, sm_90, sm_100
	$(PYTHON) -m pytest -n $(JOBS) tests/triton
	$(PYTHON) -m quadriga.kernels.triton.check

sanitize:  ## the kernels' tests under the address and undefined-behaviour sanitizers
	cmake -S . -B build/sanitize -DQUADRIGA_SANITIZE=ON && cmake --build build/sanitize -j $(JOBS)
	QUADRIGA_LIBRARY=build/sanitize/quadriga_cpu.so ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  $(PYTHON) -m pytest -m 'not gpu' tests/runners tests/ops

bench: build  ## speed of the model in the package, and of the speed claim at a small size, beside this machine's limits
	$(PYTHON) -m quadriga bench decode --model quadriga-nano
	$(PYTHON) -m quadriga bench prefill --model quadriga-nano

docs:  ## check the documentation: its code runs, its links lead somewhere, its commands exist
	$(PYTHON) -m pytest tests/test_docs.py tests/test_examples.py

serve: build  ## serve the default model and the chat page at http://127.0.0.1:8000
	$(PYTHON) -m quadriga serve

chat: build  ## talk to the default model
	$(PYTHON) -m quadriga chat

clean:  ## remove what was built and cached in this folder
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/quadriga/kernels/cpu/quadriga_cpu.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
