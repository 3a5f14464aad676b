from __future__ import annotations

from collections.abc import Iterator

import pytest

from cairn import Client
from tests.cairn.cairn_fakes import FakeServices


@pytest.fixture
def services() -> Iterator[FakeServices]:
    fakes = FakeServices()
    yield fakes
    fakes.script.endless = False
    fakes.stop()


@pytest.fixture
def client(services: FakeServices) -> Iterator[Client]:
    with Client(services.address, services.address, timeout_s=60) as opened:
        yield opened
