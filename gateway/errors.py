"""What goes wrong, as OpenAI's HTTP says it: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from cairn.client.errors import CairnError, Mismatch

RETRY_AFTER_S = 1.0  # where nobody says when to come again

_FIELD = re.compile(r"([a-z_]+(?:[.\[][\w.\[\]]*)?): ")
# Where a message of the services names a field, what the same is called over HTTP; the longest that fits is taken.
_NAMES = {
    "sampling.": "",
    "chat.": "",
    "sampling.include_stop": "include_stop_str_in_output",
    "reuse_mode": "cairn.reuse",
    "cache_use": "cairn.cache",
    "order": "cairn.order",
    "keep": "cairn.keep",
    "salt": "cairn.salt",
    "priority": "cairn.priority",
    "start_within_s": "cairn.start_within_s",
}


@dataclass(frozen=True)
class _Kind:
    status: int
    type: str
    code: str | None = None


_KINDS = {
    "INVALID_ARGUMENT": _Kind(400, "invalid_request_error"),
    "OUT_OF_RANGE": _Kind(400, "invalid_request_error"),
    "FAILED_PRECONDITION": _Kind(400, "invalid_request_error", "unsupported"),
    "UNIMPLEMENTED": _Kind(400, "invalid_request_error", "unsupported"),
    "UNAUTHENTICATED": _Kind(401, "authentication_error", "invalid_api_key"),
    "PERMISSION_DENIED": _Kind(403, "permission_error", "forbidden"),
    "NOT_FOUND": _Kind(404, "invalid_request_error", "not_found"),
    "ALREADY_EXISTS": _Kind(409, "conflict_error", "already_exists"),
    "ABORTED": _Kind(409, "conflict_error", "conflict"),
    "RESOURCE_EXHAUSTED": _Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    "UNAVAILABLE": _Kind(503, "service_unavailable_error", "unavailable"),
    "CANCELLED": _Kind(503, "service_unavailable_error", "cancelled"),  # by the service: it drains
    "DEADLINE_EXCEEDED": _Kind(504, "timeout_error", "deadline_exceeded"),
}
_FAULT = _Kind(500, "server_error", "internal_error")


@dataclass
class HttpError(Exception):
    """An answer other than 200. ``retry_after_s``: when to come again; None where that would not help."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON of the answer, or of an event in a stream that has begun."""
        said = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": said}

    def response(self) -> JSONResponse:
        """The answer. Who may not come again is told so: clients repeat some statuses by themselves."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
            headers["retry-after-ms"] = str(max(1, math.ceil(self.retry_after_s * 1000)))
        elif self.status in (409, 429, 504):
            headers["x-should-retry"] = "false"
        return JSONResponse(self.body(), self.status, headers)


def invalid(param: str, complaint: str, code: str | None = None) -> HttpError:
    """400: the request can never work as it is."""
    return HttpError(400, f"{param}: {complaint}" if param else complaint, param=param or None, code=code)


def overloaded(message: str) -> HttpError:
    """429: too much at once."""
    return HttpError(429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after_s=RETRY_AFTER_S)


def unauthorized(message: str) -> HttpError:
    """401: who calls is not known here."""
    headers = {"www-authenticate": "Bearer"}
    return HttpError(401, message, "authentication_error", code="invalid_api_key", headers=headers)


def http_error(error: CairnError) -> HttpError:
    """What a caller over HTTP is told of what a service or the client said. Addresses of services are not passed on."""
    kind = _FAULT if isinstance(error, Mismatch) else _KINDS.get(error.code, _FAULT)
    if kind.status == 401:
        return unauthorized("the bearer token (API key) is missing or not known here")
    message, retry_after_s = error.message, error.retry_after_s
    if kind.status == 503:
        message, retry_after_s = "the service cannot be reached or is shutting down", retry_after_s or RETRY_AFTER_S
    elif kind.status == 500 and error.code != "INTERNAL":
        message = "the service failed"
    named, message = _renamed(message)
    return HttpError(kind.status, message, kind.type, named, kind.code, retry_after_s)


def _renamed(message: str) -> tuple[str | None, str]:
    """The field that a message begins with, as HTTP has it, and the message with that name."""
    found = _FIELD.match(message)
    if found is None:
        return None, message
    name = found[1]
    for ours in sorted(_NAMES, key=len, reverse=True):
        if name == ours or (ours.endswith(".") and name.startswith(ours)):
            name = _NAMES[ours] + name.removeprefix(ours)
            break
    return name, f"{name}: {message[found.end() :]}"
