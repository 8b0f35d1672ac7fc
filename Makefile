# demo: the main job on a real model. test (or check): format, lint, types, docs and tests, as CI runs them.
# bench: the recorded measurements in benchmarks/. Everything installs itself into .venv.
# interop: the dictionary files of other libraries, against those libraries, in .venv-interop.
# bench-dictionaries: dictionary training against those libraries.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
INTEROP := .venv-interop

.PHONY: demo test check bench bench-dictionaries interop organisms docs clean

demo: $(STAMP)
	$(BIN)/unsleep demo --out runs/demo

test check: $(STAMP)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site
	$(BIN)/pytest

bench: $(STAMP)
	$(BIN)/python benchmarks/harvest.py
	$(BIN)/python benchmarks/harvest_all.py
	$(BIN)/python benchmarks/edit.py

bench-dictionaries: $(STAMP) $(INTEROP)/installed
	$(BIN)/python benchmarks/dictionaries.py

interop: $(INTEROP)/installed
	$(INTEROP)/bin/pytest interop -W ignore

organisms: $(STAMP)
	$(BIN)/unsleep plant deployment --out runs/deployment

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --site-dir build/site

clean:
	rm -rf runs build

# torch comes first and alone: a plain "torch" may bring a CUDA build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# A torchvision comes with them that needs a CUDA build of torch; nothing here does.
$(INTEROP)/installed: pyproject.toml interop/requirements.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check -r interop/requirements.txt -e .
	$(INTEROP)/bin/pip uninstall --quiet --yes torchvision
	touch $@
