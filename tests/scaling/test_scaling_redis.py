"""Two prefill and two decode services on one Redis: computed once, used by all, and what survives which death."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cairn import Result, Tokens, Unavailable
from tests.chunk_store.servers import Server, redis_server, redis_url
from tests.scaling.cluster import Cluster, Service, cluster, wait_until

pytestmark = pytest.mark.timeout(180)

QUERY = Tokens([20, 21, 22])
_seeds = itertools.count()


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert shutil.which("redis-server"), "redis-server is needed: see README, `make test`"
    server = redis_server(tmp_path_factory.mktemp("redis"), "--appendonly", "yes")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def workers(redis: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("workers"), redis_url(redis)) as running:
        yield running


def document(tokens: int) -> Tokens:
    """Content that no other test has used."""
    seed = next(_seeds)
    return Tokens([10 + (seed * 37 + place * (seed + 7)) % 350 for place in range(tokens)])


def answer(workers: Cluster, which: int, *parts: Any, **options: Any) -> Result:
    chosen = {"max_tokens": 4, "ignore_eos": True, **options}
    return workers.clients[which].generate([*parts, QUERY], **chosen).finish()


def test_a_document_prefilled_by_one_is_used_by_all(workers: Cluster) -> None:
    before = workers.computed()
    first, second = workers.clients
    chunk = first.prefill(document(100))
    assert (chunk.outcome, chunk.computed_tokens) == ("computed", 100)
    again = second.prefill(Tokens(first.get(chunk, token_ids=True).token_ids))
    assert (again.id, again.key, again.outcome) == (chunk.id, chunk.key, "already_stored")
    results = [answer(workers, which, chunk) for which in (0, 1)]
    assert [result.reuse.segments[0].source for result in results] == ["store", "store"]
    assert results[0].token_ids == results[1].token_ids
    assert [answer(workers, which, chunk).reuse.segments[0].source for which in (0, 1)] == ["device", "device"]
    assert [now - then for now, then in zip(workers.computed(), before, strict=True)] == [100, 0]


def test_two_decode_services_that_miss_at_once_have_it_computed_once(workers: Cluster) -> None:
    before = sum(workers.computed())
    text = document(600)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda which: answer(workers, which, text), (0, 1)))
    assert [result.reuse.segments[0].source for result in results] == ["computed", "computed"]
    assert results[0].token_ids == results[1].token_ids
    assert sum(workers.computed()) - before == 600


def test_a_decode_service_spreads_over_both_prefill_services(workers: Cluster) -> None:
    before = workers.computed()
    for _ in range(6):
        assert answer(workers, 0, document(20)).reuse.segments[0].source == "computed"
    spread = [now - then for now, then in zip(workers.computed(), before, strict=True)]
    assert sum(spread) == 120 and min(spread) >= 40, spread


def busy(workers: Cluster) -> list[Service]:
    return [service for service in workers.prefill if service.metric("cairn_prefill_queue_depth") > 0]


def test_a_prefill_service_killed_while_it_computes(workers: Cluster) -> None:
    text = document(3000)
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(answer, workers, 0, text)
        wait_until(lambda: bool(busy(workers)))
        (victim,) = busy(workers)
        (other,) = (service for service in workers.prefill if service is not victim)
        victim.kill()
        assert not pending.done(), "it was killed while it computed"
        before = other.metric("cairn_prefill_tokens_total", source="computed")
        result = pending.result(90)
        assert other.metric("cairn_prefill_tokens_total", source="computed") - before == 3000
    assert result.reuse.segments[0].source == "computed"
    assert answer(workers, 1, text).token_ids == result.token_ids
    victim.launch()
    victim.wait_ready()
    wait_until(lambda: bool(answer(workers, 1, document(20))) and min(workers.computed()) > 0)


def test_redis_is_killed_and_started_again(workers: Cluster, redis: Server) -> None:
    """Meanwhile a prefill says UNAVAILABLE, answers are computed, what runs goes on; nothing has to be restarted."""
    known = workers.clients[0].prefill(document(50))
    expected = answer(workers, 0, known, max_tokens=300)
    running = workers.clients[0].generate([known, QUERY], max_tokens=300, ignore_eos=True)
    next(running)
    redis.kill()
    try:
        assert all(service.metric("cairn_store_up") == 0 for service in workers.prefill)
        with pytest.raises(Unavailable, match="redis at"):
            workers.clients[1].prefill(document(20))
        unstored = answer(workers, 1, document(20))
        assert unstored.reuse.segments[0].source == "computed", "computed for this request alone"
        assert len(answer(workers, 1).token_ids) == 4, "a query alone needs no store"
        assert running.finish().token_ids == expected.token_ids, "nor does an answer that has begun"
    finally:
        redis.start()
    result = answer(workers, 1, known, max_tokens=300)
    assert (result.reuse.segments[0].source, result.token_ids) == ("store", expected.token_ids)
    assert [client.prefill(document(20)).outcome for client in workers.clients] == ["computed", "computed"]
    assert [answer(workers, which, document(20)).reuse.segments[0].source for which in (0, 1)] == ["computed"] * 2
    assert all(service.metric("cairn_store_up") == 1 for service in workers.prefill)


@pytest.mark.slow
def test_a_prefill_service_of_another_machine_dies(redis: Server, tmp_path: Path) -> None:
    """Nobody here can see that it is dead, so its claim has to run out: 30 s, then the other one computes.

    A process-id namespace of its own for each prefill service stands for a machine of its own.
    """
    alone = ("unshare", "--pid", "--fork", "--kill-child")
    if shutil.which(alone[0]) is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("process-id namespaces cannot be made here")
    with cluster(tmp_path, redis_url(redis, "elsewhere"), inside=alone) as workers, ThreadPoolExecutor(1) as thread:
        pending = thread.submit(answer, workers, 0, document(3000))
        wait_until(lambda: bool(busy(workers)))
        victim = busy(workers)[0]
        victim.kill()
        assert pending.result(90).reuse.segments[0].source == "computed"
        (other,) = (service for service in workers.prefill if service is not victim)
        assert other.metric("cairn_prefill_tokens_total", source="computed") == 3000
