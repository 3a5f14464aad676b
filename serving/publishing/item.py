"""One entry on its way into the store: what it holds, and who waits for it."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from chunk_store.entry import EntryHeader, EntryInfo
from chunk_store.landing import Buffers, Landing
from chunk_store.tenant import TenantLimits
from engine.kv.resident import ResidentChunk
from serving.publishing.held import HeldClaim
from serving.publishing.room import Place
from serving.publishing.staging import Region


class Publishing(Future[EntryInfo]):
    """An entry on its way: done when it is committed, or has failed. Nobody can cancel it.

    ``computed`` is done as soon as the KV is in the pool's pages for certain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computed: Future[None] = Future()
        self.set_running_or_notify_cancel()
        self.computed.set_running_or_notify_cancel()


@dataclass(eq=False)
class Item:
    """``asked`` is its room in the queue, which may be still to come; ``planes`` are its pages once they are held."""

    header: EntryHeader
    chunk: ResidentChunk
    claim: HeldClaim
    limits: TenantLimits
    asked: Future[Place]
    planes: Sequence[Tensor] = ()
    future: Publishing = field(default_factory=Publishing)
    launched: torch.cuda.Event | None = None
    still: bool = False  # its pages are held
    region: Region | None = None
    buffers: Sequence[memoryview] = ()
    ended: bool = False
    began: float = field(default_factory=time.monotonic)
    context: contextvars.Context = field(default_factory=contextvars.copy_context)  # its lines bear its request
    reading: threading.Lock = field(default_factory=threading.Lock)  # of the buffers, while somebody reads them

    def read(self, landing: Landing) -> bool:
        """Copies what is to be written; False if that is not, or no longer, in memory."""
        with self.reading:
            if not self.buffers:
                return False
            source = Buffers(self.buffers)
            left = sum(source.sizes)
            for start in range(0, left, landing.piece_nbytes):
                nbytes = min(landing.piece_nbytes, left - start)
                with source.piece(start, nbytes) as taken, landing.piece(start, nbytes) as views:
                    _copy(taken, views)
        return True


def _copy(source: Sequence[memoryview], target: Sequence[memoryview]) -> None:
    """Flat views of the same bytes in all, however they are cut."""
    views = iter(target)
    view = memoryview(b"")
    for part in source:
        while part.nbytes:
            if not view.nbytes:
                view = next(views)
            nbytes = min(part.nbytes, view.nbytes)
            view[:nbytes] = part[:nbytes]
            part, view = part[nbytes:], view[nbytes:]
