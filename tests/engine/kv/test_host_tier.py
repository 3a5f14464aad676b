"""The host tier: what it keeps, what goes first, and what a failed read leaves behind."""

from __future__ import annotations

import threading

import torch

from chunk_store.key import ChunkKey
from chunk_store.landing import Landing
from engine.kv.host_tier import ALIGN_NBYTES, HostTier
from engine.kv.source import KVSource

PLANES = (ALIGN_NBYTES // 4, ALIGN_NBYTES // 4)  # elements of two float32 planes: two aligned blocks a chunk


class Store:
    """Counts reads and fills every byte with a chunk's number."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.failing = False

    def bring(self, tier: HostTier, name: str) -> tuple[KVSource, str | None, list[torch.Tensor]]:
        planes = [torch.zeros(count) for count in PLANES]

        def read(landing: Landing) -> str | None:
            self.reads.append(name)
            fill(landing, int(name))
            return "broken" if self.failing else None

        origin, failure = tier.load(ChunkKey(name), planes, read)
        return origin, failure, planes


def fill(landing: Landing, value: int) -> None:
    """Writes ``value`` to every byte, in pieces that do not end where planes do."""
    for start in range(0, sum(landing.sizes), 1000):
        with landing.piece(start, min(1000, sum(landing.sizes) - start)) as views:
            for view in views:
                view[:] = bytes([value]) * view.nbytes


def filled(planes: list[torch.Tensor], name: str) -> bool:
    return all(bool((plane.view(torch.uint8) == int(name)).all()) for plane in planes)


def test_a_second_load_comes_from_the_host_and_has_the_same_bytes() -> None:
    store, tier = Store(), HostTier(4 * ALIGN_NBYTES, "cpu")
    first, second = store.bring(tier, "1"), store.bring(tier, "1")
    assert (first[0], second[0]) == (KVSource.STORE, KVSource.HOST)
    assert filled(first[2], "1") and filled(second[2], "1")
    assert store.reads == ["1"]


def test_the_least_recently_used_goes_first() -> None:
    store, tier = Store(), HostTier(4 * ALIGN_NBYTES, "cpu")  # two chunks
    for name in ("1", "2", "1", "3"):
        store.bring(tier, name)
    assert (ChunkKey("1") in tier, ChunkKey("2") in tier, ChunkKey("3") in tier) == (True, False, True)
    assert tier.evictions == 1
    assert filled(store.bring(tier, "1")[2], "1")


def test_a_failed_read_leaves_the_tier_as_it_was() -> None:
    store, tier = Store(), HostTier(4 * ALIGN_NBYTES, "cpu")
    store.failing = True
    assert store.bring(tier, "1")[:2] == (KVSource.STORE, "broken")
    assert ChunkKey("1") not in tier
    store.failing = False
    assert store.bring(tier, "1")[1] is None
    assert store.reads == ["1", "1"]


def test_without_room_a_load_passes_through() -> None:
    store = Store()
    for nbytes in (0, ALIGN_NBYTES):
        tier = HostTier(nbytes, "cpu")
        assert filled(store.bring(tier, "5")[2], "5")
        assert ChunkKey("5") not in tier


def test_chunks_being_filled_are_never_evicted_and_neighbours_stay_whole() -> None:
    """Sixteen threads over a tier of three chunks: every load gets its own bytes."""
    store, tier = Store(), HostTier(6 * ALIGN_NBYTES, "cpu")
    wrong: list[str] = []

    def run(seed: int) -> None:
        for step in range(60):
            name = str((seed * 7 + step * 3) % 9)
            if not filled(store.bring(tier, name)[2], name):
                wrong.append(name)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
