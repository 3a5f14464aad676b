"""Both services as processes, for the tests of one file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.decode_service.models import model_dir
from tests.end_to_end.processes import Process, processes


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    folder = model_dir(tmp_path_factory.mktemp("models") / "tiny")
    with processes(folder, tmp_path_factory.mktemp("store")) as both:
        yield both
