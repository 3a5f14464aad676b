"""What the offline comparison of orders counts, and that the order we took is worth its name."""

from __future__ import annotations

import pytest

from bench.chunk_orders import POLICIES, computed, main

pytestmark = pytest.mark.unit


def test_prefixes_are_counted_once_while_they_are_kept() -> None:
    asked = [(1, 2), (2, 1), (1, 2), (2, 1)]
    assert computed(asked, POLICIES["as given"]) == (4, 8)
    assert computed(asked, POLICIES["by id"]) == (2, 8)
    assert computed(asked, POLICIES["as given"], kept=1) == (8, 8)
    assert computed([(1,)] * 16, POLICIES["as given"]) == (0, 14), "the first eighth is not counted"


def test_what_is_used_most_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--requests", "256"])
    found = {line[:40].strip(): int(line[40:].split()[0]) for line in capsys.readouterr().out.splitlines()}
    assert found.keys() == POLICIES.keys()
    ours = found["by uses in quarter octaves (canonical)"]
    assert found["by true popularity"] <= ours < 0.85 * found["as given"] and ours < found["least popular first"]
