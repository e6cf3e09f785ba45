# make demo    set up .venv, run Knowledge Recycling on scikit-learn's digits, show where the report lies
# make test    set up .venv, build, lint, run every test
# make nightly compile every GPU kernel for the generations besides Hopper
# make check   lint, and what a change breaks most often: the layers, the documents, one case of each test of an op
#
# PYTHON=python3.12     interpreter that .venv is made with
# SYSTEM_SITE=1         let .venv see the packages (a torch, say) that are already installed for PYTHON
PYTHON ?= python3
SYSTEM_SITE ?= 0
VENV := .venv
BIN := $(VENV)/bin
# Of ten thousand files a tenth is ever imported: Python compiles each of those when it first is.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile -c constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
CPP := $(shell find csrc tests/support/cuda_host -name '*.h' -o -name '*.cpp' -o -name '*.cu')
SOURCES := setup.py pyproject.toml $(filter csrc/%,$(CPP))
VENV_FLAGS := $(if $(filter 1,$(SYSTEM_SITE)),--system-site-packages,)

.PHONY: demo test nightly check venv lint clean
demo: $(VENV)/built
	$(BIN)/kr-fast run --preset digits --out runs/digits

# A thread that waits sleeps: two test processes share the processors. Triton's interpreter needs one of its own.
# Each takes half of the tests in their order, so that neighbours share what they build, and what the other leaves.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n 2 --dist worksteal
# Some hundred processes import the package and the tests: they are compiled once, whatever the environment asks for.
export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/built lint
	$(PYTEST) -m "not interpreter and not nightly"
	TRITON_INTERPRET=1 $(PYTEST) -m interpreter

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

venv: $(VENV)/built

# torch comes apart: a build that is already there, or a CPU build that pip can find, is then kept, where an unpinned
# requirement of another package would fetch gigabytes of GPU libraries. One processor unpacks it, the other compiles.
$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kr_fast needs Python 3.10 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(INSTALL) 'setuptools>=77' wheel pybind11
	touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	{ $(BIN)/python -c 'import torch' 2>/dev/null || $(INSTALL) $(TORCH); } & torch=$$!; \
	$(INSTALL) --no-build-isolation --no-deps -e .; built=$$?; wait $$torch && exit $$built
	$(INSTALL) 'kr-fast[test]'
	touch $@

clean:
	rm -rf build dist *.egg-info kr_fast/*.so $(VENV)
