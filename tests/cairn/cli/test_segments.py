"""What a command line makes a prompt of."""

from __future__ import annotations

import pytest

from cairn.cli.arguments import UsageError
from cairn.cli.segments import read_segment
from cairn.cli.terminal import Terminal
from cairn.client.chunks import ChunkRef
from cairn.client.prompt import Text
from tests.cairn.cairn_fakes import digits

CHUNK_1 = digits("chunk 001")


class Asked(Terminal):
    """A terminal with somebody at it who gives one answer; None: nobody is there."""

    def __init__(self, answer: bool | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.warnings: list[str] = []

    def warn(self, words: str) -> None:
        self.warnings.append(words)

    def ask(self, question: str) -> bool | None:
        return self.answer


@pytest.mark.parametrize("word", [CHUNK_1, CHUNK_1[:18], CHUNK_1[:18].upper(), CHUNK_1.upper(), ":doc-1"])
def test_a_segment_may_be_an_id_the_start_of_one_or_a_name(client, word):
    assert read_segment(word, client, Asked()) == ChunkRef(CHUNK_1)


@pytest.mark.parametrize("word", ["0123456789ab", "123456", CHUNK_1[:10]])
def test_a_word_that_looks_like_an_id_and_is_none_is_no_prompt_text(client, word):
    with pytest.raises(UsageError, match=f"stands for [05] chunks; write text:{word} if it is text"):
        read_segment(word, client, Asked())


def test_text_says_that_a_word_is_text(client):
    assert read_segment("text:123456", client, Asked(), role="user") == Text("123456", role="user")
    assert read_segment("text::doc-1", client, Asked()) == Text(":doc-1")


def test_a_file_without_its_sign(client, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("Facts.")
    assert read_segment(str(file), client, Asked(True)) == Text("Facts.")
    nobody = Asked(None)
    assert read_segment(str(file), client, nobody) == Text(str(file))
    assert len(nobody.warnings) == 1 and f"write @{file}" in nobody.warnings[0]
    refused = Asked(False)
    assert read_segment(str(file), client, refused) == Text(str(file)) and not refused.warnings


@pytest.mark.parametrize("word", ["docs/chronicle.txt", "./notes", "../x.md", "~/nothing", "/etc/nothing-here"])
def test_a_path_that_does_not_exist_is_sent_with_a_warning(client, word):
    terminal = Asked(True)
    assert read_segment(word, client, terminal) == Text(word)
    assert len(terminal.warnings) == 1 and "no such file" in terminal.warnings[0]


@pytest.mark.parametrize("word", ["and/or", "Who governs Wendolin?", "see docs/a.txt now", "https://a.example/b.txt"])
def test_ordinary_words_are_sent_without_one(client, word):
    terminal = Asked(True)
    assert read_segment(word, client, terminal) == Text(word)
    assert terminal.warnings == []


@pytest.mark.parametrize("word", ["x" * 100_000, "nul\0character", "~nobodyhere42"])
def test_words_that_no_path_can_be(client, word):
    assert read_segment(word, client, Asked(True)) == Text(word)
