"""Bodies: what is parsed where."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from starlette.requests import Request

from gateway import body
from gateway.body import PARSED_AT_ONCE_MAX, Held, Room, read_json


def request(content: bytes) -> Request:
    async def receive() -> Any:
        return {"type": "http.request", "body": content, "more_body": False}

    return Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)


@pytest.mark.parametrize(("spaces", "in_the_loop"), [(0, True), (PARSED_AT_ONCE_MAX, False)])
def test_a_large_body_is_parsed_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, spaces: int, in_the_loop: bool
) -> None:
    threads, parse = list[int](), body.parse_json

    def parsed(content: bytes) -> Any:
        threads.append(threading.get_ident())
        return parse(content)

    monkeypatch.setattr(body, "parse_json", parsed)
    room = Room(1 << 20, 1 << 20)
    assert asyncio.run(read_json(request(b'{"a": 1}' + b" " * spaces), Held(room))) == {"a": 1}
    assert [thread == threading.get_ident() for thread in threads] == [in_the_loop]
