"""``cairn health`` against scripted services."""

from __future__ import annotations

import json


def test_health(cairn, services):
    code, out, _ = cairn("health")
    assert (code, out) == (0, f"{services.address} SERVING\n" * 2)
    code, out, _ = cairn("health", services.address, "127.0.0.1:1", "--json")
    assert code == 1
    assert [json.loads(line)["status"] for line in out.splitlines()] == ["SERVING", "UNAVAILABLE"]
    services.health.set("", 2)
    code, out, _ = cairn("health", "--wait", "0.3")
    assert code == 1 and "NOT_SERVING" in out
