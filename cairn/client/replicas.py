"""Several decode services as one: each request's way among them. Knows no channels; ``cairn.client.watching`` does.

A request goes elsewhere, at once, as long as nothing of its answer has come: when its replica cannot be reached, is
shutting down, says that it is full, or no longer answers. Once a token has come its failure is the caller's to see.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from cairn.client.affinity import Affinity, Seen, affinity_of, turn_name
from cairn.client.answers import Result
from cairn.client.chunks import Chunk, StoredChunk
from cairn.client.errors import CairnError, error_from_status, invalid
from cairn.client.reports import SegmentReport
from cairn.client.routing import Report, Router
from cairn.client.transport import Attempts, CallFailed, Peer, error_from_rpc, goes_elsewhere, is_away, is_late
from protos import decode_pb2

REPLICAS_MAX = 64
SIZES_MAX = 65_536  # chunks whose tokens are remembered
OF_GRPC = ("ipv4:", "ipv6:")  # lists of gRPC's own, with commas: one address to us

log = logging.getLogger("cairn.client")


def addresses_of(decode: str | Sequence[str]) -> tuple[str, ...]:
    """``HOST:PORT``, several of them in one text with commas, or a list. Raises ``InvalidRequest``."""
    given = [decode] if isinstance(decode, str) else list(decode)
    if not all(isinstance(each, str) for each in given):
        raise invalid("decode", f"must be HOST:PORT or a list of them, not {decode!r}")
    apart = [[each] if each.startswith(OF_GRPC) else each.replace(",", " ").split() for each in given]
    found = [address for each in apart for address in each]
    if not found:
        raise invalid("decode", "names no address; give HOST:PORT, or several with commas between them")
    if twice := sorted({each for each in found if found.count(each) > 1}):
        raise invalid("decode", f"names {twice[0]} twice; name each service once")
    if len(found) > REPLICAS_MAX:
        raise invalid("decode", f"names {len(found)} services, at most {REPLICAS_MAX} are used")
    return tuple(found)


class Fleet:
    """What is known of the replicas by all who use them, whatever their tokens. Thread-safe."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.router = Router(addresses)
        self.closed = False
        self._addresses = addresses
        self._lock = threading.RLock()  # a collected generation leaves in whatever a thread does
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._sent: OrderedDict[str, bytes] = OrderedDict()
        self._routes: list[dict[int, weakref.ref[Route]]] = [{} for _ in addresses]  # by id
        self._states = [""] * len(addresses)

    @property
    def alone(self) -> bool:
        """There is one, so there is nothing to choose."""
        return len(self._addresses) == 1

    def affinity(self, request: decode_pb2.GenerateRequest, owner: str) -> Affinity:
        return (
            Affinity() if self.alone else affinity_of(request, Seen(self._sizes, self.router.used, self._sent), owner)
        )

    def note(self, parts: Iterable[Any]) -> None:
        """Remembers how many tokens the chunks among ``parts`` have, of those that say so."""
        if self.alone or isinstance(parts, str):
            return
        for part in parts:
            if isinstance(part, Chunk | StoredChunk):
                self._note(part.id, part.tokens)
            elif isinstance(part, SegmentReport) and part.chunk_id:
                self._note(part.chunk_id, part.tokens)

    def _note(self, chunk_id: str, tokens: int) -> None:
        with self._lock:
            self._sizes[chunk_id] = tokens
            self._sizes.move_to_end(chunk_id)
            if len(self._sizes) > SIZES_MAX:
                self._sizes.popitem(last=False)

    def note_sent(self, segments: Iterable[SegmentReport], inline: Iterable[tuple[int, bytes]]) -> None:
        """Remembers which ids the chunks have that were sent in full; what is known of one stays."""
        digests = dict(inline)
        with self._lock:
            for segment in segments:
                if segment.chunk_id and (digest := digests.get(segment.given_index)):
                    self._sent.setdefault(segment.chunk_id, digest)
                    self._sent.move_to_end(segment.chunk_id)
            while len(self._sent) > SIZES_MAX:
                self._sent.popitem(last=False)

    def arrives(self, route: Route, replica: int) -> None:
        with self._lock:
            self._routes[replica][id(route)] = weakref.ref(route)

    def leaves(self, route: Route, replica: int) -> None:
        with self._lock:
            self._routes[replica].pop(id(route), None)
        self.router.ended(replica)

    # -- what watching finds ------------------------------------------------------------------------
    def heard(self, replica: int, reply: decode_pb2.GetLoadsResponse) -> None:
        model = (reply.model_identity, reply.tokenizer_identity)
        self.router.heard(replica, Report(reply.running + reply.waiting, model, reply.model_name))
        self._say()

    def unheard(self, replica: int, error: CallFailed) -> None:
        """It did not say how busy it is. One that hangs loses what waits there for a first token."""
        why = error.details() or error.code().name
        if is_away(error):
            self.router.away(replica, why)
        elif not is_late(error):
            self.router.heard(replica, None)  # it answers, if only that this caller may not ask
        elif self.router.missed(replica, "does not answer"):
            with self._lock:
                waiting = list(self._routes[replica].values())
            for reference in waiting:
                if (route := reference()) is not None:
                    route.leave(replica)
        self._say()

    def _say(self) -> None:
        """Logs what has changed."""
        for replica, (state, why) in enumerate(self.router.known()):
            if state != self._states[replica]:
                level = logging.INFO if state in ("up", "unknown") else logging.WARNING
                log.log(level, "decode service at %s: %s%s", self._addresses[replica], state, why and f": {why}")
                self._states[replica] = state


