"""Every error has a gRPC status, and a status means an error again."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc import StatusCode

from serving.errors import Cancelled, InternalFault, Overloaded, RequestError, TooLarge, Unavailable, Unsupported
from serving.rpc.errors import STATUS_NAMES, error_from_status, error_metadata, status_name, status_number, status_of
from tests.serving.test_errors import KINDS


def status(code: StatusCode, details: str | None, trailing: Iterable[Any] | None = None) -> grpc.RpcError:
    """What a stub raises, as far as anybody asks."""
    found = SimpleNamespace(code=lambda: code, details=lambda: details, trailing_metadata=lambda: trailing)
    return cast(grpc.RpcError, found)


def test_every_kind_of_error_has_a_status() -> None:
    assert len({status_name(kind("so")) for kind in KINDS}) == len(KINDS) - 1  # too large is too much of something
    for kind in KINDS:
        name = status_name(kind("so"))
        assert name in STATUS_NAMES and StatusCode[name].value[0] == status_number(kind("so"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_status_means_again_what_it_meant(kind: type[RequestError]) -> None:
    said = kind("so", field="text", retry_after_s=1.5, reason="WHY")
    heard = error_from_status(status(status_of(said), said.message, error_metadata(said)))
    known = {TooLarge: Overloaded, Cancelled: Unavailable}  # who drains cancels what runs
    assert type(heard) is known.get(kind, kind)
    assert (heard.message, heard.retry_after_s, heard.reason) == ("text: so", 1.5, "WHY")


def test_a_status_of_nobody_of_ours() -> None:
    assert type(error_from_status(status(StatusCode.UNIMPLEMENTED, "no such method"))) is Unsupported
    assert type(error_from_status(status(StatusCode.DATA_LOSS, None))) is InternalFault
