"""The ``place`` fixture: each contract test runs once for each backend, against the real thing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from contract import Place
from places import FilePlace

BACKENDS = ("file",)


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    file_place = FilePlace(tmp_path / "store")
    yield file_place
    file_place.close()


@pytest.fixture
def file_place(tmp_path: Path) -> Iterator[FilePlace]:
    opened = FilePlace(tmp_path / "store")
    yield opened
    opened.close()


@pytest.fixture
def file_place_2(tmp_path: Path) -> Iterator[FilePlace]:
    """A second installation, to move things to."""
    opened = FilePlace(tmp_path / "second store")
    yield opened
    opened.close()
