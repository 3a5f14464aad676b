"""Channels to the replicas, and what watches them: each is asked now and then how busy it is, while requests come.

The first request waits until all have been asked, or for ``FIRST_LOOK_S``. One that does not answer within ``ANSWER_S``
gets nothing new while others do. Nothing is asked when there is one replica, or none was wanted for ``IDLE_S``.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Self

from cairn.client import calls
from cairn.client.affinity import Affinity
from cairn.client.loads import Loads, Replica
from cairn.client.replicas import Fleet, Route, peers_for
from cairn.client.replies import loads_of_all, parse_loads
from cairn.client.transport import AsyncChannel, CallFailed, Peer, error_from_rpc, is_away, outcome
from protos import decode_pb2

POLL_S = 1.0  # between two rounds
ANSWER_S = 3.0
FIRST_LOOK_S = 2.0
IDLE_S = 30.0

LOADS = decode_pb2.GetLoadsRequest()


class _Replicas:
    """The replicas as one client uses them; clients with other tokens share all but the tokens."""

    def __init__(self, peers: Sequence[Peer], fleet: Fleet) -> None:
        self.peers = tuple(peers)
        self.fleet = fleet

    def with_token(self, token: str | None) -> Self:
        """The same channels and the same knowledge of them, for requests that bear another token."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.peers = tuple(replace(peer, token=token) for peer in self.peers)
        return other

    def route(self, request: Any, request_id: str) -> Route:
        """The way of a request, which has its salt."""
        peers = peers_for(self.peers, request_id)
        if self.fleet.alone:
            return Route(self.fleet, peers, Affinity())
        owner = f"{request.salt}\n{self.peers[0].token or ''}"
        return Route(self.fleet, peers, self.fleet.affinity(request, owner), owner)

    def loads_of(self, outcomes: Sequence[Any]) -> Loads:
        """What the replies of all to ``GetLoads`` say. Raises ``CairnError`` if none has come."""
        for replica, reply in enumerate(outcomes):
            self._noted(replica, reply)
        told = [None if isinstance(reply, CallFailed) else parse_loads(reply) for reply in outcomes]
        if not any(told):
            raise error_from_rpc(outcomes[0], self.peers[0])
        states = self.fleet.router.known()
        return loads_of_all(
            Replica(peer.address, *state, loads) for peer, state, loads in zip(self.peers, states, told, strict=True)
        )

    def aborted_of(self, outcomes: Sequence[Any]) -> bool:
        """Whether one of all has found it. Raises ``CairnError`` where one that may have it did not say."""
        if any(not isinstance(reply, CallFailed) and reply.found for reply in outcomes):
            return True
        failed = [n for n, reply in enumerate(outcomes) if isinstance(reply, CallFailed)]
        silent = [n for n in failed if not is_away(outcomes[n])]
        if silent or len(failed) == len(outcomes):
            replica = (silent or failed)[0]
            raise error_from_rpc(outcomes[replica], self.peers[replica])
        return False

    def _noted(self, replica: int, reply: Any) -> None:
        """A reply of ``GetLoads``, or how it failed."""
        if isinstance(reply, CallFailed):
            self.fleet.unheard(replica, reply)
        else:
            self.fleet.heard(replica, reply)


class ThreadReplicas(_Replicas):
    """For threads. The thread that watches ends when it is closed, is not wanted, or nobody has it any more."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        super().__init__(peers, Fleet([peer.address for peer in peers]))
        self._channels = [peer.open_channel() for peer in peers]
        self.stubs = [calls.stub(peers[0].service, channel) for channel in self._channels]
        self._watch = _Watch()

    def known(self, timeout_s: float) -> None:
        """Returns once something is known of the replicas, after ``timeout_s`` at most, or ``FIRST_LOOK_S``."""
        if self.fleet.alone or self.fleet.closed:
            return
        self._watch.wanted(self._look)
        self._watch.looked.wait(min(FIRST_LOOK_S, timeout_s))

    def ask_all(self, method: str, request: Any, timeout_s: float) -> list[Any]:
        """Each replica's reply, or the ``CallFailed`` it ended with. Takes no longer than ``timeout_s``."""
        running = [
            getattr(stub, method).future(request, timeout=timeout_s, metadata=peer.for_request().metadata)
            for stub, peer in zip(self.stubs, self.peers, strict=True)
        ]
        return [outcome(call) for call in running]

    def _look(self) -> None:
        for replica, reply in enumerate(self.ask_all("GetLoads", LOADS, ANSWER_S)):
            self._noted(replica, reply)

    def close(self) -> None:
        self.fleet.closed = True
        self._watch.stop()
        for channel in self._channels:
            channel.close()


