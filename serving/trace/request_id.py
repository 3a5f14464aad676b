"""The request that a task or thread works on: log lines bear its id, and so do replies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

REQUEST_ID_CHARACTERS_MAX = 128
NO_REQUEST = "-"

_UNFIT = re.compile(r"[^\x21-\x7e]")

_request_id: ContextVar[str] = ContextVar("request_id", default=NO_REQUEST)


def clean_request_id(text: str) -> str:
    """A caller's request id as logs and metadata bear it: visible ASCII, at most 128 characters; "" stays ""."""
    return _UNFIT.sub("_", text[:REQUEST_ID_CHARACTERS_MAX])


def set_request_id(request_id: str) -> None:
    """Log lines of the rest of this task, and of what it starts, bear ``request_id``, cleaned."""
    _request_id.set(clean_request_id(request_id) or NO_REQUEST)


def current_request_id() -> str:
    """The request that this task or thread works on, "-" outside of one."""
    return _request_id.get()


@contextmanager
def bearing(request_id: str) -> Iterator[None]:
    """Log lines inside the block bear ``request_id``: for threads that work on one request after another."""
    token = _request_id.set(clean_request_id(request_id) or NO_REQUEST)
    try:
        yield
    finally:
        _request_id.reset(token)
