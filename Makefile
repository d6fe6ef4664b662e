# Two commands do everything from nothing: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
SCALE ?= 0.1

.DEFAULT_GOAL := help
.PHONY: help demo test test-stack test-faults lint types imports bench clean

help:  ## Show what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "otel_odibi needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=24'

$(VENV)/.demo: pyproject.toml tests/constraints.txt | $(VENV)/bin/python
	$(PIP) install -c tests/constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml tests/constraints.txt tests/requirements.txt | $(VENV)/bin/python
	$(PIP) install -c tests/constraints.txt -e '.[demo,otlp,query]' -r tests/requirements.txt
	@touch $@

$(VENV)/.stack: $(VENV)/.test tests/requirements-stack.txt
	$(PIP) install -c tests/constraints.txt -r tests/requirements-stack.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.test benchmarks/requirements.txt
	$(PIP) install -r benchmarks/requirements.txt
	@touch $@

demo: $(VENV)/.demo  ## Run a real pipeline and see its trace, metrics and logs
	@$(VENV)/bin/otel-odibi demo

test: $(VENV)/.test  ## Run the tests
	$(PY) -m pytest

test-stack: $(VENV)/.stack  ## Run the tests that need more than Python: promtool, an S3 server, Java
	$(PY) -m pytest -m stack

test-faults: $(VENV)/.test  ## Run the stress and fault tests; SCALE=1 for the full counts
	ODIBI_TEST_SCALE=$(SCALE) $(PY) -m pytest -m faults

lint: $(VENV)/.test  ## Check style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test  ## Check types
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy tests/typing_api.py

imports: $(VENV)/.test  ## Check that imports run downward only
	$(VENV)/bin/lint-imports

bench: $(VENV)/.bench  ## Measure the budgets, as ratios against rivals in the same run
	$(PY) -m benchmarks

clean:  ## Remove what these commands made
	rm -rf $(VENV) telemetry .pytest_cache .mypy_cache .ruff_cache .hypothesis
