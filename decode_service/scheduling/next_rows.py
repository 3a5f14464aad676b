"""What runs next, of requests by where they stand: whose rows, of which kind, and in whose turn."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

from decode_service.scheduling.answers import who_computes, with_others
from decode_service.scheduling.jumps import with_forced
from decode_service.scheduling.line import Turns, cost_in_rows
from decode_service.scheduling.sequence import Sequence, State
from decode_service.scheduling.step_plan import (
    Forwards,
    PagesFor,
    Rows,
    can_compute,
    next_again,
    next_pieces,
    next_slices,
)
from serving.tenancy.places import Rotation

Admitted = Mapping[State, Items[Sequence]]

TAILS_FIRST_MAX = 3  # steps in a row that prompts fill while others wait to compute chunks


class NextRows:
    """Shares the device among requests, and remembers whose turn it was. ``room_for``: see ``Tails``."""

    def __init__(self, forwards: Forwards, room_for: PagesFor) -> None:
        self._forwards = forwards
        self._room_for = room_for
        self._turns = Turns(forwards.piece_tokens)
        self._turns_of_tenants = Rotation()  # to have chunks computed
        self._tails_first = 0  # steps since rows of chunks went before those of prompts, or had no need to

    def rows(self, admitted: Admitted) -> list[Rows]:
        """Pieces that run alone, or a step: everybody who decodes, and slices as there is room."""
        everyone = (*admitted[State.DECODING], *admitted[State.PREFILLING])
        rows = [Rows(sequence, sequence.tail_tokens, 1) for sequence in everyone if sequence.may_draw_more]
        pieces: list[Rows] = []
        rows += next_again(admitted[State.PREFILLING], self._forwards)
        prefilling = self._in_turn(admitted)
        if prefilling or any(each.sequence.grammar is not None for each in rows):
            rows = self._with_more(admitted, rows, prefilling)
        if prefilling:
            pieces = next_pieces(prefilling, self._forwards)
        if pieces and self._turns.may_prefill(decoding=bool(rows)):
            piece_tokens = self._forwards.piece_tokens
            self._turns.prefilled(sum(cost_in_rows(each.count, piece_tokens) for each in pieces))
            self._had_turn(pieces)
            return with_others(pieces, admitted[State.PREFILLING])
        if rows:
            self._turns.stepped()
            self._had_turn(rows)
        return with_others(rows, admitted[State.PREFILLING])

    def _in_turn(self, admitted: Admitted) -> list[Sequence]:
        """Who computes something before a first token: prompts first, for they are short, but not for ever."""
        prompts, chunks = who_computes(admitted[State.PREFILLING]), self.computing(admitted)
        self._tails_first = self._tails_first + 1 if prompts and chunks else 0
        if self._tails_first > TAILS_FIRST_MAX:
            self._tails_first = 0
            return [*chunks, *prompts]
        return [*prompts, *chunks]

    def computing(self, admitted: Admitted) -> list[Sequence]:
        """Who waits for KV that is computed here, of several tenants' requests one of each in turn."""
        waiting = admitted[State.LOADING]
        there = [sequence for sequence in waiting if sequence.fill is not None and can_compute(sequence)]
        return [there[place] for place in self._turns_of_tenants.order([sequence.tenant for sequence in there])]

    def _had_turn(self, rows: Items[Rows]) -> None:
        """Of tenants whose chunks are computed the first one had its turn."""
        first = next((each for each in rows if each.sequence.state is State.LOADING), None)
        if first is not None:
            self._turns_of_tenants.served(first.sequence.tenant)

    def _with_more(self, admitted: Admitted, decodes: Items[Rows], prefilling: Items[Sequence]) -> list[Rows]:
        """What goes beside those who decode, and what they know of their next tokens."""
        room = self._forwards.room(decoding=bool(decodes))
        for each in decodes:
            room.grant(each.context, each.first)
        drawing = len(admitted[State.PREFILLING]) + len(admitted[State.DECODING])
        slices = next_slices(prefilling, self._forwards, room, drawing, self._room_for)
        return [*with_forced(decodes, self._forwards, room, self._room_for), *slices]
