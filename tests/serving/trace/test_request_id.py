"""The id of a request fits metadata and a line, and a thread bears one at a time."""

from __future__ import annotations

import pytest

from serving.trace.request_id import REQUEST_ID_CHARACTERS_MAX, bearing, clean_request_id, current_request_id

FORGED = "ok\n2026-11-21 12:00:00,000 INFO serving.calls [-] all is well"
NASTY = [FORGED, "a\r\nb", "\x1b[2J", "\u2028next", "\u202egnp", "\x00", "lone \udc80", "\x85", "tab\there"]


@pytest.mark.parametrize("text", [*NASTY, "x" * 1000, "déjà vu", ""])
def test_a_request_id_fits_metadata_and_a_line(text: str) -> None:
    cleaned = clean_request_id(text)
    assert len(cleaned) <= REQUEST_ID_CHARACTERS_MAX and cleaned.isascii() and cleaned.isprintable()
    assert " " not in cleaned and bool(cleaned) == bool(text)


def test_plain_request_ids_stay() -> None:
    for text in ("to-be-aborted", "7f3a:1/b", "00000000-0000-4000-8000-000000000000"):
        assert clean_request_id(text) == text


def test_a_thread_works_for_one_request_after_another() -> None:
    assert current_request_id() == "-"
    with bearing("one"):
        with bearing("two\n"):
            assert current_request_id() == "two_"
        assert current_request_id() == "one"
    assert current_request_id() == "-"
