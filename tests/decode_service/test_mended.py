"""Races, leaks and stuck requests: each was found by reading the code and failed here first."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cairn
from engine.sampling.params import Choice
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair, wait_until

PAGE = 16


def ask(services: Pair, parts, **options):
    """A request on its way, in a thread of its own."""
    threads = ThreadPoolExecutor(1)
    future = threads.submit(services.generate, parts, **options)
    threads.shutdown(wait=False)
    return future


@pytest.fixture
def small(folder: Path, tmp_path: Path):
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store", kv_pages=20, waiting_max=4, batch_max=2
    ) as services:
        yield services
        services.check_idle()


def test_a_repeated_chunk_that_bypasses_is_counted_each_time(small: Pair) -> None:
    """Six pages twice do not fit into ten: it was admitted to the queue, never fitted, and blocked everyone."""
    chunk = tokens(1, 6 * PAGE)
    with pytest.raises(cairn.Unsupported, match="12 pages"):
        small.generate([chunk, chunk, [5]], reuse="independent", cache="bypass", timeout_s=5)
    assert small.generate([chunk, chunk, [5]], reuse="independent").usage.cached_tokens == 6 * PAGE


def test_abort_while_waiting_ends_with_a_report(small: Pair) -> None:
    with small.held_decode():
        running = ask(small, [tokens(2, 20), [5]], request_id="waits")
        wait_until(lambda: small.client.loads().waiting == 1)
        assert small.client.abort("waits")
    result = running.result(60)
    assert (result.finish_reason, result.token_ids) == ("abort", ())
    assert result.usage == cairn.Usage(0, 0, 0, 0)


def test_abort_while_filling_claims_no_reuse(small: Pair) -> None:
    with small.held_prefill():
        running = ask(small, [tokens(3, 20), [5]], request_id="fills")
        wait_until(lambda: small.client.loads().running == 1)
        assert small.client.abort("fills")
        result = running.result(60)
    assert result.usage == cairn.Usage(0, 0, 0, 0)
    assert all(segment.cached_tokens == 0 for segment in result.reuse.segments)


def test_abort_before_the_request_is_queued(small: Pair) -> None:
    """Abort says that it found the request: then the request must end."""
    resolver = small.decode.resolver
    resolve, reached, release = resolver.resolve, threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        reached.set()
        release.wait(60)
        return resolve(*args, **kwargs)

    resolver.resolve = slow
    try:
        running = ask(small, [tokens(4, 20), [5]], max_tokens=100, request_id="early")
        assert reached.wait(60)
        assert small.client.abort("early")
        release.set()
        assert running.result(60).finish_reason == "abort"
    finally:
        resolver.resolve = resolve


def test_one_who_waits_for_a_fill_does_not_fail_for_what_it_did_not_ask(small: Pair) -> None:
    """The filler's first chunk cannot be had; the other request only wants the second."""
    shared = tokens(5, 20)
    doomed = small.client.prefill(
        tokens(6, 20), context=[small.client.prefill([9, 9], durable=True)], durable=True
    )  # other KV than is asked for
    with small.held_decode():
        filler = ask(small, [doomed, shared, [5]], reuse="independent")
        wait_until(lambda: small.client.loads().waiting == 1)
        waiter = ask(small, [shared, [6]], reuse="independent")
        wait_until(lambda: small.client.loads().waiting == 2)
        small.client.delete(doomed)
    with pytest.raises(cairn.NotFound):
        filler.result(60)
    assert waiter.result(60).usage.prompt_tokens == 21


