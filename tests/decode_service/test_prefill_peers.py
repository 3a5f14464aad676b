"""Prefill services that hang, are busy, or come back late: another one is asked, or the caller is told why."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import cairn
from decode_service.kv_source.prefill_client import RemotePrefillClient
from prefill_service.__main__ import build
from prefill_service.api.service import FULL_NAME
from prefill_service.options import PrefillOptions
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair, serve, servers, wait_until
from tests.decode_service.test_pressure import asking, later


class Frozen:
    """A TCP proxy that can stop passing anything on, as a stopped process does: connections stand, nobody answers."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.flows = threading.Event()
        self.flows.set()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
                self._sockets += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self.flows.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.flows.set()
        for each in (self._listener, *self._sockets):
            each.close()


@pytest.fixture
def services(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s") as made:
        yield made
        made.check_idle()


@pytest.fixture
def frozen(services: Pair) -> Iterator[Frozen]:
    proxy = Frozen(services.prefill_address)
    yield proxy
    proxy.close()


@contextmanager
def through(services: Pair, target: str, **options: Any) -> Iterator[None]:
    """The decode service asks ``target``, with less patience than it has otherwise."""
    source = services.decode.worker.loader.source
    usual, source.prefill_client = source.prefill_client, RemotePrefillClient(target, **options)
    try:
        yield
    finally:
        source.prefill_client.close()
        source.prefill_client = usual


IMPATIENT = {"keepalive_s": 0.5, "keepalive_timeout_s": 0.5}


def test_a_connection_that_hangs_is_given_up(services: Pair, frozen: Frozen) -> None:
    """The ping is not answered; a new connection to the service, which has recovered, is."""
    with through(services, frozen.address, **IMPATIENT):
        assert services.generate([tokens(1, 20), [5]]).token_ids
        frozen.flows.clear()
        waits = later(services, [tokens(2, 20), [5]], timeout_s=60)
        old = list(frozen._sockets)
        wait_until(lambda: old[0].fileno() < 0 or hung_up(old[0]) or len(frozen._sockets) > len(old), 30)
        frozen.flows.set()
        assert waits.result(60).reuse.segments[0].source == "computed"


def hung_up(near: socket.socket) -> bool:
    with suppress(OSError):
        return near.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    return False


def test_another_peer_is_asked_when_one_hangs(services: Pair, frozen: Frozen) -> None:
    both = f"ipv4:{frozen.address},{services.prefill_address}"
    with through(services, both, **IMPATIENT):
        for seed in range(3, 7):
            services.generate([tokens(seed, 20), [5]])
        frozen.flows.clear()
        cold = [later(services, [tokens(seed, 20), [5]], timeout_s=60) for seed in range(10, 14)]
        assert all(future.result(60).reuse.segments[0].source == "computed" for future in cold)
        assert not frozen.flows.is_set()


def test_a_peer_that_answers_pings_but_does_not_compute(services: Pair) -> None:
    """Its deadline is that of the tokens; the caller is told long before its own."""
    with services.held_prefill(), through(services, services.prefill_address, call_s=0.2, call_s_a_token=0.01):
        with asking(services) as asked, pytest.raises(cairn.Unavailable, match="did not answer for"):
            stub_generate(services, [tokens(20, 20), [5]])
        assert len(asked) == 1


def stub_generate(services: Pair, parts: list[Any]) -> None:
    """One attempt; the client would make several."""
    generation = services.client.generate(parts, timeout_s=60)
    generation._attempts.retry = False
    generation.finish()


def test_a_busy_peer_is_asked_again(services: Pair) -> None:
    services.prefill.jobs.queue._places.most = 1
    with services.held_prefill():
        cold: list[Future[Any]] = [later(services, [tokens(30 + n, 20), [5]]) for n in range(3)]
        wait_until(lambda: services.client.loads().running == 3)
    assert all(future.result(30).token_ids for future in cold)


def test_a_service_that_comes_back_late_is_waited_for(folder: Path, tmp_path: Path) -> None:
    """Longer than any retry of a connection takes; whoever has no time left is told that it was away."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pair(None, loaded(folder, "decode"), tmp_path / "s", prefill_address=f"127.0.0.1:{port}") as services:
        waits = later(services, [tokens(40, 20), [5]], timeout_s=60)
        generation = services.client.generate([tokens(41, 20), [5]], timeout_s=3)
        generation._attempts.retry = False
        with pytest.raises(cairn.Unavailable, match="was not there for"):
            generation.finish()
        assert not waits.done()
        options = PrefillOptions(model="", store=f"file://{tmp_path / 's'}", kv_pages=64, port=port)
        service = build(options, loaded(folder, "prefill"))
        server, _ = servers().run(serve(service, FULL_NAME, options, loaded(folder, "prefill")))
        try:
            assert waits.result(60).reuse.segments[0].source == "computed"
        finally:
            servers().run(server.drain(5.0))
            servers().run(service.stop())
