"""Every status has an error class, and an error says what, who and which request."""

from __future__ import annotations

import grpc
import pytest

from cairn.client.errors import CairnError, InvalidRequest, ServerError, Unauthorized, error_from_status, invalid


def test_every_status_code_has_a_class() -> None:
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.OK:
            error = error_from_status(code.name, "why")
            assert type(error) is not CairnError and error.code == code.name
    assert type(error_from_status("NEWER", "why")) is CairnError


@pytest.mark.parametrize(
    ("code", "kind", "builtin"),
    [("INVALID_ARGUMENT", InvalidRequest, ValueError), ("PERMISSION_DENIED", Unauthorized, PermissionError)],
)
def test_errors_are_pythons_too(code: str, kind: type[CairnError], builtin: type[Exception]) -> None:
    error = error_from_status(code, "why")
    assert isinstance(error, kind) and isinstance(error, builtin)


def test_an_error_says_what_it_knows() -> None:
    assert str(error_from_status("INTERNAL", "", "decode service at x", "r-1")) == (
        "INTERNAL from the decode service at x: no details given (request r-1)"
    )
    assert str(invalid("salt", "is too long")) == "INVALID_ARGUMENT: salt: is too long"
    assert isinstance(error_from_status("DATA_LOSS", "x"), ServerError)