class Route:
    """One request's way: where it is, and where it goes next. Over at most once, by ``over``."""

    def __init__(self, fleet: Fleet, peers: Sequence[Peer], affinity: Affinity, owner: str = "") -> None:
        """``peers`` are the replicas for this request, with its id."""
        self.peer = peers[0]  # where it is, or was last
        self._fleet = fleet
        self._peers = peers
        self._affinity = affinity
        self._owner = owner
        self._at = -1
        self._tried: dict[int, CairnError] = {}
        self._leave: Callable[[], Callable[[], None] | None] = lambda: None

    @classmethod
    def alone(cls, peer: Peer) -> Route:
        """The way of a request for which there is one place."""
        return cls(Fleet([peer.address]), [peer], Affinity())

    def on_hang(self, leave: Callable[[], None]) -> None:
        """``leave``, a method, is called when the replica no longer answers, in any thread; it is not kept alive."""
        self._leave = weakref.WeakMethod(leave)

    def leave(self, replica: int) -> None:
        """The replica hangs."""
        leave = self._leave()
        if leave is not None and self._at == replica:
            leave()

    def go(self) -> int:
        """Chooses a replica and returns its number. Raises ``CairnError`` where none may be used."""
        self.over()
        chosen = self._fleet.router.choose(self._affinity, self._tried)
        if chosen < 0 and self._tried:
            self._tried.clear()
            chosen = self._fleet.router.choose(self._affinity)
        if chosen < 0:
            raise self._none()
        self._at, self.peer = chosen, self._peers[chosen]
        self._fleet.arrives(self, chosen)
        return chosen

    def delay_or_raise(self, error: CallFailed, attempts: Attempts, *, late_elsewhere: bool = False) -> float:
        """Seconds until another attempt, 0 if it goes to another replica; raises the error when there is none.

        ``late_elsewhere``: a deadline that passed was the attempt's, not the call's.
        """
        if self._fails(error, late_elsewhere) and len(self._tried) < len(self._peers):
            return 0.0
        delay_s = attempts.delay_after(error)
        if delay_s is None:
            raise self.error(error) from None
        self._tried.clear()
        return delay_s

    def patience_s(self, attempts: Attempts) -> float:
        """How long one replica may take with a call that every one does soon: there is time left for the others."""
        return attempts.remaining_s() / max(1, len(self._peers) - len(self._tried))

    def moves(self) -> None:
        """It has left a replica that hangs."""
        if self._at >= 0:
            why = "it does not answer, and nothing of the answer had come"
            self._tried[self._at] = error_from_status("UNAVAILABLE", why, self.peer.source, self.peer.request_id)

    def error(self, error: CallFailed) -> CairnError:
        """What the caller is told in the end: of several replicas what each has said."""
        last = error_from_rpc(error, self.peer)
        failed = {**self._tried, self._at: last}
        if len(failed) < 2:
            return last
        told = next((each for each in failed.values() if each.retry_after_s is not None), last)
        # Addresses stand in the source alone: messages are passed on to those who need not know them.
        words = "; ".join(dict.fromkeys(each.message for each in failed.values() if each.code == told.code))
        places = ", ".join(self._peers[replica].address for replica in failed)
        return _like(told, f"no decode service takes it: {words}", f"decode services at {places}")

    def broken(self, error: CallFailed, tokens: int) -> CairnError:
        """What the caller is told of an answer that ended in its middle."""
        last = error_from_rpc(error, self.peer)
        if self._fleet.alone or not is_away(error):
            return last
        words = f"the answer broke off after {tokens} tokens, so no other service goes on: {last.message}"
        return _like(last, words, last.source)

    def finished(self, result: Result) -> None:
        """It was answered: the conversation stays here."""
        if self._fleet.alone or self._at < 0:
            return
        kept = [turn_name(result.kept.id, self._owner)] if result.kept is not None else []
        self._fleet.router.answered(self._at, (*self._affinity.here, *kept))
        self._fleet.note(result.reuse.segments)
        self._fleet.note_sent(result.reuse.segments, self._affinity.inline)

    def over(self) -> None:
        """It is at no replica (any more)."""
        at, self._at = self._at, -1
        if at >= 0:
            self._fleet.leaves(self, at)

    def _fails(self, error: CallFailed, late_elsewhere: bool) -> bool:
        """Whether another replica may do what this one did not; what that says of this one is noted."""
        if self._fleet.alone or self._fleet.closed or self._at < 0:
            return False
        late = late_elsewhere and is_late(error)
        if not late and not goes_elsewhere(error):
            return False
        self._tried[self._at] = error_from_rpc(error, self.peer)
        if late or is_away(error):
            self._fleet.unheard(self._at, error)
        return True

    def _none(self) -> CairnError:
        words = "; ".join(dict.fromkeys(why or state for state, why in self._fleet.router.known()))
        places = ", ".join(peer.address for peer in self._peers)
        return error_from_status(
            "UNAVAILABLE",
            f"no decode service can be used: {words}",
            f"decode services at {places}",
            self.peer.request_id,
        )


def _like(error: CairnError, message: str, source: str) -> CairnError:
    """The same error in other words."""
    told = error_from_status(error.code, message, source, error.request_id)
    told.retry_after_s = error.retry_after_s
    return told


def peers_for(peers: Sequence[Peer], request_id: str) -> list[Peer]:
    """All replicas for one request."""
    first = peers[0].for_request(request_id)
    return [replace(peer, request_id=first.request_id) for peer in peers]
