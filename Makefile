# make demo, make test, make check; everything runs from .venv in the checkout. On a fresh Debian: ./run demo, ./run test.
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip --quiet --disable-pip-version-check
TORCH := torch==2.13.0

.PHONY: demo test test-containers check protos bench clean env

env: $(STAMP)

# torch goes first and as the CPU's build, which is a tenth of the other; where its index is out of reach, from pip's own.
$(STAMP): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	@echo "Installing Python packages into $(VENV) ..."
	@$(PIP) install --retries 1 --timeout 30 --index-url $(TORCH_INDEX) $(TORCH) 2>/dev/null || \
	  { echo "$(TORCH_INDEX) did not give $(TORCH); from pip's own index:"; $(PIP) install $(TORCH); }
	@$(PIP) install -e ".[server,dev,redis,mooncake]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/cairn demo

# Two workers, a file of tests each: most tests wait for one service or another.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The containers with a real engine (DOCKER_HOST or /var/run/docker.sock); skipped where none answers.
test-containers: $(STAMP)
	$(BIN)/python -m pytest -m containers -rs tests/containers

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

protos: $(STAMP)
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I. $(patsubst %,--%_out=.,python mypy grpc_python mypy_grpc) protos/*.proto

bench: $(STAMP)
	$(BIN)/python -m bench.cpu

clean:
	rm -rf $(VENV) build *.egg-info
