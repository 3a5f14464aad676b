"""Health of the names it was made with, asked for and watched."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc_health.v1 import health_pb2

from serving.errors import NotFound
from serving.rpc.health import Health

Status = health_pb2.HealthCheckResponse
CONTEXT: Any = None


def request(name: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=name)


def test_every_name_serves_or_none() -> None:
    async def main() -> None:
        health = Health(("", "cairn.v1.DecodeService"))
        for serving, status in ((False, Status.NOT_SERVING), (True, Status.SERVING), (False, Status.NOT_SERVING)):
            health.set(serving)
            for name in ("", "cairn.v1.DecodeService"):
                assert (await health.Check(request(name), CONTEXT)).status == status
            listed = (await health.List(health_pb2.HealthListRequest(), CONTEXT)).statuses
            assert {name: reply.status for name, reply in listed.items()} == dict.fromkeys(health._names, status)

    asyncio.run(main())


def test_another_name_is_not_known() -> None:
    async def main() -> None:
        with pytest.raises(NotFound, match="service: unknown here"):
            await Health(("",)).Check(request("cairn.v1.Other"), CONTEXT)

    asyncio.run(main())


def test_watchers_are_told_of_changes_only() -> None:
    async def main() -> None:
        health = Health(("",))
        known, other = health.Watch(request(""), CONTEXT), health.Watch(request("nobody"), CONTEXT)
        assert (await anext(known)).status == Status.NOT_SERVING
        assert (await anext(other)).status == Status.SERVICE_UNKNOWN
        change = asyncio.ensure_future(anext(known))
        unknown = asyncio.ensure_future(anext(other))
        health.set(False)  # says nothing new
        for _ in range(5):
            await asyncio.sleep(0)
        assert not change.done()
        health.set(True)
        assert (await asyncio.wait_for(change, 10)).status == Status.SERVING
        assert not unknown.done()
        unknown.cancel()

    asyncio.run(main())
