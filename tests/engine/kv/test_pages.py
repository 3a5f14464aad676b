"""The page table: any history of runs and pages leaves each page with one owner, and gaps are found."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv.pages import PageRun, PageTable, PoolError

PAGES, CHUNKS = 12, 8
commands = st.lists(st.tuples(st.sampled_from(["run", "free run", "tail", "free tail", "move"]), st.integers(1, 20)))


@settings(max_examples=300, deadline=None)
@given(commands)
def test_any_history_keeps_each_page_with_one_owner(history: list[tuple[str, int]]) -> None:
    table = PageTable(pages=PAGES, chunk_pages=CHUNKS, page_size=4)
    runs: list[PageRun] = []
    tails: list[list[int]] = []
    for command, size in history:
        if command == "run":
            run = table.allocate_run(size)
            taken = {page for each in runs for page in range(each.first, each.first + each.pages)}
            gaps = "".join("x" if page in taken else "." for page in range(CHUNKS))
            assert (run is None) == ("." * table.pages_for(size) not in gaps)
            if run is not None:
                assert run.first == gaps.index("." * table.pages_for(size)), "the first gap"
                runs.append(run)
        elif command == "free run" and runs:
            table.release_run(runs.pop(size % len(runs)))
        elif command == "tail":
            pages = table.allocate_pages(size % 4)
            assert (pages is None) == (size % 4 > PAGES - CHUNKS - sum(map(len, tails)))
            if pages is not None:
                assert all(page >= CHUNKS for page in pages)
                tails.append(pages)
        elif command == "free tail" and tails:
            table.release_pages(tails.pop(size % len(tails)))
        elif command == "move" and runs:
            run = runs[size % len(runs)]
            below = max((each.first + each.pages for each in runs if each.first < run.first), default=0)
            if below < run.first:
                runs[runs.index(run)] = table.move_run(run, below)
        table.check_integrity()
        counted = {"chunk": sum(run.pages for run in runs), "tail": sum(map(len, tails))}
        assert table.count() == {**counted, "free": PAGES - sum(counted.values())}
        assert table.runs == sorted(runs, key=lambda run: run.first)


def table() -> PageTable:
    return PageTable(pages=PAGES, chunk_pages=CHUNKS, page_size=4)


def test_pages_are_rounded_up() -> None:
    assert [table().pages_for(tokens) for tokens in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="at least 1"):
        table().allocate_run(0)


def test_what_is_not_owned_is_not_given_back() -> None:
    pages = table()
    run = pages.allocate_run(8)
    assert run is not None
    for wrong in (PageRun(run.first, run.pages + 1), PageRun(run.first + 1, 1)):
        with pytest.raises(PoolError, match="is not allocated"):
            pages.release_run(wrong)
    with pytest.raises(PoolError, match="expected tail"):
        pages.release_pages([run.first])
    with pytest.raises(ValueError, match="is not below"):
        pages.move_run(run, run.first)


@pytest.mark.parametrize(("pages", "chunk_pages", "page_size"), [(4, 5, 4), (4, -1, 4), (4, 2, 0)])
def test_sizes_that_cannot_be_are_named(pages: int, chunk_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match=r"chunk_pages: |page_size: "):
        PageTable(pages=pages, chunk_pages=chunk_pages, page_size=page_size)
