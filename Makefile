# Every target does its own set-up: `make quickstart` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-long lint types contracts protos protos-check clean

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

# The generator has an environment of its own: it needs an older protobuf than flwr does.
PROTOC := .protoc/bin/python -m grpc_tools.protoc -Ifedlora/protos=protos
PROTOS := exchange worker consortium

.protoc/ready:
	$(PYTHON) -m venv .protoc
	.protoc/bin/pip install --quiet 'grpcio-tools==1.70.0' 'setuptools<81'
	touch $@

protos: .protoc/ready
	for name in $(PROTOS); do $(PROTOC) --python_out=. --pyi_out=. --grpc_python_out=. \
		fedlora/protos/$$name.proto || exit 1; done

# what is committed is what the .proto files give
protos-check: .protoc/ready
	rm -rf .protoc/out && mkdir .protoc/out
	for name in $(PROTOS); do $(PROTOC) --python_out=.protoc/out --pyi_out=.protoc/out \
		--grpc_python_out=.protoc/out fedlora/protos/$$name.proto || exit 1; done
	for file in .protoc/out/fedlora/protos/*; do \
		diff -u protos/$$(basename $$file) $$file || exit 1; done

clean:
	rm -rf .protoc $(VENV) build *.egg-info
