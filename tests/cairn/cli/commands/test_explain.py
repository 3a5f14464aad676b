"""``cairn explain`` against scripted services."""

from __future__ import annotations

import json


def test_explain(cairn):
    code, out, _ = cairn("explain", "a", "--query", "q")
    assert code == 0
    assert "9 prompt tokens: 7 cached, 2 to compute" in out and "load 2.0 KiB" in out
    code, out, _ = cairn("explain", "a", "--query", "q", "--json")
    assert json.loads(out)["bytes_read_per_step"] == 4096
