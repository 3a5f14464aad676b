"""Sampling on the card: the tokens and log-probabilities of the host, bit for bit, at a real vocabulary's size."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.sampling.params import Choice, Draw, SamplingParams, SamplingRequest
from tests.engine.sampling.cases import DTYPES, Pair, random_logits

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

VOCABULARY = 151936


def device_slots(slots: int, rows: int, vocabulary: int = VOCABULARY) -> Any:
    from engine.run.cuda.sampling.slots import DeviceSlots

    return DeviceSlots(vocabulary, slots=slots, rows=rows, device="cuda")


@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 32003, 1000])
def test_host_and_device_draw_the_same(number: int, vocabulary: int) -> None:
    source = random.Random(number)
    pair = Pair(device_slots(16, 17, vocabulary), source, 16, vocabulary)
    for _ in range(3):
        draws = pair.draws(source.sample(range(16), 16))
        logits = random_logits(source, 17, vocabulary, DTYPES[number % len(DTYPES)]).cuda()
        pair.device.launch(logits, pair.device.stage(draws, 17))
        pair.check(draws, logits[:16], pair.device.pending(16).wait())
        pair.open(source.randrange(16))


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 128, 256])
def test_crowds(rows: int) -> None:
    source = random.Random(rows)
    pair = Pair(device_slots(256, 256), source, rows, VOCABULARY)
    draws = pair.draws(source.sample(range(rows), rows))
    logits = random_logits(source, rows, VOCABULARY, torch.bfloat16).cuda()
    pair.device.launch(logits, pair.device.stage(draws, rows))
    pair.check(draws, logits, pair.device.pending(rows).wait())


def test_a_captured_step_draws_as_it_would_by_itself_and_allocates_nothing() -> None:
    """Four replays are launched before the first is read; penalties count what was drawn in between."""
    source, slots = random.Random(5), 24
    pair = Pair(device_slots(slots, 64), source, slots, VOCABULARY)
    logits = [random_logits(source, 64, VOCABULARY, torch.bfloat16) for _ in range(4)]
    fixed = logits[0].cuda()
    kind = pair.device.stage([], 64)
    for slot in range(slots):
        kind |= pair.device.stage([Draw(slot, 0, 0)], 64)
    pair.device.stage([], 64)
    pair.device.launch(fixed, kind)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        pair.device.launch(fixed, kind)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    launched = []
    for given in logits:
        draws = pair.draws(source.sample(range(slots), slots - 3))
        fixed.copy_(given.cuda())
        pair.device.stage(draws, 64)
        graph.replay()
        launched.append((draws, given, pair.device.pending(len(draws))))
    for draws, given, pending in launched:
        pair.check(draws, given[: len(draws)], pending.wait())


def test_a_row_draws_the_same_at_every_place_among_any_crowd() -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=77, logprobs=True)
    slots = device_slots(256, 256)
    row = (torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2).bfloat16().cuda()
    found = set()
    for rows, place, slot in ((1, 0, 0), (64, 0, 9), (64, 63, 255), (256, 127, 17), (256, 255, 3)):
        logits = torch.randn(rows, VOCABULARY, device="cuda").bfloat16()
        logits[place] = row[0]
        draws = []
        free = [number for number in range(256) if number != slot]
        for other in range(rows):
            at = slot if other == place else free[other - (other > place)]
            request = params if other == place else SamplingParams(temperature=1.0, top_k=40, seed=other)
            slots.open(at, SamplingRequest(request))
            draws.append(Draw(at, 3, 1234))
        slots.launch(logits, slots.stage(draws, rows))
        found.add(slots.pending(rows).wait()[place])
    assert len(found) == 1


def test_many_steps_of_sampled_rows_end_and_draw_the_same() -> None:
    """Programs of a row agree on when it is settled: where their warps parted ways, a step in thousands never ended."""
    rows = 64
    slots = device_slots(rows, rows)
    logits = (torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(5)) * 1.3).bfloat16().cuda()
    for slot in range(rows):
        slots.open(slot, SamplingRequest(SamplingParams(temperature=0.8, top_p=(0.95, 0.5)[slot % 2], seed=slot)))
    for position in range(8):
        kind = slots.stage([Draw(slot, position, 900 + position) for slot in range(rows)], rows)
        expected: list[Choice] | None = None
        for _ in range(400):
            slots.launch(logits, kind)
            found = slots.pending(rows).wait()
            expected = expected or found
            assert found == expected
