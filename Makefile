# `make demo` and `make test` set up a virtual environment first; nothing else is downloaded but packages.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: setup demo test check clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ppcl needs Python 3.10 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

demo: setup
	$(BIN)/ppcl demo --out runs/demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# two processes of one thread each are three times as fast as one process of two threads
test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

clean:
	rm -rf $(VENV) build dist *.egg-info
