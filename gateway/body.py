"""A request's body: within bounds of bytes, time and nesting, or refused before more of it is read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from gateway.errors import HttpError, invalid, overloaded

BODY_S = 30.0  # for all of a body to arrive
NESTING_MAX = 64
PARSED_AT_ONCE_MAX = 64 * 1024  # bytes of a body that are parsed in the event loop: a millisecond at most
NUMBER_DIGITS_MAX = 40


@dataclass
class Room:
    """Bytes of bodies that are here at once."""

    nbytes_max: int
    body_max: int
    nbytes: int = 0

    @contextmanager
    def held(self) -> Iterator[Held]:
        """What one request holds of it."""
        held = Held(self)
        try:
            yield held
        finally:
            self.nbytes -= held.nbytes


@dataclass
class Held:
    """What one request has taken of the room so far."""

    room: Room
    nbytes: int = 0

    def take(self, nbytes: int) -> None:
        """Raises ``HttpError`` for a body that is too large, or where there is no room now."""
        if self.nbytes + nbytes > self.room.body_max:
            message = f"the body has more than {self.room.body_max} bytes"
            raise HttpError(413, message, code="request_too_large", headers={"connection": "close"})
        if self.room.nbytes + nbytes > self.room.nbytes_max:
            raise overloaded("too many bytes of requests are being read; try again later")
        self.room.nbytes += nbytes
        self.nbytes += nbytes


async def read_json(request: Request, held: Held) -> Any:
    """The JSON of a request's body. Raises ``HttpError``, or ``ClientDisconnect``."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # nothing that a page of another origin can send without asking first
        raise HttpError(415, "send JSON, with content-type: application/json", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HttpError(415, "send the body without a content-encoding", code="unsupported_media_type")
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > held.room.body_max:
        held.take(int(said))
    body = await _read(request, held)
    if len(body) <= PARSED_AT_ONCE_MAX:
        return parse_json(body)
    return await asyncio.to_thread(parse_json, body)  # everybody else's answers go on meanwhile


def parse_json(body: bytes) -> Any:
    """The value that ``body`` is JSON of. Raises ``HttpError``."""
    try:
        value = json.loads(body, parse_constant=_refuse, parse_int=_whole)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise invalid("", "the body is not UTF-8") from None
    except ValueError as error:
        raise invalid("", f"the body is not JSON: {error}") from None
    _check(value)
    return value


async def _read(request: Request, held: Held) -> bytes:
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                held.take(len(part))
                parts.append(part)
    except TimeoutError:
        message = f"the body did not arrive within {BODY_S:g} s"
        raise HttpError(408, message, code="timeout", headers={"connection": "close"}) from None
    return b"".join(parts)


def _check(value: Any) -> None:
    """Raises ``HttpError`` for a value that is nested too deep, and for text that has no UTF-8."""
    level = [value]
    for _ in range(NESTING_MAX):
        inside: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inside += each.keys()
                inside += each.values()
            elif isinstance(each, list):
                inside += each
            elif isinstance(each, str) and not each.isascii():
                try:
                    each.encode()
                except UnicodeEncodeError:
                    raise invalid("", "the body has half of a surrogate pair in it") from None
        if not inside:
            return
        level = inside
    raise _too_deep()


def _too_deep() -> HttpError:
    return invalid("", f"the body is nested more than {NESTING_MAX} deep")


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number in JSON")


def _whole(digits: str) -> int:
    if len(digits) > NUMBER_DIGITS_MAX:
        raise ValueError("a whole number is too long")
    return int(digits)


__all__ = ["ClientDisconnect", "Held", "Room", "parse_json", "read_json"]
