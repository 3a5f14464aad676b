"""Which calls are open and whose they are: bounds on them, and deadlines on what their clients make them wait for.

    waiting for a message ── works ── waiting for a reply to be taken ── ended, its status not yet taken

A call that works has no deadline here (its handler has). One that waits for its client has one, and it is the first to
go: where a bound is reached, the call that has waited longest for its client is ended, and only if there is none is the
new one refused. So calls that do nothing never keep out calls that do something.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from urllib.parse import unquote

from serving.errors import Overloaded, RequestError

RETRY_AFTER_S = 1.0
CONNECTIONS_REMEMBERED = 1024
DRAIN_MESSAGE_S = 1.0  # how long a service that drains waits for a message, or for a stream's end


class CallKind(StrEnum):
    """Kinds are counted apart: none can take another's room."""

    WORK = "calls"
    WATCH = "health watches"
    CHECK = "health checks"
    REFLECTION = "reflection calls"


@dataclass(frozen=True)
class Bounds:
    """Open calls of one kind at most: of a connection, of a token, of a client's address, and in all."""

    connection: int
    token: int
    address: int
    total: int


@dataclass(frozen=True)
class CallLimits:
    """What a client may hold open, and how long it may keep a call waiting, in seconds."""

    work: Bounds = Bounds(512, 1024, 1024, 2048)
    watch: Bounds = Bounds(32, 256, 256, 1024)
    check: Bounds = Bounds(64, 256, 256, 1024)
    reflection: Bounds = Bounds(32, 64, 64, 256)
    unread: int = 32  # ended calls of a connection whose replies the client does not take
    message_s: float = 30.0  # for the first message, all of it
    idle_s: float = 120.0  # for the next message of a stream, once all are answered
    write_s: float = 30.0  # for one reply to be taken

    def of(self, kind: CallKind) -> Bounds:
        """The bounds of a kind."""
        found = {CallKind.WORK: self.work, CallKind.WATCH: self.watch, CallKind.CHECK: self.check}
        return found.get(kind, self.reflection)


@dataclass(frozen=True)
class Holder:
    """Who holds a call open: grpc's name of the connection, and the digest of the token ("" without one)."""

    connection: str
    token: str = ""

    @property
    def address(self) -> str:
        """The connection without its port. Of IPv6 the network: one client has all the addresses in it."""
        return _address_of(self.connection)

    def scopes(self) -> dict[str, str]:
        """What it is counted under; the keys are the fields of ``Bounds``."""
        named = {"connection": self.connection, "token": self.token, "address": self.address, "total": "all"}
        return {scope: name for scope, name in named.items() if name}


@lru_cache(CONNECTIONS_REMEMBERED)  # many calls come over one connection
def _address_of(connection: str) -> str:
    place = unquote(connection).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        found = ipaddress.ip_address(place)
    except ValueError:
        return connection
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else place


