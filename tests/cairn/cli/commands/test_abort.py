"""``cairn abort`` against scripted services."""

from __future__ import annotations

import json


def test_abort(cairn):
    code, out, _ = cairn("abort", "running", "gone")
    assert (code, out) == (1, "running aborted\ngone is not waiting or running\n")
    code, out, _ = cairn("abort", "running", "--json")
    assert (code, json.loads(out)) == (0, {"request_id": "running", "found": True})
