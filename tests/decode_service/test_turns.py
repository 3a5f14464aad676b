"""Turns that are kept: what was written while the answer was generated, or is computed behind, is what is read later.

``packed`` has rows that share steps, as on a GPU; ``stepwise`` is the CPU, where chunks have bits of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn import ChunkRef, Result, Tokens
from chunk_store.errors import QuotaFull, StoreFull, StoreUnavailable
from chunk_store.key import ChunkKey
from decode_service import turns
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import Claim
from protos import decode_pb2
from tests.decode_service.models import loaded, tokens
from tests.decode_service.packing import packing
from tests.decode_service.pair import Pair, pair, raw_status, wait_until

SYSTEM, DOCUMENT = tokens(1, 40), tokens(2, 90)


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    store = tmp_path_factory.mktemp("kept")
    with pair(loaded(folder, "prefill"), packing(loaded(folder, "decode")), store) as services:
        yield services


@pytest.fixture(scope="module")
def stepwise(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path_factory.mktemp("behind")) as services:
        yield services


@pytest.fixture(params=["packed", "stepwise"])
def services(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Each in turn; no page may be lost."""
    running: Pair = request.getfixturevalue(request.param)
    yield running
    running.check_idle()


def keeps(services: Pair) -> str:
    """What becomes of a turn's KV there."""
    return "computing" if services.decode.worker.runner.alone(1, chunk=True) else "resident"


def computed(result: Result) -> list[tuple[int, str]]:
    return [(segment.tokens - segment.cached_tokens, segment.source) for segment in result.reuse.segments]


def same(got: Result, want: Result) -> None:
    assert got.token_ids == want.token_ids
    assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)


@pytest.mark.parametrize(("query", "answer"), [(5, 9), (70, 1), (16, 17), (1, 40)])
def test_the_next_turn_computes_its_own_query_alone(services: Pair, query: int, answer: int) -> None:
    before = [SYSTEM, DOCUMENT]
    first = services.generate([*before, tokens(10 * query, query)], answer, keep=True, logprobs=True)
    same(first, services.generate([*before, tokens(10 * query, query)], answer, cache="bypass", logprobs=True))
    kept = first.kept
    assert kept is not None and kept.registered and (kept.kv, kept.reason) == (keeps(services), "")
    assert list(kept.query_token_ids) == tokens(10 * query, query)
    second = [*before, ChunkRef(kept.id), tokens(3, 7)]
    got = services.generate(second, logprobs=True)
    assert computed(got) == [(0, "device"), (0, "device"), (0, "device"), (7, "computed")]
    assert got.reuse.segments[2].tokens == query + answer and got.reuse.segments[2].type == "turn"
    assert got.usage.computed_tokens == 7
    inline = Tokens([*kept.query_token_ids, *first.token_ids], type="turn")
    assert services.generate([*before, inline, tokens(3, 7)], logprobs=True).reuse.segments[2].chunk_id == kept.id
    same(got, services.generate(second, cache="bypass", logprobs=True))
    same(got, services.generate([*before, inline, tokens(3, 7)], cache="bypass", logprobs=True))


def planes(services: Pair, key: str) -> list[torch.Tensor]:
    """A chunk's KV, once it is there."""
    residents = services.decode.worker.residents

    def ready() -> bool:
        chunk = residents.find(ChunkKey(key))
        return chunk is not None and chunk.ready

    def read() -> list[torch.Tensor]:
        chunk = residents.find(ChunkKey(key))
        assert chunk is not None
        return [plane.clone() for plane in residents.pool.run_planes(chunk.run, chunk.tokens)]

    wait_until(lambda: services.in_device_thread(ready))
    return services.in_device_thread(read)


def test_kept_kv_is_that_of_a_prefill(services: Pair) -> None:
    first = services.generate([SYSTEM, tokens(20, 33)], 21, keep=True)
    assert first.kept is not None
    wait_until(lambda: services.client.get(first.kept or "").kv_entries == 1)
    chunk = services.client.prefill(first.kept, context=[first.reuse.segments[0].chunk_id])
    assert chunk.outcome == "already_stored"
    kept = planes(services, chunk.key)
    services.client.delete(chunk)
    wait_until(lambda: services.in_device_thread(lambda: services.decode.worker.residents.held) == 0)
    services.forget()
    turn = Tokens([*first.kept.query_token_ids, *first.token_ids], type="turn")
    got = services.generate([SYSTEM, turn, [9]])
    assert computed(got)[1:] == [(54, "computed"), (1, "computed")]
    for mine, prefilled in zip(kept, planes(services, chunk.key), strict=True):
        torch.testing.assert_close(mine, prefilled, atol=1e-5, rtol=1e-5)


def test_a_kept_turn_is_published_behind(services: Pair) -> None:
    """By the decode service where it has the KV, else by the prefill service; and read like any other chunk."""
    computed_there = services.metric("cairn_prefill_tokens_total", "prefill", source="computed")
    first = services.generate([SYSTEM, tokens(21, 5)], 30, keep=True)
    assert first.kept is not None
    kept = first.kept
    wait_until(lambda: services.client.get(kept).kv_entries == 1)
    wait_until(lambda: services.in_device_thread(lambda: services.decode.worker.residents.held) == 0)
    computed_there = services.metric("cairn_prefill_tokens_total", "prefill", source="computed") - computed_there
    assert (computed_there < 35) == (keeps(services) == "resident")
    services.forget()
    got = services.generate([SYSTEM, kept, [9]], logprobs=True)
    assert computed(got)[1:] == [(0, "store"), (1, "computed")]
    same(got, services.generate([SYSTEM, kept, [9]], logprobs=True, cache="bypass"))