@dataclass(eq=False)
class OpenCall:
    """One call. ``deadline`` ends the task that answers it; ``ending`` is what it is then ended with.

    A stream waits for its client with every message, thousands of times a second in all: that only notes when it is
    ``due``. The one timer that it has is looked at when it rings, and set again where there is still time.
    """

    kind: CallKind
    holder: Holder
    deadline: asyncio.Timeout
    ending: RequestError | None = None
    closing: RequestError | None = None  # the service drains: what it is ended with should no message come soon
    idle_since: float | None = None  # it waits for its client since then (loop time)
    message_due: bool = False  # what it waits for is a message
    counted: bool = False
    delivery: asyncio.TimerHandle | None = None
    unread: bool = False
    scopes: dict[str, str] = field(default_factory=dict)
    due: float | None = None  # when it ends if it still waits then (loop time)
    _timer: asyncio.TimerHandle | None = None

    def waits(self, seconds: float | None, ending: RequestError) -> None:
        """From now on it waits for its client, at most ``seconds``; then it ends with ``ending``."""
        now = asyncio.get_running_loop().time()
        self.idle_since, self.ending, self.message_due = now, ending, False
        self._reschedule(None if seconds is None else now + seconds)

    def awaits_message(self, seconds: float, ending: RequestError) -> None:
        """From now on it waits for a message, as ``waits`` does; not for long if the service drains."""
        if self.closing is not None:
            seconds, ending = DRAIN_MESSAGE_S, self.closing
        self.waits(seconds, ending)
        self.message_due = True

    def close(self, closing: RequestError) -> None:
        """The service drains: what works goes on, and takes as long as it likes to hand out its replies."""
        self.closing = closing
        if self.message_due:
            self.awaits_message(DRAIN_MESSAGE_S, closing)

    def works(self) -> None:
        """From now on it waits for us."""
        self.idle_since, self.message_due = None, False
        if self.due is not None:
            self._reschedule(None)

    def end(self, ending: RequestError) -> None:
        """Ends it now."""
        self.ending = ending
        self._reschedule(asyncio.get_running_loop().time())

    def forget(self) -> None:
        """It has ended: nothing is due."""
        self.due = None
        if self._timer is not None:
            self._timer.cancel()

    def _reschedule(self, when: float | None) -> None:
        if not self._can_end:
            return
        self.due = when
        if self.deadline.when() is not None:  # it was about to end
            self.deadline.reschedule(None)
        if when is not None and (self._timer is None or when < self._timer.when()):
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_at(when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self.due is None or not self._can_end:
            return
        loop = asyncio.get_running_loop()
        if self.due <= loop.time():
            self.deadline.reschedule(self.due)
        else:
            self._timer = loop.call_at(self.due, self._ring)

    @property
    def _can_end(self) -> bool:
        return self.counted and self.delivery is None and not self.deadline.expired()


class OpenCalls:
    """The table. Used from the event loop only."""

    def __init__(self, limits: CallLimits) -> None:
        self.limits = limits
        self._calls: dict[CallKind, dict[OpenCall, None]] = {kind: {} for kind in CallKind}
        self._counts: Counter[tuple[CallKind, str, str]] = Counter()
        self._unread: Counter[str] = Counter()  # by connection
        self.no_work = asyncio.Event()  # set while no call of the service itself is open
        self.no_work.set()

    def count(self, kind: CallKind) -> int:
        """Open calls of a kind, without those whose replies are not taken."""
        return len(self._calls[kind])

    @property
    def unread(self) -> int:
        """Ended calls whose replies are not taken."""
        return self._unread.total()

    def enter(self, call: OpenCall) -> None:
        """Counts a call in; ends others that only wait, if it takes that. Raises ``RequestError`` at a bound."""
        if self._unread[call.holder.connection] >= self.limits.unread:
            raise Overloaded(
                f"{self.limits.unread} replies of this connection are not taken", remedy="read them or connect anew"
            )
        bounds = self.limits.of(call.kind)
        call.scopes = call.holder.scopes()
        for scope, name in call.scopes.items():
            most = getattr(bounds, scope)
            while self._counts[call.kind, scope, name] >= most:
                self._make_room(call.kind, scope, name, most)
        self._calls[call.kind][call] = None
        self._counts.update((call.kind, scope, name) for scope, name in call.scopes.items())
        call.counted = True
        if call.kind is CallKind.WORK:
            self.no_work.clear()

    def finishing(self, call: OpenCall) -> None:
        """Its handler is done: what is left is the client's taking of reply and status."""
        if not call.counted:
            return
        loop = asyncio.get_running_loop()
        call.idle_since = loop.time()
        call.delivery = loop.call_later(self.limits.write_s, self._set_aside, call)

    def leave(self, call: OpenCall) -> None:
        """It has ended altogether."""
        call.forget()
        if call.delivery is not None:
            call.delivery.cancel()
        self._uncount(call)
        if call.unread:
            call.unread = False
            self._unread -= Counter((call.holder.connection,))

    def close(self, closing: RequestError) -> None:
        """Ends every call of the service that waits for a message, now or later; those that work go on."""
        for call in self._calls[CallKind.WORK]:
            call.close(closing)

    def _make_room(self, kind: CallKind, scope: str, name: str, most: int) -> None:
        idle = [call for call in self._calls[kind] if call.idle_since is not None and call.scopes.get(scope) == name]
        whose = {"connection": "of this connection", "token": "with this token", "address": "of this address"}
        if not idle:
            raise Overloaded(
                f"{most} {kind} {whose.get(scope, 'in all')} are open, and no more may be",
                remedy="try again later",
                retry_after_s=RETRY_AFTER_S,
            )
        oldest = min(idle, key=lambda call: call.idle_since or 0.0)
        if oldest.delivery is not None:
            self._set_aside(oldest)
            return
        oldest.end(
            Overloaded(
                f"ended in favour of a new call: this one waited longest for its client, and at most {most} {kind} "
                f"{whose.get(scope, 'in all')} may be open",
            )
        )
        self._uncount(oldest)

    def _set_aside(self, call: OpenCall) -> None:
        """Its reply is not taken: it no longer counts as open, but its connection may have few of these."""
        if call.delivery is not None:
            call.delivery.cancel()
        self._uncount(call)
        call.unread = True
        self._unread[call.holder.connection] += 1

    def _uncount(self, call: OpenCall) -> None:
        if not call.counted:
            return
        call.counted = False
        del self._calls[call.kind][call]
        if not self._calls[CallKind.WORK]:
            self.no_work.set()
        self._counts -= Counter((call.kind, scope, name) for scope, name in call.scopes.items())
