"""Chunks that a prefill service of this host lends: taken over, or asked for again until the store has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from decode_service.kv_source.asking import ComputedChunk, FetchTerms, Wanted
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import Unpublished
from engine.kv.source import KVSource
from serving.errors import Unavailable
from serving.handover.lent import Lent, Refusal
from tests.decode_service.kv_source.test_fetcher import Desk, Memory
from tests.decode_service.prompts import composed

LENT = Lent("pool", 7, 0, 1)


@dataclass
class FakeBorrower:
    """Copies what is lent, or refuses each for the reason that is due."""

    refuses: list[Refusal | None] = field(default_factory=list)
    lenders: int = 1
    name: str = "me"
    copied: list[Lent] = field(default_factory=list)

    def copy(self, lent: Lent, planes: Any, *, after: Any = None) -> Refusal | None:
        self.copied.append(lent)
        return self.refuses.pop(0) if self.refuses else None


class LendingDesk(Desk):
    """The prefill service lends what it computes, and stores it where that is asked for, unless ``unpublished``."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.terms: list[FetchTerms] = []
        self.unpublished: Unpublished | None = None
        self.borrower = FakeBorrower()
        source: Any = self.source
        source.borrower = self.borrower

    def compute_all(
        self, composition: Composition, indices: Sequence[int], terms: FetchTerms
    ) -> Iterator[ComputedChunk]:
        self.asked.append(list(indices))
        self.terms.append(terms)
        for index in indices:
            if terms.durable and self.unpublished is None:
                self.put(composition.chunks[index])
            key, lent = composition.chunks[index].key, LENT if terms.borrower else None
            yield ComputedChunk(index, key, terms.durable, self.unpublished, lent=lent)

    def wanted(self, composition: Composition) -> list[Wanted]:
        made: Any = [Wanted(chunk, LentMemory(chunk)) for chunk in composition.chunks]  # type: ignore[arg-type]
        self.source.fetch(composition, made, FetchTerms(salt=""))
        return list(made)


class LentMemory(Memory):
    planes: tuple[()] = ()
    launched = None


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[LendingDesk]:
    made = LendingDesk(tmp_path)
    yield made
    made.store.close()


def test_what_is_lent_is_copied_and_not_read_from_the_store(desk: LendingDesk) -> None:
    wanted = desk.wanted(composed((3,), (4,)))
    assert [(terms.borrower, terms.durable) for terms in desk.terms] == [("me", False)]
    assert desk.borrower.copied == [LENT, LENT]
    memories: Any = [want.memory for want in wanted]
    assert all(want.outcome and want.outcome.source is KVSource.COMPUTED for want in wanted)
    assert [memory.filled for memory in memories] == [0, 0]


@pytest.mark.parametrize("refusal", Refusal)
def test_what_cannot_be_copied_is_asked_for_until_the_store_has_it(desk: LendingDesk, refusal: Refusal) -> None:
    desk.borrower.refuses = [refusal, None]
    wanted = desk.wanted(composed((3,), (4,)))
    first, second = desk.terms
    assert (first.borrower, first.durable) == ("me", False) and (second.borrower, second.durable) == ("", True)
    assert desk.asked[0] == [0, 1] and len(desk.asked[1]) == 1
    filled: Any = [want.memory for want in wanted]
    assert sorted(memory.filled for memory in filled) == [0, 1]
    assert all(want.outcome and want.outcome.unpublished is None for want in wanted)


def test_without_a_session_answers_are_waited_for_until_they_are_durable(desk: LendingDesk) -> None:
    desk.borrower.lenders, desk.borrower.refuses = 0, [Refusal.NO_SESSION] * 2
    wanted = desk.wanted(composed((3,), (4,)))
    assert [(terms.borrower, terms.durable) for terms in desk.terms] == [("me", True)], "it says who would lend"
    filled: Any = [want.memory for want in wanted]
    assert [memory.filled for memory in filled] == [1, 1]


def test_what_the_store_does_not_take_is_copied_or_else_computed_here(desk: LendingDesk) -> None:
    desk.unpublished = Unpublished.STORE_FULL
    desk.borrower.refuses = [None, Refusal.LEASE_LOST]
    wanted = desk.wanted(composed((3,), (4,)))
    found = [want.outcome.unpublished for want in wanted if want.outcome]
    assert sorted(map(str, found)) == sorted(map(str, (None, Unpublished.STORE_FULL))) and len(desk.asked) == 1


def test_what_is_never_stored_and_never_copied_is_an_error_that_can_be_tried_again(desk: LendingDesk) -> None:
    desk.borrower.refuses = [Refusal.LEASE_LOST] * 2
    desk.put = lambda chunk: None
    with pytest.raises(Unavailable):
        desk.wanted(composed((3,)))
