"""Which chunks the words of a command line stand for, whether a service is asked or a store."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from cairn.cli.arguments import UsageError
from cairn.cli.selection import choose_ids, find_chunk, find_id, looks_like_id
from cairn.client.chunks import ChunkRef
from tests.cairn.cairn_fakes import digits

CHUNK_1 = digits("chunk 001")
ONE, TWO, TWIN = "1" * 64, "12" * 32, "ab" * 32
NAMES = {ONE: "one", TWO: "two", TWIN: "1" * 8}
TAGS = {"even": [TWO], "all": [ONE, TWO, TWIN]}


def ids(*, name: str = "", tag: str = "") -> Iterable[str]:
    """Three chunks; the last bears a name that is also the first digits of another one's id."""
    return TAGS.get(tag, []) if tag else [each for each in NAMES if name in ("", NAMES[each])]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("0123ab", True),
        ("0123AB", True),
        (CHUNK_1, True),
        ("abcdefabcdef", True),
        ("123456", True),
        ("facade", False),
        ("decade", False),
        ("12345", False),
        ("0123ag", False),
        (CHUNK_1 + "0", False),
        ("Who governs?", False),
    ],
)
def test_what_looks_like_an_id(word, expected):
    assert looks_like_id(word) is expected


@pytest.mark.parametrize("word", ["doc-1", ":doc-1", CHUNK_1, CHUNK_1[:18], CHUNK_1.upper()])
def test_a_chunk_may_be_named_in_every_way(client, word):
    assert find_chunk(client, word) == ChunkRef(CHUNK_1)


@pytest.mark.parametrize("word", [":", "", ":nobody", "nobody", "fedcba", ":" + CHUNK_1[:18]])
def test_a_chunk_that_is_not_there(client, word):
    with pytest.raises(UsageError):
        find_chunk(client, word)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *(("one", ONE), (":one", ONE), (ONE, ONE), ("121212", TWO), ("ABAB" * 16, TWIN), ("f" * 64, "f" * 64)),
        ("1" * 8, TWIN),  # a name goes before the digits of an id
        ("1" * 9, ONE),
    ],
)
def test_a_word_stands_for_one_chunk(word: str, expected: str) -> None:
    assert find_id(word, ids) == expected


@pytest.mark.parametrize(("word", "count"), [("three", 0), (":111111111", 0), ("ababac", 0), (":" + ONE, 0)])
def test_a_word_that_stands_for_none_says_so(word: str, count: int) -> None:
    with pytest.raises(UsageError, match=f"'{word}' stands for {count} chunks; see: cairn chunks list"):
        find_id(word, ids)


def test_a_name_that_several_bear_chooses_none() -> None:
    with pytest.raises(UsageError, match="'two' stands for 2 chunks"):
        find_id("two", lambda *, name="", tag="": [ONE, TWO])


def test_words_and_tags_choose_each_chunk_once() -> None:
    assert choose_ids([":two", TWIN], ["even", "all"], ids) == [TWO, TWIN, ONE]


@pytest.mark.parametrize("tag", ["", "odd"])
def test_a_tag_that_no_chunk_bears_chooses_none(tag: str) -> None:
    with pytest.raises(UsageError, match=f"--tag: no chunk bears '{tag}'"):
        choose_ids([], ["all", tag], ids)
