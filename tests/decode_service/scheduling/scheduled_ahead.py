"""A scheduler on a fake device that runs ahead of the host, and what every step of it must keep."""

from __future__ import annotations

from typing import Any

from decode_service.device.begun import sequences_of
from decode_service.prompt.request_chunk import RequestChunk
from decode_service.scheduling.answers import who_computes
from decode_service.scheduling.line import SHORT_PIECE, STEPS_A_PIECE
from decode_service.scheduling.sequence import Sequence, State
from decode_service.scheduling.step_plan import Rows, StepPlan
from engine.sampling.params import Choice
from tests.decode_service.scheduling.scheduled import Forwards, Scheduled, check_context


class Ahead(Scheduled):
    """The same beside a device: each step is read when the next one has begun. Keeps to itself what steps must keep."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.forwards: Forwards = options["forwards"]
        self.in_flight: list[list[Rows]] = []
        self.steps_since_piece = self.steps_owed = 0

    def plan(self) -> StepPlan:
        plan = super().plan()
        self.check_plan(plan)
        return plan

    def run(self, plan: StepPlan, token_id: int = 7) -> None:
        for rows in ([piece] for piece in plan.alone):
            self._begin(rows, token_id)
        if plan.packed:
            self._begin(plan.packed, token_id)
        if not plan.rows:
            self._read(0, token_id)

    def _begin(self, rows: list[Rows], token_id: int) -> None:
        self.ran += rows
        for each in rows:
            check_context(each)
        self.scheduler.ran(rows)
        self.in_flight.append(rows)
        self._read(1, token_id)

    def _read(self, unread: int, token_id: int) -> None:
        while len(self.in_flight) > unread:
            for rows in self.in_flight.pop(0):
                if rows.decodes or rows.last_of_prompt:
                    for sequence in sequences_of([rows]):
                        self.scheduler.token(sequence, Choice(token_id, None), next(self._now))

    def check_plan(self, plan: StepPlan) -> None:
        """Before anything of it runs."""
        drawing = [
            s
            for s in self.sequences
            if not s.done and s.slot >= 0 and s.tail_tokens >= s.known_tokens and 0 < s.drawn < s.params.max_tokens
        ]
        slots = [s.slot for s in self.sequences if s.state in (State.PREFILLING, State.DECODING)]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(self.batch_max))
        assert all((s.state is State.PREFILLING and not s.tail_tokens) or s.preemptions for s in plan.opened)
        assert not (plan.alone and plan.packed)
        if plan.alone:
            rows_alone = sum(max(rows.count, self.forwards.piece_tokens // SHORT_PIECE) for rows in plan.alone)
            assert not drawing or self.steps_since_piece >= self.steps_owed
            assert rows_alone <= self.forwards.piece_tokens
            self.steps_since_piece = 0
            self.steps_owed = STEPS_A_PIECE if rows_alone > self.forwards.piece_tokens // SHORT_PIECE else 1
            return
        self.steps_since_piece += bool(plan.packed)
        decodes = plan.packed[: len(drawing)]
        assert all(rows.decodes for rows in decodes) and not any(rows.decodes for rows in plan.packed[len(drawing) :])
        assert {id(rows.sequence) for rows in decodes} == set(map(id, drawing)), "nobody who decodes is left out"
        assert len(decodes) == len(drawing)
        assert all((rows.first, rows.count) == (rows.sequence.tail_tokens, 1) for rows in decodes)
        assert sum(rows.count for rows in plan.packed) <= max(self.forwards.rows, len(drawing))
        self._check_order(plan)

    def _check_order(self, plan: StepPlan) -> None:
        """In a group, chunks of one tenant or prompts, a later one has rows only where every earlier one has all it
        could have; chunks come after prompts or before, and none is held up while there is room."""
        there = self.scheduler.everyone
        prompts = self._check_group(plan, who_computes([s for s in there if s.state is State.PREFILLING]))
        loading = [s for s in there if s.state is State.LOADING]
        groups = [[s for s in loading if s.tenant == tenant] for tenant in {s.tenant for s in loading}]
        of_tenants = [self._check_group(plan, group) for group in groups]
        chunks = any(taken for taken, _ in of_tenants), any(waits for _, waits in of_tenants)
        assert not (prompts[1] and chunks[0]) or not (chunks[1] and prompts[0])
        if prompts[1] or chunks[1]:
            taken = prompts[0] or chunks[0]
            assert taken or sum(rows.count for rows in plan.packed) >= self.forwards.rows, "prompts go on"

    def _check_group(self, plan: StepPlan, group: list[Sequence]) -> tuple[bool, bool]:
        """Whether some of a group had rows, and whether some had to wait."""
        taken = {(id(rows.sequence), rows.chunk): rows.count for rows in plan.packed if not rows.decodes}
        any_taken = waits = False
        for sequence in group:
            wanted = self._wanted(sequence)
            mine = {chunk for there, chunk in taken if there == id(sequence)}
            assert mine <= {chunk for chunk, _ in wanted}
            for chunk, rows in wanted:
                count = taken.get((id(sequence), chunk), 0)
                assert not (waits and count), "first come first served"
                any_taken |= bool(count)
                waits |= count < rows
        return any_taken, waits

    def _wanted(self, sequence: Sequence) -> list[tuple[RequestChunk | None, int]]:
        """What of a sequence may be in the next step, and how many rows at most."""
        chunks = sequence.composition.chunks
        there = {c for c in chunks if c.held.ready or (sequence.bypass and c.computed == len(c.token_ids))}
        found: list[tuple[RequestChunk | None, int]] = [
            (chunk, len(chunk.token_ids) - chunk.computed)
            for chunk in chunks
            if chunk.computed is not None
            and chunk not in there
            and all(chunks[index] in there for index in chunk.context)
            and not self.forwards.alone(len(chunk.token_ids), chunk=True)
        ]
        tail, done = sequence.known_tokens, sequence.tail_tokens
        if sequence.state is State.PREFILLING and len(there) == len(chunks) and done < tail:
            query = len(sequence.composition.tail)
            if not self.forwards.alone(query, chunk=False):
                found.append((None, tail - done))
            elif done >= query:  # an answer goes on, a row a step
                found.append((None, 1))
        return found
