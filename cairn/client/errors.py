"""What a request can fail with. One class for what a caller would do about it; this module knows no gRPC.

Every error keeps the status code's name (``code``), the service's own words (``message``), which service at which
address said so (``source``), and the request's id (``request_id``), under which the services' logs have it.
"""

from __future__ import annotations


class CairnError(Exception):
    """Base of every error that a client raises on purpose. ``retry_after_s``: when the service says to come again."""

    retry_after_s: float | None = None

    def __init__(self, message: str, *, code: str = "UNKNOWN", source: str = "", request_id: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.source = source
        self.request_id = request_id

    def __str__(self) -> str:
        place = f" from the {self.source}" if self.source else ""
        request = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.code}{place}: {self.message}{request}"


class InvalidRequest(CairnError, ValueError):
    """The request can never work as it is: mend it."""


class NotFound(CairnError, LookupError):
    """No such chunk or request."""


class Conflict(CairnError):
    """It is in use or exists already: another request id, or once the other one is done."""


class Unsupported(CairnError):
    """This model or this server cannot do it (a reuse mode that the model fails, a chunk of another model)."""


class Mismatch(Unsupported):
    """The services that the client was given do not belong together: whoever set it up has to mend that."""


class Overloaded(CairnError):
    """A queue or a pool is full: try again later, or with less."""


class Unavailable(CairnError):
    """The service cannot be reached or is shutting down: try again later."""


class DeadlineExceeded(CairnError, TimeoutError):
    """The call's ``timeout_s`` ran out."""


class Cancelled(CairnError):
    """The request was cancelled or aborted."""


class Unauthorized(CairnError, PermissionError):
    """The bearer token is missing, wrong, or does not allow this."""


class ServerError(CairnError):
    """The service failed; its log says why."""


_CLASSES: dict[str, type[CairnError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "OUT_OF_RANGE": InvalidRequest,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": Conflict,
    "ABORTED": Conflict,
    "FAILED_PRECONDITION": Unsupported,
    "UNIMPLEMENTED": Unsupported,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "CANCELLED": Cancelled,
    "UNAUTHENTICATED": Unauthorized,
    "PERMISSION_DENIED": Unauthorized,
    "INTERNAL": ServerError,
    "DATA_LOSS": ServerError,
    "UNKNOWN": ServerError,
}


def error_from_status(code: str, message: str, source: str = "", request_id: str = "") -> CairnError:
    """The error for a gRPC status code's name, such as ``"NOT_FOUND"``."""
    return _CLASSES.get(code, CairnError)(
        message or "no details given", code=code, source=source, request_id=request_id
    )


def invalid(field: str, complaint: str) -> InvalidRequest:
    """The error for an argument that is refused before anything is sent."""
    return InvalidRequest(f"{field}: {complaint}", code="INVALID_ARGUMENT")
