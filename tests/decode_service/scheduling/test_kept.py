"""What a request that keeps its turn leaves in the pool: the KV of its query and its answer, token by token."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from chunk_store.key import ChunkKey
from decode_service.scheduling import kept
from decode_service.scheduling.kept import Keep
from decode_service.scheduling.sequence import Finished, FinishReason, Sequence
from tests.decode_service.content import content_request
from tests.decode_service.device.running import DEADLINE_S
from tests.decode_service.test_packed import Served, served


def in_device_thread(it: Served, look: Callable[[], Any]) -> Any:
    seen: list[Any] = []
    done = threading.Event()

    def call() -> None:
        try:
            seen.append(look())
        finally:
            done.set()

    it.worker.call(call)
    assert done.wait(DEADLINE_S) and seen
    return seen[0]


def keeping(name: str, rng: random.Random, **options: Any) -> Sequence:
    sequence = content_request(name, rng, **options)
    sequence.bypass = False
    sequence.keep = Keep(lambda _: True)
    return sequence


def check_left(it: Served, sequence: Sequence, answer: list[int]) -> None:
    """The tokens and positions that the runner wrote."""
    keep, pool = sequence.keep, it.residents.pool
    assert keep is not None and keep.left is not None
    tokens, start = [*sequence.composition.tail, *answer], sequence.composition.tail_start
    first, count = keep.left.run.first * pool.page_size, keep.left.tokens
    assert count >= len(tokens) - (not it.runner.runs_ahead)
    assert pool.keys[0][first : first + count, 0, 0].long().tolist()[: len(tokens)] == tokens[:count]
    written = pool.values[0][first : first + count, 0, 0].long().tolist()
    assert written == list(range(start, start + count))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {"packs": True, "runs_ahead": True},
        {"packs": True, "runs_ahead": True, "long": 9},
        {"packs": True, "runs_ahead": False},
    ],
)
def test_a_turn_is_left_as_it_was_written(options: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    with served(**options) as it:
        sequences = [keeping(f"{n}", rng) for n in range(24)]
        for n, sequence in enumerate(sequences):
            it.submit(sequence)
            if rng.random() < 0.2:
                it.worker.end(f"{n}", FinishReason.ABORT)
            answer, end = it.answer(f"{n}")
            assert isinstance(end, Finished)
            if not answer or (sequence.keep is not None and sequence.keep.pool_full):
                continue
            in_device_thread(it, partial(check_left, it, sequence, answer))
            if rng.random() < 0.5:
                chunk = in_device_thread(it, partial(kept.name, it.residents, sequence.keep, ChunkKey(f"t{n}"), 1))
                assert (chunk.key, chunk.tokens, chunk.ready) == (f"t{n}", 1, True)
                in_device_thread(it, partial(it.residents.release, chunk))
            for _ in range(2):
                in_device_thread(it, partial(kept.forget, it.residents, sequence.keep))
        it.check_idle()


def test_nothing_is_left_of_a_call_that_is_over_before_its_answer() -> None:
    rng = random.Random(1)
    with served(packs=True, runs_ahead=True) as it:
        sequence = keeping("gone", rng, max_tokens=25)
        it.submit(sequence)
        in_device_thread(it, partial(kept.forget, it.residents, sequence.keep))
        it.worker.end("gone", FinishReason.ABORT)
        it.answer("gone")
        assert sequence.keep is not None and sequence.keep.left is None
        it.check_idle()


def test_a_pool_that_is_full_of_chunks_in_use_keeps_no_turn() -> None:
    rng = random.Random(2)
    with served(packs=True, runs_ahead=True) as it:
        pool = it.residents.pool
        fills = it.residents.reserve(ChunkKey("all"), pool.chunk_pages * pool.page_size)
        sequence = keeping("one", rng, max_tokens=3)
        sequence.composition = content_request("x", random.Random(5)).composition
        while sequence.composition.chunks:
            sequence.composition = content_request("x", rng).composition
        it.submit(sequence)
        it.answer("one")
        assert sequence.keep is not None and sequence.keep.pool_full and sequence.keep.left is None
        in_device_thread(it, partial(it.residents.release, fills))
        it.check_idle()


def test_a_turn_that_is_here_already_is_not_kept_twice() -> None:
    rng = random.Random(3)
    with served(packs=True, runs_ahead=True) as it:
        for name in ("first", "second"):
            sequence = keeping(name, rng, max_tokens=3)
            it.submit(sequence)
            it.answer(name)
            chunk = in_device_thread(it, partial(kept.name, it.residents, sequence.keep, ChunkKey("turn"), 2))
            assert (chunk is None) == (name == "second")
            if chunk is not None:
                in_device_thread(it, partial(it.residents.release, chunk))
        it.check_idle()
