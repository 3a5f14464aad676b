"""One process with one pool: answers read what prefill computed without a load, with the bits of two processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import cairn
from cairn import ChunkRef, Client
from chunk_store.local.blobs import FileBlobs
from chunk_store.open import open_store
from chunk_store.store import Busy, Stored
from decode_service.scheduling.line import STEPS_A_PIECE
from serving.publishing.publisher import Publisher
from serving.publishing.staging import Staging
from tests.cairn.local.together.one_process import Together, together
from tests.decode_service.models import loaded, model_dir, tokens
from tests.decode_service.pair import pair, wait_until

PLANES = 6  # of an entry: keys and values of three layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def running(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Together]:
    with together(loaded(folder, "decode"), tmp_path_factory.mktemp("store")) as services:
        yield services


@pytest.fixture
def on(running: Together) -> Iterator[Together]:
    """Whatever a test does to them, no page, claim or byte of room may be lost."""
    yield running
    running.check_idle()


def sources(result: cairn.Result) -> list[str]:
    return [segment.source for segment in result.reuse.segments[:-1]]


def test_what_prefill_computed_is_resident_for_answers_and_durable_soon(on: Together) -> None:
    document, question = tokens(1, 100), tokens(2, 9)
    chunk = on.client.prefill(document)
    assert on.metric("cairn_store_load_seconds_count") == 0
    answer = on.generate([ChunkRef(chunk.id), question])
    assert sources(answer) == ["device"]
    assert answer.token_ids == on.generate([document, question], cache="bypass").token_ids
    on.flush()
    assert on.client.prefill(document).outcome == "already_stored"
    on.forget()
    again = on.generate([document, question])
    assert sources(again) == ["store"] and again.token_ids == answer.token_ids


@pytest.mark.parametrize("mode", ["exact", "anchored", "independent"])
def test_missing_chunks_are_computed_in_the_request_and_stored_behind_it(on: Together, mode: Any) -> None:
    seed = {"exact": 10, "anchored": 20, "independent": 30}[mode]
    documents, question = [tokens(seed + n, 30 + 20 * n) for n in range(3)], tokens(seed + 9, 7)
    cold = on.generate([*documents, question], reuse=mode)
    assert sources(cold) == ["computed"] * 3 and cold.timings.prefill_s > cold.timings.forward_s / 10
    assert [segment.unpublished for segment in cold.reuse.segments[:-1]] in ([""] * 3, [None] * 3)
    on.flush()
    warm = on.generate([*documents, question], reuse=mode)
    on.forget()
    stored = on.generate([*documents, question], reuse=mode)
    assert sources(warm) == ["device"] * 3 and sources(stored) == ["store"] * 3
    plain = on.generate([*documents, question], reuse=mode, cache="bypass")
    assert cold.token_ids == warm.token_ids == stored.token_ids == plain.token_ids


def stored_bytes(url: str) -> dict[str, list[bytes]]:
    """The planes of every entry of a store, by key."""
    store = open_store(url)
    found: dict[str, list[bytes]] = {}
    for entry in store.list_entries():
        record = store.get_records([entry.chunk_id])[0]
        assert record is not None
        planes = [bytearray(entry.nbytes // PLANES) for _ in range(PLANES)]
        assert store.load(entry.key, record.token_ids, [memoryview(plane) for plane in planes]) is None
        found[entry.key] = [bytes(plane) for plane in planes]
    store.close()
    return found


def test_bits_are_those_of_two_processes(on: Together, folder: Path, tmp_path: Path) -> None:
    parts, url = [tokens(40, 80), tokens(41, 33), tokens(42, 6)], f"file://{tmp_path / 'store'}"
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), url) as two:
        separate = two.generate(parts, 12, logprobs=3)
    here = on.generate(parts, 12, logprobs=3)
    assert here.token_ids == separate.token_ids and here.logprobs == separate.logprobs
    on.flush()
    apart, shared = stored_bytes(url), stored_bytes(on.url)
    assert len(apart) == 2 and all(shared[key] == planes for key, planes in apart.items())


def test_those_who_want_the_same_at_once_compute_it_once(on: Together) -> None:
    document = tokens(50, 90)
    before = on.metric("cairn_publication_bytes_total", "prefill")
    with ThreadPoolExecutor(8) as threads:
        prefills = [threads.submit(on.client.prefill, document) for _ in range(4)]
        answers = on.together([[document, tokens(51, 5)]] * 4)
        assert {future.result(30).id for future in prefills}
    assert len({answer.token_ids for answer in answers}) == 1
    on.flush()
    nbytes = on.decode.worker.residents.pool.layout.nbytes(90)
    assert on.metric("cairn_publication_bytes_total", "prefill") - before == nbytes


def test_a_cold_chunk_is_computed_beside_streams_whose_gaps_stay_short(on: Together) -> None:
    """Pieces of at most one forward's tokens, and three steps of those who decode between two of them."""
    worker = on.decode.worker
    begin, ran = worker.runner.begin, [("s", 0)]

    def noted(batch: Any) -> Any:
        ran.append(("p", batch[0].sequence.rows) if batch[0].alone else ("s", 0))
        return begin(batch)

    with on.client.generate([tokens(60, 5)], max_tokens=400, ignore_eos=True) as stream:
        next(stream)
        worker.runner.begin = noted
        try:
            on.client.prefill(tokens(61, 1900))
            on.generate([tokens(62, 900), tokens(63, 4)], 1)
        finally:
            worker.runner.begin = begin
    kinds = "".join(kind for kind, _ in ran)
    between = [len(steps) for steps in kinds.strip("s").split("p")[1:-1] if steps]
    assert len(between) >= 20 and min(between[:20]) >= STEPS_A_PIECE, kinds  # the last pieces are short
    rows = 0
    for kind, count in ran:
        rows = rows + count if kind == "p" else 0
        assert rows <= worker.runner.piece_tokens, kinds