def test_a_full_pool_keeps_the_record_alone(folder: Path, tmp_path: Path) -> None:
    """Two answers run whose chunks fill the pool; the first to end finds no room for its turn."""
    decode = packing(loaded(folder, "decode"))
    with pair(loaded(folder, "prefill"), decode, tmp_path, kv_pages=40, chunk_page_ratio=0.5) as small:
        fills = [tokens(31, 150), tokens(32, 150)]  # 10 pages each
        long = small.client.generate([fills[0], [5]], max_tokens=200, ignore_eos=True)
        next(long)
        first = small.generate([fills[1], [6]], 3, keep=True)
        long.close()
        assert first.kept is not None and first.kept.registered
        assert (first.kept.kv, first.kept.reason) == ("none", "pool_full")
        assert small.metric("cairn_kept_turns_total", outcome="pool_full") == 1
        got = small.generate([fills[1], first.kept, [7]])
        assert computed(got)[1:] == [(4, "computed"), (1, "computed")]
        assert got.token_ids == small.generate([fills[1], first.kept, [7]], cache="bypass").token_ids
        small.check_idle()


def test_a_turn_that_waits_for_its_claim_keeps_nobody_from_its_pages(
    packed: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store takes its time; what has left the pool by then is claimed for nobody."""
    keeper, let_on = packed.decode.turns, threading.Event()
    real = keeper._claim
    assert real is not None

    def slow(turn: Composition) -> Claim | None:
        assert let_on.wait(200)
        return real(turn)

    monkeypatch.setattr(keeper, "_claim", slow)
    first = packed.generate([SYSTEM, tokens(24, 5)], 6, keep=True)
    assert first.kept is not None and first.kept.kv == "resident"
    try:
        wait_until(lambda: keeper._publishing == 1)
        wait_until(lambda: packed.in_device_thread(lambda: packed.decode.worker.residents.held) == 0)
        packed.forget()
        assert keeper._publishing == 1
    finally:
        let_on.set()
    wait_until(lambda: keeper._publishing == 0)
    got = packed.generate([SYSTEM, first.kept, [7]])
    assert got.reuse.segments[1].source == "computed"
    assert got.token_ids == packed.generate([SYSTEM, first.kept, [7]], cache="bypass").token_ids
    packed.check_idle()


def test_an_answer_that_ends_while_the_service_stops_leaves_its_turn_in_the_pool(folder: Path, tmp_path: Path) -> None:
    """Nothing is claimed any more, and the device thread goes on to its end."""
    with pair(loaded(folder, "prefill"), packing(loaded(folder, "decode")), tmp_path) as stopping:
        stopping.decode.turns.stop()
        first = stopping.generate([SYSTEM, tokens(25, 5)], 6, keep=True)
        assert first.kept is not None and first.kept.kv == "resident"
        assert computed(stopping.generate([SYSTEM, first.kept, [7]]))[1] == (0, "device")
        stopping.check_idle()


def test_a_full_queue_leaves_it_to_the_next_turn(services: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TENANT_COMPUTING_MAX", 0)
    first = services.generate([SYSTEM, tokens(22, 5)], 4, keep=True)
    assert first.kept is not None and first.kept.registered
    copied = keeps(services) == "resident"
    assert (first.kept.kv, first.kept.reason) == (("resident", "") if copied else ("none", "queue_full"))
    got = services.generate([SYSTEM, first.kept, [7]])
    assert computed(got)[1:] == [(0, "device") if copied else (9, "computed"), (1, "computed")]


@pytest.mark.parametrize("wrong", [StoreFull("full", "wait"), StoreUnavailable("away", "wait"), QuotaFull("q", "w")])
def test_a_turn_that_cannot_be_registered_is_sent_whole(
    services: Pair, monkeypatch: pytest.MonkeyPatch, wrong: Exception
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise wrong

    talk = services.client.conversation(None, [SYSTEM], max_tokens=4, ignore_eos=True)
    with monkeypatch.context() as patched:
        patched.setattr(services.decode.resolver, "register_turn", refuse)
        talk.ask(tokens(23, 6))
    kept = talk.turns[0].kept
    copied = keeps(services) == "resident"
    reason = "store_unavailable" if isinstance(wrong, StoreUnavailable) else "store_full"
    assert (kept.registered, kept.kv, kept.reason) == (False, "resident" if copied else "none", reason)
    second = talk.ask([7, 8])
    assert second.reuse.segments[1].chunk_id == kept.id
    inline = Tokens(talk.turns[0].token_ids, type="turn")
    assert second.token_ids == services.generate([SYSTEM, inline, [7, 8]], 4, cache="bypass").token_ids


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"cache_use": decode_pb2.CACHE_USE_BYPASS}, "keep: nothing of a request is kept that bypasses the caches"),
        ({"reuse_mode": 2}, "keep: an answer attends to all that stands before it"),
        ({"reuse_mode": 3}, "keep: an answer attends to all that stands before it"),
    ],
)
def test_what_could_not_be_kept_is_refused(services: Pair, options: dict[str, Any], problem: str) -> None:
    request = decode_pb2.GenerateRequest(keep=True, **options)
    request.segments.add().token_ids.ids.extend([5, 6])
    code, said = raw_status(services, request)
    assert code.name == "INVALID_ARGUMENT" and said.startswith(problem)
