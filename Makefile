.DEFAULT_GOAL := help
PYTHON ?= python

.PHONY: help setup check test test-weights test-slow bench chat

help:  ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup:  ## install the package and the test tools into the current environment
	$(PYTHON) -m pip install '.[test]'

check:  ## lint, formatting, types and layer contracts
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	PYTHONPATH=src lint-imports

test: check  ## everything that must hold on every machine, in minutes on two cores
	$(PYTHON) -m pytest -n 2

test-slow:  ## the long tests as well
	$(PYTHON) -m pytest -n 2 -m 'not gpu'

chat:  ## talk to the default model
	quadriga chat