class _Watch:
    """A thread that looks every ``POLL_S`` seconds."""

    def __init__(self) -> None:
        self.looked = threading.Event()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._running = False
        self._wanted_at = 0.0

    def wanted(self, look: Callable[[], None]) -> None:
        """Starts it unless it runs. ``look`` is a method, whose object is not kept alive."""
        self._wanted_at = time.monotonic()
        with self._lock:
            if self._running or self._stopped.is_set():
                return
            self._running = True
        threading.Thread(target=self._run, args=(weakref.WeakMethod(look),), name="cairn-replicas", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self, look: weakref.WeakMethod[Callable[[], None]]) -> None:
        while True:
            now = look()
            with self._lock:
                idle = time.monotonic() - self._wanted_at > IDLE_S
                if now is None or idle or self._stopped.is_set():
                    self._running = False
                    self.looked.clear()  # what is known by then is old
                    return
            try:
                now()
            except ValueError:  # the channel is closed
                self._stopped.set()
            del now
            self.looked.set()
            self._stopped.wait(POLL_S)


class LoopReplicas(_Replicas):
    """For the event loop of the first call."""

    def __init__(self, peers: Sequence[Peer]) -> None:
        super().__init__(peers, Fleet([peer.address for peer in peers]))
        self._shared = _OfLoop()

    def stub(self, replica: int) -> Any:
        """Opens the channel if it is not open yet."""
        channels = self._shared.channels
        if not channels:
            channels += [peer.open_async_channel() for peer in self.peers]
            self._shared.stubs += [calls.stub(self.peers[0].service, channel) for channel in channels]
        return self._shared.stubs[replica]

    @property
    def is_known(self) -> bool:
        """Whether something is known of the replicas; they are watched from now on."""
        shared = self._shared
        if self.fleet.alone or self.fleet.closed:
            return True
        shared.wanted_at, shared.peers = time.monotonic(), self.peers
        if shared.task is None or shared.task.done():
            shared.task = asyncio.create_task(self._watch(), name="cairn-replicas")
        return shared.looked.is_set()

    async def known(self, timeout_s: float) -> None:
        """Returns once something is known of the replicas, after ``timeout_s`` at most, or ``FIRST_LOOK_S``."""
        if not self.is_known:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._shared.looked.wait(), min(FIRST_LOOK_S, timeout_s))

    async def ask_all(self, method: str, request: Any, timeout_s: float, peers: Sequence[Peer] = ()) -> list[Any]:
        """Each replica's reply, or the ``CallFailed`` it ended with. Takes no longer than ``timeout_s``."""

        async def ask(replica: int, peer: Peer) -> Any:
            call = getattr(self.stub(replica), method)
            try:
                return await call(request, timeout=timeout_s, metadata=peer.for_request().metadata)
            except CallFailed as error:
                return error

        return await asyncio.gather(*(ask(replica, peer) for replica, peer in enumerate(peers or self.peers)))

    async def _watch(self) -> None:
        while time.monotonic() - self._shared.wanted_at <= IDLE_S:
            shared = self._shared
            asking = shared.let_in or shared.peers
            replies = await self.ask_all("GetLoads", LOADS, ANSWER_S, asking)
            for replica, reply in enumerate(replies):
                self._noted(replica, reply)
            # A token that may ask asks on, whatever tokens others come with.
            shared.let_in = asking if any(not isinstance(reply, CallFailed) for reply in replies) else ()
            self._shared.looked.set()
            await asyncio.sleep(POLL_S)
        self._shared.looked.clear()  # what is known by then is old

    async def close(self) -> None:
        self.fleet.closed = True
        if self._shared.task is not None:
            self._shared.task.cancel()
            await asyncio.gather(self._shared.task, return_exceptions=True)
        for channel in self._shared.channels:
            await channel.close(None)


class _OfLoop:
    """What all clients of one loop share, whatever their tokens."""

    def __init__(self) -> None:
        self.channels: list[AsyncChannel] = []
        self.stubs: list[Any] = []
        self.looked = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.peers: tuple[Peer, ...] = ()  # with the token of whoever wanted something last
        self.let_in: tuple[Peer, ...] = ()  # with one that was let in
        self.wanted_at = 0.0
