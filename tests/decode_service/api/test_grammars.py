"""A request's grammar on its way to a matcher: what is refused, and with what."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from decode_service.api import grammars
from decode_service.api.grammars import compiled, follow
from protos import decode_pb2
from serving.errors import InvalidRequest, Overloaded
from tests.fakes import END, codec
from tests.tokenizer_for_tests import VOCABULARY
from text.errors import TextBusy
from text.grammar.compiler import GrammarCompiler


def run(compiler: Any, **fields: Any) -> Any:
    request = decode_pb2.GenerateRequest(grammar=decode_pb2.Grammar(**fields))
    return asyncio.run(compiled(compiler, request, "somebody"))


def test_requests_without_a_grammar_have_none() -> None:
    assert asyncio.run(compiled(SimpleNamespace(), decode_pb2.GenerateRequest(), "")) is None  # type: ignore[arg-type]


def test_every_form_is_compiled() -> None:
    compiler = GrammarCompiler(codec(), vocabulary=VOCABULARY, end_token_ids=[END])
    for fields in ({"json_schema": "{}"}, {"regex": "a"}, {"lark": 'start: "a"'}, {"json_object": True}):
        assert not run(compiler, **fields).matcher().is_over
    with pytest.raises(InvalidRequest, match=r"grammar\.json_schema: at /type"):
        run(compiler, json_schema='{"type": 3}')


def test_too_many_are_overloaded_and_too_slow_ones_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise TextBusy("32 grammars are being compiled")

    with pytest.raises(Overloaded, match=r"grammar\.regex: 32 grammars") as caught:
        run(SimpleNamespace(begin=full), regex="a")
    assert caught.value.retry_after_s
    monkeypatch.setattr(grammars, "WAIT_S", 0.01)
    running: Future[Any] = Future()
    running.set_running_or_notify_cancel()
    slow = SimpleNamespace(begin=lambda *_, **__: running, late=GrammarCompiler.late)
    with pytest.raises(InvalidRequest, match=r"grammar\.regex: took longer"):
        run(slow, regex="a")
    waiting: Future[Any] = Future()
    with pytest.raises(Overloaded, match="waited"):
        run(SimpleNamespace(begin=lambda *_, **__: waiting, late=GrammarCompiler.late), regex="a")


def test_matchers_are_not_made_in_the_event_loop() -> None:
    """Sixteen answers that begin with a long constant would hold it for a second."""
    made: list[tuple[int, bool]] = []

    def matcher(*, ignore_ends: bool) -> Any:
        made.append((threading.get_ident(), ignore_ends))
        return object()

    answers: Any = [SimpleNamespace(grammar=None, params=SimpleNamespace(ignore_eos=True)) for _ in range(3)]
    asyncio.run(follow(SimpleNamespace(matcher=matcher), answers))  # type: ignore[arg-type]
    assert len({id(each.grammar) for each in answers}) == 3
    assert all(where != threading.get_ident() and ignore for where, ignore in made)
