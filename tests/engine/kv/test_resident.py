"""Every page has one owner; chunks come, go and move without losing a byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chunk_store.key import ChunkKey
from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.pages import PageRun, PoolError
from engine.kv.pool import PagedKVPool
from engine.kv.resident import PoolFull, ResidentChunk, ResidentChunks

LAYOUT = KVLayout("float32", (LayerLayout(1, 2, 3), LayerLayout(2, 1, 1)))


def make_pool(pages: int = 20, chunk_pages: int = 12) -> PagedKVPool:
    return PagedKVPool(LAYOUT, pages=pages, chunk_pages=chunk_pages, page_size=4)


class PoolMachine(RuleBasedStateMachine):
    """Random reserves, fills, releases, evictions and tails; the bytes of ready chunks never change."""

    def __init__(self) -> None:
        super().__init__()
        self.residents = ResidentChunks(make_pool())
        self.held: list[ResidentChunk] = []
        self.still: list[tuple[ResidentChunk, PageRun]] = []  # where each was when it was held still
        self.tails: list[list[int]] = []
        self.filled: dict[ChunkKey, float] = {}
        self.count = 0

    @rule(tokens=st.integers(1, 20), ready=st.booleans())
    def reserve(self, tokens: int, ready: bool) -> None:
        self.count += 1
        key = ChunkKey(f"chunk {self.count}")
        try:
            chunk = self.residents.reserve(key, tokens)
        except PoolFull:
            assert self.residents.held
            return
        self.held.append(chunk)
        if ready:
            for part in self.residents.pool.run_planes(chunk.run, tokens):
                part.fill_(self.count)
            chunk.ready = True
            self.filled[key] = float(self.count)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chunk = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.residents.release(chunk)

    @precondition(lambda self: self.filled)
    @rule(data=st.data())
    def acquire_or_evict(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.filled)))
        if data.draw(st.booleans()):
            chunk = self.residents.acquire(key)
            if chunk is not None:
                self.held.append(chunk)
        else:
            self.residents.evict(key)

    @precondition(lambda self: self.filled)
    @rule(data=st.data())
    def hold_still(self, data: st.DataObject) -> None:
        chunk = self.residents.find(data.draw(st.sampled_from(sorted(self.filled))))
        if chunk is not None:
            self.residents.hold_still(chunk)
            self.still.append((chunk, chunk.run))

    @precondition(lambda self: self.still)
    @rule(data=st.data())
    def let_move(self, data: st.DataObject) -> None:
        self.residents.let_move(self.still.pop(data.draw(st.integers(0, len(self.still) - 1)))[0])

    @rule(count=st.integers(1, 4))
    def take_tail(self, count: int) -> None:
        pages = self.residents.pool.allocate_pages(count)
        if pages is not None:
            self.tails.append(pages)

    @precondition(lambda self: self.tails)
    @rule()
    def drop_tail(self) -> None:
        self.residents.pool.release_pages(self.tails.pop())

    @invariant()
    def what_is_held_still_stays_where_it_is(self) -> None:
        for chunk, run in self.still:
            assert chunk.run == run
            assert self.residents.find(chunk.key) is chunk

    @invariant()
    def integrity(self) -> None:
        self.residents.check_integrity()
        count = self.residents.pool.count()
        assert sum(count.values()) == 20
        assert count["tail"] == sum(map(len, self.tails))
        for key, value in self.filled.items():
            chunk = self.residents.find(key)
            if chunk is not None:
                for part in self.residents.pool.run_planes(chunk.run, chunk.tokens):
                    assert torch.all(part == value)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_chunk_that_does_not_fit_beside_what_is_in_use_is_refused_with_numbers() -> None:
    residents = ResidentChunks(make_pool())
    residents.reserve(ChunkKey("a"), 40)
    with pytest.raises(PoolFull, match="needs 3 neighbouring pages"):
        residents.reserve(ChunkKey("b"), 12)


def test_gaps_are_closed_when_only_compaction_helps() -> None:
    residents = ResidentChunks(make_pool(chunk_pages=6))
    chunks = [residents.reserve(ChunkKey(name), 8) for name in "abc"]
    for value, chunk in enumerate(chunks):
        for part in residents.pool.run_planes(chunk.run, 8):
            part.fill_(float(value))
        chunk.ready = True
    residents.release(chunks[0])
    residents.evict(ChunkKey("a"))
    residents.release(chunks[2])
    residents.evict(ChunkKey("c"))
    assert residents.pool.allocate_run(16) is None
    residents.reserve(ChunkKey("d"), 16)
    assert residents.moves == 1
    assert all(torch.all(part == 1.0) for part in residents.pool.run_planes(chunks[1].run, 8))
    residents.check_integrity()


def test_what_is_held_still_is_neither_moved_nor_evicted() -> None:
    residents = ResidentChunks(make_pool(chunk_pages=6))
    chunks = [residents.reserve(ChunkKey(name), 8) for name in "abc"]
    for chunk in chunks:
        chunk.ready = True
    residents.hold_still(chunks[1])
    for chunk in chunks:
        residents.release(chunk)
    with pytest.raises(PoolFull):
        residents.reserve(ChunkKey("d"), 16)  # four pages are free, two on either side of the one that stays
    assert chunks[1].run == PageRun(2, 2)
    assert not residents.evict(ChunkKey("b"))
    residents.let_move(chunks[1])
    residents.reserve(ChunkKey("d"), 16)
    residents.check_integrity()
    with pytest.raises(ValueError, match="not held still"):
        residents.let_move(chunks[1])
    with pytest.raises(ValueError, match="not resident"):
        residents.hold_still(chunks[0])


def test_a_chunk_is_found_by_its_new_name_alone() -> None:
    residents = ResidentChunks(make_pool())
    chunk, other = residents.reserve(ChunkKey("none"), 7), residents.reserve(ChunkKey("other"), 1)
    residents.rename(chunk, ChunkKey("named"), 5)
    assert residents.find(ChunkKey("none")) is None and residents.find(ChunkKey("named")) is chunk
    assert (chunk.key, chunk.tokens) == ("named", 5)
    for key, tokens in (("other", 5), ("longer", 6), ("empty", 0)):
        with pytest.raises(ValueError, match="rename"):
            residents.rename(chunk, ChunkKey(key), tokens)
    residents.check_integrity()
    for each in (chunk, other):
        residents.release(each)
    assert len(residents) == 0


def test_releasing_what_is_not_owned_is_an_error() -> None:
    pool = make_pool()
    with pytest.raises(PoolError, match="not allocated"):
        pool.release_run(PageRun(0, 1))
    pages = pool.allocate_pages(1)
    assert pages is not None
    pool.release_pages(pages)
    with pytest.raises(PoolError, match="expected tail"):
        pool.release_pages(pages)
    with pytest.raises(ValueError, match="chunk_pages"):
        make_pool(pages=4, chunk_pages=5)
