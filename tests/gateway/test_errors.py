"""What a caller over HTTP is told of errors of the services."""

from __future__ import annotations

import json

import pytest

from cairn.client.errors import Mismatch, error_from_status
from gateway.errors import http_error


@pytest.mark.parametrize(
    ("code", "status", "type"),
    [
        ("INVALID_ARGUMENT", 400, "invalid_request_error"),
        ("FAILED_PRECONDITION", 400, "invalid_request_error"),
        ("UNAUTHENTICATED", 401, "authentication_error"),
        ("PERMISSION_DENIED", 403, "permission_error"),
        ("NOT_FOUND", 404, "invalid_request_error"),
        ("ALREADY_EXISTS", 409, "conflict_error"),
        ("RESOURCE_EXHAUSTED", 429, "rate_limit_error"),
        ("INTERNAL", 500, "server_error"),
        ("DATA_LOSS", 500, "server_error"),
        ("UNAVAILABLE", 503, "service_unavailable_error"),
        ("DEADLINE_EXCEEDED", 504, "timeout_error"),
        ("NEVER_HEARD_OF", 500, "server_error"),
    ],
)
def test_each_status_has_one_of_https(code: str, status: int, type: str) -> None:
    told = http_error(error_from_status(code, "why", "decode service at 10.1.2.3:50072", "r"))
    assert (told.status, told.type) == (status, type)
    assert set(told.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("sampling.top_p: 0.0 must be in (0, 1]", "top_p"),
        ("sampling.stop[2]: is empty", "stop[2]"),
        ("chat.messages[0].content: is odd", "messages[0].content"),
        ("keep: only in exact", "cairn.keep"),
        ("reuse_mode: not here", "cairn.reuse"),
        ("salt: strange", "cairn.salt"),
        ("something went wrong: all of it", None),
        ("", None),
    ],
)
def test_fields_have_the_names_that_they_have_over_http(message: str, param: str | None) -> None:
    told = http_error(error_from_status("INVALID_ARGUMENT", message))
    assert told.param == param and (param is None or told.message.startswith(f"{param}: "))


def test_when_to_come_again_and_when_not() -> None:
    full = error_from_status("RESOURCE_EXHAUSTED", "the line is full")
    assert http_error(full).response().headers["x-should-retry"] == "false"
    full.retry_after_s = 1.2
    headers = http_error(full).response().headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1200") and "x-should-retry" not in headers
    assert http_error(error_from_status("UNAVAILABLE", "")).response().headers["retry-after"] == "1"


def test_addresses_of_services_are_not_told() -> None:
    gone = error_from_status("UNAVAILABLE", "failed to connect to all addresses: ipv4:10.1.2.3:50072", "decode", "r")
    odd = error_from_status("UNKNOWN", "ipv4:10.1.2.3:50072 said nothing", "decode", "r")
    for error in (gone, odd):
        assert b"10.1.2.3" not in json.dumps(http_error(error).body()).encode()


def test_services_that_do_not_belong_together_are_no_fault_of_the_caller() -> None:
    mixed = Mismatch("decode: 10.1.2.3:50072 serves x, 10.1.2.4:50072 serves y", code="FAILED_PRECONDITION")
    told = http_error(mixed)
    assert told.status == 500 and "10.1.2" not in json.dumps(told.body())
