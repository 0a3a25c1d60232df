# `make demo` and `make test` need only python3 and make: they first install their dependencies into .venv.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
# one thread per worker: the workers already use all cores, and sums are the same everywhere
SINGLE_THREADED := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
TYPED := --jaxtyping-packages=fisherfn,tests.typed.checked

.DEFAULT_GOAL := help
.PHONY: help install test test-deep lint format docs gallery demo build check-wheel soak zoo search benchmark clean

help:  ## show this list
	@echo "fisherfn: natural-gradient methods for PyTorch"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed  ## create .venv with the pinned versions (again after changes of pyproject or constraints)

demo: .venv/installed  ## train on generated data; print a table, write pictures
	$(BIN)/python apps/demo.py

test: .venv/installed  ## all tests and doctests, a small part of them with shapes and types checked at run time
	$(SINGLE_THREADED) FISHERFN_HYPOTHESIS=quick $(BIN)/python -m pytest -n $(WORKERS) --durations 40 -m "not typed"
	$(SINGLE_THREADED) FISHERFN_HYPOTHESIS=quick $(BIN)/python -m pytest -n $(WORKERS) $(TYPED) -m typed

test-deep: .venv/installed  ## all with shapes and types checked, and many more random examples
	$(SINGLE_THREADED) FISHERFN_HYPOTHESIS=deep $(BIN)/python -m pytest -n $(WORKERS) $(TYPED)

lint: .venv/installed-dev  ## ruff, mypy, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck apps/cluster/*

format: .venv/installed-dev  ## format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-docs  ## build the documentation site in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

gallery: .venv/installed  ## redraw the pictures of the gallery (docs/images/gallery)
	$(BIN)/python docs/examples/all.py

build: .venv/installed-dev  ## wheel and source archive, in dist
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --no-isolation

check-wheel: build  ## install the wheel into a fresh environment with only its dependencies, and use it
	rm -rf build/wheel && $(BIN)/python -m venv build/wheel
	build/wheel/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt torch==2.13.0
	build/wheel/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt dist/*.whl
	build/wheel/bin/python -m pip check
	build/wheel/bin/python .ci/use_wheel.py

soak: .venv/installed  ## inject faults into training runs for ten minutes, and compare resumed with undisturbed runs
	$(BIN)/python apps/soak.py

zoo: .venv/installed  ## try more than 150 nets, of those packages that are installed (an hour; it goes on where it stopped)
	$(SINGLE_THREADED) $(BIN)/python apps/zoo.py --page docs/coverage.md

search: .venv/installed  ## run the recorded hyper-parameter search again (hours)
	$(BIN)/python apps/search.py

benchmark: .venv/installed-peers  ## time steps of this and other libraries; update tables and picture in docs/performance.md
	$(BIN)/python apps/benchmark.py --peers --page docs/performance.md

clean:  ## remove .venv, caches and builds; results stay
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "fisherfn needs Python 3.11 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments; install the system package that adds it" \
		          "(Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch first and alone: the build that an index or a local folder offers is kept
.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv, once; torch is large ..."
	$(PIP) torch==2.13.0
	$(PIP) -e ".[apps,test]"
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) -e ".[apps,test,dev]"
	@touch $@

.venv/installed-docs: .venv/installed
	$(PIP) -e ".[apps,docs]"
	@touch $@

# other libraries to be measured; without what they depend on, so that torch stays as it is
.venv/installed-peers: requirements-peers.txt | .venv/installed
	$(PIP) --no-deps -r requirements-peers.txt
	@touch $@
