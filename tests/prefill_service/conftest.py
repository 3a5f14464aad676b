"""The tiny model, loaded once for all tests of the prefill service."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.process.loading import Loaded
from tests.models_for_tests import tiny_model_dir
from tests.prefill_service.prefill_worker import load_tiny


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(model_dir: Path) -> Loaded:
    return load_tiny(model_dir)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"
