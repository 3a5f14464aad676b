"""Memory that other processes of this host may map and read: one sealed memory file, cut into planes.

Whoever makes it keeps the only mapping that can be written to. From then on the kernel refuses any other, to whoever
gets the descriptor, and the file can neither shrink nor grow under a reader.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN_NBYTES = 4096  # where planes begin
_SEAL_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE of <linux/fcntl.h>, which Python 3.11 does not name
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@dataclass(frozen=True)
class PlanePlace:
    """Where a plane lies in a memory file, in bytes."""

    at: int
    nbytes: int


def places_of(plane_nbytes: Sequence[int]) -> list[PlanePlace]:
    """Planes behind each other, each from an aligned place on."""
    places, at = [], 0
    for nbytes in plane_nbytes:
        places.append(PlanePlace(at, nbytes))
        at += -(-nbytes // ALIGN_NBYTES) * ALIGN_NBYTES
    return places


class SharedMemory:
    """``places`` of a new memory file, zeros at first. Raises ``OSError`` where there are none, or no room."""

    def __init__(self, places: Sequence[PlanePlace]) -> None:
        self.places = tuple(places)
        self.nbytes = max((place.at + place.nbytes for place in places), default=0)
        if not hasattr(os, "memfd_create"):
            raise OSError("this system has no memory files")
        self.fd = os.memfd_create("cairn-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.nbytes)
            self._mapping = mmap.mmap(self.fd, self.nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(self.fd)
            raise
        weakref.finalize(self, os.close, self.fd)

    def tensor(self, index: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Plane ``index`` as a contiguous tensor, which keeps the memory."""
        place = self.places[index]
        flat = torch.frombuffer(self._mapping, dtype=dtype, count=place.nbytes // dtype.itemsize, offset=place.at)
        return flat.view(*shape)


class MappedMemory:
    """Another process's ``SharedMemory``, to be read; it stays while this object does, ``fd`` is the caller's."""

    def __init__(self, fd: int, nbytes: int) -> None:
        """Raises ``ValueError`` for a file that is shorter than ``nbytes``, or could become so."""
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_SEALS != _SIZE_SEALS or os.fstat(fd).st_size < nbytes:
            raise ValueError(f"a memory file of {nbytes} bytes that keeps its size was promised")
        self._mapping = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ)
        self.bytes = memoryview(self._mapping)
