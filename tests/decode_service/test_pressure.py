"""More work than there is room for: who waits holds up nobody who need not wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from cairn import Result
from chunk_store.tenant import DEFAULT_TENANT
from engine.run.protocol import StepRows
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair, wait_until

PAGE = 16


def later(services: Pair, parts: list[Any], **options: Any) -> Future[Result]:
    threads = ThreadPoolExecutor(1)
    future = threads.submit(services.generate, parts, **options)
    threads.shutdown(wait=False)
    return future


@contextmanager
def asking(services: Pair) -> Iterator[list[Sequence[int]]]:
    """Which chunks the prefill service is asked for, in each call."""
    source, asked = services.decode.worker.loader.source, []
    compute_all = source.prefill_client.compute_all

    def noted(*arguments: Any) -> Any:
        asked.append(arguments[1])
        return compute_all(*arguments)

    source.prefill_client.compute_all = cast(Any, noted)
    try:
        yield asked
    finally:
        source.prefill_client.compute_all = compute_all


def test_cold_requests_behind_a_hung_prefill_block_no_other(folder: Path, tmp_path: Path) -> None:
    """More cold ones than may decode together, and than may wait for KV: resident and stored KV is served meanwhile."""
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", batch_max=4, kv_pages=256
    ) as services:
        warm, stored, joined = tokens(1, 40), tokens(2, 40), tokens(3, 40)
        expected = services.generate([warm, [5]]), services.generate([stored, [5]])
        key = next(key for key, c in services.decode.worker.residents._chunks.items() if c.tokens == 40)
        residents = services.decode.worker.residents
        services.in_device_thread(lambda: residents.evict(list(residents._chunks)[-1]))
        assert key in residents._chunks
        with services.held_prefill(), asking(services) as asked:
            cold = [later(services, [tokens(100 + n, 20), [5]]) for n in range(12)]
            cold += [later(services, [joined, [5 + n]]) for n in range(12)]
            wait_until(lambda: len(asked) == 4 and services.client.loads().waiting == 20)
            assert services.generate([warm, [5]], timeout_s=20).token_ids == expected[0].token_ids
            found = services.generate([stored, [5]], timeout_s=20)
            assert found.token_ids == expected[1].token_ids and found.reuse.segments[0].source == "store"
            many = services.together([[warm, [5 + n]] for n in range(8)])
            assert {result.reuse.segments[0].source for result in many} == {"device"}
            assert len(asked) == 4
        assert all(future.result(30).token_ids for future in cold)
        services.check_idle()


def test_a_large_request_lets_small_ones_pass(folder: Path, tmp_path: Path) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", kv_pages=40) as services:
        with services.client.generate([tokens(5, 10 * PAGE)], max_tokens=10 * PAGE, ignore_eos=True) as long:
            next(iter(long))
            large = later(services, [tokens(6, 15 * PAGE)])
            wait_until(lambda: services.client.loads().waiting == 1)
            small = [services.generate([[7 + n]], 4) for n in range(3)]
            assert all(len(result.token_ids) == 4 for result in small)
        assert large.result(30).token_ids
        services.check_idle()


@contextmanager
def recorded(services: Pair) -> Iterator[list[str]]:
    """What the device thread runs: "piece" or "step"."""
    runner, ran = services.decode.worker.runner, []
    begin = runner.begin

    def noted(batch: Sequence[StepRows]) -> Any:
        ran.append("piece" if batch[0].alone else "step")
        return begin(batch)

    runner.begin = cast(Any, noted)
    try:
        yield ran
    finally:
        del runner.begin


@pytest.mark.parametrize("cache", ["shared", "bypass"])
def test_a_long_query_comes_in_pieces_with_steps_between_them(folder: Path, tmp_path: Path, cache: str) -> None:
    """Also a chunk that is computed in the decode service comes piece by piece."""
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s") as services:
        parts = [tokens(1, 700), [5]] if cache == "bypass" else [tokens(1, 700)]
        alone = services.generate(parts, cache=cache, logprobs=True)
        with services.client.generate([[6]], max_tokens=900, ignore_eos=True) as stream:
            next(iter(stream))
            with recorded(services) as ran:
                beside = services.generate(parts, cache=cache, logprobs=True)
        first, last = ran.index("piece"), len(ran) - ran[::-1].index("piece")
        gaps = "".join(word[0] for word in ran[first:last]).split("p")[1:-1]
        assert len(gaps) >= 10 and all(len(steps) >= 3 for steps in gaps[:10])
        assert beside.token_ids == alone.token_ids
        assert beside.logprobs == pytest.approx(alone.logprobs, abs=1e-5)
        services.check_idle()


def test_who_joined_a_chunk_that_is_computed_here_goes_on_when_its_owner_leaves(folder: Path, tmp_path: Path) -> None:
    """The owner of a chunk that cannot be stored is aborted before it has computed it."""
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s") as services:
        chunk, reached, release = tokens(1, 40), threading.Event(), threading.Event()
        expected = services.generate([chunk, [6]], cache="bypass")
        runner = services.decode.worker.runner
        services.decode.worker.loader.source.full._until[DEFAULT_TENANT] = float("inf")
        real = runner.begin

        def held(batch: Sequence[StepRows]) -> Any:
            reached.set()
            assert release.wait(20)
            if len(batch[0].sources) != 30:
                del runner.begin
            return real(batch)

        runner.begin = cast(Any, held)
        other = later(services, [tokens(2, 30), [5]], reuse="independent")
        assert reached.wait(20)  # the device thread stands still in another request's chunk
        owner = later(services, [chunk, [5]], request_id="owner")
        wait_until(lambda: services.client.loads().waiting == 1)
        joined = later(services, [chunk, [6]])
        wait_until(lambda: services.client.loads().waiting == 2)
        assert services.client.abort("owner")
        release.set()
        assert other.result(20).reuse.segments[0].unpublished == "store_full"
        assert owner.result(20).finish_reason == "abort"
        result = joined.result(20)
        assert result.token_ids == expected.token_ids
        services.check_idle()
