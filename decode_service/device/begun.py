"""Steps that were launched: rows of requests as a runner takes them, and the tokens that come of them."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from itertools import islice

from decode_service.prompt.scores import PromptScores
from decode_service.scheduling.sequence import Sequence
from decode_service.scheduling.step_plan import Rows
from engine.kv.resident import ResidentChunks
from engine.plan import StepSequence, behind_each_other
from engine.run.pieces import Cut, chunk_rows
from engine.run.protocol import PendingStep, Runner, StepRows
from engine.sampling.params import Choice, Draw
from engine.sight import EVERYTHING, Sight


@dataclass(frozen=True)
class Begun:
    """A step that was launched, and the rows in it. ``tokens_flat``: KV tokens that it would read without sharing."""

    rows: Items[Rows]
    step: PendingStep
    tokens_flat: int
    places: Items[tuple[PromptScores, Items[int]]] = ()  # of the prompts' tokens that are scored in it

    @property
    def sequences(self) -> list[Sequence]:
        """Whoever is in it."""
        return sequences_of(self.rows)

    @property
    def decodes(self) -> bool:
        """Whether somebody decodes in it; those rows come first."""
        return self.rows[0].decodes

    def wait(self) -> list[tuple[Rows, Choice]]:
        """The tokens of those who have not ended meanwhile. Raises what the device raises."""
        last = (rows for rows in self.rows if rows.decodes or rows.last_of_prompt)
        drawn = (each for rows in last for each in (rows, *(replace(rows, sequence=other) for other in rows.also)))
        taken = zip(drawn, self.step.wait(), strict=True)
        return [(rows, choice) for rows, choice in taken if not rows.sequence.done]

    def note_scores(self) -> None:
        """Keeps what was found of prompts' tokens; waits as ``wait``, and raises the same."""
        if not self.places:
            return
        found = iter(self.step.scores())
        for scores, places in self.places:
            scores.note(places, list(islice(found, len(places))))


def begin(runner: Runner, rows: Items[Rows], residents: ResidentChunks, sight: Sight = EVERYTHING) -> Begun:
    """Launches a step: one piece that is alone, or rows that are packed. Raises what the runner raises.

    ``sight``: what its rows see.
    """
    batch = [_decode_row(each, residents) if each.decodes else _slice(each, residents) for each in rows]
    places: list[tuple[PromptScores, list[int]]] = []
    for at, each in enumerate(rows):
        scores = each.sequence.scores
        if scores is not None and not each.decodes:
            index = None if each.chunk is None else each.chunk.index
            scored, wanted = scores.wanted(index, each.first, each.count)
            batch[at] = replace(batch[at], scored=scored)
            places.append((scores, wanted))
    begun = Begun(rows, runner.begin(batch), sum(_tokens_seen(each.sequence, sight) for each in batch), places)
    for each in rows:
        left = len(each.sequence.composition.tail) - each.copied_from * residents.pool.page_size
        if each.also and left:
            tails = [other.tail_pages for other in each.also]
            residents.pool.share_tail(each.sequence.tail_pages[each.copied_from :], tails, left)
    return begun


def sequences_of(rows: Items[Rows]) -> list[Sequence]:
    """Whose rows they are, and who takes what comes of them."""
    return [sequence for each in rows for sequence in (each.sequence, *each.also)]


def _tokens_seen(sequence: StepSequence, sight: Sight) -> int:
    return sequence.position + sequence.rows - sight.first(sequence.position)


def _decode_row(rows: Rows, residents: ResidentChunks) -> StepRows:
    """The row of the token that was drawn last, whether it was read or not, and those of tokens that are forced."""
    sequence = rows.sequence
    placed = sequence.placed(residents.pool.page_size, residents.moves)
    position = sequence.composition.tail_start + rows.first
    row = StepSequence(placed, sequence.tail_pages, rows.first, rows.count, position)
    return StepRows(row, (~sequence.slot, *rows.forced), _draw(sequence, rows.first + rows.count))


def _slice(rows: Rows, residents: ResidentChunks) -> StepRows:
    """Rows of a tail whose tokens are known, or of a chunk that is computed here."""
    sequence, page_size = rows.sequence, residents.pool.page_size
    composition, cut = sequence.composition, Cut(rows.first, rows.count, rows.alone)
    if rows.chunk is not None:
        before = [composition.chunks[index].held for index in rows.chunk.context]
        context = behind_each_other((each.first_slot(page_size), each.tokens, 0) for each in before)
        return chunk_rows(rows.chunk.token_ids, cut, context, rows.chunk.held.run)
    placed = sequence.placed(page_size, residents.moves)
    draw = _draw(sequence, rows.first + rows.count) if rows.last_of_prompt else None
    row = StepSequence(placed, sequence.tail_pages, rows.first, rows.count, composition.tail_start + rows.first)
    also = tuple(_draw(other, rows.first + rows.count) for other in rows.also)
    return StepRows(row, sequence.tail_token_ids(rows.first, rows.count), draw, rows.alone, also)


def _draw(sequence: Sequence, tail_tokens: int) -> Draw:
    """The token behind so many tokens of the tail."""
    composition = sequence.composition
    return Draw(sequence.slot, tail_tokens - len(composition.tail), composition.tail_start + tail_tokens)
