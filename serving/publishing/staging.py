"""Host memory that KV passes through on its way out of a device: pinned once, used again for every chunk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device import current
from engine.kv.pool_bytes import as_bytes, copy_planes

ALIGN_NBYTES = 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Region:
    """Neighbouring bytes of the staging memory; ``at`` is -1 for memory of its own."""

    at: int
    memory: Tensor


class Staging:
    """``nbytes`` of host memory for copies out of ``device``. Any thread may take; one thread copies.

    A chunk that is larger than all of it gets memory of its own, which is not pinned, for as long as it takes. It is
    ``pinned`` for a card; where the system has no such memory left, copies go through plain memory, slower.
    """

    def __init__(self, nbytes: int, device: torch.device, *, pinned: bool | None = None) -> None:
        self.nbytes = nbytes // ALIGN_NBYTES * ALIGN_NBYTES
        self._device = device
        self._pinned = device.type == "cuda" if pinned is None else pinned
        self._arena: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._taken: dict[int, int] = {}  # bytes by place
        self._changed = threading.Condition()

    def prepare(self) -> None:
        """Makes the memory: about half a second a GiB where it is pinned. Called by the thread that copies."""
        with current(self._device):
            try:
                self._arena = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=self._pinned and self.nbytes > 0)
            except RuntimeError as error:
                log.warning("%d bytes cannot be pinned, KV is stored more slowly: %s", self.nbytes, error)
                self._arena = torch.empty(self.nbytes, dtype=torch.uint8)
            if self._device.type == "cuda":
                self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def take(self, nbytes: int, deadline: float) -> Region:
        """A region, when there is a gap that is large enough. Raises ``TimeoutError`` at ``deadline`` (monotonic)."""
        if self._arena is None:
            self.prepare()
        assert self._arena is not None
        if nbytes > self.nbytes:
            return Region(-1, torch.empty(nbytes, dtype=torch.uint8))
        with self._changed:
            while (at := self._gap(nbytes)) is None:
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError("the memory that KV passes through on its way out did not become free")
            self._taken[at] = -(-nbytes // ALIGN_NBYTES) * ALIGN_NBYTES
        return Region(at, self._arena[at : at + nbytes])

    def copy(self, planes: Sequence[Tensor], region: Region) -> list[memoryview]:
        """The planes' bytes in ``region``, one buffer a plane; there when it returns. Steps go on meanwhile."""
        staged, at = [], 0
        for plane in planes:
            staged.append(region.memory[at : at + plane.nbytes].view(plane.dtype).view(plane.shape))
            at += plane.nbytes
        with current(self._device), torch.cuda.stream(self._stream):
            copy_planes(staged, planes)
            if self._stream is not None:
                self._stream.synchronize()
        return as_bytes(staged)

    def give_back(self, region: Region) -> None:
        """Ends a region."""
        with self._changed:
            self._taken.pop(region.at, None)
            self._changed.notify_all()

    def _gap(self, nbytes: int) -> int | None:
        start = 0
        for at in sorted(self._taken):
            if at - start >= nbytes:
                return start
            start = at + self._taken[at]
        return start if self.nbytes - start >= nbytes else None
