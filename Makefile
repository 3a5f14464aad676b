# make demo, make test, make check (CONTRIBUTING.md has the rest); everything runs from .venv in the checkout.
# On a fresh Debian: ./run demo, ./run test.
PYTHON ?= python3
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip --quiet --disable-pip-version-check
TORCH := torch==2.13.0
EXTRAS := server,http,load,dev,redis,mooncake,quantized,lora
LOCK := requirements.lock
VERSIONS ?= 3.11 3.12 3.13

.PHONY: demo test test-all test-gpu test-containers coverage check format hooks protos bench lock clean env

env: $(STAMP)

# torch goes first and as the CPU's build, which is a tenth of the other; where its index is out of reach, from pip's own.
# Everything else is of the versions in requirements.lock, here as in CI.
$(STAMP): pyproject.toml setup.py requirements.lock
	$(PYTHON) -m venv $(VENV)
	@echo "Installing Python packages into $(VENV) ..."
	@$(PIP) install --retries 1 --timeout 30 $(addprefix --index-url ,$(TORCH_INDEX)) $(TORCH) 2>/dev/null || \
	  { echo "$(TORCH_INDEX) did not give $(TORCH); from pip's own index:"; $(PIP) install $(TORCH); }
	@$(PIP) install $(addprefix --constraint ,$(LOCK)) -e ".[$(EXTRAS)]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/cairn demo

# Two workers, a file of tests each: most tests wait for one service or another.
test: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist loadfile

# The suite on every Python that we promise; one that is not installed fails it, unless with SKIP_MISSING=1.
test-all:
	@for version in $(VERSIONS); do \
	  python=$$(.ci/python $$version) || { echo "Python $$version is not installed"; [ "$(SKIP_MISSING)" ] && continue; exit 1; }; \
	  echo "Python $$version: $$python"; \
	  $(MAKE) --no-print-directory test VENV=.venv-$$version PYTHON=$$python || exit 1; \
	done

# With a CUDA device, in an environment of its own: there torch is pip's own build, with CUDA.
test-gpu:
	$(MAKE) --no-print-directory env VENV=.venv-gpu TORCH_INDEX= EXTRAS=$(EXTRAS),gpu
	.venv-gpu/bin/python -c 'import torch; assert torch.cuda.is_available(), "torch finds no CUDA device here"'
	.venv-gpu/bin/python -m pytest -m gpu -rs tests

# What no unit test reaches; unit tests are those that start no service, no process and no model (tests/conftest.py).
coverage: $(STAMP)
	$(BIN)/python -m pytest --unit --cov --cov-report=term-missing:skip-covered

# The containers with a real engine (DOCKER_HOST or /var/run/docker.sock); skipped where none answers.
test-containers: $(STAMP)
	$(BIN)/python -m pytest -m containers -rs tests/containers

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# `make check` before every commit, by git itself.
hooks: $(STAMP)
	$(BIN)/pre-commit install

protos: $(STAMP)
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I. $(patsubst %,--%_out=.,python mypy grpc_python mypy_grpc) protos/*.proto

bench: $(STAMP)
	$(BIN)/python -m bench.cpu

# The newest versions that pyproject.toml allows, for everyone.
lock:
	rm -rf .venv-lock
	$(MAKE) --no-print-directory env VENV=.venv-lock LOCK=
	head -n 1 requirements.lock > .venv-lock/lock
	.venv-lock/bin/pip freeze --exclude-editable --exclude torch | grep -E '^[A-Za-z0-9._-]+==[^+]+$$' >> .venv-lock/lock
	mv .venv-lock/lock requirements.lock

clean:
	rm -rf $(VENV) .venv-* build *.egg-info
