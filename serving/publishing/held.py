"""The claims that a process holds on what it computes, from ``begin`` to ``commit``: kept alive all together.

One thread renews them in one step of the store, however many there are and whatever is being written meanwhile. A claim
that is lost all the same (the store was away for long, or somebody removed what is in it) is taken again at once,
unless another process has it: then that one publishes, and what was computed here need not be written.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

from chunk_store.entry import EntryInfo
from chunk_store.errors import ClaimLost, StoreError
from chunk_store.key import ChunkKey
from chunk_store.store import Busy, ChunkStore, Publication, Stored
from serving.store.heartbeat import EVERY_S, TTL_S, heartbeat

log = logging.getLogger(__name__)


class HeldClaim:
    """The right to publish one key. It is renewed until ``write`` or ``end`` returns."""

    def __init__(self, claims: HeldClaims, key: ChunkKey, publication: Publication) -> None:
        self.key = key
        self.publication = publication
        self._claims = claims
        self._lost = self._writing = self._ended = False
        self._lock = threading.Lock()  # of who takes it again

    def write(self, write: Callable[[Publication], EntryInfo]) -> EntryInfo:
        """What ``write`` committed; it is called once more, under a new claim, where the first was lost meanwhile.

        Returns what another process has stored, and raises ``ClaimLost`` where one is about to.
        """
        with self._lock:
            self._writing = True  # from here on it is this thread that takes it again
        try:
            if self._lost and (stored := self._begin_again()) is not None:
                return stored
            try:
                with self.publication as publication:
                    return write(publication)
            except ClaimLost:
                if (stored := self._begin_again()) is not None:
                    return stored
            with self.publication as publication:
                return write(publication)
        finally:
            self.end()

    def end(self) -> None:
        """Gives it up, if it was not committed; harmless a second time.

        Raises ``StoreUnavailable``: then it runs out.
        """
        self._claims.forget(self)
        with self._lock:
            self._ended = True
        self.publication.abort()

    def take_again(self) -> None:
        """It was found to be lost while it waits."""
        with self._lock:
            if self._writing or self._ended:
                return  # who writes finds out, too
            self._lost = True
            answer = self._claims.store.begin(self.key, ttl_s=TTL_S)
            if isinstance(answer, Stored | Busy):
                self._claims.forget(self)
                log.warning("the claim on %s was lost, and another process has it", self.key)
                return
            self.publication, self._lost = answer, False
        log.warning("the claim on %s was lost, and is taken again", self.key)

    def _begin_again(self) -> EntryInfo | None:
        """Claims it anew; what is stored already, if it is."""
        answer = self._claims.store.begin(self.key, ttl_s=TTL_S)
        if isinstance(answer, Stored):
            return answer.info
        if isinstance(answer, Busy):
            raise ClaimLost(f"the claim on {self.key} was lost, and another process is about to store it")
        self.publication, self._lost = answer, False
        self._claims.keep(self)
        return None


class HeldClaims:
    """Claims in ``store`` that are renewed together, every ``every_s`` seconds. Thread-safe."""

    def __init__(self, store: ChunkStore, every_s: float = EVERY_S) -> None:
        self.store = store
        self._every_s = every_s
        self._held: set[HeldClaim] = set()
        self._lock = threading.Lock()
        self._beats = ExitStack()
        self._beats.enter_context(heartbeat(self.renew, every_s))

    def __len__(self) -> int:
        return len(self._held)

    def hold(self, key: ChunkKey, publication: Publication) -> HeldClaim:
        """Takes over a claim that was given just now."""
        claim = HeldClaim(self, key, publication)
        self.keep(claim)
        return claim

    def keep(self, claim: HeldClaim) -> None:
        """It is renewed from now on."""
        with self._lock:
            self._held.add(claim)

    def forget(self, claim: HeldClaim) -> None:
        """It is renewed no more."""
        with self._lock:
            self._held.discard(claim)

    def renew(self) -> None:
        """Renews them all, and takes those again that are lost, as many as there is time for until the next renewal.

        Raises ``StoreError``; what could not be renewed is tried again.
        """
        until = time.monotonic() + self._every_s
        with self._lock:
            held = {claim.publication: claim for claim in self._held}
        for publication in self.store.renew(list(held)):
            if held[publication].publication is publication:
                held[publication].take_again()
            if time.monotonic() > until:
                return

    def stop(self) -> None:
        """Renews nothing more."""
        self._beats.close()


def end_quietly(claim: HeldClaim) -> None:
    """Gives a claim up where nobody can do anything about a store that is away."""
    try:
        claim.end()
    except StoreError as error:
        log.warning("the claim on %s could not be given up and runs out: %s", claim.key, error)
