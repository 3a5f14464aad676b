"""docs/models.md says what the code does: its rows are made anew and compared, and its models are many."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator

import pytest
import torch

from tests.docs.models_page import PAGE, REFRESH, Row, look_at, page
from tests.published import PUBLISHED


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What is computed here is small: two threads wait for each other longest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def row(number: int) -> Row:
    return look_at(PUBLISHED[number])


@pytest.mark.parametrize("number", range(len(PUBLISHED)), ids=lambda number: PUBLISHED[number].model_type)
def test_a_model_is_served_or_refused(number: int) -> None:
    """And the page has what was found of it."""
    found = row(number)
    told = " | ".join((PUBLISHED[number].families, *(found.cells or (found.refused,))))
    assert told in PAGE.read_text(), f"{told!r} is not in the page; run `{REFRESH}` and read what has changed"


def test_the_page_is_what_the_code_says() -> None:
    written, made = PAGE.read_text(), page([row(number) for number in range(len(PUBLISHED))])
    diff = "\n".join(
        difflib.unified_diff(written.splitlines(), made.splitlines(), "docs/models.md", "found", lineterm="")
    )
    assert not diff, f"run `{REFRESH}` and read what has changed:\n{diff}"


def test_many_kinds_are_served() -> None:
    found = [row(number) for number in range(len(PUBLISHED))]
    assert len({each.published.model_type for each in found if not each.refused}) >= 75
    assert len({each.published.model_type for each in found if each.refused}) >= 20