def test_tenants_see_nothing_of_each_other(on: Together) -> None:
    document, question = tokens(70, 60), tokens(71, 5)
    one, two = (Client(on.prefill_address, on.decode_address, timeout_s=30, salt=salt) for salt in ("one", "two"))
    with one, two:
        chunk = one.prefill(document)
        first = one.generate([ChunkRef(chunk.id), question], max_tokens=3).finish()
        assert sources(first) == ["device"]
        with pytest.raises(cairn.CairnError, match="chunk"):
            two.generate([ChunkRef(chunk.id), question], max_tokens=3).finish()
        other = two.generate([document, question], max_tokens=3).finish()
        assert sources(other) == ["computed"] and other.token_ids == first.token_ids


def test_what_is_deleted_leaves_the_pool_and_is_computed_anew(on: Together) -> None:
    document, question = tokens(80, 60), tokens(81, 5)
    chunk = on.client.prefill(document)
    on.client.delete(chunk.id)
    again = on.generate([document, question])
    assert sources(again) == ["computed"] and again.token_ids == on.generate([document, question]).token_ids


@pytest.mark.parametrize("by", ["abort", "cancel", "deadline"])
def test_whoever_goes_takes_its_claims_along(on: Together, by: str) -> None:
    """What it had claimed is free for another process at once, and what was computed of it is nowhere."""
    document = tokens({"abort": 90, "cancel": 91, "deadline": 92}[by], 1900)
    with on.held_decode():
        call = ThreadPoolExecutor(1).submit(on.client.prefill, document, timeout_s=0.5 if by == "deadline" else 30)
        time.sleep(0.7 if by == "deadline" else 0.1)
    if by == "deadline":
        with pytest.raises(cairn.CairnError):
            call.result(30)
    else:
        stream = on.client.generate([document, tokens(93, 5)], max_tokens=5, request_id=f"gone-{by}")
        (stream.close if by == "cancel" else lambda: on.client.abort(f"gone-{by}"))()
        call.result(30)
    on.check_idle()
    assert sources(on.generate([document, tokens(94, 4)], 2))[0] in ("device", "computed")


def test_a_key_that_another_process_computes_is_waited_for(on: Together) -> None:
    document, other = tokens(100, 50), open_store(on.url)
    known = {entry.key for entry in other.list_entries()}
    first = on.generate([document, tokens(102, 5)], 3)
    on.flush()
    (entry,) = [entry for entry in other.list_entries() if entry.key not in known]
    key = entry.key
    other.delete_chunks([entry.chunk_id])
    on.forget()
    claim = other.begin(key)
    assert not isinstance(claim, Stored | Busy)
    again = ThreadPoolExecutor(1).submit(on.generate, [document, tokens(102, 5)], 3)
    time.sleep(0.3)
    assert not again.done()
    claim.abort()  # it has died
    assert again.result(30).token_ids == first.token_ids
    other.close()


def test_a_full_store_refuses_chunks_and_no_answers(folder: Path, tmp_path: Path) -> None:
    with together(loaded(folder, "decode"), tmp_path / "store", store_capacity=1 << 16) as on:
        document, question = tokens(110, 400), tokens(111, 5)
        with pytest.raises(cairn.CairnError) as caught:
            on.client.prefill(document, durable=True)
        assert "room" in str(caught.value) or "capacity" in str(caught.value)
        answers = [on.generate([document, question]) for _ in range(2)]
        assert len({answer.token_ids for answer in answers}) == 1
        on.flush()
        other = on.generate([tokens(112, 400), question])
        assert other.reuse.segments[0].unpublished == "store_full"
        on.check_idle()


def test_a_pool_that_is_too_small_for_all_serves_them_in_turn(folder: Path, tmp_path: Path) -> None:
    with together(loaded(folder, "decode"), tmp_path / "store", kv_pages=96, batch_max=4) as on:
        with ThreadPoolExecutor(12) as threads:
            chunks = [threads.submit(on.client.prefill, tokens(200 + n, 300)) for n in range(6)]
            answers = [threads.submit(on.generate, [tokens(200 + n, 300), tokens(220 + n, 5)], 4) for n in range(6)]
            assert all(future.result(60) for future in chunks) and all(future.result(60) for future in answers)
        on.check_idle()


