"""What every command reads its words with: files, argparse types, and the error of a word that cannot be meant."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Parsed = TypeVar("Parsed")


class UsageError(Exception):
    """The command line cannot be carried out as it was typed; nothing was sent."""


def read_file(path: Path) -> str:
    """A file's text. Raises ``UsageError``."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def typed(parse: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    """``parse`` as an argparse type that says what its ``ValueError`` says."""

    def of(text: str) -> Parsed:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return of


def shown(word: str) -> str:
    """A word as an error quotes it."""
    return repr(word if len(word) <= 80 else f"{word[:77]}...")
