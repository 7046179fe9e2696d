# `make demo` and `make test` set up a virtual environment first; nothing else is downloaded but packages.
PYTHON ?= python3
VENV ?= .venv
SITE ?= build/site
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
IMPORTS = $(BIN)/python -c "import open_clip, peft, torchmetrics, ppcl.pipelines, ppcl.run"

.PHONY: setup demo test test-all check docs tables clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ppcl needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) && $(IMPORTS) || { \
		echo "The newest packages do not work here: taking the tested ones of tests/constraints.txt instead."; \
		$(INSTALL) --constraint tests/constraints.txt && $(IMPORTS); }
	touch $@

demo: setup
	$(BIN)/ppcl demo --out runs/demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# two processes of one thread each are three times as fast as one process of two threads; tests/tested_set.py runs the
# suite in random orders. `make test` leaves out what is marked slow, `make test-all`, which CI runs, does not
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal -p no:randomly

test: check
	$(PYTEST) -m "not slow"

test-all: check
	$(PYTEST)

# the documentation as a site; a warning is an error
docs: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --config-file .ci/mkdocs.yml --site-dir $(abspath $(SITE))

# what is measured on the embedded teacher, hours of it; goes on where it was stopped
TABLES = results metric_sanity ladder ablation study compare methods methods_units width prices predictions correction \
	low_rank_steps
tables: setup
	$(BIN)/python benchmarks/tables.py $(TABLES)

clean:
	rm -rf $(VENV) build dist *.egg-info
