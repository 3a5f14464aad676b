"""Quotas and fair shares of tenants, through the services: who floods is refused, nobody else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

import cairn
from cairn import Client, Tokens
from chunk_store.open import open_store
from chunk_store.tenant import Tenant, tenant_of
from prefill_service.jobs.attempt import Wait
from prefill_service.jobs.progress import JobProgress
from prefill_service.jobs.resolver import PrefillJob
from protos import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from serving.publishing.room import Place
from serving.rpc.details import retry_after_s
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import DEADLINE_S, Pair, pair, wait_until

PART = 20


@contextmanager
def services(folder: Path, root: Path, lines: str, **options: Any) -> Iterator[tuple[Pair, dict[str, Client]]]:
    """Both services, and a client for each token of ``lines``; the token of the services themselves is an admin's."""
    file = root / "tokens"
    file.write_text(f"boss - admin\n{lines}")
    with ExitStack() as ends:
        running = ends.enter_context(
            pair(loaded(folder, "prefill"), loaded(folder, "decode"), root / "s", token_file=file, **options)
        )
        addresses = running.prefill_address, running.decode_address
        names = [line.split()[0] for line in file.read_text().splitlines()]
        clients = {name: ends.enter_context(Client(*addresses, token=name, timeout_s=DEADLINE_S)) for name in names}
        running.client.close()
        running.client = clients["boss"]
        yield running, clients
        running.check_idle()


def content(seed: int) -> Tokens:
    return Tokens(tokens(seed, PART))


def refused(call: Any) -> tuple[str, float | None]:
    """The message of RESOURCE_EXHAUSTED, and when to come again."""
    with pytest.raises(grpc.RpcError) as caught:
        list(call()) if callable(call) else call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, caught.value
    return caught.value.details(), retry_after_s(caught.value.trailing_metadata())


def generate(running: Pair, token: str, request_id: str = "", n: int = 1) -> Any:
    """The raw call, which no client tries again."""
    channel = grpc.insecure_channel(running.decode_address)
    request = decode_pb2.GenerateRequest(
        segments=[decode_pb2.Segment(text="x")],
        sampling=decode_pb2.SamplingParams(max_tokens=2, ignore_eos=True, n=n),
        request_id=request_id,
    )
    return decode_pb2_grpc.DecodeServiceStub(channel).Generate(
        request, timeout=DEADLINE_S, metadata=(("authorization", f"Bearer {token}"),)
    )


def test_every_answer_of_a_request_counts(folder: Path, tmp_path: Path) -> None:
    """Several answers take places as so many requests do: all, or the request is refused and takes none."""
    with services(folder, tmp_path, "a salt-a running=2 waiting=3\nb salt-b\n") as (running, _):
        with pytest.raises(grpc.RpcError) as caught:
            list(generate(running, "a", n=6))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "sampling.n: 6" in caught.value.details()
        with running.held_decode():
            first = generate(running, "a", n=3)
            wait_until(lambda: running.decode.worker.places.of(tenant_of("salt-a")) == (0, 3))
            words, after_s = refused(lambda: generate(running, "a", n=3))
            assert "quota waiting" in words and after_s
            assert running.decode.worker.places.of(tenant_of("salt-a")) == (0, 3), "nothing was taken"
            second, other = generate(running, "a", n=2), generate(running, "b", n=4)
            wait_until(lambda: running.decode.worker.places.of(tenant_of("salt-a")) == (0, 5))
        for call, count in ((first, 3), (second, 2), (other, 4)):
            assert len([reply for reply in call if reply.HasField("complete")]) == count


def test_quotas_of_the_store(folder: Path, tmp_path: Path) -> None:
    lines = f"a salt-a chunks=2 pins=1\nb salt-b\nc salt-c bytes={30_000}\n"
    with services(folder, tmp_path, lines) as (_, clients):
        first = clients["a"].prefill(content(1), pin=True, durable=True)
        second = clients["a"].prefill(content(2), durable=True)
        for call, words in (
            (lambda: clients["a"].prefill(content(3)), r"quota chunks: .* 2, .*DeleteChunk"),
            (lambda: clients["a"].pin(second), r"quota pins: .* 1, .*UnpinChunk"),
            (lambda: clients["a"].prefill(content(2), pin=True), "quota pins"),
        ):
            with pytest.raises(cairn.Overloaded, match=words):
                call()
        stats = clients["a"].stats()
        assert (stats.chunks, stats.chunks_max, stats.pinned_entries) == (2, 2, 1)
        assert clients["a"].generate([content(3), Tokens([5])], max_tokens=2).finish().token_ids, "it is answered"
        clients["a"].delete(first)
        assert clients["a"].prefill(content(3), durable=True).newly_registered and clients["a"].pin(second).pinned
        for seed in range(4):
            assert clients["b"].prefill(content(seed), pin=True, durable=True).newly_registered, (
                "another tenant's quota is another"
            )
        stored = 0
        with pytest.raises(cairn.Overloaded, match=r"quota bytes: .* 30000, .*DeleteChunk"):
            for seed in range(40):
                clients["c"].prefill(content(seed), durable=True)
                stored += 1
        stats = clients["c"].stats()
        assert stored and stats.kv_entries == stored and stats.kv_bytes <= stats.capacity_bytes == 30_000
        answer = clients["c"].generate([content(50), Tokens([5])], max_tokens=2).finish()
        assert answer.reuse.segments[0].source == "computed"


