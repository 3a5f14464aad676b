"""The pool's memory as loads fill it: pages of the CPU straight, those of a device through pinned host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chunk_store.entry import MissReason
from chunk_store.key import ChunkKey
from decode_service.kv_source.store_source import Memory, Read
from engine.kv.host_tier import HostTier
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunk
from engine.kv.source import KVSource


class PoolMemory:
    """Makes the memory of chunks of one pool. ``host_nbytes`` of pinned memory keep what was loaded to a device."""

    def __init__(self, pool: PagedKVPool, *, host_nbytes: int = 0) -> None:
        self._pool = pool
        self._tier = None if pool.device.type == "cpu" else HostTier(host_nbytes, pool.device)

    def of(self, chunk: ResidentChunk) -> Memory:
        """The memory of a reserved chunk, which nobody moves while it is being filled."""
        parts = self._pool.run_parts(chunk.run, chunk.tokens)
        if self._tier is None:
            return HostPages([part.reshape(-1).view(torch.uint8).numpy().data.cast("B") for part in parts])
        return DevicePages(self._tier, chunk.key, parts)


@dataclass(frozen=True)
class HostPages:
    """Pages that a read fills where they are."""

    buffers: Sequence[memoryview]

    @property
    def held(self) -> bool:
        return False

    def fill(self, read: Read) -> tuple[KVSource, MissReason | None]:
        return KVSource.STORE, read(self.buffers)


@dataclass(frozen=True)
class DevicePages:
    """Pages of a device behind the host tier; ``parts`` are views of the pool in layout order."""

    tier: HostTier
    key: ChunkKey
    parts: Sequence[Tensor]

    @property
    def held(self) -> bool:
        return self.key in self.tier

    def fill(self, read: Read) -> tuple[KVSource, MissReason | None]:
        return self.tier.load(self.key, self.parts, read)
