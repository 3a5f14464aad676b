"""The life of a service process: listen, load, announce, serve until told to stop, drain.

A process may serve several services over one loaded model, each at a port of its own, with health and metrics of its
own. A ready line for each is all there is on stdout: ``{"event":"ready","service":...,"port":...,"metrics_port":...,
"dtype":...,"dtype_reason":...,"attention":...,"attention_reason":...,"same_bits":...,"same_bits_reason":...,
"seconds":{...}}``. SIGTERM and SIGINT drain; a
second one ends the draining at once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

import transformers
from prometheus_client import CollectorRegistry

from chunk_store.errors import StoreError
from engine.run.cuda.products import use_stable_products
from serving.process.loading import Loaded, configured_context, load
from serving.process.logs import adopt_library_loggers
from serving.process.metrics import add_process_metrics
from serving.process.metrics_endpoint import MetricsEndpoint
from serving.process.options import ServiceOptions
from serving.process.same_bits import SameBits
from serving.process.startup import say, seconds_since_start
from serving.rpc.access import Access
from serving.rpc.exposure import exposure_warning
from serving.rpc.handlers import Server
from serving.rpc.parsing import MESSAGE_NBYTES_MAX, message_nbytes_max
from serving.rpc.server import RpcServer

log = logging.getLogger(__name__)

# How long a thread keeps the interpreter that another one wants; Python's own 5 ms are a whole step. The device thread
# lets go of it with every call of torch, and an event loop that writes 64 messages a step would keep it each time.
# Steps of 6 ms for 64 streams (bench.stream_cost, bench/LOG.md): the device waits 28 % of the time with 5 ms, 11 % with
# 1 ms, 4 % with this, 2 % with 0.1 ms, which costs a fifth more processor time in changes of threads.
SWITCH_INTERVAL_S = 0.0002


class Service(Protocol):
    """What a process serves. Made in a thread while the server already answers health checks."""

    @property
    def registry(self) -> CollectorRegistry:
        """The metrics to export."""

    @property
    def same_bits(self) -> SameBits:
        """What is said about the bits of what it computes."""

    async def start(self) -> None:
        """Begins its background work, in the event loop."""

    def add_to(self, server: Server) -> None:
        """Registers the RPC handlers."""

    async def stop(self) -> None:
        """Ends its background work and frees what it holds. Called once, after the last call."""


@dataclass(frozen=True)
class Listed:
    """A service to be served: its name in the ready line, its protobuf name, and what it was told."""

    name: str
    full_name: str
    options: ServiceOptions

    def at(self, port: int) -> str:
        return f"{self.full_name} on {self.options.host}:{port}"


async def run_services(
    listed: Sequence[Listed], make: Callable[[Loaded], Sequence[Service]], stopping: asyncio.Event
) -> bool:
    """Serves until ``stopping`` is set, then drains; False if calls had to be cancelled.

    ``make`` runs in a thread and gives the services as they are ``listed``, over a model that is loaded as the first
    one was told. They start in this order and stop in the other. Raises ``OSError`` (addresses, files), ``ValueError``
    (model, options) or ``StoreUnavailable`` while it starts.
    """
    for each in listed:
        warn_of_exposure(each.options)
    allow_many_connections()
    options = listed[0].options
    if options.device != "cpu":
        for line in use_stable_products():  # before any thread of ours could read the environment, and CUDA does
            log.warning("%s", line)
    # Before the model is loaded, what its configuration says bounds what grpc takes in for a message.
    context = await asyncio.to_thread(configured_context, options.model)
    nbytes_max = message_nbytes_max(context) if context else MESSAGE_NBYTES_MAX
    servers: list[RpcServer] = []
    ports: list[int] = []
    async with AsyncExitStack() as ends:
        for each in listed:
            access = Access.from_file(each.options.token_file)
            servers.append(RpcServer(access, [each.full_name], message_nbytes_max=nbytes_max))
            ports.append(await servers[-1].start(each.options.host, each.options.port, each.options.tls))
            ends.push_async_callback(servers[-1].drain, 0.0)  # again: harmless
            say(f"listening on {each.options.host}:{ports[-1]}, not serving yet")
        loaded, services = await asyncio.to_thread(_make, options, make)
        for service in services:
            ends.push_async_callback(service.stop)
        metrics_ports: list[int] = []
        for each, server, service in zip(listed, servers, services, strict=True):
            await service.start()
            service.registry.register(server.metrics)
            add_process_metrics(service.registry, each.name, loaded)
            metrics = MetricsEndpoint.start(service.registry, each.options.host, each.options.metrics_port)
            ends.callback(metrics.stop)
            metrics_ports.append(metrics.port)
        leave_to_the_end()
        for server, service in zip(servers, services, strict=True):
            await server.open(service.add_to, message_nbytes_max(loaded.served.context_length_max))
        seconds = round(seconds_since_start(), 3)
        for each, port, metrics_port, service in zip(listed, ports, metrics_ports, services, strict=True):
            say(f"ready: {each.at(port)}, metrics on {each.options.host}:{metrics_port}")
            announce(each.name, port, metrics_port, loaded, service.same_bits, seconds)
        await stopping.wait()
        return all(await asyncio.gather(*map(_drain, listed, servers)))


async def _drain(listed: Listed, server: RpcServer) -> bool:
    drain_s = listed.options.drain_s
    log.info("draining %s: %d calls run, at most %g s", listed.name, server.gate.running, drain_s)
    return await server.drain(drain_s)


def warn_of_exposure(options: ServiceOptions) -> None:
    """Says what a service that others can reach goes without."""
    tokens, tls = options.token_file is not None, options.tls is not None
    if warning := exposure_warning(options.host, tokens=tokens, tls=tls, insecure=options.insecure):
        log.warning("%s", warning)


def leave_to_the_end() -> None:
    """Collects garbage, and has no later collection look at what is there now.

    A full collection visits every object there is while all threads wait: some 400,000 of libraries and the model,
    which stay to the end, take a third of a second, many decode steps.
    """
    gc.collect()
    gc.freeze()


def allow_many_connections() -> None:
    """As many descriptors as this process may have: one that runs out of them accepts no connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _make(options: ServiceOptions, make: Callable[[Loaded], Sequence[Service]]) -> tuple[Loaded, Sequence[Service]]:
    loaded = load(options)
    adopt_library_loggers()  # of what was imported meanwhile
    return loaded, make(loaded)


