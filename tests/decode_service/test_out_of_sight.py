"""What no row to come sees is given back while an answer goes on: the answers are those of a service that keeps it all.

The runner's KV and tokens are a function of all that their rows see through their windows, and of nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from chunk_store.key import ChunkKey
from decode_service.scheduling.giving_way import GaveWay
from decode_service.scheduling.kept import Keep
from decode_service.scheduling.sequence import Event, Finished
from decode_service.scheduling.sequence import Sequence as Request
from decode_service.scheduling.tails import Tails
from engine.kv.pages import PageTable
from engine.plan import StepSequence, Window
from engine.run.protocol import StepRows
from engine.sight import EVERYTHING, Sight
from serving.errors import Unsupported
from tests.decode_service.content import PRIME, TOKENS, ContentRunner, content_request
from tests.decode_service.scheduling.scheduled import PAGE, Forwards, Scheduled, request
from tests.decode_service.test_packed import Served, served

WINDOWS = {
    "one window": (Window(13),),
    "blocks": (Window(16, chunked=True),),
    "several": (Window(5), Window(18), Window(7, chunked=True)),
}
WAYS: list[dict[str, Any]] = [
    {"packs": True, "runs_ahead": True},
    {"packs": True, "runs_ahead": True, "long": 9},
    {"packs": False, "runs_ahead": True},
    {"packs": False, "runs_ahead": False},
]


@dataclass
class SeeingRunner(ContentRunner):
    """Its rows see through ``windows``, and what they write is made of what they see."""

    windows: Sight = EVERYTHING
    tail_pages_max: int = 0
    steps: int = 0
    chunks_seen: set[int] = field(default_factory=set)

    def begin(self, batch: Sequence[StepRows]) -> Any:
        self.steps += 1
        self.tail_pages_max = max(self.tail_pages_max, self.pool.count()["tail"])
        return super().begin(batch)

    def _seen(self, sequence: StepSequence, row: int) -> int:
        """A number made of the KV that a row sees, its own not among it."""
        size = self.pool.page_size
        first, position = self.windows.first(sequence.position + row), sequence.position + row
        slots = [
            chunk.first_slot + at
            for chunk in sequence.chunks
            for at in range(max(0, first - chunk.start), chunk.tokens)
        ]
        start = sequence.position - sequence.tail_tokens
        mine = range(max(0, first - start), position - start)
        slots += [sequence.tail_pages[at // size] * size + at % size for at in mine]
        assert all(slot // size != self.pool.scratch_page for slot in slots), "a page is gone that a row sees"
        seen = self.pool.keys[0][slots, 0, 0].long() * 31 + self.pool.values[0][slots, 0, 0].long() * 7
        mixed = position
        for at, value in enumerate(seen.tolist(), start=1):
            mixed = (mixed * 33 + value * at + 1) % PRIME
        return mixed

    def _write(self, sequence: StepSequence, ids: Sequence[int]) -> None:
        size = self.pool.page_size
        for row, token in enumerate(ids):
            at = sequence.tail_tokens + row
            slot = sequence.tail_pages[at // size] * size + at % size
            assert slot // size != self.pool.scratch_page
            mixed = self._seen(sequence, row)
            self.pool.keys[0][slot] = float(token)
            self.pool.values[0][slot] = float(mixed % 9973)

    def token(self, rows: StepRows, ids: list[int]) -> int:
        draw, sequence, size = rows.draw, rows.sequence, self.pool.page_size
        assert draw is not None
        at = sequence.tail_tokens + sequence.rows - 1
        slot = sequence.tail_pages[at // size] * size + at % size
        own = int(self.pool.keys[0][slot, 0, 0]) * 31 + int(self.pool.values[0][slot, 0, 0]) * 7
        return (own + draw.index * 13 + self.requests[draw.slot].params.seed) % PRIME % TOKENS


def seeing(windows: str, *, limited: bool, **options: Any) -> Any:
    """A service over a ``SeeingRunner``; ``limited``: it knows that its rows do not see everything."""
    sight = Sight(WINDOWS[windows])
    return served(runner=SeeingRunner, windows=sight, sight=sight if limited else EVERYTHING, **options)


def ask(it: Served, seed: int, count: int) -> list[Request]:
    rng = random.Random(seed)
    asked = []
    for n in range(count):
        made = content_request(f"{n}", rng, max_tokens=rng.choice((2, 25, 40, 130)))
        made.priority = rng.choice((0, 0, 9))
        asked.append(made)
        it.submit(made)
    return asked


def answers(it: Served, count: int) -> list[tuple[list[int], Event]]:
    return [it.answer(f"{n}") for n in range(count)]


@pytest.mark.parametrize("aside", [0, 12], ids=lambda pages: f"{pages} pages aside")
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_answers_are_those_of_who_keeps_everything(way: dict[str, Any], windows: str, aside: int) -> None:
    count, seed = 16, 3
    with seeing(windows, limited=False, pages=600, chunk_pages=40, batch_max=8, **way) as all_kept:
        ask(all_kept, seed, count)
        expected = answers(all_kept, count)
        all_kept.check_idle()
    with seeing(windows, limited=True, pages=40 + 11, chunk_pages=40, batch_max=8, aside_pages=aside, **way) as it:
        asked = ask(it, seed, count)
        for each in asked:
            it.worker.check_size(each)
        assert answers(it, count) == expected
        assert all(isinstance(end, Finished) for _, end in expected)
        assert it.counted("preemptions_total", reason="growth") > 0
        it.check_idle()


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_prompt_and_an_answer_longer_than_the_pool_take_what_their_rows_see(
    way: dict[str, Any], windows: str
) -> None:
    made, again = (
        request("long", [("a", 7), ("b", 30), ("a", 7), ("c", 2)], tail=90, max_tokens=300, min_tokens=300)
        for _ in range(2)
    )
    with seeing(windows, limited=False, pages=600, chunk_pages=40, **way) as all_kept:
        all_kept.submit(again)
        expected = all_kept.answer("long")
        with pytest.raises(Unsupported):
            seeing_nothing = Served(pages=48, chunk_pages=40)
            seeing_nothing.worker.check_size(made)
    with seeing(windows, limited=True, pages=40 + 8, chunk_pages=40, **way) as it:
        it.worker.check_size(made)
        it.submit(made)
        assert it.answer("long") == expected and len(expected[0]) == 300
        assert isinstance(it.runner, SeeingRunner)
        most = Tails(it.residents.pool, PageTable(pages=0, chunk_pages=0, page_size=PAGE), it.sight, piece_tokens=8)
        assert it.runner.tail_pages_max <= max(most.most(made), 8 if way["packs"] else 0)
        assert it.counted("kv_pages_given_back_total") > 300 // PAGE
        it.check_idle()


def test_chunks_go_when_no_row_to_come_sees_them_and_others_have_their_pages() -> None:
    on = Scheduled(chunk_pages=4, tail_pages=8, sight=Sight((Window(12),)))
    first = request("first", [("a", 8), ("b", 8)], tail=3, max_tokens=40)
    on.submit(first)
    while len(first.generated) < 4:
        on.step()
        for fill in list(on.loads):
            on.load(fill)
        on.check()
    assert first.chunks_gone == 1 and on.residents.find(ChunkKey("a")) is not None, (
        "it stays while nobody wants its pages"
    )
    second = request("second", [("c", 8)], tail=3, max_tokens=2)
    on.submit(second)
    on.plan()
    assert on.residents.find(ChunkKey("a")) is None and on.residents.find(ChunkKey("b")) is not None
    on.finish()
    assert len(first.generated) == 40 and first.chunks_gone == 2
    assert [chunk.level for chunk in first.composition.chunks] == [0, 0]
    on.check_idle()


def test_several_answers_begin_behind_what_they_see_of_a_tail() -> None:
    for way in WAYS:
        expected = []
        sight = Sight(WINDOWS["one window"])
        for limited in (False, True):
            pages = 40 + (24 if limited else 200)
            known = sight if limited else EVERYTHING
            with served(
                start=False, runner=SeeingRunner, windows=sight, sight=known, pages=pages, chunk_pages=40, **way
            ) as it:
                prompt = object()
                for n in range(3):
                    made = request(f"{n}", [("a", 7)], tail=41, max_tokens=30, min_tokens=30, seed=n)
                    it.submit(replace(made, prompt=prompt, answer=n))
                it.worker.start()
                expected.append(answers(it, 3))
                shared = [len(rows.also) for batch in it.runner.batches for rows in batch]
                assert max(shared) == 2
                it.check_idle()
        assert expected[0] == expected[1]


def test_a_turn_that_is_kept_keeps_its_pages_as_long_as_there_are_so_many() -> None:
    on = Scheduled(chunk_pages=12, tail_pages=12, sight=Sight((Window(8),)), forwards=Forwards(packs=True))
    fits = request("fits", tail=3, max_tokens=30, keep=Keep(lambda tokens: True, forgotten=True))
    long = request("long", tail=3, max_tokens=60, keep=Keep(lambda tokens: True, forgotten=True))
    other = request("other", tail=3, max_tokens=30, keep=Keep(lambda tokens: False, forgotten=True))
    for each in (fits, long, other):
        on.scheduler.check_size(each)
        on.submit(each)
        while not each.done:
            on.step()
            on.check()
            keeps = each is fits or (each is long and each.tail_tokens < 12 * PAGE)
            assert bool(each.pages_gone) == (not keeps and each.tail_tokens >= 8 + PAGE - 1) or each.done
        assert bool(each.pages_gone) == (each is not fits)


def test_who_goes_on_holds_again_what_a_chunk_that_is_computed_anew_stands_behind() -> None:
    on = Scheduled(
        chunk_pages=4, tail_pages=8, aside_pages=8, sight=Sight((Window(12),)), forwards=Forwards(packs=True)
    )
    old = request("old", [("a", 8), ("b", 8)], tail=3, max_tokens=20, exact=True)
    on.submit(old)
    while not old.chunks_gone:
        on.step()
        for fill in list(on.loads):
            on.load(fill)
    on.scheduler._leaving.give_way(old, GaveWay.GROWTH)
    assert old.aside is not None and old.chunks_gone == 1
    for key in (ChunkKey("a"), ChunkKey("a/b")):
        on.residents.evict(key)
    on.plan()
    on.load(on.loads[0], [True, True])
    on.finish()
    assert len(old.generated) == 20 and {rows.chunk.index for rows in on.ran if rows.chunk is not None} == {0, 1}
    on.check_idle()
