"""Takes chunks over from lenders of this host; sessions with them are opened in the background.

A process may borrow from several lenders (prefill services behind one address), and lenders come and go: where a
chunk was computed by one with which there is no session, one is asked for. Until there is, the store has the bytes.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chunk_store.layout import KVLayout
from serving.errors import PermissionDenied, RequestError, Unauthenticated, Unsupported
from serving.handover.lent import Lent, NoSession, Offer, Refusal
from serving.handover.metrics import BorrowerMetrics
from serving.handover.session import NotOpened, Session, open_session

ASK_AGAIN_S = 30.0  # after a lender that could not be opened, or was not found
LENDERS_AT_ONE_ADDRESS = 8  # asked one after the other for the one that is wanted

log = logging.getLogger(__name__)


class Borrower:
    """Copies into a pool of ``layout`` on ``device``. ``ask`` calls ``OpenHandOver`` with our ``name``.

    Any thread may call it. ``ask`` runs in a thread of its own and raises ``RequestError``.
    """

    def __init__(
        self,
        layout: KVLayout,
        device: torch.device,
        ask: Callable[[str], Offer],
        metrics: BorrowerMetrics,
        *,
        ask_again_s: float = ASK_AGAIN_S,
        uid: int | None = None,
    ) -> None:
        self.name = secrets.token_hex(16)
        self._layout = layout
        self._device = device
        self._ask = ask
        self._metrics = metrics
        self._ask_again_s = ask_again_s
        self._uid = uid
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}  # by the lender's name
        self._opening: threading.Thread | None = None
        self._not_before: dict[str, float] = {}  # by lender, when it is looked for again (monotonic clock)
        self._closed = False

    def copy(self, lent: Lent, planes: Sequence[Tensor], *, after: torch.cuda.Event | None = None) -> Refusal | None:
        """Copies a chunk into ``planes`` of our pool, in entry order, and gives it back.

        Not before ``after``. None if the bytes are there and right; otherwise the planes are undefined.
        """
        refusal = self._copy(lent, planes, after)
        self._metrics.chunk(refusal)
        if refusal is not None:
            log.info("a chunk is taken from the store and not from who computed it: %s", refusal)
        return refusal

    def _copy(self, lent: Lent, planes: Sequence[Tensor], after: torch.cuda.Event | None) -> Refusal | None:
        session = self._session(lent.pool)
        if session is None:
            return Refusal.NO_SESSION
        if not lent.lease:
            return Refusal.NOT_LENT
        if any(plane.shape[0] != lent.tokens for plane in planes):
            return Refusal.NOT_COPIED
        refusal = session.copy(lent, planes, after)
        if session.lost:
            self._forget(lent.pool, session)
        return refusal

    def open(self) -> None:
        """Begins to open a session with the lender behind the address, if there is one."""
        self._look_for("")

    def close(self) -> None:
        """Ends every session."""
        with self._lock:
            self._closed = True
            sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            session.close()

    @property
    def lenders(self) -> int:
        """Sessions that are open."""
        with self._lock:
            self._sessions = {pool: session for pool, session in self._sessions.items() if not session.lost}
            return len(self._sessions)

    # -- sessions -----------------------------------------------------------------------------------
    def _session(self, pool: str) -> Session | None:
        """The session with a lender; without one, it is looked for, for the next time."""
        with self._lock:
            session = self._sessions.get(pool)
            if session is not None and session.lost:
                del self._sessions[pool]
                session = None
        if session is None and pool:
            self._look_for(pool)
        return session

    def _forget(self, pool: str, session: Session) -> None:
        with self._lock:
            if self._sessions.get(pool) is session:
                del self._sessions[pool]

    def _look_for(self, pool: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._not_before = {name: until for name, until in self._not_before.items() if until > now}
            if self._closed or self._opening is not None or pool in self._not_before:
                return
            self._opening = threading.Thread(target=self._open, args=(pool,), name="cairn-borrow", daemon=True)
            self._opening.start()

    def _open(self, pool: str) -> None:
        """Asks until the lender named ``pool`` is there: calls go to each that is behind the address in turn."""
        found = False
        try:
            for _ in range(LENDERS_AT_ONE_ADDRESS if pool else 1):
                opened = self._open_next()
                if opened is None:
                    break
                found = opened == pool or not pool
                if found:
                    break
        except Exception:  # what nobody expected must not leave us without hand-over for good
            log.exception("a session with a lender could not be opened")
        finally:
            with self._lock:
                self._opening = None
                if pool and not found:
                    self._not_before[pool] = time.monotonic() + self._ask_again_s

    def _open_next(self) -> str | None:
        """Opens a session with the lender that answers; its name, None if that failed."""
        try:
            offer = self._ask(self.name)
            with self._lock:
                if offer.pool in self._sessions:
                    return offer.pool
            session = open_session(offer, self._layout, self._device, uid=self._uid)
        except (NotOpened, RequestError) as error:
            why = error.why if isinstance(error, NotOpened) else _why(error)
            log.info("KV is not taken over from the prefill service, but from the store: %s", error)
            self._metrics.session(why)
            return None
        with self._lock:
            if self._closed:
                session.close()
                return None
            self._sessions[offer.pool] = session
        log.info("KV is taken over from a prefill service of this host")
        self._metrics.session(None)
        return offer.pool


def _why(error: RequestError) -> NoSession:
    """What a call that was refused says about hand-over."""
    if isinstance(error, PermissionDenied | Unauthenticated):
        return NoSession.NOT_ALLOWED
    return NoSession.OFF if isinstance(error, Unsupported) else NoSession.NO_ANSWER
