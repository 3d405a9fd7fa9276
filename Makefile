# Every target sets up what it needs: a virtual environment in .venv, with the releases of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs node benchmark clean

demo: $(VENV)/.ready
	$(BIN)/attrdb demo demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/.ready
	$(BIN)/python docs/cli.py
	$(BIN)/python docs/dictionary.py

# The experiments on IconAbC, from its frozen files; hours on two cores, and it goes on where it was.
benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/iconabc/run.py runs/iconabc --json benchmarks/results/iconabc.json
	$(BIN)/python benchmarks/report.py

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
	rm -rf $(VENV) demo
