"""Events out of bytes, wherever these are cut."""

from __future__ import annotations

import pytest

from cairn.load.sse import EVENT_MAX, EventReader

STREAM = b': hello\n\ndata: {"a": 1}\r\n\r\nevent: x\ndata:two\ndata: lines\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_wherever_they_are_cut(size: int) -> None:
    reader = EventReader()
    found = [event for at in range(0, len(STREAM), size) for event in reader.feed(STREAM[at : at + size])]
    assert found == [b'{"a": 1}', b"two\nlines", b"[DONE]"]


def test_an_event_that_never_ends_is_refused() -> None:
    reader = EventReader()
    with pytest.raises(ValueError, match="an event of more than"):
        for _ in range(EVENT_MAX // 65536 + 2):
            reader.feed(b"x" * 65536)
