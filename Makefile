# Every target sets up what it needs: a virtual environment in .venv, with the releases of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test coverage lint hooks docs docs-site node benchmark icon-sd gpu gpu-wheels removals torture clean

demo: $(VENV)/.ready
	$(BIN)/attrdb demo demo

# A process per core, at most four, each with one thread for torch and BLAS: threads that share a core slow each other down.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# The tests, and the lines that they do not reach; in htmlcov/ page by page.
coverage: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage html --quiet
	$(BIN)/python -m coverage report

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.ready
	$(BIN)/python docs/cli.py
	$(BIN)/python docs/dictionary.py
	$(BIN)/python docs/options.py
	$(BIN)/python docs/architecture.py

# The documentation as a site, in site/. Fails on a broken link.
docs-site: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Lint before every commit.
hooks: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[hooks]'
	$(BIN)/pre-commit install

# Every way in which attrdb was made to fail, or not: about an hour. CI runs a slice (tests/test_torture*.py).
torture: $(VENV)/.ready
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m torture --folder ../runs/torture --json ../benchmarks/results/torture.json
	$(BIN)/python benchmarks/report.py

# The experiments on IconAbC, from its frozen files; hours on two cores, and it goes on where it was.
benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/iconabc/run.py runs/iconabc --json benchmarks/results/iconabc.json
	$(BIN)/python benchmarks/report.py

# What models owe to their exemplars, by training them again without some; hours on two cores, and it goes on where it was.
removals: $(VENV)/.ready
	$(BIN)/python benchmarks/removals/run.py make runs/removals
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/removals/run.py truth runs/removals --workers 2
	$(BIN)/python benchmarks/removals/run.py score runs/removals
	$(BIN)/python benchmarks/removals/run.py figures runs/removals --json benchmarks/results/removals.json
	$(BIN)/python benchmarks/report.py

# Go on training icon-sd on this machine for MINUTES, from its last checkpoint, and keep what it has then.
MINUTES ?= 9.5
icon-sd: $(VENV)/.ready
	$(BIN)/python -m attrdb.training.icon_sd.checkpoint restore runs/icon-sd
	$(BIN)/python -m attrdb.training.icon_sd.build --run runs/icon-sd --out runs/icon-sd-out --minutes $(MINUTES)
	$(BIN)/python -m attrdb.training.icon_sd.checkpoint save runs/icon-sd

# What waits for a GPU, in order, within MINUTES. Needs no environment of its own: see training/icon_sd/gpu.py.
OUT ?= runs/gpu-out
gpu:
	$(PYTHON) training/icon_sd/gpu.py --minutes $(MINUTES) --out $(OUT)

# The packages that a machine with torch and transformers may lack, to carry there in .whl.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --constraint constraints.txt --dest .whl \
	    diffusers open_clip_torch ftfy wcwidth

# LanceDB's client for Node, for examples/node and its test.
node:
	npm ci --prefix examples/node --no-audit --no-fund

# Installed again only when what is to be installed has changed.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attrdb needs Python 3.11 or newer; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo site htmlcov
