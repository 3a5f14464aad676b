# make demo, make test, make check; everything runs from .venv in the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check protos bench clean env

env: $(STAMP)

# torch goes first: with it installed nothing that asks for torch pulls a build of another kind.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev,redis,mooncake]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/cairn demo

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

protos: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/*.proto

bench: $(STAMP)
	$(BIN)/python -m bench.cpu

clean:
	rm -rf $(VENV) build *.egg-info
