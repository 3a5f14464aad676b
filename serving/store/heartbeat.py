"""Keeps claims and leases alive while their holder computes: a thread that renews them until the block ends."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chunk_store.errors import StoreError

TTL_S = 30.0
EVERY_S = TTL_S / 6

log = logging.getLogger(__name__)


@contextmanager
def heartbeat(renew: Callable[[], None], every_s: float = EVERY_S) -> Iterator[None]:
    """Calls ``renew`` every ``every_s`` seconds inside the block.

    A renewal that fails is logged and tried again: whether the claim still stands, its next use will tell.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            try:
                renew()
            except StoreError as error:
                if not ended.is_set():  # else nobody needs it any more
                    log.warning("claims or a lease could not be renewed: %s", error)

    context = contextvars.copy_context()  # its lines bear the request that it is for
    thread = threading.Thread(target=context.run, args=(beat,), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(every_s)
