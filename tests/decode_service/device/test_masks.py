"""Masks of a step: filled beside the forward where tokens are read at once, else when the step before it was read."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

from decode_service.device.masks import Masks
from tests.fakes import END, codec
from tests.tokenizer_for_tests import VOCABULARY
from text.grammar.compiler import GrammarCompiler
from text.grammar.matcher import Matcher


def sequence(grammar: Matcher | None) -> Any:
    return SimpleNamespace(grammar=grammar)


def masks(*, runs_ahead: bool) -> Masks:
    runner: Any = SimpleNamespace(
        runs_ahead=runs_ahead, bitmasks=lambda count: np.zeros((count, VOCABULARY // 32), np.int32)
    )
    return Masks(runner)


def test_what_has_ended_meanwhile_may_draw_anything() -> None:
    compiled = GrammarCompiler(codec(), vocabulary=VOCABULARY, end_token_ids=[END]).compile("regex", "[ab]c")
    made = masks(runs_ahead=True)
    first, second = sequence(compiled.matcher()), sequence(compiled.matcher())
    step = made.of([first, second])
    first.grammar = None
    assert step.fill() == []
    assert (step.bits[0] == -1).all() and 0 < np.bitwise_count(step.bits[1]).sum() < 10
    made.stop()


def test_masks_are_filled_beside_the_forward_of_a_runner_that_waits(monkeypatch: Any) -> None:
    begun = threading.Event()

    def fill(*_: Any) -> list[None]:
        begun.set()
        return [None]

    monkeypatch.setattr("decode_service.device.masks.fill_rows", fill)
    waits, ahead = masks(runs_ahead=False), masks(runs_ahead=True)
    step = waits.of([sequence(None)])
    assert begun.wait(60)
    assert step.fill() == []
    begun.clear()
    step = ahead.of([sequence(None)])
    assert not begun.is_set(), "the tokens before it are not read"
    step.fill()
    assert begun.is_set()
    waits.stop()
    ahead.stop()
