"""What a person or a script sees: words, tables and progress for one, JSON lines for the other.

Results go to standard output, everything else to standard error. Colours appear only on a terminal and never with
``NO_COLOR``; with ``--json`` standard output carries JSON lines and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cairn.client.errors import CairnError
from cairn.client.reports import ChatReport, ReuseReport
from chunk_store.quantities import human_age

PLAIN_WIDTH = 140  # columns where the output is not a terminal


class Terminal:
    """Where a command writes. ``as_json`` is what ``--json`` asked for."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out = _console(sys.stdout)
        self._err = _console(sys.stderr)

    def result(self, value: Any, human: str | Table) -> None:
        """A command's result: the value as one JSON line, or its human form."""
        if self.as_json:
            self.json_line(value)
        else:
            self.say(human)

    def json_line(self, value: Any) -> None:
        """One JSON value on a line of its own; dataclasses become objects."""
        print(json.dumps(_plain(value), ensure_ascii=False), flush=True)

    def say(self, words: str | Text | Table, style: str = "") -> None:
        """Words or a table for a person on standard output."""
        self._out.print(words, style=style, soft_wrap=isinstance(words, str))

    def note(self, words: str | Text | Table, style: str = "") -> None:
        """Words or a table beside the result, on standard error; nothing with ``--json``."""
        if not self.as_json:
            self.log(words, style)

    def log(self, words: str | Text | Table, style: str = "") -> None:
        """A line on standard error in every mode."""
        self._err.print(words, style=style, soft_wrap=isinstance(words, str | Text))

    def stream(self, text: str) -> None:
        """Text of an answer, as it is, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def waiting(self, words: str) -> AbstractContextManager[Any]:
        """Show on a terminal that something is going on."""
        if self.as_json or not self._err.is_terminal:
            return nullcontext()
        return self._err.status(words)

    def live(self) -> AbstractContextManager[Any]:
        """A line on a terminal that changes (a ``rich.live.Live``); None elsewhere."""
        if self.as_json or not self._err.is_terminal:
            return nullcontext()
        return Live("", console=self._err, refresh_per_second=4, transient=True)

    def warn(self, words: str) -> None:
        """Say on standard error, in every mode, that something may not be what was meant."""
        self._err.print(Text.assemble(("cairn: ", "bold yellow"), words), soft_wrap=True)

    def ask(self, question: str) -> bool | None:
        """Put a question to the person at the terminal; Enter means yes. None if there is nobody to ask."""
        if self.as_json or not (self._err.is_terminal and sys.stdin.isatty()):
            return None
        self._err.print(f"{question} [Y/n] ", end="")
        return sys.stdin.readline().strip().lower() in ("", "y", "yes")

    def failed(self, error: Exception, hint: str = "") -> None:
        """Say on standard error why the command failed, and what to do about it if that is known."""
        if self.as_json and isinstance(error, CairnError):
            fields = {"code": error.code, "message": error.message, "source": error.source}
            if hint:
                fields["hint"] = hint
            print(json.dumps({"error": fields}), file=sys.stderr, flush=True)
        else:
            self._err.print(Text.assemble(("cairn: ", "bold red"), str(error)), soft_wrap=True)
            if hint:
                self._err.print(Text.assemble(("hint: ", "bold"), hint), soft_wrap=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> Table:
    """A table; columns whose name starts with ``#`` hold numbers and are aligned to the right."""
    made = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column.lstrip("#"), justify="right" if column.startswith("#") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    return made


def reuse_table(report: ReuseReport, title: str = "") -> Table:
    """The reuse report, one row for each segment of the prompt, and of a sorted one where each was given."""
    given = ("#given",) if report.reordered else ()
    columns = (*given, "segment", "type", "#tokens", "#cached", "source", "#level", "#offset", "exactness", "miss")
    rows = [
        (
            *([segment.given_index + 1] if report.reordered else []),
            segment.name or short_id(segment.chunk_id) or "(query)",
            segment.type,
            segment.tokens,
            segment.cached_tokens,
            segment.source,
            segment.level,
            segment.offset,
            segment.exactness,
            segment.miss_reason or "-",
        )
        for segment in report.segments
    ]
    return table(columns, rows, title)


def chat_line(report: ChatReport) -> str:
    """How a chat became chunks."""
    again = f"; rendered again: {report.rendered_again}" if report.rendered_again else ""
    return (
        f"chat: {report.turns_kept} answers as they were generated, the rest rendered in {report.pieces} pieces{again}"
    )


def short_id(chunk_id: str) -> str:
    """The first digits of a chunk id: enough to recognise it."""
    return chunk_id[:12]


def human_time(unix_s: float, now_s: float) -> str:
    """A point in time by the clock of this machine, and how far it is from now."""
    shown = datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    gap = human_age(abs(now_s - unix_s))
    return f"{shown} ({gap} ago)" if unix_s <= now_s else f"{shown} (in {gap})"


def _console(stream: Any) -> Console:
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