def test_quotas_of_requests(folder: Path, tmp_path: Path) -> None:
    lines = "a salt-a running=1 waiting=1\nb salt-b running=1\nc salt-c\n"
    with services(folder, tmp_path, lines) as (running, clients), ThreadPoolExecutor(4) as threads:
        with running.held_decode():
            held = [threads.submit(list, generate(running, token)) for token in ("a", "a", "b")]
            wait_until(lambda: clients["boss"].loads().waiting == 3)
            for token, words in (
                ("a", "quota waiting: the tenant may have 1"),
                ("b", "quota running: the tenant may have 1"),
            ):
                message, again_s = refused(lambda token=token: generate(running, token))
                assert words in message and "have the quota raised" in message and again_s
            held.append(threads.submit(list, generate(running, "c")))
            wait_until(lambda: clients["boss"].loads().waiting == 4)
            assert (clients["a"].loads().waiting, clients["c"].loads().waiting) == (2, 1)
        assert all(future.result(DEADLINE_S)[-1].complete.finish_reason == "length" for future in held)
        assert list(generate(running, "a")) and list(generate(running, "b"))


def test_a_flood_does_not_refuse_another_tenants_first_request(folder: Path, tmp_path: Path) -> None:
    with services(folder, tmp_path, "a salt-a\nb salt-b\n", waiting_max=4, batch_max=1) as (running, clients):
        with ThreadPoolExecutor(8) as threads:
            ended: list[str] = []

            def ask(token: str, name: str) -> None:
                list(generate(running, token, name))
                ended.append(name)

            with running.held_decode():
                asked = [threads.submit(ask, "a", f"a{n}") for n in range(4)]
                wait_until(lambda: clients["boss"].loads().waiting == 4)
                message, _ = refused(lambda: generate(running, "a"))
                assert "at most 4" in message
                asked += [threads.submit(ask, "b", f"b{n}") for n in range(2)]
                wait_until(lambda: clients["boss"].loads().waiting == 6)
                refused(lambda: generate(running, "b"))
            for future in asked:
                future.result(DEADLINE_S)
        assert max(ended.index("b0"), ended.index("b1")) <= 4, f"in turn, not behind the flood: {ended}"


def test_a_flood_of_content_does_not_refuse_another_tenants_first(folder: Path, tmp_path: Path) -> None:
    """One tenant without a quota fills the registry; others still register their share of it."""
    open_store(f"file://{tmp_path / 's'}", records_max=8).close()
    with services(folder, tmp_path, "a salt-a\nb salt-b\nc salt-c\n") as (_, clients):
        for seed in range(8):
            clients["a"].prefill(content(seed), durable=True)
        with pytest.raises(cairn.Overloaded, match=r"the registry is full: .*delete chunks"):
            clients["a"].prefill(content(8))
        for seed in range(4):
            assert clients["b"].prefill(content(seed), durable=True).newly_registered
        with pytest.raises(cairn.Overloaded, match="the registry is full"):
            clients["b"].prefill(content(4))
        assert clients["c"].prefill(content(20), durable=True).newly_registered
        sent = clients["c"].generate([content(21), Tokens([5])], max_tokens=2).finish().reuse.segments[0]
        assert (sent.source, sent.unpublished) == ("computed", "")
        stats = clients["boss"].stats()
        assert (clients["a"].stats().chunks, stats.chunks, stats.chunks_max) == (8, 14, 8)


def prefill(running: Pair, token: str, seed: int) -> Any:
    channel = grpc.insecure_channel(running.prefill_address)
    request = prefill_pb2.PrefillChunkRequest(text=f"number {seed}")
    return prefill_pb2_grpc.PrefillServiceStub(channel).PrefillChunk.future(
        request, timeout=DEADLINE_S, metadata=(("authorization", f"Bearer {token}"),)
    )


def test_prefill_jobs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with services(folder, tmp_path, "a salt-a\nb salt-b\nc salt-c jobs=1\n") as (running, _):
        queue, computer = running.prefill.jobs.queue, running.prefill_pool
        order: list[Tenant] = []  # in which the device took jobs up: replies may overtake each other
        attempt = computer.attempt

        def noted(job: PrefillJob, progress: JobProgress, places: list[Place]) -> Wait | None:
            order.append(job.tenant)
            return attempt(job, progress, places)

        monkeypatch.setattr(computer, "attempt", noted)
        queue._places.most = 4
        with running.held_prefill():
            flood = [prefill(running, "a", seed) for seed in range(4)]
            wait_until(lambda: queue.jobs == 4)
            message, again_s = refused(lambda: [prefill(running, "a", 9).result()])
            assert "at most 4" in message and again_s
            others = [prefill(running, "b", 1), prefill(running, "c", 1)]
            wait_until(lambda: queue.jobs == 6)
            message, again_s = refused(lambda: [prefill(running, "c", 2).result()])
            assert "quota jobs: the tenant may have 1" in message and again_s
        assert all(call.result(DEADLINE_S).newly_registered for call in (*flood, *others))
        assert len(order) == 6
        of_others = [order.index(tenant_of(salt)) for salt in ("salt-b", "salt-c")]
        assert max(of_others) <= 3, f"in turn, not behind the flood: {order}"


def test_the_decode_service_acts_for_every_tenant(folder: Path, tmp_path: Path) -> None:
    """Its own token must not be one tenant's, whose name all KV would bear."""
    file = tmp_path / "tokens"
    file.write_text("# comment\nword salt-a\nfree\n")
    with (
        pytest.raises(ValueError, match=r"the first token of .* has a salt"),
        pair(None, loaded(folder, "decode"), tmp_path / "s", prefill_address="127.0.0.1:1", token_file=file),
    ):
        pass
