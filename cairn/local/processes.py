"""Child processes that serve: started together, watched together, drained together.

Nothing is restarted. A child that ends is reported by ``first_exit``; ``stop`` asks with SIGTERM, waits, then kills.
Children die with this process even if it is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import random
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cairn.client.health import ask_health_async
from cairn.client.transport import Peer

POLL_S = 0.1
HEALTH_S = 5.0  # for one question
READ_BYTES = 65536
PORTS = range(20_000, 32_000)
_PR_SET_PDEATHSIG = 1

LogLine = Callable[[str, str], None]  # service, line


class ServiceFailed(Exception):
    """A service ended or did not become ready."""


@dataclass(frozen=True)
class Place:
    """Where a service will serve, under its name; with TLS if ``tls_ca`` is given.

    One without ``rpcs`` is not asked for its health: that it is announced is enough.
    """

    name: str
    address: str
    tls_ca: Path | None = None
    rpcs: bool = True


@dataclass(frozen=True)
class Command:
    """A service to start: its name, the command, and where it will serve (with TLS if ``tls_ca`` is given).

    A process that ``serves`` several has a name and a command, and they have the rest. Secrets are in its environment,
    which other users of the machine do not see.
    """

    name: str
    argv: tuple[str, ...]
    address: str = ""
    tls_ca: Path | None = None
    environment: Mapping[str, str] | None = field(default=None, repr=False)
    serves: tuple[Place, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """Its services, in the order in which they are shown."""
        return self.serves or (Place(self.name, self.address, self.tls_ca),)


@dataclass
class _Served:
    """A service of a child: what it announced, and why the last question for its health had no answer."""

    place: Place
    ready: asyncio.Future[dict[str, Any]]
    refusal: str = ""


@dataclass
class _Child:
    command: Command
    process: Process
    served: list[_Served]
    readers: list[asyncio.Task[None]] = field(default_factory=list)


class Processes:
    """The running children. Used inside one event loop, in this order: start, wait_ready, first_exit, stop."""

    def __init__(self, log: LogLine) -> None:
        self._log = log
        self._children: list[_Child] = []

    async def start(self, commands: Sequence[Command]) -> None:
        """Start every command. Raises ``OSError`` if one cannot be executed; call ``stop`` then too.

        Start them before threads of yours do: a child runs a little Python between fork and exec.
        """
        die_with_parent = _die_with_parent()
        for command in commands:
            process = await asyncio.create_subprocess_exec(
                *command.argv,
                stdout=PIPE,
                stderr=PIPE,
                env=command.environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
            loop = asyncio.get_running_loop()
            child = _Child(command, process, [_Served(place, loop.create_future()) for place in command.places])
            assert process.stdout is not None and process.stderr is not None
            child.readers = [
                asyncio.create_task(self._read(child, process.stdout, announces=True)),
                asyncio.create_task(self._read(child, process.stderr, announces=False)),
            ]
            self._children.append(child)

    async def wait_ready(self, timeout_s: float) -> dict[str, dict[str, Any]]:
        """Wait until every service is announced and reports SERVING; its announcement by its name.

        Raises ``ServiceFailed`` if one ends first or the time is over.
        """
        everyone = asyncio.create_task(self._announcements())
        died = asyncio.create_task(self.first_exit())
        waits: set[asyncio.Task[Any]] = {everyone, died}
        try:
            done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if everyone in done:
                return everyone.result()
            if died in done:
                raise ServiceFailed(died.result())
            names = " and ".join(served.place.name for served in self._served)
            why = "".join(f"; {served.place.name}: {served.refusal}" for served in self._served if served.refusal)
            raise ServiceFailed(f"{names} were not ready within {timeout_s:g} s{why}")
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    @property
    def _served(self) -> list[_Served]:
        return [served for child in self._children for served in child.served]

    def not_ready(self) -> list[str]:
        """The names of the services that are not announced yet."""
        return [served.place.name for served in self._served if not served.ready.done()]

    async def first_exit(self) -> str:
        """Wait until a child ends by itself, and say which one and how."""
        waits = {asyncio.create_task(child.process.wait()): child for child in self._children}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        return " and ".join(_how_it_ended(waits[task]) for task in done)

    async def stop(self, grace_s: float) -> bool:
        """End every child, the last started first: SIGTERM, at most ``grace_s`` seconds each, then SIGKILL.

        Returns False if one had to be killed. Safe to call twice.
        """
        clean = True
        while self._children:
            child = self._children[-1]
            clean = await _stop_one(child.process, grace_s) and clean
            for served in child.served:
                served.ready.cancel()
            await asyncio.gather(*child.readers, return_exceptions=True)
            self._children.pop()
        return clean

    def kill(self) -> None:
        """End every child at once; ``stop`` then returns soon."""
        for child in self._children:
            if child.process.returncode is None:
                child.process.kill()

    async def _announcements(self) -> dict[str, dict[str, Any]]:
        everyone = self._served
        events = await asyncio.gather(*map(self._announcement, everyone))
        return {served.place.name: event for served, event in zip(everyone, events, strict=True)}

    async def _announcement(self, served: _Served) -> dict[str, Any]:
        announced = await asyncio.shield(served.ready)
        if served.place.rpcs:
            await _wait_for_serving(served)
        return announced

    async def _read(self, child: _Child, stream: asyncio.StreamReader, announces: bool) -> None:
        """Pass a child's lines on; its ready lines are kept instead."""
        rest = b""
        while data := await stream.read(READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._line(child, line, announces)
        if rest:
            self._line(child, rest, announces)

    def _line(self, child: _Child, line: bytes, announces: bool) -> None:
        text = line.decode(errors="replace")
        ready = _ready_event(text) if announces else None
        if ready is None:
            self._log(child.command.name, text)
            return
        for served in child.served:  # whoever serves one thing may be called anything
            alone = len(child.served) == 1
            if (alone or served.place.name == ready.get("service")) and not served.ready.done():
                served.ready.set_result(ready)


def free_port(host: str, *others: int) -> int:
    """A TCP port that nothing listens on now, and none of ``others``.

    It lies below the ports that systems give to outgoing connections, so that none of those takes it before a service
    does, or while one restarts.
    """
    for port in random.SystemRandom().sample(PORTS, 100):
        if port in others:
            continue
        with suppress(OSError), socket.create_server((host, port)):
            return port
    with socket.create_server((host, 0)) as listener:
        return int(listener.getsockname()[1])


def _ready_event(line: str) -> dict[str, Any] | None:
    """A service's ready line, or None for any other line."""
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if event.get("event") == "ready" else None


async def _wait_for_serving(served: _Served) -> None:
    """Poll grpc.health.v1 until the service says SERVING."""
    peer = Peer(served.place.name, served.place.address, served.place.tls_ca)
    async with peer.open_async_channel() as channel:
        while True:
            status, served.refusal = await ask_health_async(channel, peer, HEALTH_S)
            if status == "SERVING":
                return
            if status == "UNIMPLEMENTED":
                raise ServiceFailed(f"{peer.source} has no health service")
            await asyncio.sleep(POLL_S)


async def _stop_one(process: Process, grace_s: float) -> bool:
    if process.returncode is None:
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), grace_s)
        return True
    except TimeoutError:
        process.kill()
        await process.wait()
        return False


def _how_it_ended(child: _Child) -> str:
    code = child.process.returncode
    assert code is not None
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    names = " and the ".join(served.place.name for served in child.served)
    return f"the {names} service {how}"


def _die_with_parent() -> Callable[[], None] | None:
    """What a child runs before it becomes the service, on Linux: ask for SIGTERM when this process dies."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask
