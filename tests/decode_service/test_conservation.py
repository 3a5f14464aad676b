"""Hit + computed = prompt tokens, for each request and in the metrics; and every page comes back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import cairn
from cairn import Client, Result
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair, wait_until


@pytest.fixture
def fresh(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    """A pool that holds about half of what the workloads below want at once."""
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store", kv_pages=64, batch_max=6
    ) as services:
        yield services
        services.check_idle()


def workload(seed: int, count: int) -> list[tuple[list[list[int]], dict[str, Any]]]:
    draw = random.Random(seed)
    documents = [tokens(900 + index, draw.choice((1, 15, 16, 17, 60))) for index in range(6)]
    return [
        (
            [*draw.choices(documents, k=draw.randint(0, 4)), tokens(draw.randrange(10**6), draw.randint(1, 20))],
            {
                "max_tokens": draw.randint(1, 12),
                "reuse": draw.choice(("exact", "exact", "anchored", "independent")),
                "cache": draw.choice(("shared", "shared", "shared", "bypass")),
                "salt": draw.choice(("", "", "tenant")),
            },
        )
        for _ in range(count)
    ]


def check_usage(parts: list[list[int]], result: Result) -> None:
    usage, segments = result.usage, result.reuse.segments
    assert usage.prompt_tokens == sum(map(len, parts)) == usage.cached_tokens + usage.computed_tokens
    assert [segment.tokens for segment in segments] == [len(part) for part in parts]
    assert sum(segment.cached_tokens for segment in segments) == usage.cached_tokens
    for segment in segments:
        assert segment.cached_tokens in (0, segment.tokens)
        assert (segment.source == "computed") == (segment.cached_tokens == 0)


def counted(services: Pair) -> dict[str, float]:
    names = {source: "cairn_prompt_tokens_by_source_total" for source in ("device", "host", "store", "computed")}
    found = {source: services.metric(name, source=source) for source, name in names.items()}
    return {**found, "prompt": services.metric("cairn_prompt_tokens_total")}


@pytest.mark.parametrize("seed", range(4))
def test_a_random_workload_adds_up(fresh: Pair, seed: int) -> None:
    requests = workload(seed, 40)
    with ThreadPoolExecutor(10) as threads:
        results = list(threads.map(lambda request: fresh.generate(request[0], **request[1]), requests))
    for (parts, _), result in zip(requests, results, strict=True):
        check_usage(parts, result)
    total = counted(fresh)
    assert total["prompt"] == sum(result.usage.prompt_tokens for result in results)
    assert total["computed"] == sum(result.usage.computed_tokens for result in results)
    assert total["device"] + total["store"] == sum(result.usage.cached_tokens for result in results)
    assert total["computed"] > 0 and total["device"] > 0 and total["host"] == 0
    assert fresh.metric("cairn_generation_tokens_total") == sum(len(result.token_ids) for result in results)
    assert fresh.metric("cairn_request_success_total") == len(requests)
    misses = sum(1 for result in results for segment in result.reuse.segments if segment.miss_reason)
    assert fresh.metric("cairn_cache_misses_total") == misses


def test_the_prefill_service_counts_the_same_computed_tokens(fresh: Pair) -> None:
    """Chunks that the decode service reports as computed are those that the prefill service computed."""
    documents = [tokens(950 + index, 20 + index) for index in range(4)]
    results = [fresh.generate([*documents[: 1 + n], tokens(970 + n, 5)]) for n in range(4) for _ in range(2)]
    chunks = sum(s.tokens for r in results for s in r.reuse.segments[:-1] if s.source == "computed")
    assert chunks == sum(map(len, documents))
    assert fresh.metric("cairn_prefill_tokens_total", "prefill", source="computed") == chunks


def call_of(services: Pair, request_id: str, parts: list[list[int]], timeout_s: float = 30.0) -> Any:
    """A raw Generate call, so that it can be cancelled and read at will."""
    from cairn.client import calls

    request = calls.generate_request(parts, {"max_tokens": 900, "ignore_eos": True, "request_id": request_id})
    return services.client._services["decode"].stubs[0].Generate(request, timeout=timeout_s)


def queued(services: Pair) -> Callable[[], bool]:
    return lambda: services.client.loads().waiting >= 1


def admitted(services: Pair) -> Callable[[], bool]:
    return lambda: services.client.loads().running >= 1


ENDS = ("cancel", "disconnect", "deadline", "abort")


@pytest.fixture(scope="module")
def victim(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    store = tmp_path_factory.mktemp("ends")
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, kv_pages=256) as services:
        yield services


def end(services: Pair, how: str, call: Any, other: Client, request_id: str) -> None:
    if how == "cancel":
        call.cancel()
    elif how == "disconnect":
        other.close()
    elif how == "abort":
        assert services.client.abort(request_id)


def outcome(call: Any) -> str:
    """How a call ended: a finish reason, or a status."""
    try:
        *_, last = call
        return last.complete.finish_reason
    except grpc.RpcError as error:
        return error.code().name


EXPECTED = {"cancel": "CANCELLED", "disconnect": "CANCELLED", "deadline": "DEADLINE_EXCEEDED", "abort": "abort"}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("stage", ["waiting", "filling", "prefill", "decode"])
def test_every_end_in_every_stage_gives_all_pages_back(victim: Pair, stage: str, how: str) -> None:
    seed = 10_000 + 100 * ENDS.index(how)
    chunk = tokens(seed + ("waiting", "filling", "prefill", "decode").index(stage), 40)
    request_id, timeout_s = f"{stage}-{how}", 0.4 if how == "deadline" else 30.0
    hold = {"waiting": victim.held_decode, "filling": victim.held_prefill}.get(stage)
    with Client(victim.prefill_address, victim.decode_address) as other:
        services = Pair.__new__(Pair)
        services.client = other
        if hold is not None:
            with hold():
                call = call_of(services, request_id, [chunk, [5]], timeout_s)
                wait_until(queued(victim) if stage == "waiting" else admitted(victim))
                end(victim, how, call, other, request_id)
                if stage == "filling":
                    assert outcome(call) == EXPECTED[how]
                    wait_until(lambda: victim.client.loads().running == 0)
                elif how == "deadline":
                    assert outcome(call) == EXPECTED[how]
            if stage == "waiting" and how != "deadline":
                assert outcome(call) == EXPECTED[how]
        else:
            query = tokens(seed + 50, 1000) if stage == "prefill" else [5]  # 16 pieces
            call = call_of(services, request_id, [chunk, query], timeout_s)
            if stage == "decode":
                next(call)
            else:
                wait_until(admitted(victim))
            end(victim, how, call, other, request_id)
            assert outcome(call) == EXPECTED[how]
    victim.check_idle()


def test_a_chunk_of_an_aborted_fill_is_there_for_the_next(victim: Pair) -> None:
    """Aborted while loading: the fill goes on into its own pages, and whoever joined it is served."""
    chunk = tokens(20_000, 40)
    with victim.held_prefill():
        first = call_of(victim, "first", [chunk, [5]])
        wait_until(admitted(victim))
        joined: Future[Result] = ThreadPoolExecutor(1).submit(victim.generate, [chunk, [6]])
        wait_until(lambda: victim.client.loads().running == 2)
        first.cancel()
        wait_until(lambda: victim.client.loads().running == 1)
    assert joined.result(20).reuse.segments[0].source == "device"
    assert victim.generate([chunk, [6]], cache="bypass").token_ids == joined.result().token_ids
    victim.check_idle()


def test_an_abandoned_prefill_is_not_waited_for(victim: Pair) -> None:
    """Nobody wants the KV any more: the loader gives up long before the prefill service answers."""
    with victim.held_prefill():
        call = call_of(victim, "abandoned", [tokens(20_001, 40), [5]])
        wait_until(admitted(victim))
        call.cancel()
        wait_until(lambda: victim.in_device_thread(lambda: victim.decode.worker.residents.held) == 0, 3.0)
    wait_until(lambda: victim.prefill.jobs.queue.jobs == 0)  # what it had begun counts as computed, too


def test_two_who_want_the_same_absent_chunk_compute_it_once(victim: Pair) -> None:
    chunk = tokens(20_002, 40)
    before = victim.metric("cairn_prefill_tokens_total", "prefill", source="computed")
    results = victim.together([[chunk, [7 + n]] for n in range(8)])
    assert victim.metric("cairn_prefill_tokens_total", "prefill", source="computed") - before == 40
    assert sorted(result.reuse.segments[0].source for result in results) == ["computed"] + ["device"] * 7
    victim.check_idle()


def test_cancelled_at_random_moments(fresh: Pair) -> None:
    """Many streams, most of them left early, while a pool that is too small evicts and compacts."""
    draw = random.Random(3)
    stop = time.monotonic() + 4

    def one(worker: int) -> None:
        index = 0
        while time.monotonic() < stop:
            index += 1
            parts, options = workload(1000 * worker + index, 1)[0]
            try:
                with fresh.client.generate(parts, ignore_eos=True, **options) as stream:
                    wait_s = draw.random() * 0.05
                    timer = threading.Timer(wait_s, stream.close)
                    timer.start()
                    for _ in stream:
                        pass
                    timer.cancel()
            except (cairn.CairnError, RuntimeError):
                continue

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(8)))
    fresh.check_idle()
    total = counted(fresh)
    assert total["prompt"] == total["computed"] + total["device"] + total["store"] > 0


@pytest.mark.parametrize("identical", [True, False])
def test_64_requests_keep_one_copy_of_a_document(folder: Path, tmp_path: Path, identical: bool) -> None:
    document = tokens(30_000, 1000)
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store", kv_pages=512, batch_max=64
    ) as services:
        queries = [tokens(30_001 + (0 if identical else n), 6) for n in range(64)]
        with ThreadPoolExecutor(64) as threads:
            with services.held_decode():
                futures = [threads.submit(services.generate, [document, query], 40) for query in queries]
                wait_until(lambda: services.client.loads().waiting == 64)
            results = [future.result(60) for future in futures]
        assert services.client.loads().chunks_resident == 1
        assert services.metric("cairn_kv_pages", owner="chunk") == 63  # of 16 tokens: ceil(1000 / 16)
        read, flat = (services.metric(f"cairn_decode_bytes_{name}_total") for name in ("read", "flat"))
        steps, token = (
            services.metric("cairn_decode_steps_total"),
            services.decode.worker.residents.pool.layout.nbytes(1),
        )
        rows = services.metric("cairn_generation_tokens_total") - 64
        own = sum(6 + n for _ in range(64) for n in range(1, 40)) * token  # what each row reads of its own tail
        assert read == own + steps * 1000 * token
        assert flat == own + rows * 1000 * token
        assert flat > 10 * read * rows / steps / 64
        assert len({result.token_ids for result in results}) == 1 or not identical
        services.check_idle()
