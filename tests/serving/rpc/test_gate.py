"""What the gate makes of calls and of what their handlers raise, without a server."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from grpc import StatusCode

from serving.errors import InternalFault, NotFound, Overloaded
from serving.rpc.access import Access
from serving.rpc.details import retry_after_s
from serving.rpc.gate import HEALTH, REFLECTION, WATCH, CallGate, abort
from serving.rpc.open_calls import CallKind
from serving.rpc.streams import MessageKinds

METHOD = "/cairn.v1.PrefillService/GetChunk"


class Aborted(Exception):
    """A call ended with a status."""


class Context:
    """Of a call that has set trailing metadata already."""

    def __init__(self) -> None:
        self.told: tuple[StatusCode, str] | None = None
        self.trailing: tuple[Any, ...] = ()

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("x-request-id", "mine"),)

    async def abort(self, code: StatusCode, message: str, trailing: Any = ()) -> None:
        self.told, self.trailing = (code, message), tuple(trailing)
        raise Aborted


def aborted(error: Exception) -> Context:
    context = Context()
    with pytest.raises(Aborted):
        asyncio.run(abort(cast(Any, context), error))
    return context


def test_an_error_ends_the_call_with_its_status_and_details() -> None:
    context = aborted(Overloaded("full", field="jobs", remedy="try later", retry_after_s=1.5))
    assert context.told == (StatusCode.RESOURCE_EXHAUSTED, "jobs: full; try later")
    assert context.trailing[0] == ("x-request-id", "mine") and retry_after_s(context.trailing) == 1.5


def test_a_fault_of_ours_is_logged_with_its_traceback_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        context = aborted(KeyError("a prompt"))
        aborted(NotFound("unknown", field="chunk_id"))
        aborted(InternalFault("a forward failed", remedy="see the log"))  # who raised it has logged it
    assert context.told is not None and context.told[0] is StatusCode.INTERNAL and "prompt" not in context.told[1]
    assert [bool(record.exc_info) for record in caplog.records] == [True, False, False]
    assert caplog.records[1].getMessage() == "refused: NOT_FOUND: chunk_id: unknown"


def test_a_call_that_was_aborted_already_stays_so() -> None:
    with pytest.raises(grpc.aio.AbortError):
        asyncio.run(abort(cast(Any, Context()), grpc.aio.AbortError("told")))


def arrive(gate: CallGate, method: str, handler: Any, **metadata: str) -> Any:
    async def continuation(_: Any) -> Any:
        return handler

    details = SimpleNamespace(method=method, invocation_metadata=tuple(metadata.items()))
    return asyncio.run(gate.intercept_service(continuation, cast(Any, details)))


def answer(handler: Any) -> tuple[StatusCode, str] | None:
    """The status that a handler answers with at once."""
    context = Context()
    with pytest.raises(Aborted):
        asyncio.run(handler.stream_unary(None, context))
    return context.told


def handler() -> Any:
    make: Any = grpc.unary_unary_rpc_method_handler
    return make(lambda request, context: request)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("secret-a tenant-a\n")
    return path


def test_calls_of_the_service_pass_while_it_is_open(token_file: Path) -> None:
    gate = CallGate(Access(), MessageKinds({}))
    starting = answer(arrive(gate, METHOD, handler()))
    assert starting == (StatusCode.UNAVAILABLE, "the service is starting; try again")
    for method in (HEALTH + "Check", WATCH, REFLECTION + "v1.ServerReflection/Info"):
        assert arrive(gate, method, handler()).stream_unary is not None
        assert arrive(gate, method, None) is None  # grpc says UNIMPLEMENTED
    gate.open()
    assert arrive(gate, METHOD, None) is None and gate.running == gate.calls.count(CallKind.WORK) == 0
    gate.close()
    draining = answer(arrive(gate, METHOD, handler()))
    assert draining == (StatusCode.UNAVAILABLE, "the service is shutting down; try another one")


def test_tokens_are_asked_for_everywhere_but_for_health(token_file: Path) -> None:
    gate = CallGate(Access.from_file(token_file), MessageKinds({}))
    gate.open()
    for method in (METHOD, REFLECTION + "v1.ServerReflection/Info", "/x.Y/z"):
        refused = answer(arrive(gate, method, handler() if method != "/x.Y/z" else None))
        assert refused is not None and refused[0] is StatusCode.UNAUTHENTICATED
    assert arrive(gate, "/x.Y/z", None, authorization="Bearer secret-a") is None
    assert arrive(gate, HEALTH + "Check", None) is None
