"""Log lines that bear the request they belong to. Logging is configured by a service's ``__main__`` only."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar

LEVELS = ("debug", "info", "warning", "error")

_request_id: ContextVar[str] = ContextVar("request_id", default="-")


def set_request_id(request_id: str) -> None:
    """Log lines of the rest of this task, and of what it starts, bear ``request_id``."""
    _request_id.set(request_id or "-")


def current_request_id() -> str:
    """The request that this task works on, "-" outside of one."""
    return _request_id.get()


def configure_logging(level: str) -> None:
    """One line an event on stderr: time, level, logger, request id, message. ``level`` is one of ``LEVELS``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_add_request_id)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _add_request_id(record: logging.LogRecord) -> bool:
    record.request_id = _request_id.get()
    return True
