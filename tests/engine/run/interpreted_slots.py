"""``python -m tests.engine.run.interpreted_slots FIRST LAST``, with TRITON_INTERPRET=1: host and device draw alike.

A process of its own, since what Triton's kernels become is settled when Triton is imported.
"""

from __future__ import annotations

import random
import sys
import warnings
from typing import Any

import torch

from engine.run.cuda.sampling.slots import DeviceSlots
from engine.run.cuda.sampling.waited import WaitedSlots
from engine.sampling.params import Draw, SamplingParams, SamplingRequest
from engine.sampling.sampler import HostSlots
from tests.engine.sampling.cases import DTYPES, Pair, random_logits

VOCABULARIES = (2049, 7, 500, 4100, 33)


def run(number: int) -> None:
    """Two steps of three slots, one of which is opened anew between them, with a row that only fills up."""
    source, vocabulary = random.Random(number), VOCABULARIES[number % len(VOCABULARIES)]
    pair = Pair(DeviceSlots(vocabulary, slots=3, rows=4, device="cpu"), source, 3, vocabulary)
    for step in range(2):
        draws = pair.draws(source.sample(range(3), 3))
        logits = random_logits(source, 4, vocabulary, DTYPES[number % len(DTYPES)])
        kind = pair.device.stage(draws, 4)
        pair.device.launch(logits, kind)
        found = pair.device.pending(3).wait()
        pair.check(draws, logits[:3], found)
        assert [int(pair.device.last[draw.slot]) for draw in draws] == [choice.token_id for choice in found]
        if step == 0:
            pair.open(source.randrange(3))


def cut(number: int) -> None:
    """Hot draws from few tokens of different scores, so that a token too many or too few kept is soon seen."""
    rows, vocabulary = 24, 9
    source = random.Random(number)
    device, host = DeviceSlots(vocabulary, slots=rows, rows=rows, device="cpu"), HostSlots(rows, vocabulary)
    for slot in range(rows):
        cuts: dict[str, Any] = {
            "top_k": slot % 6,
            "top_p": (1.0, 0.4, 0.7, 0.05)[slot % 4],
            "min_p": (0.0, 0.95)[slot % 2],
        }
        params = SamplingParams(temperature=20.0, seed=source.randrange(2**63), **cuts)
        for slots in (device, host):
            slots.open(slot, SamplingRequest(params))
    scores = torch.tensor([source.sample(range(-4, 5), vocabulary) for _ in range(rows)], dtype=DTYPES[number % 3])
    draws = [Draw(slot, 0, source.randrange(2**31)) for slot in range(rows)]
    device.launch(scores, device.stage(draws, rows))
    assert device.pending(rows).wait() == host.draw(scores.float(), draws)


def remember(number: int) -> None:
    """Greedy draws that follow from those before them, the scores being the same each time."""
    rows, vocabulary = 6, 9
    source = random.Random(number)
    device, host = DeviceSlots(vocabulary, slots=rows, rows=rows, device="cpu"), HostSlots(rows, vocabulary)
    kinds: list[dict[str, Any]] = [
        *({"frequency_penalty": 0.75}, {"presence_penalty": 1.5}, {"repetition_penalty": 1.75}, {"min_tokens": 2}),
        *({"min_tokens": 9, "max_tokens": 9}, {"logit_bias": ((number % vocabulary, 3.5),)}),
    ]
    for slot, kind in enumerate(kinds):
        stops = frozenset(range(9 if slot == 4 else 5))  # of one row all tokens
        for slots in (device, host):
            slots.open(slot, SamplingRequest(SamplingParams(**kind), (1, 2), stops, (3,)))
    scores = torch.tensor([source.sample(range(-4, 5), vocabulary) for _ in range(rows)], dtype=DTYPES[number % 3])
    for step in range(4):
        draws = [Draw(slot, step, step) for slot in range(rows)]
        device.launch(scores, device.stage(draws, rows))
        assert device.pending(rows).wait() == host.draw(scores.float(), draws)


def wait(number: int) -> None:
    """What a runner that waits draws with is what the host draws with."""
    source, vocabulary = random.Random(number), VOCABULARIES[number % len(VOCABULARIES)]
    both = HostSlots(3, vocabulary), WaitedSlots(3, vocabulary, torch.device("cpu"))
    for slot in range(3):
        params = SamplingParams(temperature=(0.0, 0.7, 1.3)[slot], seed=number, logprobs=slot == 1)
        for slots in both:
            slots.open(slot, SamplingRequest(params, generated=(4,) if slot == 2 else ()))
    assert [slots.last(2) for slots in both] == [4, 4]
    for step in range(2):
        draws = [Draw(slot, step, 9 + step) for slot in source.sample(range(3), 2)]
        logits = random_logits(source, 2, vocabulary, torch.float32)
        host, waited = (slots.draw(logits, draws) for slots in both)
        assert [choice.token_id for choice in host] == [choice.token_id for choice in waited]
        drawn = [(draw.slot, one.token_id) for draw, one in zip(draws, host, strict=True) if one.token_id >= 0]
        assert all(slots.last(slot) == token for slots in both for slot, token in drawn)


def main(first: int, last: int) -> None:
    warnings.simplefilter("ignore")  # numpy computes what kernels compute, NaN too
    for number in range(first, last):
        cut(number)
        remember(number)
        wait(number)
    for number in range(first, last):
        run(number)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
