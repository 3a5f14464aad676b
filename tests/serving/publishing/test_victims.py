"""kill -9 at any moment of a publication: nothing half-published is ever read, and no claim of the dead holds."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from chunk_store.open import open_store


def kill(url: str, kills: int) -> None:
    seed = random.randrange(2**32)
    command = [sys.executable, "-m", "tests.serving.publishing.victims", url, str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(120)
def test_killed_publishers_leave_whole_entries_and_nothing_else(tmp_path: Path) -> None:
    kill(f"file://{tmp_path}", 6)
    store = open_store(f"file://{tmp_path}")
    store.sweep()
    stats = store.stats()
    assert stats.entries > 0 and stats.quarantined == 0
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert len(files) == stats.entries, "what the dead had begun to write is swept"
    store.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_a_hundred_times(tmp_path: Path) -> None:
    kill(f"file://{tmp_path}", 100)
