# Every target does its own set-up: `make quickstart` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-long lint types contracts clean

# Bytecode is left to the first import (what is not imported is not compiled), but the tests
# start many processes and get it all at once.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev: $(VENV)/ready
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	touch $@

quickstart: $(VENV)/ready
	$(BIN)/fedlora simulate

test: $(VENV)/dev
	$(BIN)/pytest -n auto -q

test-long: $(VENV)/dev
	$(BIN)/pytest -n auto -q -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy

contracts: $(VENV)/dev
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info
