"""Slots on the device draw what slots on the host draw, bit for bit: the kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("first", "last"),
    [(0, 4), pytest.param(4, 60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_host_and_device_draw_the_same(first: int, last: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.run.interpreted_slots", str(first), str(last)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-3000:]
