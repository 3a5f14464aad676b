"""How commands read words and files."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cairn.cli.arguments import UsageError, read_file, shown, typed


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("é", encoding="utf-8")
    assert read_file(file) == "é"
    for bad in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError, match=f"cannot read {bad}"):
            read_file(bad)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="cannot read"):
        read_file(file)


def test_a_type_says_what_its_parser_says() -> None:
    assert typed(int)("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="invalid literal for int"):
        typed(int)("seven")


def test_long_words_are_quoted_in_part() -> None:
    assert shown("a'b") == repr("a'b") and shown("x" * 80) == repr("x" * 80)
    assert len(shown("x" * 81)) == 82 and shown("x" * 81).endswith("...'")
