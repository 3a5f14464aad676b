from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.store.metered_store import Metered


@pytest.fixture
def metered(tmp_path: Path) -> Iterator[Metered]:
    made = Metered(tmp_path)
    yield made
    made.store.close()
