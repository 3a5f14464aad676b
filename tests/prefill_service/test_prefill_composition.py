"""PrefillComposition over the wire: one reply for each wanted chunk, as soon as it can be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode

from engine.reuse import ReuseMode, key_composition
from protos import prefill_pb2
from serving.process.loading import Loaded
from serving.rpc import wire
from tests.prefill_service.fake_worker import held_writes
from tests.prefill_service.prefill_worker import ALREADY_STORED, COMPUTED, DEADLINE_S, Worker, refusal, run, worker

A, B, C = tuple(range(10, 27)), tuple(range(40, 56)), tuple(range(70, 72))
Reply = prefill_pb2.PrefillCompositionResponse


async def walk(w: Worker, **fields: Any) -> list[Reply]:
    return [reply async for reply in w.stub.PrefillComposition(request(**fields), timeout=DEADLINE_S)]


def request(**fields: Any) -> prefill_pb2.PrefillCompositionRequest:
    fields.setdefault("durable", True)  # what follows looks into the store
    return prefill_pb2.PrefillCompositionRequest(**fields)


async def registered(w: Worker, *contents: tuple[int, ...]) -> list[str]:
    """Ids of chunks that have KV behind another chunk only."""
    before = (await w.prefill((99,))).chunk_id
    return [(await w.prefill(ids, context_chunk_ids=[before])).chunk_id for ids in contents]


@pytest.mark.parametrize("mode", ReuseMode)
def test_each_wanted_chunk_is_answered_for_when_it_is_stored(tiny: Loaded, store: Path, mode: ReuseMode) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            ids, number = await registered(w, A, B, C), wire.reuse_mode_out(mode)
            before = w.value("cairn_prefill_chunks_total", outcome="computed")
            made = await walk(w, chunk_ids=ids, wanted=[0, 1, 2], reuse_mode=number)
            keys = [chunk.key for chunk in key_composition(tiny.served.identity, [A, B, C], mode)]
            assert sorted((reply.index, reply.key) for reply in made) == list(enumerate(keys))
            assert {reply.outcome for reply in made} == {COMPUTED} and all(reply.durable for reply in made)
            assert [bool(reply.timings.total_ns) for reply in made] == [False, False, True]
            assert all(info is not None for info in w.service.store.lookup(keys))
            assert w.value("cairn_prefill_chunks_total", outcome="computed") - before == 3
            again = await walk(w, chunk_ids=ids, wanted=[0, 1, 2], reuse_mode=number)
            assert [reply.outcome for reply in again] == [ALREADY_STORED] * 3

    run(body)


def test_what_need_not_be_stored_is_answered_for_in_order_as_it_is_computed(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            ids = await registered(w, A, B, C)
            with held_writes():
                made = await walk(w, chunk_ids=ids, wanted=[0, 1, 2], durable=False)
                assert [(reply.index, reply.outcome, reply.durable) for reply in made] == [
                    (index, COMPUTED, False) for index in range(3)
                ]
            assert w.computer.publisher.flush(DEADLINE_S)
            again = await walk(w, chunk_ids=ids, wanted=[0, 1, 2], durable=False)
            assert [(reply.outcome, reply.durable) for reply in again] == [(ALREADY_STORED, True)] * 3

    run(body)


def test_what_is_not_wanted_is_made_where_it_is_attended_to_and_not_answered_for(tiny: Loaded, store: Path) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            ids = await registered(w, A, B, C)
            (made,) = await walk(w, chunk_ids=ids, wanted=[1])
            assert (made.index, made.outcome) == (1, COMPUTED)
            keys = [chunk.key for chunk in key_composition(tiny.served.identity, [A, B, C], ReuseMode.EXACT)]
            assert [info is not None for info in w.service.store.lookup(keys)] == [True, True, False]

    run(body)


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"wanted": [0]}, StatusCode.INVALID_ARGUMENT, "chunk_ids: missing"),
        ({"chunk_ids": ["a"]}, StatusCode.INVALID_ARGUMENT, "wanted: missing"),
        ({"chunk_ids": ["a"], "wanted": [1]}, StatusCode.INVALID_ARGUMENT, "wanted: 1 is not a place"),
        ({"chunk_ids": ["a", "b"], "wanted": [1, 0]}, StatusCode.INVALID_ARGUMENT, "wanted: not ascending"),
        ({"chunk_ids": ["a", "b"], "wanted": [1, 1]}, StatusCode.INVALID_ARGUMENT, "wanted: not ascending"),
        ({"chunk_ids": ["a"] * 1026, "wanted": [0]}, StatusCode.INVALID_ARGUMENT, "chunk_ids: 1026"),
        ({"chunk_ids": ["a" * 129], "wanted": [0]}, StatusCode.INVALID_ARGUMENT, r"chunk_ids\[0\]"),
        ({"chunk_ids": ["a"], "wanted": [0], "salt": "s" * 257}, StatusCode.INVALID_ARGUMENT, "salt"),
        ({"chunk_ids": ["feed"], "wanted": [0]}, StatusCode.NOT_FOUND, "chunk_ids"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny: Loaded, store: Path, fields: dict[str, Any], code: StatusCode, words: str
) -> None:
    async def body() -> None:
        async with worker(tiny, store) as w:
            found, details = await refusal(walk(w, **fields))
            assert found is code and re.search(words, details)

    run(body)
