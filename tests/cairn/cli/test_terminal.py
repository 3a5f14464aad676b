"""What a person or a script sees: words and tables for one, JSON lines for the other, colours on a terminal only."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import pytest

from cairn.cli.terminal import Terminal, human_time, reuse_table, table
from cairn.client.errors import error_from_status
from cairn.client.reports import ReuseReport, SegmentReport
from tests.cairn.on_terminal import on_a_terminal


@dataclass
class Value:
    name: str
    numbers: tuple[int, ...]
    inner: dict[str, Any]


VALUE = Value("é", (1, 2), {"deep": Value("x", (), {})})


def test_a_result_is_words_or_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().result(VALUE, "for people [bold]as it is[/bold] :smile:")
    assert capsys.readouterr().out == "for people [bold]as it is[/bold] :smile:\n"
    Terminal(as_json=True).result(VALUE, "for people")
    line = capsys.readouterr().out
    inner = {"name": "x", "numbers": [], "inner": {}}
    assert line.count("\n") == 1 and "é" in line
    assert json.loads(line) == {"name": "é", "numbers": [1, 2], "inner": {"deep": inner}}


def test_what_is_beside_the_result_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        terminal = Terminal(as_json)
        terminal.note("beside")
        terminal.log("always")
        terminal.warn("careful")
        with terminal.waiting("..."):
            pass
        found = capsys.readouterr()
        assert found.out == "" and ("beside" in found.err) == (not as_json)
        assert "always" in found.err and "cairn: careful" in found.err


def test_long_words_are_not_broken_into_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().say("word " * 100)
    Terminal().log("word " * 100)
    found = capsys.readouterr()
    assert found.out.count("\n") == found.err.count("\n") == 1


def test_an_answer_streams_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().stream("a\x1b[31m")
    Terminal().stream("b")
    assert capsys.readouterr().out == "a\x1b[31mb"


def test_a_failure_is_words_with_a_hint_or_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_from_status("NOT_FOUND", "no chunk", "prefill service at x")
    Terminal().failed(error, "look again")
    found = capsys.readouterr()
    assert found.out == "" and found.err.splitlines() == [
        "cairn: NOT_FOUND from the prefill service at x: no chunk",
        "hint: look again",
    ]
    Terminal(as_json=True).failed(error, "look again")
    told = json.loads(capsys.readouterr().err)["error"]
    assert told == {"code": "NOT_FOUND", "message": "no chunk", "source": "prefill service at x", "hint": "look again"}
    Terminal(as_json=True).failed(error)
    assert "hint" not in json.loads(capsys.readouterr().err)["error"]
    Terminal(as_json=True).failed(ValueError("a wrong command line"))
    assert capsys.readouterr().err == "cairn: a wrong command line\n"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "answer"), [("\n", True), ("y\n", True), ("YES\n", True), ("n\n", False), ("what\n", False)]
)
def test_a_question_is_put_to_a_person(monkeypatch: pytest.MonkeyPatch, typed: str, answer: bool) -> None:
    monkeypatch.setattr("sys.stderr", Screen())
    monkeypatch.setattr("sys.stdin", Screen(typed))
    assert Terminal().ask("shall I?") is answer
    assert Terminal(as_json=True).ask("shall I?") is None


def test_a_question_is_not_put_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert Terminal().ask("shall I?") is None


def shown(capsys: pytest.CaptureFixture[str], made: Any) -> list[list[str]]:
    Terminal().say(made)
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_tables_align_numbers_and_take_cells_literally(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().say(table(("name", "#count"), [("a", 5), ("[red]", 1234)], "title"))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert (
        lines[0] == "title"
        and lines[2].endswith("    5")
        and lines[3].startswith("[red]")
        and lines[3].endswith("1234")
    )


def test_the_reuse_report_has_a_row_for_each_segment(capsys: pytest.CaptureFixture[str]) -> None:
    def segment(**fields: Any) -> SegmentReport:
        values: dict[str, Any] = dict.fromkeys(SegmentReport.__dataclass_fields__, 0)
        for name in ("chunk_id", "name", "type", "source", "exactness", "miss_reason", "unpublished"):
            values[name] = ""
        return SegmentReport(**{**values, "type": "context", "source": "store", "exactness": "exact", **fields})

    report = ReuseReport(
        "exact", "exact", (segment(name="doc"), segment(chunk_id="ab" * 32), segment(miss_reason="evicted"))
    )
    _, first, second, third = shown(capsys, reuse_table(report))
    assert (first[0], second[0], third[0]) == ("doc", "abababababab", "(query)")
    assert (first[-1], third[-1]) == ("-", "evicted")


def test_a_time_says_how_far_it_is() -> None:
    assert human_time(1000.0, 1090.0).endswith(" ago)") and "(in " in human_time(1090.0, 1000.0)


def test_colours_only_on_a_terminal_and_not_with_no_color(services: Any, cairn: Any) -> None:
    argv = ["generate", "q", "--prefill", services.address, "--decode", services.address]
    assert b"\x1b[1m" in on_a_terminal(argv, {})
    coloured = on_a_terminal(["chunks", "list", *argv[2:]], {"NO_COLOR": "1"})
    assert b"\x1b[3" not in coloured
    _, out, err = cairn(*argv)
    assert "\x1b" not in out + err
