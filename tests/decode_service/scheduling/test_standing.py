"""Where requests stand: states follow where they may, slots and tenants' places come back."""

from __future__ import annotations

import pytest

from decode_service.scheduling.admission import Fill
from decode_service.scheduling.sequence import Sequence, State
from decode_service.scheduling.standing import Standing
from serving.tenancy.places import TenantPlaces
from serving.tenancy.quotas import TenantQuotas
from tests.decode_service.scheduling.scheduled import Scheduled, request


def test_a_state_follows_only_where_it_may() -> None:
    on = Scheduled()
    one = request("one")
    on.submit(one)
    with pytest.raises(RuntimeError, match="waiting cannot become decoding"):
        on.scheduler._standing.enter(one, State.DECODING)


def come(standing: Standing, places: TenantPlaces, *sequences: Sequence) -> None:
    for submitted, sequence in enumerate(sequences, 1):
        if not sequence.for_chunks:
            places.take(sequence.tenant)
        sequence.clock.submitted = submitted
        standing.add(sequence)


def test_a_slot_is_a_requests_own_until_it_ends_or_waits_again() -> None:
    places = TenantPlaces(9, TenantQuotas())
    standing = Standing(places, 2)
    one, two, three = (request(name) for name in ("one", "two", "three"))
    come(standing, places, one, two, three)
    for each in (one, two):
        assert standing.next(lambda sequence, _: Fill(sequence, set())) is not None
        standing.enter(each, State.PREFILLING)
    assert (one.slot, two.slot, standing.free_places, standing.running) == (0, 1, 0, 2)
    assert standing.next(lambda sequence, _: Fill(sequence, set())) is None and not standing.line_moved
    standing.enter(one, State.DECODING)
    assert standing.with_slots == [one, two]
    standing.enter(two, State.WAITING)
    assert [each.request_id for each in standing.everyone] == ["two", "three", "one"] and places.waiting == 2
    standing.look_again()
    assert standing.next(lambda sequence, _: Fill(sequence, set())) is not None and two.state is State.LOADING
    standing.enter(two, State.PREFILLING)
    assert two.slot == 1, "nobody else has it"
    standing.enter(one, State.ENDED)
    standing.enter(two, State.ENDED)
    standing.enter(three, State.ENDED)
    assert not standing.everyone and places.of(one.tenant) == (0, 0) and standing.free_places == 2


def test_who_waits_for_a_place_keeps_it_from_answers_and_not_from_chunks() -> None:
    places = TenantPlaces(9, TenantQuotas())
    standing = Standing(places, 1)
    chunks = request("chunks", [("doc", 4)], tail=0)
    come(standing, places, request("answer"), chunks)
    standing.for_a_place = 1
    fill = standing.next(lambda sequence, _: Fill(sequence, set()))
    assert fill is not None and fill.sequence is chunks and standing.running == 0
    assert standing.loading == [chunks] and places.of(chunks.tenant) == (0, 1), "whoever asks for chunks counts them"


def test_who_was_to_begin_is_late_until_it_begins_or_ends() -> None:
    places = TenantPlaces(9, TenantQuotas())
    standing = Standing(places, 2)
    one, two = request("one", start_by=10), request("two", start_by=10)
    come(standing, places, one, two)
    assert not standing.late(9) and standing.late(10) == [one, two]
    standing.next(lambda sequence, _: Fill(sequence, set()))
    assert standing.late(10) == [one, two], "it is admitted, not begun"
    standing.enter(one, State.PREFILLING)
    assert standing.late(10) == [two]
    standing.enter(two, State.ENDED)
    assert not standing.late(10)
