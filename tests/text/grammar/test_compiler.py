"""Compiling: what is kept, its bounds, and what it refuses whatever the form."""

from __future__ import annotations

import threading

import pytest

from tests.text.grammar.answers import compiler, refusal
from text.codec import TextCodec
from text.errors import TextBusy, TextRefused
from text.grammar import compiler as limits
from text.grammar.compiler import GrammarCompiler
from text.grammar.forms import Form


def test_a_tokenizer_larger_than_the_model_has_no_grammars() -> None:
    with pytest.raises(TextRefused, match="tokens, the model 256"):
        compiler(vocabulary=256).compile("regex", "a")
    with pytest.raises(TextRefused, match="has no tokenizer"):
        GrammarCompiler(TextCodec(None, "bare"), vocabulary=64, end_token_ids=[1]).compile("regex", "a")


def test_what_is_compiled_is_kept_for_its_owner_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiler()
    first = made.compile("regex", "a+", owner="one")
    assert made.compile("regex", "a+", owner="one") is first
    assert made.compile("regex", "a+", owner="other") is not first
    assert made.compile("lark", "start: /a+/", owner="one") is not first
    monkeypatch.setattr(limits, "KEPT_MAX", 2)
    made.compile("regex", "b+", owner="one")
    made.compile("regex", "c+", owner="one")
    assert made.compile("regex", "a+", owner="one") is not first
    monkeypatch.setattr(limits, "KEPT_CHARACTERS_MAX", 10)
    made.compile("regex", "d" * 9)
    assert sum(len(source) for _, _, source in made._kept) <= 10


def test_compiling_is_bounded_in_number_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, release = compiler(), threading.Event()
    made.compile("regex", "a")
    monkeypatch.setattr(made, "_compile", lambda form, source: release.wait(60) and None)
    monkeypatch.setattr(limits, "WAIT_S", 0.05)
    try:
        with pytest.raises(TextRefused, match="took longer than"):
            made.compile("regex", "b")
        running = [made.begin("regex", f"{index}") for index in range(limits.OWN_WAITING_MAX - 1)]
        with pytest.raises(TextBusy, match="are being compiled"):
            made.begin("regex", "c")
        left = limits.WAITING_MAX - limits.OWN_WAITING_MAX  # which nobody else's keep from a tenant
        running += [made.begin("regex", f"{index}", owner="another") for index in range(left)]
        with pytest.raises(TextBusy, match="are being compiled"):
            made.begin("regex", "c", owner="a third")
        busy = made.late(running[-1])
        assert isinstance(busy, TextBusy)
    finally:
        release.set()


@pytest.mark.parametrize(
    ("form", "source", "complaint"),
    [
        ("json_schema", '{"enum": [' + "[" * 300 + "]" * 300 + "]}", "cannot be compiled: recursion limit"),
        ("json_schema", '{"const": "\\ud800"}', "cannot be compiled: unexpected end of hex escape"),
        ("json_schema", '{"minimum": ' + "9" * 4000 + "}", "cannot be compiled: number out of range"),
    ],
)  # fmt: skip
def test_what_is_json_to_python_alone_is_refused(form: Form, source: str, complaint: str) -> None:
    assert complaint in refusal(form, source)
