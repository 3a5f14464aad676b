"""What runs next: beside tests of the whole scheduler, of what answers that go on have in a step."""

from __future__ import annotations

from decode_service.scheduling.next_rows import NextRows
from decode_service.scheduling.sequence import Sequence, State
from tests.decode_service.scheduling.scheduled import Forwards, request


def going_on(name: str, done: int, generated: int) -> Sequence:
    """A request whose query of 3 tokens, and what of its answer is known, is computed as far as ``done``."""
    made = request(name, max_tokens=50)
    made.state, made.slot, made.preemptions = State.PREFILLING, 0, 1
    made.generated = list(range(generated))
    made.go_on()
    made.tail_tokens = done
    return made


def rows_of(forwards: Forwards, **by_state: list[Sequence]) -> list[tuple[str, int, int, bool]]:
    admitted = {state: by_state.get(state.value, []) for state in (State.LOADING, State.PREFILLING, State.DECODING)}
    rows = NextRows(forwards, lambda sequence, tokens: tokens).rows(admitted)
    return [(each.sequence.request_id, each.first, each.count, each.alone) for each in rows]


def test_where_rows_are_packed_what_is_known_is_one_slice() -> None:
    decodes = request("d", max_tokens=9)
    decodes.state, decodes.tail_tokens = State.DECODING, 3
    again = going_on("a", 0, 6)
    found = rows_of(Forwards(packs=True), prefilling=[again], decoding=[decodes])
    assert found == [("d", 3, 1, False), ("a", 0, 8, False)], "a query of 3 and 5 of 6 tokens: the last one draws"
    again.tail_tokens = 8
    assert rows_of(Forwards(packs=True), prefilling=[again]) == [("a", 8, 1, False)]


def test_elsewhere_a_query_is_a_piece_and_each_known_token_a_row_beside_those_who_decode() -> None:
    decodes = request("d", max_tokens=9)
    decodes.state, decodes.tail_tokens = State.DECODING, 3
    assert rows_of(Forwards(), prefilling=[going_on("a", 0, 6)]) == [("a", 0, 3, True)]
    assert rows_of(Forwards(), prefilling=[going_on("a", 4, 6)], decoding=[decodes]) == [
        *(("d", 3, 1, False), ("a", 4, 1, False))
    ]
