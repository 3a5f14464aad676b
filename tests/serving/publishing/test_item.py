"""An entry in memory is read from there, however the target is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from chunk_store.landing import Buffers
from serving.publishing.item import Item


class Joined:
    """A landing whose pieces span planes."""

    def __init__(self, sizes: Sequence[int], piece_nbytes: int) -> None:
        self.sizes, self.piece_nbytes = sizes, piece_nbytes
        self.data = bytearray(sum(sizes))

    @contextmanager
    def piece(self, start: int, nbytes: int) -> Iterator[Sequence[memoryview]]:
        yield [memoryview(self.data)[start : start + nbytes]]


def item(parts: Sequence[bytes]) -> Item:
    nobody: Any = None
    return Item(nobody, nobody, nobody, nobody, Future(), buffers=[memoryview(part) for part in parts])


@pytest.mark.parametrize("piece_nbytes", [1, 3, 7, 8, 64])
def test_every_byte_comes_once_and_in_order(piece_nbytes: int) -> None:
    parts = [bytes(range(8)), b"", bytes(range(8, 13)), bytes(range(13, 20))]
    made = item(parts)
    joined = Joined([len(part) for part in parts], piece_nbytes)
    assert made.read(joined) and bytes(joined.data) == bytes(range(20))
    own = [bytearray(len(part)) for part in parts]
    cut = Buffers([memoryview(part) for part in own])
    cut.piece_nbytes = piece_nbytes
    assert made.read(cut) and b"".join(own) == bytes(range(20))


def test_what_is_not_in_memory_is_not_read() -> None:
    made = item([])
    assert not made.read(Joined([3], 8))
