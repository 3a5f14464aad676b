"""Draws that a grammar bounds, in captured steps: begun ahead of their masks, beside rows without, and jumping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from engine.plan import StepSequence
from engine.run.protocol import PendingStep, StepRows
from engine.sampling.params import Choice, Draw, SamplingParams, SamplingRequest
from engine.sampling.sampler import HostSlots
from engine.sampling.shaping import Bits
from tests.engine.composer import Composer
from tests.gpu.engine_models import served
from tests.gpu.packing import Packing, Tail

pytestmark = pytest.mark.gpu

NAME = "qwen3-ratio4-128"
COUNT = 12
KINDS = (
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.95, seed=1),
    SamplingParams(logprobs=True, top_logprobs=5),
    SamplingParams(temperature=1.3, top_k=20, seed=2),
    SamplingParams(temperature=1.0, seed=3, repetition_penalty=1.3, presence_penalty=0.4),
    SamplingParams(temperature=0.7, min_p=0.1, seed=4, logit_bias=((5, 3.0),)),
)


def allowed(vocabulary: int, last: int, step: int) -> list[int]:
    """Which tokens may come behind a token, as if a grammar said so: each third, of every third step one."""
    if step % 3 == 2:
        return [(last * 7 + 3) % vocabulary]
    return list(range((last + step) % 3, vocabulary, 3))


def write(row: Bits, tokens: Sequence[int]) -> None:
    bits = np.zeros(len(row) * 32, np.uint8)
    bits[list(tokens)] = 1
    row[:] = np.packbits(bits, bitorder="little").view(np.int32)


@dataclass
class Answer:
    """A request in a slot, and what was drawn for it; ``masked``: it follows ``allowed``."""

    tail: Tail
    query: int
    params: SamplingParams
    slot: int
    masked: bool
    choices: list[Choice] = field(default_factory=list)
    begun: int = 0

    @property
    def request(self) -> SamplingRequest:
        return SamplingRequest(self.params, self.tail.token_ids[: self.query], masked=self.masked)

    def rows(self) -> StepRows:
        draw = Draw(self.slot, self.begun, self.tail.start + self.query + self.begun)
        at = 0 if self.begun == 0 else self.query + self.begun - 1
        sources: Sequence[int] = self.tail.token_ids[: self.query] if self.begun == 0 else [~self.slot]
        self.begun += 1
        return StepRows(
            StepSequence(self.tail.context, self.tail.pages, at, len(sources), self.tail.start + at), sources, draw
        )

    def may(self, vocabulary: int) -> list[int]:
        return allowed(vocabulary, self.choices[-1].token_id if self.choices else 5, len(self.choices))


class Run:
    """Steps of a packing's runner, each begun before the one before it is read, as the decode worker does."""

    def __init__(self, pack: Packing, vocabulary: int) -> None:
        self.pack, self.vocabulary = pack, vocabulary
        self.before: tuple[PendingStep, list[Answer]] | None = None

    def step(self, members: list[Answer]) -> PendingStep:
        masked = [answer for answer in members if answer.masked]
        bits = self.pack.runner.bitmasks(len(masked)) if masked else None
        step = self.pack.runner.begin([answer.rows() for answer in members])
        self.read()
        if bits is not None:
            for row, answer in zip(bits, masked, strict=True):
                write(row, answer.may(self.vocabulary))
            step.draw(bits)
        self.before = step, members
        return step

    def read(self) -> None:
        if self.before is not None:
            for answer, choice in zip(self.before[1], self.before[0].wait(), strict=True):
                answer.choices.append(choice)
            self.before = None


def answers(pack: Packing) -> list[Answer]:
    contexts = pack.contexts((300, 17))
    made = []
    for index in range(2 * len(KINDS)):
        tail = pack.tail(contexts[index % len(contexts)], 10 + index + COUNT, 30 + index)
        made.append(Answer(tail, 10 + index, KINDS[index // 2], index, masked=index % 2 == 0))
    return made


def run(pack: Packing, vocabulary: int, members: list[Answer]) -> None:
    for answer in members:
        pack.runner.open(answer.slot, answer.request)
    running = Run(pack, vocabulary)
    for _ in range(COUNT):
        running.step(members)
    running.read()


def test_masked_rows_draw_alone_what_they_draw_beside_others() -> None:
    """And those without a mask, what they draw in steps where nobody has one."""
    model = served(NAME)
    pack = Packing(Composer(model, pages=1024))
    together = answers(pack)
    run(pack, model.vocabulary, together)
    for answer in together:
        single = replace(answer, choices=[], begun=0)
        run(pack, model.vocabulary, [single])
        assert single.choices == answer.choices, answer
        if answer.masked:
            last = 5
            for step, choice in enumerate(answer.choices):
                assert choice.token_id in allowed(model.vocabulary, last, step)
                last = choice.token_id


def test_masked_draws_are_those_of_the_host() -> None:
    """For the logits of each step, of all kinds; log-probabilities are those of the model, whatever may come."""
    model = served(NAME)
    pack, host = Packing(Composer(model, pages=1024)), HostSlots(16, model.vocabulary)
    members = answers(pack)
    for answer in members:
        pack.runner.open(answer.slot, answer.request)
        host.open(answer.slot, answer.request)
    running = Run(pack, model.vocabulary)
    for index in range(COUNT):
        draws = [Draw(a.slot, a.begun, a.tail.start + a.query + a.begun) for a in members]
        step = running.step(members)
        logits = step.logits()
        masked = [answer for answer in members if answer.masked]
        bits = host.bitmasks(len(masked))
        for row, answer in zip(bits, masked, strict=True):
            write(row, answer.may(model.vocabulary))
        host.allow([answer.slot for answer in masked], bits)
        running.read()
        assert host.draw(logits, draws) == [answer.choices[-1] for answer in members], index


def test_rows_of_forced_tokens_share_a_step_and_change_nothing() -> None:
    """Three tokens that are known go in one step with the draw behind them: the same token, the same KV."""
    model = served(NAME)
    pack = Packing(Composer(model, pages=1024))
    tail = pack.tail(pack.contexts((300, 17))[1], 40, 77)
    query, forced = 12, tail.token_ids[12:16]

    def rows(at: int, sources: Sequence[int], index: int) -> StepRows:
        sequence = StepSequence(tail.context, tail.pages, at, len(sources), tail.start + at)
        return StepRows(sequence, sources, Draw(0, index, tail.start + at + len(sources)))

    def draw(step: StepRows, may: Sequence[int]) -> int:
        bits = pack.runner.bitmasks(1)
        begun = pack.runner.begin([step])
        write(bits[0], may)
        begun.draw(bits)
        return begun.wait()[0].token_id

    found = []
    everything = range(model.vocabulary)
    for jumps in (False, True):
        pack.wipe([tail])
        pack.runner.open(0, SamplingRequest(SamplingParams(temperature=1.0, seed=8), (), masked=True))
        assert draw(rows(0, tail.token_ids[:query], 0), forced[:1]) == forced[0]
        if jumps:
            last = draw(rows(query, [~0, *forced[1:]], len(forced)), everything)
        else:
            for index, token in enumerate(forced[1:], start=1):
                assert draw(rows(query + index - 1, [~0], index), [token]) == token
            last = draw(rows(query + len(forced) - 1, [~0], len(forced)), everything)
        used = replace(tail, token_ids=tail.token_ids[: query + len(forced)])
        found.append((last, pack.kv(used)))
    (one, kv_one), (other, kv_other) = found
    assert one == other and torch.equal(kv_one, kv_other)
