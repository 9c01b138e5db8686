# Two commands matter to a newcomer: `make quickstart` and `make test`.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
BIN := .venv/bin

# libtpu, which the tests compile with, looks for a TPU wherever it may: only let it where one is.
ifeq ($(shell command -v nvidia-smi || ls /dev/accel* /dev/vfio/0 2>/dev/null),)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: install quickstart test test-all lint format docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "longctx needs Python 3.12 or newer: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $@

quickstart: install
	$(BIN)/longctx train quickstart --out runs/quickstart
	$(BIN)/longctx eval runs/quickstart --lengths 256,512,1024,2048
	$(BIN)/longctx generate runs/quickstart --prompt "def main("

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m ""

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

clean:
	rm -rf .venv runs build dist
