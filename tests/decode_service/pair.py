"""A prefill and a decode service in this process: the real parts on loopback ports, over one store.

Everything goes through gRPC; being in one process only lets tests look at the pool and hold a device thread still.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc

from cairn import Client, Result
from decode_service.__main__ import FULL_NAME as DECODE
from decode_service.__main__ import build
from decode_service.api.service import DecodeService
from decode_service.options import DecodeOptions
from prefill_service.__main__ import build as build_prefill
from prefill_service.api.service import FULL_NAME as PREFILL
from prefill_service.api.service import PrefillService
from prefill_service.jobs.own_pool import OwnPool
from prefill_service.options import PrefillOptions
from protos import decode_pb2, decode_pb2_grpc
from serving.process.loading import Loaded
from serving.process.options import ServiceOptions
from serving.rpc.access import Access
from serving.rpc.parsing import message_nbytes_max
from serving.rpc.server import RpcServer
from serving.tenancy.quotas import NO_QUOTAS, Quotas

T = TypeVar("T")
DEADLINE_S = 60.0


class LoopThread:
    """An event loop in a thread, for the servers."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="servers", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(DEADLINE_S)


_servers: list[LoopThread] = []


def servers() -> LoopThread:
    """The one loop that all servers of this process run in."""
    if not _servers:
        _servers.append(LoopThread())
    return _servers[0]


async def serve(
    service: DecodeService | PrefillService, name: str, options: ServiceOptions, loaded: Loaded
) -> tuple[RpcServer, str]:
    """A server for ``service`` at the options' port, and its address."""
    server = RpcServer(Access.from_file(options.token_file), [name])
    port = await server.start("127.0.0.1", options.port)
    await service.start()
    await server.open(service.add_to, message_nbytes_max(loaded.served.context_length_max))
    return server, f"127.0.0.1:{port}"


