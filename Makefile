# Two commands do everything from nothing: `make demo` and `make test`. Each makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
SCALE ?= 0.1
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/otel-odibi
BUILDER := v0.159.0
ODIBI := 3.15.1
ODIBI_PY := $(VENV)-odibi/bin/python
OTELCOL := $(CACHE)/otelcol-$(BUILDER)-$(word 1,$(shell cksum <collector-config/builder.yaml))
# Jaeger 2.13: the last release of which the tag fits the module path.
JAEGER_VERSION := v1.76.0
JAEGER := $(CACHE)/jaeger-$(JAEGER_VERSION)

# What engines would tell their makers about test runs.
export DO_NOT_TRACK := 1

.DEFAULT_GOAL := help
.PHONY: help demo otelcol jaeger test test-odibi test-stack test-faults lint types imports bench report-assets clean

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

# odibi pins what the other tests want newer, so it has an environment of its own.
$(VENV)-odibi/.test: pyproject.toml tests/requirements.txt
	$(PYTHON) -m venv $(VENV)-odibi
	$(ODIBI_PY) -m pip install --quiet --upgrade 'pip>=24'
	$(ODIBI_PY) -m pip install --quiet -c tests/requirements.txt odibi==$(ODIBI) -e '.[cli]' pytest hypothesis
	$(ODIBI_PY) -m pip check
	@touch $@

demo: $(VENV)/.demo  ## Run a real pipeline and see its trace, metrics and logs
	@$(VENV)/bin/otel-odibi demo

# What is built from Go modules lies outside the tree, once, under a name that says what it was built from.
$(OTELCOL):
	@mkdir -p $(CACHE)
	GOBIN=$(CACHE) go install go.opentelemetry.io/collector/cmd/builder@$(BUILDER) >&2
	@work=$$(mktemp -d $(CACHE)/build.XXXXXX) && trap 'rm -rf "$$work"' EXIT && \
		TMPDIR=$$work $(CACHE)/builder --config collector-config/builder.yaml >&2 && mv $$work/*/otelcol-odibi $@

# Built in a copy of its module: what replace directives it has count there alone.
$(JAEGER):
	@mkdir -p $(CACHE)
	@work=$$(mktemp -d $(CACHE)/build.XXXXXX) && trap 'rm -rf "$$work"' EXIT && \
		source=$$(cd $$work && go mod download -json github.com/jaegertracing/jaeger@$(JAEGER_VERSION) | \
			sed -n 's/.*"Dir": "\(.*\)".*/\1/p') && \
		{ test -d "$$source" || { echo "go mod download gave no Jaeger $(JAEGER_VERSION)"; false; } >&2; } && \
		cp -r "$$source" $$work/jaeger && chmod -R u+w $$work/jaeger && \
		cd $$work/jaeger && go build -o ../built ./cmd/jaeger >&2 && mv ../built $@

otelcol: $(OTELCOL)  ## Build the collector of collector-config/, once, and print where it is
	@echo $(OTELCOL)

jaeger: $(JAEGER)  ## Build Jaeger, for the tests, once, and print where it is
	@echo $(JAEGER)

test: $(VENV)/.test  ## Run the tests
	$(PY) -m pytest

test-odibi: $(VENV)-odibi/.test  ## Run the tests with odibi, and some of the others on its pinned versions
	$(ODIBI_PY) -m pytest tests/test_integration_odibi.py 'tests/test_docs.py::test_what_the_page_says_is_what_happens[docs/odibi.md]'
	$(ODIBI_PY) -m pytest tests/test_scope.py tests/test_logs.py tests/test_parquet.py tests/test_telemetry.py

test-stack: $(VENV)/.stack $(OTELCOL) $(JAEGER)  ## Run the tests that need more than Python: Go, Prometheus, Java
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

report-assets:  ## Fetch the JavaScript libraries of the HTML report anew, as pinned; needs npm
	$(PYTHON) docs/report_assets.py

clean:  ## Remove what these commands made
	rm -rf $(VENV) $(VENV)-odibi telemetry .pytest_cache .mypy_cache .ruff_cache .hypothesis
