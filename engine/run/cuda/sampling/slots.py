"""Sampling slots on the device: the same tokens as ``engine.sampling.sampler.HostSlots`` for the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.run.cuda.sampling.launch import BLOCK, Kind, Launches
from engine.run.cuda.sampling.tables import Tables
from engine.sampling.params import Choice, Draw, SamplingRequest

TOP_MAX = 20


@dataclass(frozen=True)
class PendingDraws:
    """Tokens on their way to the host. ``asked``: of each row 0, or 1 and how many of the likeliest it reports."""

    asked: tuple[int, ...]
    tokens: Tensor
    reports: Tensor | None
    arrived: torch.cuda.Event | None

    def wait(self) -> list[Choice]:
        """One for each draw, in order."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens: list[int] = self.tokens.tolist()
        if self.reports is None:
            return [Choice(token, None) for token in tokens]
        return [
            _reported(token, asked, report)
            for token, asked, report in zip(tokens, self.asked, self.reports.tolist(), strict=True)
        ]


class DeviceSlots:
    """The sampling state of ``slots`` requests and what draws a step's tokens, up to ``rows`` of them.

    Slot number ``slots`` is scratch: rows that only fill a step up. Everything happens on the stream that is current.
    ``last`` (slots + 1,) int32: the token last drawn in each slot, -1 if there was no number to choose by.
    """

    def __init__(self, vocabulary: int, *, slots: int, rows: int, device: torch.device | str) -> None:
        self._tables = Tables(slots, vocabulary, BLOCK, torch.device(device))
        self._launches = Launches(self._tables, rows)
        self._requests: list[SamplingRequest | None] = [None] * slots
        self._allows = [False] * slots
        self._staged: tuple[int, ...] = ()

    @property
    def last(self) -> Tensor:
        return self._tables.last

    def open(self, slot: int, request: SamplingRequest) -> None:
        """Puts a request into a slot, whatever was there; draws that were launched before do not see it."""
        self._requests[slot] = request
        self._allows[slot] = False
        self._tables.open(slot, request)

    def allow(self, slot: int, bitmask: Tensor | None) -> None:
        """Which tokens may come next: (ceil(vocabulary / 32),) int32 on the CPU, the lowest bit first; None: any."""
        self._allows[slot] = bitmask is not None
        self._tables.allow(slot, bitmask)

    def stage(self, draws: Sequence[Draw], rows: int) -> Kind:
        """Brings to the device what is drawn in the next launch, of ``rows`` rows: what these ask for together.

        Raises ``ValueError`` for more draws than rows, or a slot that was not opened.
        """
        launches = self._launches
        if not len(draws) <= rows <= launches.rows:
            raise ValueError(f"draws: {len(draws)} in {rows} rows of at most {launches.rows}")
        staged = torch.empty((rows, 3), dtype=torch.int32, pin_memory=self._tables.device.type == "cuda")
        values = staged.numpy()
        values[:] = (self._tables.slots, 0, 0)
        if draws:
            values[: len(draws)] = [(draw.slot, draw.index, draw.position) for draw in draws]
        launches.draws[:rows].copy_(staged, non_blocking=True)
        kind = Kind()
        for draw in draws:
            kind |= self._kind_of(draw)
        self._staged = tuple(self._asked(draw) for draw in draws)
        return kind

    def launch(self, logits: Tensor, kind: Kind) -> None:
        """Draws a token for each row of ``logits`` (rows, vocabulary), bf16, fp16 or fp32: kernels only."""
        self._launches.launch(logits, kind)

    def pending(self, count: int) -> PendingDraws:
        """Begins to bring the first ``count`` tokens of the last launch to the host."""
        asked = self._staged[:count]
        on_device = self._tables.device.type == "cuda"

        def fetch(values: Tensor) -> Tensor:
            return torch.empty(values.shape, dtype=values.dtype, pin_memory=on_device).copy_(values, non_blocking=True)

        tokens = fetch(self._launches.chosen[:count])
        reports = fetch(self._launches.reports[:count]) if any(asked) else None
        arrived = None
        if on_device:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        return PendingDraws(asked, tokens, reports, arrived)

    def _kind_of(self, draw: Draw) -> Kind:
        request = self._request(draw.slot)
        params, sampled = request.params, request.params.temperature > 0.0
        early = draw.index < params.min_tokens and bool(request.stop_token_ids)
        return Kind(
            shaped=params.penalises or bool(params.logit_bias) or early or self._allows[draw.slot],
            sampled=sampled,
            top_k=sampled and 0 < params.top_k < self._tables.vocabulary,
            top_p=sampled and params.top_p < 1.0,
            reports=params.logprobs,
        )

    def _asked(self, draw: Draw) -> int:
        params = self._request(draw.slot).params
        return 1 + min(params.top_logprobs, self._tables.vocabulary) if params.logprobs else 0

    def _request(self, slot: int) -> SamplingRequest:
        request = self._requests[slot]
        if request is None:
            raise ValueError(f"slot: {slot} was not opened")
        return request


def _reported(token: int, asked: int, report: list[float]) -> Choice:
    if token < 0 or not asked:
        return Choice(token, None)
    tokens, values = report[1:asked], report[1 + TOP_MAX : TOP_MAX + asked]
    return Choice(token, report[0], tuple((int(one), value) for one, value in zip(tokens, values, strict=True)))
