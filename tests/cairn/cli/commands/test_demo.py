"""``cairn demo`` before it starts anything, and how it ends."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cairn.cli.commands import demo
from cairn.cli.terminal import Terminal


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--orders", "0"], "--orders and --questions must be at least 1"),
        (["--questions", "-1"], "--orders and --questions must be at least 1"),
        (["--model", "modles/fable"], "--model: "),
        (["--examples", "EMPTY"], "cannot use the examples"),
        (["--orders", "1000000000"], "cannot use the examples: .* orders"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    cairn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], words: str
) -> None:
    monkeypatch.setattr(demo, "_demonstrate", None)
    code, out, err = cairn("demo", *(word.replace("EMPTY", str(tmp_path)) for word in argv))
    assert (code, out) == (2, "")
    assert re.search(words, err), err


@pytest.mark.parametrize(("problems", "code"), [([(), ()], 0), ([(), ("the tokens differ",)], 1), ([], 0)])
def test_it_ends_well_only_if_every_answer_did(
    capsys: pytest.CaptureFixture[str], problems: list[tuple[str, ...]], code: int
) -> None:
    verdicts: Any = [SimpleNamespace(problems=each) for each in problems]
    assert demo._conclude(Terminal(as_json=True), verdicts, 1.25) == code
    done = json.loads(capsys.readouterr().out)
    assert (done["answers"], done["good"]) == (len(problems), sum(not each for each in problems))
