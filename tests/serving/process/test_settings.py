"""Kinds of settings: which words are one, and what is said of the others; what a declaration gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from serving.process.settings import (
    SWITCH,
    Kind,
    choice,
    number,
    or_zero,
    parse_switch,
    setting,
    settings_of,
    text,
    whole,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = setting(text("PATH"), "the model")
    kv_pages: int | None = setting(whole(1), "pages", default=None, unset="by memory", own=True)
    token: str = setting(text("TOKEN"), "a token", default="", secret=True)
    share: float = setting(number("S", "a share", lambda value: 0 <= value <= 1), "of it", default=0.5)
    loud: bool = setting(SWITCH, "say more", default=False)


def test_a_field_is_a_setting_with_flag_and_variables() -> None:
    model, kv_pages, token, share, loud = settings_of(Options)
    assert (kv_pages.flag, kv_pages.variable) == ("--kv-pages", "CAIRN_KV_PAGES")
    assert kv_pages.variables("decode") == ("CAIRN_DECODE_KV_PAGES", "CAIRN_KV_PAGES")
    assert model.variables("decode") == ("CAIRN_MODEL",)
    assert [each.shown_default for each in (model, kv_pages, token, share, loud)] == ["", "by memory", "", "0.5", ""]


def test_a_secret_is_not_shown() -> None:
    assert "hush" not in repr(Options(model="m", token="hush")) and "m" in repr(Options(model="m"))


@pytest.mark.parametrize(
    ("kind", "words", "value"),
    [
        (whole(1), "7", 7),
        (whole(-3), "-3", -3),
        (whole(1, 5), "5", 5),
        (choice("a", "b"), "b", "b"),
        (text("T"), " ", " "),
        (number("N", "a share", lambda value: 0 <= value <= 1), "0.25", 0.25),
    ],
)
def test_words_that_are_one(kind: Kind, words: str, value: Any) -> None:
    assert kind.parse(words) == value


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        (whole(1), "0", "'0' is not a whole number of at least 1"),
        (whole(1, 5), "6", "'6' is not a whole number from 1 to 5"),
        (whole(1), "1.5", "not a whole number"),
        (whole(1), "", "not a whole number"),
        (choice("a", "b"), "c", "'c' is not one of a, b"),
        (text("T"), "", "must not be empty"),
        (number("N", "a share", lambda value: 0 <= value <= 1), "2", "'2' is not a share"),
        (number("N", "a share", lambda value: 0 <= value <= 1), "much", "'much' is not a share"),
        (number("N", "a share", lambda value: 0 <= value <= 1), "nan", "'nan' is not a share"),
    ],
)
def test_words_that_are_none_say_what_would_be(kind: Kind, words: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kind.parse(words)


@pytest.mark.parametrize(("words", "value"), [("TRUE", True), ("1", True), ("on", True), ("off", False), ("no", False)])
def test_a_switch_is_on_or_off(words: str, value: bool) -> None:
    assert parse_switch(words) is value


def test_a_switch_is_nothing_else_and_zero_may_be_a_size() -> None:
    with pytest.raises(ValueError, match="'maybe' is neither true nor false"):
        parse_switch("maybe")
    assert or_zero(whole(5)).parse(" 0 ") == 0 and or_zero(whole(5)).parse("7") == 7
    with pytest.raises(ValueError, match="at least 5"):
        or_zero(whole(5)).parse("3")
