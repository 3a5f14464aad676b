"""Foreign text on one line of ours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.trace.printable import printable


@given(text=st.text(max_size=40), most=st.integers(1, 30))
def test_any_text_is_one_bounded_line(text: str, most: int) -> None:
    shown = printable(text, most)
    assert shown.isprintable() and len(shown.splitlines()) <= 1
    assert len(shown) <= 10 * most + 40
    if len(text) <= most and text.isprintable():
        assert shown == text


def test_what_is_left_out_is_counted() -> None:
    assert printable("x" * 11, 10) == "x" * 10 + "... (1 more characters)"
    assert printable("a\nb\x1b\u202e") == "a\\nb\\x1b\\u202e"