def test_what_is_held_back_by_compaction_is_tried_again_at_once(small: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """[X, A, B] with X in the middle of the region needs one compaction; that is no reason to wait for a timer."""
    monkeypatch.setattr("decode_service.device.inbox.IDLE_WAIT_S", 60.0)
    small.generate([tokens(7, 3 * PAGE), [5]], reuse="independent")
    small.generate([tokens(8, 2 * PAGE), [5]], reuse="independent")
    residents = small.decode.worker.residents
    first = next(iter(residents._chunks))
    small.in_device_thread(lambda: residents.evict(first))
    result = small.generate([tokens(8, 2 * PAGE), tokens(9, 4 * PAGE), tokens(10, 4 * PAGE), [5]], reuse="independent")
    assert result.timings.queue_s < 30.0
    assert result.reuse.segments[0].source == "device"


def test_resident_chunks_of_a_request_are_not_evicted_for_its_other_chunks(small: Pair) -> None:
    old, new = tokens(11, 4 * PAGE), tokens(12, 4 * PAGE)
    small.generate([old, [5]], reuse="independent")
    small.generate([tokens(13, 4 * PAGE), [5]], reuse="independent")
    result = small.generate([new, old, [5]], reuse="independent")
    assert [segment.source for segment in result.reuse.segments] == ["computed", "device", "computed"]


def test_a_stop_token_outside_the_vocabulary_is_refused(small: Pair) -> None:
    with pytest.raises(cairn.InvalidRequest, match="stop_token_ids"):
        small.generate([[5, 6]], stop_token_ids=[10**6], min_tokens=2)


def test_a_row_without_a_number_to_choose_by_ends_its_own_request_only(small: Pair) -> None:
    with small.held_decode():
        good = ask(small, [[5, 6, 7]], max_tokens=20)
        bad = ask(small, [[8, 9]], max_tokens=20, temperature=1.0, request_id="bad")
        wait_until(lambda: small.client.loads().waiting == 2)
        worker = small.decode.worker

        def sabotage() -> None:
            found = next((s for s in worker.scheduler.everyone if s.request_id == "bad"), None)
            if found is None:  # it has its place, and comes to the worker in a moment
                worker.call(sabotage)
                return
            runner: Any = worker.runner
            begin = runner.begin

            def fails_later(batch):
                step = begin(batch)
                draws = [rows.draw for rows in batch if rows.draw is not None]
                lost = [draw.slot == found.slot and draw.index == 3 for draw in draws]
                choices = [Choice(-1, None) if none else c for none, c in zip(lost, step.choices, strict=True)]
                return replace(step, choices=choices)

            runner.begin = fails_later

        worker.call(sabotage)
    with pytest.raises(cairn.ServerError, match="ArithmeticError"):
        bad.result(60)
    assert len(good.result(60).token_ids) == 20


def test_the_device_thread_dies(folder: Path, tmp_path: Path) -> None:
    """Broken bookkeeping ends the thread: everyone is told at once, and so is everyone who comes later."""
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store") as services:
        running = ask(services, [tokens(14, 20), [5]], max_tokens=1000)
        wait_until(lambda: services.metric("cairn_decode_steps_total") > 0)

        def break_it() -> None:
            raise RuntimeError("a page has two owners")

        services.decode.worker.call(break_it)
        with pytest.raises(cairn.ServerError, match="RuntimeError"):
            running.result(60)
        with pytest.raises(cairn.CairnError, match="restart"):  # and not the deadline
            services.generate([tokens(14, 20), [5]], timeout_s=60)
        with pytest.raises(cairn.CairnError, match="restart"):
            services.client.explain([tokens(14, 20), [5]], timeout_s=60)


def test_inline_content_leaves_a_pin_and_a_ttl_alone(small: Pair) -> None:
    chunk = small.client.prefill(tokens(15, 20), pin=True, ttl_s=1000, name="kept", durable=True)
    small.generate([tokens(15, 20), [5]])
    record = small.client.get(chunk)
    assert record.pinned and record.expires_unix_s and record.name == "kept"


@pytest.mark.parametrize("known", ["nothing", "stored", "resident"])
@pytest.mark.parametrize("cache", ["shared", "bypass"])
def test_explain_of_a_repeated_chunk_says_what_generate_will(small: Pair, known: str, cache: str) -> None:
    chunk = tokens(16, 20)
    options: dict[str, Any]
    parts, options = [chunk, chunk, [5]], {"reuse": "independent", "cache": cache}
    if known != "nothing":
        small.generate(parts, reuse="independent")
    if known == "stored":
        small.forget()
    expected = small.client.explain(parts, **options)
    result = small.generate(parts, **options)
    assert expected.cached_tokens == result.usage.cached_tokens
    assert expected.computed_tokens == result.usage.computed_tokens
    for said, done in zip(expected.reuse.segments, result.reuse.segments, strict=True):
        assert (said.source, said.cached_tokens, said.miss_reason) == (
            done.source,
            done.cached_tokens,
            done.miss_reason,
        )
    assert expected.bytes_to_load == (
        small.decode.worker.residents.pool.layout.nbytes(20) if known == "stored" and cache == "shared" else 0
    )


def test_compaction_leaves_a_chunk_that_is_being_filled_where_it_is(small: Pair) -> None:
    """A chunk of six pages would fit if the one being filled moved; its bytes are on their way to the old place."""
    small.generate([tokens(17, 3 * PAGE), [5]], reuse="independent")
    before = next(iter(small.decode.worker.residents._chunks))
    filled, wide = tokens(18, 3 * PAGE), tokens(19, 6 * PAGE)
    with small.held_prefill():
        first = ask(small, [filled, [5]], reuse="independent", logprobs=True)
        wait_until(lambda: small.client.loads().running == 1)
        small.in_device_thread(lambda: small.decode.worker.residents.evict(before))
        second = ask(small, [wide, [5]], reuse="independent", logprobs=True)
        wait_until(lambda: small.client.loads().waiting == 1)
        small.in_device_thread(lambda: None)
    for parts, result in (([filled, [5]], first.result(60)), ([wide, [5]], second.result(60))):
        bypass = small.generate(parts, reuse="independent", cache="bypass", logprobs=True)
        assert result.token_ids == bypass.token_ids
        assert result.logprobs == pytest.approx(bypass.logprobs, abs=1e-5)


def test_a_chunk_that_moves_while_it_is_read(small: Pair) -> None:
    """Compaction between two steps of a running request: it goes on reading at the new place."""
    residents = small.decode.worker.residents
    small.generate([tokens(20, 3 * PAGE), [5]], reuse="independent")
    before = next(iter(residents._chunks))
    options: dict[str, Any]
    parts, options = [tokens(21, 3 * PAGE), [5]], {"reuse": "independent", "logprobs": True, "ignore_eos": True}
    stream = small.client.generate(parts, max_tokens=120, **options)
    next(stream)
    small.in_device_thread(lambda: residents.evict(before))
    with small.held_decode():
        wide = ask(small, [tokens(22, 6 * PAGE), [5]], max_tokens=4, reuse="independent")
        wait_until(lambda: small.client.loads().waiting == 1)
        assert (small.client.loads().running, residents.moves) == (1, 0)
    moved = stream.finish()
    assert wide.result(60).token_ids and residents.moves == 1
    bypass = small.generate(parts, 120, cache="bypass", **options)
    assert moved.token_ids == bypass.token_ids
    assert moved.logprobs == pytest.approx(bypass.logprobs, abs=1e-5)  # two rows meanwhile: other kernels
