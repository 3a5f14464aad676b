"""Random requests and logits, and host and device slots run over the same: whoever compares the two."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.sampling.params import Choice, Draw, SamplingParams, SamplingRequest
from engine.sampling.sampler import HostSlots
from engine.sampling.shaping import Bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_request(source: random.Random, vocabulary: int) -> SamplingRequest:
    """Any parameters at all, many of them together."""

    def some(chance: float, name: str, *values: Any) -> dict[str, Any]:
        return {name: source.choice(values)} if source.random() < chance else {}

    few = min(vocabulary, 5)
    params: dict[str, Any] = {
        "max_tokens": 10**6,
        "seed": source.randrange(2**63),
        **some(0.75, "temperature", 0.3, 0.8, 1.0, 3.0, 1e-45, 100.0),
        **some(0.4, "top_k", 1, 2, 5, 50, 10**6),
        **some(0.5, "top_p", 1e-6, 0.2, 0.5, 0.9, 0.95, 0.999),
        **some(0.3, "min_p", 1e-4, 0.02, 0.3, 1.0),
        **some(0.25, "repetition_penalty", 0.5, 1.3, 1e-38),
        **some(0.25, "frequency_penalty", -0.5, 1.3),
        **some(0.25, "presence_penalty", -0.5, 1.3),
        **some(0.25, "min_tokens", 1, 3),
        **some(0.5, "logprobs", True),
    }
    if params.get("logprobs"):
        params["top_logprobs"] = source.choice((0, 1, 5, 20))
    if source.random() < 0.25:
        biased = source.sample(range(vocabulary), few)
        params["logit_bias"] = tuple((token, source.choice((-100.0, 3.3, 7.0, 100.0))) for token in biased)
    return SamplingRequest(
        SamplingParams(**params),
        [source.randrange(vocabulary) for _ in range(8)],
        frozenset(source.sample(range(vocabulary), few)),
        [source.randrange(vocabulary) for _ in range(source.choice((0, 4)))],
    )


def random_logits(source: random.Random, rows: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Rows that are flat, peaked, full of ties, or no numbers."""
    generator = torch.Generator().manual_seed(source.randrange(2**31))
    logits = torch.randn(rows, vocabulary, generator=generator)
    for row in logits:
        row *= source.choice((0.0, 0.3, 2.0, 8.0))
        if source.random() < 0.2:
            row.copy_((row * 2).round())
        if source.random() < 0.2:
            row[source.randrange(vocabulary)] = source.choice((float("inf"), float("-inf"), 30.0))
        if source.random() < 0.1:
            row[source.randrange(vocabulary)] = float("nan")
        if source.random() < 0.1:
            row[source.randrange(vocabulary) :] = float("-inf")
    return logits.to(dtype)


class Pair:
    """Host and device slots that are opened alike; ``device`` is a ``DeviceSlots`` with ``rows`` rows."""

    def __init__(self, device: Any, source: random.Random, slots: int, vocabulary: int) -> None:
        self.device, self.source, self.vocabulary = device, source, vocabulary
        self.host = HostSlots(slots, vocabulary)
        self._indices = [0] * slots
        self._told: dict[tuple[Draw, ...], tuple[list[int], Bits]] = {}  # what a step's masked draws were told
        for slot in range(slots):
            self.open(slot)

    def open(self, slot: int) -> None:
        """A new request in a slot, perhaps with tokens that a grammar allows."""
        request = random_request(self.source, self.vocabulary)
        if self.source.random() < 0.2:
            request = replace(request, masked=True)
        self._indices[slot] = len(request.generated)
        for slots in (self.device, self.host):
            slots.open(slot, request)

    def draws(self, slots: list[int]) -> list[Draw]:
        """The next draw of each of these slots, which are told what a grammar allows if they ask for it."""
        made = [Draw(slot, self._indices[slot], 1000 * slot + self._indices[slot]) for slot in slots]
        masked = [slot for slot in slots if self.host.masked(slot)]
        if masked:
            words = -(-self.vocabulary // 32)
            generator = np.random.default_rng(self.source.randrange(2**31))
            chosen = generator.integers(-(2**31), 2**31, (len(masked), words), np.int32)
            bits = self.device.bitmasks(len(masked))
            bits[:] = chosen
            self.device.allow(masked, bits)
            self._told[tuple(made)] = masked, chosen
        for slot in slots:
            self._indices[slot] += 1
        return made

    def check(self, draws: list[Draw], logits: Tensor, found: list[Choice]) -> None:
        """``found`` are what the device gave for these logits (draws, vocabulary): the host gives the same bits."""
        if tuple(draws) in self._told:  # steps may be launched before the ones before them are checked
            self.host.allow(*self._told.pop(tuple(draws)))
        expected = self.host.draw(logits.float().cpu(), draws)
        for draw, ours, theirs in zip(draws, found, expected, strict=True):
            assert repr(ours) == repr(theirs), (draw, ours, theirs)  # as text, so that NaN equals NaN