class Pair:
    """Both services, and a client of them."""

    def __init__(self, prefill: PrefillService | None, decode: DecodeService, addresses: tuple[str, str]) -> None:
        self.prefill = prefill
        self.decode = decode
        self.prefill_address, self.decode_address = addresses
        self.client = Client(*addresses, timeout_s=DEADLINE_S)
        self.decode_server: RpcServer | None = None

    @property
    def prefill_pool(self) -> OwnPool:
        """What computes in the prefill service."""
        assert self.prefill is not None and isinstance(self.prefill.jobs.computer, OwnPool)
        return self.prefill.jobs.computer

    def generate(self, parts: Sequence[Any], max_tokens: int = 6, **options: Any) -> Result:
        """An answer of exactly ``max_tokens`` tokens, unless ``ignore_eos`` is overridden."""
        return self.client.generate(parts, **{"max_tokens": max_tokens, "ignore_eos": True, **options}).finish()

    def together(self, requests: Sequence[Sequence[Any]], max_tokens: int = 6, **options: Any) -> list[Result]:
        """Answers to all requests, asked for at the same moment."""
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(lambda parts: self.generate(parts, max_tokens, **options), requests))

    def together_each(self, requests: Sequence[tuple[Sequence[Any], dict[str, Any]]]) -> list[Result]:
        """The same, each with options of its own."""
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(lambda request: self.generate(request[0], **request[1]), requests))

    def in_device_thread(self, look: Callable[[], T]) -> T:
        """Runs ``look`` between two steps of the decode service."""
        results: list[T | BaseException] = []
        done = threading.Event()

        def call() -> None:
            try:
                results.append(look())
            except BaseException as error:
                results.append(error)
            done.set()

        self.decode.worker.call(call)
        assert done.wait(DEADLINE_S), "the device thread does not answer"
        if isinstance(results[0], BaseException):
            raise results[0]
        return results[0]

    def forget(self) -> None:
        """Evicts every resident chunk of the decode service."""
        residents = self.decode.worker.residents
        self.in_device_thread(lambda: [residents.evict(key) for key in list(residents._chunks)])

    def check_idle(self) -> None:
        """Nothing runs, nothing is held, every page is accounted for; in the pool, in GetLoads, in the metrics."""
        residents = self.decode.worker.residents
        wait_until(lambda: self.client.loads().running == 0 and self.client.loads().waiting == 0)
        wait_until(lambda: self.in_device_thread(lambda: residents.held) == 0)
        self.in_device_thread(residents.check_integrity)
        loads = self.client.loads()
        assert loads.pages_tails == 0
        assert loads.pages_free + loads.pages_chunks == loads.pages_total
        pages = {owner: self.metric("cairn_kv_pages", owner=owner) for owner in ("free", "chunk", "tail")}
        assert pages == {"free": loads.pages_free, "chunk": loads.pages_chunks, "tail": 0}
        if self.prefill is not None:
            computer = self.prefill_pool
            wait_until(lambda: self.prefill.jobs.queue.jobs == 0)
            assert computer.publisher.flush(DEADLINE_S)
            computer.device._thread.submit(lambda: None).result(DEADLINE_S)  # what was posted has run
            wait_until(lambda: computer.residents.held == 0)  # what was lent comes back a moment later
            computer.residents.check_integrity()

    def metric(self, name: str, service: str = "decode", **labels: Any) -> float:
        """The sum of a metric's samples that bear ``labels``."""
        registry = (self.decode if service == "decode" else self.prefill).registry
        return sum(
            sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    @contextmanager
    def held_prefill(self) -> Iterator[None]:
        """Keeps the device thread of the prefill service busy inside the block."""
        release = threading.Event()
        self.prefill_pool.device._thread.submit(release.wait, DEADLINE_S)
        try:
            yield
        finally:
            release.set()

    @contextmanager
    def held_decode(self) -> Iterator[None]:
        """Keeps the device thread of the decode service busy inside the block."""
        release, reached = threading.Event(), threading.Event()

        def held() -> None:
            reached.set()
            release.wait(DEADLINE_S)

        self.decode.worker.call(held)
        assert reached.wait(DEADLINE_S)
        try:
            yield
        finally:
            release.set()


def raw_status(
    services: Pair, request: decode_pb2.GenerateRequest, method: str = "Generate"
) -> tuple[grpc.StatusCode, str]:
    """The status that a request is refused with; the client would not even send some, and try others again."""
    with grpc.insecure_channel(services.decode_address, [("grpc.max_send_message_length", -1)]) as channel:
        call = getattr(decode_pb2_grpc.DecodeServiceStub(channel), method)
        try:
            reply = call(request, timeout=20)
            found = list(reply) if method == "Generate" else reply
        except grpc.RpcError as error:
            return error.code(), error.details()
    raise AssertionError(f"was answered: {found}")


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Waits for a condition; fails the test if it does not come."""
    ends_at = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_at, "the condition did not come about"
        time.sleep(0.01)


@contextmanager
def pair(
    prefill: Loaded | None,
    decode: Loaded,
    store: Path | str,
    *,
    token_file: Path | None = None,
    tenant_quota: Quotas = NO_QUOTAS,
    store_capacity: int | None = None,
    prefill_address: str = "",
    kv_pages: int = 512,
    page_size: int = 16,
    of_prefill: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Pair]:
    """Both services on ``store``, a directory or a URL; ``options`` are those of ``DecodeOptions``, ``of_prefill`` of
    ``PrefillOptions`` alone.

    Without ``prefill``, only decode.
    """
    shared: dict[str, Any] = {
        "model": "",
        "store": store if isinstance(store, str) else f"file://{store}",
        "token_file": token_file,
        "tenant_quota": tenant_quota,
        "kv_pages": kv_pages,
        "page_size": page_size,
    }
    running = servers()
    ends: list[tuple[RpcServer, DecodeService | PrefillService]] = []
    service = None
    if prefill is not None:
        told = PrefillOptions(**{**shared, "store_capacity": store_capacity, **(of_prefill or {})})
        service = build_prefill(told, prefill)
        server, prefill_address = running.run(serve(service, PREFILL, told, prefill))
        ends.append((server, service))
    defaults = {"prefill_token_file": token_file, "request_timeout_s": DEADLINE_S}
    asked = DecodeOptions(**shared, prefill=prefill_address, **{**defaults, **options})
    made = build(asked, decode)
    server, decode_address = running.run(serve(made, DECODE, asked, decode))
    ends.append((server, made))
    both = Pair(service, made, (prefill_address, decode_address))
    both.decode_server = server
    try:
        yield both
    finally:
        both.client.close()
        for server, ended in reversed(ends):
            running.run(server.drain(5.0))
            running.run(ended.stop())