def announce(name: str, port: int, metrics_port: int, loaded: Loaded, same_bits: SameBits, seconds: float) -> None:
    """Prints the ready line; ``seconds`` is how long the whole start took."""
    borrowed = loaded.served.borrowed
    line = {
        "event": "ready",
        "service": name,
        "port": port,
        "metrics_port": metrics_port,
        "dtype": borrowed.dtype_name,
        "dtype_reason": borrowed.dtype_reason,
        "attention": loaded.served.decision.attention,
        "attention_reason": loaded.served.decision.reason,
        "same_bits": same_bits.always,
        "same_bits_reason": same_bits.reason,
        "seconds": {**loaded.startup.seconds, "total": seconds},
    }
    print(json.dumps(line), flush=True)


def stop_on_signals() -> asyncio.Event:
    """An event of this loop that SIGTERM or SIGINT sets; after the first one they end the process as usual."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        stopping.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopping


def run_main(listed: Sequence[Listed], make: Callable[[Loaded], Sequence[Service]]) -> int:
    """``run_services`` under signals; the exit code: 0 drained, 1 could not start or calls were cancelled."""

    async def main() -> bool:
        return await run_services(listed, make, stop_on_signals())

    transformers.logging.disable_progress_bar()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        return 0 if asyncio.run(main()) else 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        expected = isinstance(error, OSError | ValueError | StoreError)
        names = " and ".join(each.name for each in listed)
        log.error("%s service: %s", names, error, exc_info=None if expected else error)
        return 1
