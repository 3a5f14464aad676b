"""The gateway's process: listens, says that it is ready, and drains when it is told to stop.

One line on stdout: ``{"event":"ready","service":"gateway","port":...,"metrics_port":...}``. SIGTERM and SIGINT drain; a
second one ends the draining at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn

from gateway.app import Gateway, make_app
from gateway.connections import HEAD_NBYTES_MAX, IDLE_S, BoundedProtocol
from gateway.options import GatewayOptions
from serving.process.metrics_endpoint import MetricsEndpoint
from serving.rpc.exposure import exposure_warning

log = logging.getLogger(__name__)

BACKLOG = 1024


class _Server(uvicorn.Server):
    """uvicorn's, with the signals left to us."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        announce(self.port, self.metrics_port)

    port = 0
    metrics_port: int | None = None


def run(options: GatewayOptions) -> int:
    """Serves until told to stop; the exit code: 0 stopped on request, 1 could not start."""
    try:
        gateway = Gateway.of(options)
        listener = _listen(options.http_host, options.http_port)
        metrics = None
        if options.metrics_port is not None:
            metrics = MetricsEndpoint.start(gateway.metrics.registry, options.http_host, options.metrics_port)
    except (OSError, ValueError) as error:
        log.error("%s", error)
        return 1
    tokens, tls = options.token_file is not None, options.tls_cert is not None
    if warning := exposure_warning(options.http_host, tokens=tokens, tls=tls, insecure=options.insecure):
        log.warning("%s", warning)
    server = _Server(_config(gateway, options))
    server.port = int(listener.getsockname()[1])
    server.metrics_port = None if metrics is None else metrics.port
    try:
        asyncio.run(server.serve([listener]))
    finally:
        if metrics is not None:
            metrics.stop()
    return 0


def announce(port: int, metrics_port: int | None) -> None:
    """Prints the ready line."""
    log.info("ready: HTTP on port %d", port)
    print(json.dumps({"event": "ready", "service": "gateway", "port": port, "metrics_port": metrics_port}), flush=True)


def _config(gateway: Gateway, options: GatewayOptions) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(gateway),
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=math.ceil(options.drain_s),
        h11_max_incomplete_event_size=HEAD_NBYTES_MAX,
        backlog=BACKLOG,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ``OSError`` naming the address."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}; is the port in use?") from error
