"""Sampling slots on the device: the same tokens as ``engine.sampling.sampler.HostSlots`` for the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.run.cuda.inputs import Ints, Pinned, PinnedRing
from engine.run.cuda.sampling.launch import BLOCK, Kind, Launches
from engine.run.cuda.sampling.tables import Tables
from engine.sampling.params import Choice, Draw, SamplingRequest
from engine.sampling.shaping import Bits

TOP_MAX = 20
UNREAD = 16  # launches whose tokens may be unread
MASKS = 3  # steps whose masks may be on their way


class PendingDraws:
    """Tokens on their way to the host. ``asked``: of each row 0, or 1 and how many of the likeliest it reports."""

    def __init__(self, asked: tuple[int, ...], tokens: Pinned, reports: Pinned | None) -> None:
        self._asked = asked
        self._arriving = [tokens] if reports is None else [tokens, reports]
        self._times = [pinned.times for pinned in self._arriving]
        self._choices: list[Choice] | None = None

    def wait(self) -> list[Choice]:
        """One for each draw, in order. ``RuntimeError`` if ``UNREAD`` later draws were begun before they were read."""
        if self._choices is None:
            self._arriving[0].wait()  # the reports come before the tokens
            if [pinned.times for pinned in self._arriving] != self._times:
                raise RuntimeError(f"wait: more than {UNREAD} later steps were begun before this one was read")
            self._choices = self._read(*(pinned.values[: len(self._asked)].tolist() for pinned in self._arriving))
        return list(self._choices)

    def _read(self, tokens: list[int], reports: list[list[float]] | None = None) -> list[Choice]:
        if reports is None:
            return [Choice(token, None) for token in tokens]
        return [
            _reported(token, asked, report) for token, asked, report in zip(tokens, self._asked, reports, strict=True)
        ]


@dataclass
class _Asks:
    """What the draws of a slot ask for: ``kind`` always, scores that are not the model's before draw ``least``.

    ``reports`` is 0, or 1 and how many of the likeliest tokens; ``allows``: a grammar says which tokens may come.
    """

    kind: Kind
    least: int
    reports: int
    allows: bool = False

    @classmethod
    def of(cls, request: SamplingRequest, vocabulary: int) -> _Asks:
        params = request.params
        sampled = params.temperature > 0.0
        kind = Kind(
            shaped=params.penalises or bool(params.logit_bias),
            sampled=sampled,
            top_k=sampled and 0 < params.top_k < vocabulary,
            top_p=sampled and params.top_p < 1.0,
            reports=params.logprobs,
        )
        reports = 1 + min(params.top_logprobs, vocabulary) if params.logprobs else 0
        return cls(kind, params.min_tokens if request.stop_token_ids else 0, reports, request.masked)


class DeviceSlots:
    """The sampling state of ``slots`` requests and what draws a step's tokens, up to ``rows`` of them.

    Slot number ``slots`` is scratch: rows that only fill a step up. Everything happens on the stream that is current.
    ``last`` (slots + 1,) int32: the token last drawn in each slot, -1 if there was no number to choose by.
    """

    def __init__(self, vocabulary: int, *, slots: int, rows: int, device: torch.device | str) -> None:
        self._tables = Tables(slots, vocabulary, BLOCK, torch.device(device))
        self._launches = Launches(self._tables, rows)
        self._asks: list[_Asks | None] = [None] * slots
        self._kinds: dict[Kind, Kind] = {}  # equal ones are one object, so that a step's few are found quickly
        self._staged: tuple[int, ...] = ()
        where = self._tables.device
        self._staging = PinnedRing((rows, 3), torch.int32, where, depth=UNREAD)
        self._tokens = PinnedRing((rows,), torch.int32, where, depth=UNREAD)
        words = self._tables.allowed.shape[1]
        self._mask_ring = PinnedRing((rows, words), torch.int32, where, depth=MASKS)
        self._where_ring = PinnedRing((rows,), torch.int64, where, depth=MASKS)
        self._masks: Pinned | None = None  # that are being filled
        self._reports = PinnedRing(self._launches.reports.shape, torch.float64, where, depth=UNREAD)

    @property
    def scratch(self) -> int:
        """The slot that is nobody's."""
        return self._tables.slots

    @property
    def last(self) -> Tensor:
        return self._tables.last

    def open(self, slot: int, request: SamplingRequest) -> None:
        """Puts a request into a slot, whatever was there; draws that were launched before do not see it."""
        asks = _Asks.of(request, self._tables.vocabulary)
        asks.kind = self._kinds.setdefault(asks.kind, asks.kind)
        self._asks[slot] = asks
        self._tables.open(slot, request)

    def bitmasks(self, count: int) -> Bits:
        """(count, ceil(vocabulary / 32)) int32 in pinned memory for ``allow``, which has to come before the next call.

        What stands in it is undefined.
        """
        self._masks = self._mask_ring.take()
        masks: Bits = self._masks.values[:count]
        return masks

    def masked(self, slot: int) -> bool:
        """Whether a slot was opened by a request that is told which tokens may come."""
        return self._opened(slot).allows

    def allow(self, slots: Sequence[int], bitmasks: Bits) -> None:
        """Begins to tell the device which tokens may come next in each of these masked slots, the lowest bit first.

        ``bitmasks`` are those that ``bitmasks`` gave last, filled. Raises ``ValueError`` for others.
        """
        masks, count = self._masks, len(slots)
        if masks is None or bitmasks.ctypes.data != masks.tensor.data_ptr() or len(bitmasks) != count:
            raise ValueError(f"allow: not what `bitmasks` gave for {count} draws")
        self._masks = None
        where = self._where_ring.take()
        where.values[:count] = slots
        table = self._tables.allowed
        at = where.tensor[:count].to(table.device, non_blocking=True)
        table.index_copy_(0, at, masks.tensor[:count].to(table.device, non_blocking=True))
        where.begun()
        masks.begun()

    def stage(self, draws: Sequence[Draw], rows: int) -> Kind:
        """Brings to the device what is drawn in the next launch, of ``rows`` rows: what these ask for together.

        Raises ``ValueError`` for more draws than rows, or a slot that was not opened.
        """
        launches = self._launches
        if not len(draws) <= rows <= launches.rows:
            raise ValueError(f"draws: {len(draws)} in {rows} rows of at most {launches.rows}")
        pinned = self._staging.take()
        pinned.values[:rows] = (self._tables.slots, 0, 0)
        kind = self.write(draws, pinned.values)
        launches.draws[:rows].copy_(pinned.tensor[:rows], non_blocking=True)
        pinned.begun()
        return kind

    def write(self, draws: Sequence[Draw], values: Ints) -> Kind:
        """What is drawn in the next launch, as the first of ``values`` (rows, 3); what the draws ask for together.

        For a caller who brings them to the device himself (``draws_in``). Raises ``ValueError`` as ``stage``.
        """
        asked = [self._opened(draw.slot) for draw in draws]
        if draws:
            values[: len(draws)] = [(draw.slot, draw.index, draw.position) for draw in draws]
        shaped = any([ask.allows or draw.index < ask.least for ask, draw in zip(asked, draws, strict=True)])
        kind = Kind(shaped=shaped)
        for one in {id(ask.kind): ask.kind for ask in asked}.values():
            kind |= one
        self._staged = tuple([ask.reports for ask in asked])
        return kind

    def draws_in(self, draws: Tensor) -> None:
        """From now on launches read what is drawn from ``draws`` (rows, 3) int32: slot, index and position of each."""
        self._launches.draws = draws

    def launch(self, logits: Tensor, kind: Kind) -> None:
        """Draws a token for each row of ``logits`` (rows, vocabulary), bf16, fp16 or fp32: kernels only."""
        self._launches.launch(logits, kind)

    def pending(self, count: int) -> PendingDraws:
        """Begins to bring the first ``count`` tokens of the last launch to the host."""
        asked = self._staged[:count]
        reports = None
        if any(asked):
            reports = self._reports.take()
            reports.tensor[:count].copy_(self._launches.reports[:count], non_blocking=True)
        tokens = self._tokens.take()
        tokens.tensor[:count].copy_(self._launches.chosen[:count], non_blocking=True)
        tokens.begun()
        return PendingDraws(asked, tokens, reports)

    def _opened(self, slot: int) -> _Asks:
        asks = self._asks[slot]
        if asks is None:
            raise ValueError(f"slot: {slot} was not opened")
        return asks


def _reported(token: int, asked: int, report: list[float]) -> Choice:
    if token < 0 or not asked:
        return Choice(token, None)
    tokens, values = report[1:asked], report[1 + TOP_MAX : TOP_MAX + asked]
    return Choice(token, report[0], tuple((int(one), value) for one, value in zip(tokens, values, strict=True)))