def test_a_store_that_stalls_holds_up_no_answer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written for now, and the queue is full: new documents are computed, used again, and stored later."""
    write, let_on = FileBlobs.write, threading.Event()

    def held(self: FileBlobs, *given: Any) -> None:
        assert let_on.wait(200)
        write(self, *given)

    monkeypatch.setattr(FileBlobs, "write", held)
    documents, question = [tokens(140 + n, 200) for n in range(4)], tokens(150, 4)
    with together(loaded(folder, "decode"), tmp_path / "store") as on:
        nbytes = on.pool.served.layout.nbytes(200)
        on.pool.publisher.room.nbytes_max = 2 * nbytes
        try:
            cold = [on.generate([document, question]) for document in documents]
            warm = [on.generate([document, question]) for document in documents]
            assert [sources(each) for each in (*cold, *warm)] == [["computed"]] * 4 + [["device"]] * 4
            assert not any(each.reuse.segments[0].unpublished for each in cold)
            assert on.pool.store.stats().entries == 0 and on.pool.publisher.room.waiting == 2 * nbytes
        finally:
            let_on.set()
        on.check_idle()
        assert on.pool.store.stats().entries == 4


def test_a_durable_job_goes_on_when_its_chunk_leaves_the_pool_before_there_is_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed again: its caller has time, and asked for it to be stored."""
    write, let_on = FileBlobs.write, threading.Event()

    def held(self: FileBlobs, *given: Any) -> None:
        assert let_on.wait(200)
        write(self, *given)

    monkeypatch.setattr(FileBlobs, "write", held)
    with together(loaded(folder, "decode"), tmp_path / "store") as on, ThreadPoolExecutor(1) as threads:
        nbytes = on.pool.served.layout.nbytes(200)
        on.pool.publisher.room.nbytes_max = nbytes
        client = Client(on.prefill_address, on.decode_address, timeout_s=60, wait_overloaded=False)
        with client:
            try:
                client.prefill(tokens(170, 200))
                job = threads.submit(client.prefill, tokens(171, 200), durable=True)
                wait_until(lambda: on.pool.publisher.room.waiting == nbytes)
                wait_until(lambda: len(on.pool.publisher.all_pending()) == 2)
                wait_until(lambda: on.in_device_thread(lambda: on.decode.worker.residents.held) == 1)
                on.forget()
                assert on.in_device_thread(lambda: len(on.decode.worker.residents)) == 1
            finally:
                let_on.set()
            assert job.result(60).durable
        on.check_idle()


def test_what_waits_in_memory_to_be_stored_is_used_and_not_taken_for_stored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card: KV passes through staging memory, and its pages have gone before it is written."""
    make = Publisher.__init__

    def staged(self: Publisher, *parts: Any, nbytes_max: int, **given: Any) -> None:
        make(self, *parts, nbytes_max=nbytes_max, staging=Staging(nbytes_max, torch.device("cpu")), **given)

    monkeypatch.setattr(Publisher, "__init__", staged)
    write, let_on = FileBlobs.write, threading.Event()

    def held(self: FileBlobs, *given: Any) -> None:
        assert let_on.wait(200)
        write(self, *given)

    monkeypatch.setattr(FileBlobs, "write", held)
    document, question = tokens(160, 200), tokens(161, 4)

    def leave(on: Together) -> None:
        """All chunks leave the pool, as soon as they are copied."""
        wait_until(lambda: on.in_device_thread(lambda: on.decode.worker.residents.held) == 0)
        on.forget()

    with together(loaded(folder, "decode"), tmp_path / "store", publish_queue=1 << 24) as on:
        with ThreadPoolExecutor(1) as threads:
            try:
                chunk = on.client.prefill(document)
                leave(on)
                answer = on.generate([ChunkRef(chunk.id), question])
                assert sources(answer) == ["host"]
                assert answer.token_ids == on.generate([document, question], cache="bypass").token_ids
                leave(on)
                assert not on.client.prefill(document).durable
                leave(on)
                waiting = threads.submit(on.client.prefill, document, durable=True)
                wait_until(lambda: on.in_device_thread(lambda: len(on.decode.worker.residents)) == 1)
                assert on.pool.store.stats().entries == 0 and not waiting.done()
            finally:
                let_on.set()
            assert waiting.result(60).durable and on.pool.store.stats().entries == 1
        on.check_idle()


def test_a_drain_writes_out_what_was_computed(folder: Path, tmp_path: Path) -> None:
    documents = [tokens(120 + n, 200) for n in range(4)]
    with together(loaded(folder, "decode"), tmp_path / "store") as on:
        answer = on.generate([*documents, tokens(130, 4)], reuse="independent")
        url = on.url
    assert len(stored_bytes(url)) == 4
    with together(loaded(folder, "decode"), tmp_path / "store") as on:
        again = on.generate([*documents, tokens(130, 4)], reuse="independent")
    assert sources(again) == ["store"] * 4 and again.token_ids == answer.token_ids
