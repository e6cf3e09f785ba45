# make demo    set up .venv, run Knowledge Recycling on scikit-learn's digits, show where the report lies
# make test    set up .venv, build, lint, run every test
# make nightly compile every GPU kernel for the generations besides Hopper
# make check   lint, and what a change breaks most often: the layers, the documents, one case of each test of an op
# make format  let ruff and clang-format rewrite the sources; make hooks: git does so before each commit
# make bench   measure what `kr-fast bench` measures
# make docs    build/site: the documentation as a site, without a warning
# make wheel   dist/: the sdist, and the wheel for other machines of this Python, see docs/start/install.md
# make sanitize  the C++ kernels with address and undefined-behaviour sanitizers through their tests
# make avx512    the AVX-512 forms of the C++ kernels through their tests, on a processor that has AVX2 alone
#
# COVERAGE=1            with test: which lines of kr_fast/ ran, refused below a floor
# PYTHON=python3.12     interpreter that .venv is made with
# SYSTEM_SITE=1         let .venv see the packages (a torch, say) that are already installed for PYTHON
# SANITIZE=tests/ops    with sanitize: the tests that are run
PYTHON ?= python3
SYSTEM_SITE ?= 0
COVERAGE ?= 0
FLOOR := 92
SANITIZE ?= tests/ops
VENV := .venv
BIN := $(VENV)/bin
# Of ten thousand files a tenth is ever imported: Python compiles each of those when it first is.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
CPP := $(shell find csrc tests/support/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := setup.py pyproject.toml $(filter csrc/%,$(CPP))
VENV_FLAGS := $(if $(filter 1,$(SYSTEM_SITE)),--system-site-packages,)

.PHONY: demo test nightly check venv lint format hooks bench docs wheel sanitize avx512 clean
demo: $(VENV)/built
	$(BIN)/kr-fast run --preset digits --out runs/digits

docs: $(VENV)/built
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# A thread that waits sleeps: two test processes share the processors. Triton's interpreter needs one of its own.
# Each takes half of the tests in their order, so that neighbours share what they build, and what the other leaves.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist worksteal
COVERED := $(if $(filter 1,$(COVERAGE)),--cov --cov-report= --cov-append,)
# Some hundred processes import the package and the tests: they are compiled once, whatever the environment asks for.
export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/built $(if $(COVERED),$(VENV)/dev) lint
	$(if $(COVERED),$(BIN)/coverage erase)
	$(PYTEST) $(COVERED) -m "not interpreter and not nightly"
	TRITON_INTERPRET=1 $(PYTEST) $(COVERED) -m interpreter
	$(if $(COVERED),grep -rn '# needs a GPU' kr_fast; $(BIN)/coverage report --skip-covered --fail-under=$(FLOOR))

nightly: $(VENV)/built
	$(PYTEST) -m nightly

check: $(VENV)/built lint
	$(PYTEST) -m "not interpreter and not pipeline and not packaging and not compile" --one-case \
		tests/test_layers.py tests/test_docs.py tests/backends/test_registry.py tests/backends/test_codes.py \
		tests/ops tests/cli/test_parsing.py tests/data tests/models

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/typos
	$(BIN)/mypy

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

hooks: $(VENV)/dev
	$(BIN)/pre-commit install

bench: $(VENV)/built
	$(BIN)/kr-fast bench all

# The wheel is built from the sdist. libgomp is torch's: two OpenMP runtimes would contend for the processors.
wheel: $(VENV)/dev
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel .
	mkdir dist && mv build/wheel/*.tar.gz dist/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/*.whl
	$(BIN)/twine check --strict dist/*
	ls -l dist

# Python itself is not built with sanitizers, so their libraries are loaded first; what it leaves allocated is no fault.
SANITIZED := $(CURDIR)/build/sanitized
PRELOAD = $(foreach name,libasan.so libubsan.so libstdc++.so.6,$(shell g++ -print-file-name=$(name)))
sanitize: $(VENV)/built
	KR_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitizing --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		$(BIN)/pytest -q -p no:cacheprovider -m "not interpreter and not compile and not gpu" $(SANITIZE)

EMULATED := $(CURDIR)/build/emulated
avx512: $(VENV)/built
	CXXFLAGS="-O2 -Wno-psabi -DKR_EMULATE_AVX512" KR_FAST_CUDA=0 $(BIN)/python setup.py -q \
		build --build-base build/emulating --build-lib $(EMULATED)
	PYTHONPATH=$(EMULATED) $(BIN)/pytest -q -p no:cacheprovider -m "not interpreter and not compile and not gpu" \
		-k avx512 tests/ops

venv: $(VENV)/built

# torch comes apart: a build that is already there, or a CPU build that pip can find, is then kept, where an unpinned
# requirement of another package would fetch gigabytes of GPU libraries. One processor unpacks it, the other compiles.
$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the versions of constraints.txt need Python 3.11 \
	or newer: make PYTHON=...; with 3.10, pip install .")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(INSTALL) 'setuptools>=77' wheel pybind11
	touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	{ $(BIN)/python -c 'import torch' 2>/dev/null || $(INSTALL) $(TORCH); } & torch=$$!; \
	$(INSTALL) --no-build-isolation --no-deps -e .; built=$$?; wait $$torch && exit $$built
	$(INSTALL) 'kr-fast[test]'
	touch $@

$(VENV)/dev: $(VENV)/built
	$(INSTALL) 'kr-fast[dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info kr_fast/*.so $(VENV)
