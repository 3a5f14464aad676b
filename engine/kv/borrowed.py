"""Another process's pool, open to be read, and copying planes from it.

What is read is anybody's as soon as a lease has run out: whoever copies asks afterwards whether it still held.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from chunk_store.layout import KVLayout
from engine.device import current
from engine.kv.exported import CardPlane, ExportedPool, card_name
from engine.kv.pool import TORCH_DTYPES
from engine.kv.pool_bytes import as_bytes
from engine.kv.shared_memory import MappedMemory


class NotReadable(Exception):
    """A pool that cannot be opened here, and why."""


class BorrowedPool(Protocol):
    """Planes of another process, by slot."""

    slots: int

    def copy(
        self, first_slot: int, tokens: int, targets: Sequence[Tensor], *, after: torch.cuda.Event | None = None
    ) -> None:
        """Copies ``tokens`` slots from ``first_slot`` on into ``targets``, planes of our pool in entry order.

        Not before ``after``; returns when the bytes are there. Any thread may call it, several at once. Raises
        ``ValueError`` for slots that the pool does not have, ``RuntimeError`` for what CUDA says.
        """
        ...


def open_pool(exported: ExportedPool, fd: int | None, layout: KVLayout, device: torch.device) -> BorrowedPool:
    """Opens another process's pool for copies into one of ``layout`` on ``device``; ``fd`` stays the caller's.

    Raises ``NotReadable``.
    """
    if exported.layout != layout.canonical():
        raise NotReadable("its KV has another layout")
    if (device.type == "cuda") != bool(exported.card):
        raise NotReadable("its memory is of another kind of device")
    try:
        if device.type == "cuda":
            return _CardPool(exported, layout, device)
        if fd is None:
            raise NotReadable("no memory file came with it")
        return _FilePool(exported, fd, layout)
    except (OSError, ValueError, RuntimeError) as error:
        raise NotReadable(f"its memory cannot be opened: {error}") from error


def _check(first_slot: int, tokens: int, slots: int) -> None:
    if first_slot < 0 or tokens < 1 or first_slot + tokens > slots:
        raise ValueError(f"slots {first_slot} to {first_slot + tokens} of a pool of {slots}")


class _FilePool:
    """A pool in a memory file. Copied by numpy, which takes memory that is not to be written to."""

    def __init__(self, exported: ExportedPool, fd: int, layout: KVLayout) -> None:
        expected = layout.plane_nbytes(exported.slots)
        if [place.nbytes for place in exported.file] != expected:
            raise ValueError("planes of other sizes than its layout says")
        if any(place.at < 0 for place in exported.file):
            raise ValueError("planes before its memory")
        self.slots = exported.slots
        self._slot_nbytes = layout.plane_nbytes(1)
        self._memory = MappedMemory(fd, exported.file_nbytes)
        whole = np.frombuffer(self._memory.bytes, dtype=np.uint8)
        self._planes = [whole[place.at : place.at + place.nbytes] for place in exported.file]

    def copy(
        self, first_slot: int, tokens: int, targets: Sequence[Tensor], *, after: torch.cuda.Event | None = None
    ) -> None:
        _check(first_slot, tokens, self.slots)
        for plane, nbytes, target in zip(self._planes, self._slot_nbytes, as_bytes(targets), strict=True):
            np.copyto(np.asarray(target), plane[first_slot * nbytes : (first_slot + tokens) * nbytes])


class _CardPool:
    """A pool in a card's memory, on the same card as ours or on another one that it reaches."""

    def __init__(self, exported: ExportedPool, layout: KVLayout, device: torch.device) -> None:
        self.slots = exported.slots
        self._device = device
        self._card = _card_here(exported.card)
        shapes = [(exported.slots, la.kv_heads, dim) for la in layout.layers for dim in (la.k_dim, la.v_dim)]
        if [plane.storage_nbytes for plane in exported.planes] != layout.plane_nbytes(exported.slots):
            raise ValueError("planes of other sizes than its layout says")
        dtype = TORCH_DTYPES[layout.dtype]
        with current(self._card):
            pairs = zip(exported.planes, shapes, strict=True)
            self._planes = [_opened(plane, shape, dtype, self._card) for plane, shape in pairs]
        self._streams = threading.local()

    def copy(
        self, first_slot: int, tokens: int, targets: Sequence[Tensor], *, after: torch.cuda.Event | None = None
    ) -> None:
        _check(first_slot, tokens, self.slots)
        here, there = self._own_streams()
        # torch copies between cards on the source's current stream, in the order of both.
        with torch.cuda.stream(there), torch.cuda.stream(here):
            if after is not None:
                here.wait_event(after)
            for plane, target in zip(self._planes, targets, strict=True):
                target.copy_(plane[first_slot : first_slot + tokens], non_blocking=True)
        here.synchronize()

    def _own_streams(self) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        """This thread's, on our card and on the other one; the same where it is one card."""
        streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = getattr(self._streams, "pair", None)
        if streams is None:
            here = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            one_card = card_name(self._device) == card_name(self._card)
            there = here if one_card else torch.cuda.Stream(self._card)  # type: ignore[no-untyped-call]
            streams = self._streams.pair = (here, there)
        return streams


def _card_here(name: str) -> torch.device:
    """The card of that name as this process numbers it. Raises ``NotReadable`` if it does not see it."""
    for index in range(torch.cuda.device_count()):
        card = torch.device("cuda", index)
        if card_name(card) == name:
            return card
    raise NotReadable("it is on a card that this process does not see")


def _opened(plane: CardPlane, shape: tuple[int, ...], dtype: torch.dtype, card: torch.device) -> Tensor:
    opened: Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        torch.Tensor,
        torch.Size(shape),
        (shape[1] * shape[2], shape[2], 1),
        0,
        torch.UntypedStorage,
        dtype,
        card.index,
        plane.handle,
        plane.storage_nbytes,
        plane.storage_at,
        False,
        plane.counter,
        plane.counter_at,
        plane.event,
        plane.event_needed,
    )
    return opened
