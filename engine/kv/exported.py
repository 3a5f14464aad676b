"""What another process of this host needs to read a pool: where its planes are, and a handle on their memory.

On the CPU the planes lie in one memory file, whose descriptor is passed beside this. On a card each plane has a CUDA
IPC handle, as torch makes them; the card is named by its UUID, for processes may number cards differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine.device import current
from engine.kv.pool import PagedKVPool
from engine.kv.shared_memory import PlanePlace


class NotExportable(Exception):
    """The memory of this pool cannot be read by other processes."""


@dataclass(frozen=True)
class CardPlane:
    """A plane in a card's memory; what ``torch.UntypedStorage._share_cuda_`` says of it, but for the card's number."""

    handle: bytes
    storage_nbytes: int
    storage_at: int  # in the exported allocation, bytes
    counter: bytes
    counter_at: int
    event: bytes
    event_needed: bool


@dataclass(frozen=True)
class ExportedPool:
    """A pool's geometry, and where its planes are: ``file`` on the CPU, or ``card`` and ``planes``."""

    layout: str  # KVLayout.canonical
    slots: int
    file: tuple[PlanePlace, ...] = ()
    card: str = ""  # its UUID
    planes: tuple[CardPlane, ...] = ()

    @property
    def file_nbytes(self) -> int:
        return max((place.at + place.nbytes for place in self.file), default=0)


def export(pool: PagedKVPool) -> ExportedPool:
    """To be called once a pool: torch counts a reference for each call. Raises ``NotExportable``."""
    layout = pool.layout.canonical()
    if pool.shared is not None:
        return ExportedPool(layout, pool.slots, file=pool.shared.places)
    if pool.device.type != "cuda":
        raise NotExportable("its memory is this process's own")
    try:
        with current(pool.device):
            planes = tuple(_card_plane(plane) for pair in zip(pool.keys, pool.values, strict=True) for plane in pair)
            torch.cuda.current_stream().synchronize()
    except RuntimeError as error:  # of memory that is no cudaMalloc's, of a driver that has no IPC
        raise NotExportable(f"CUDA gives no handle on it: {error}") from error
    return ExportedPool(layout, pool.slots, card=card_name(pool.device), planes=planes)


def card_name(device: torch.device) -> str:
    """What every process of this host calls a card."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _card_plane(plane: torch.Tensor) -> CardPlane:
    storage: Any = plane.untyped_storage()
    _, handle, nbytes, at, counter, counter_at, event, event_needed = storage._share_cuda_()
    return CardPlane(handle, nbytes, at, counter, counter_at, event, event_needed)
