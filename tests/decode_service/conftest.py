"""One pair of services over one model for most tests; they use token ids of their own, so that caches start cold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.decode_service.models import loaded, model_dir
from tests.decode_service.pair import Pair, pair

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def running(folder: Path, store: Path) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store) as services:
        yield services


@pytest.fixture
def services(running: Pair) -> Iterator[Pair]:
    """The session's services; whatever a test does to them, no page may be lost."""
    yield running
    running.check_idle()
