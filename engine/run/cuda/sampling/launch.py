"""Which kernels a step needs, and their launches: no allocation, no synchronisation, so that a graph can hold them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from engine.run.cuda.sampling.tables import Tables

BLOCK = 2048  # tokens of a program
GREEDY_BLOCK = 8192
ASKED = 3  # times that top_p is asked of a row by the whole device; what is left is one program's
DIGITS = {torch.bfloat16: 2, torch.float16: 3, torch.float32: 4}  # bytes of a key that tell two scores apart


@dataclass(frozen=True)
class Kind:
    """What the rows of a step ask for, together. A row that asks for less gets the same as in a step of its own kind.

    ``shaped``: scores are not the model's own; ``sampled``: a temperature above 0; ``top_k`` and ``top_p``: of a
    sampled row; ``reports``: log-probabilities.
    """

    shaped: bool = False
    sampled: bool = False
    top_k: bool = False
    top_p: bool = False
    reports: bool = False

    def __or__(self, other: Kind) -> Kind:
        return Kind(
            self.shaped or other.shaped,
            self.sampled or other.sampled,
            self.top_k or other.top_k,
            self.top_p or other.top_p,
            self.reports or other.reports,
        )


class Launches:
    """Fixed buffers for steps of up to ``rows`` rows over the tables of the slots."""

    def __init__(self, tables: Tables, rows: int) -> None:
        self._tables = tables
        device, vocabulary = tables.device, tables.vocabulary
        blocks = -(-vocabulary // BLOCK)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.rows = rows
        self.draws = empty(rows, 3, dtype=torch.int32)  # slot, index, position
        self.draws[:, 0] = tables.slots
        self.chosen = empty(rows, dtype=torch.int32)
        self.reports = empty(rows, 41, dtype=torch.float64)
        self._shaped = empty(rows, vocabulary, dtype=torch.float32)
        self._others = empty(rows, blocks, dtype=torch.int32)
        self._tops = empty(rows, blocks, dtype=torch.int64)
        self._histograms = empty(4, rows, 256, dtype=torch.int32)
        self._prefixes = empty(4, rows, 2, dtype=torch.int32)
        self._floors = empty(rows, dtype=torch.int32)
        self._shares = empty(rows, blocks, dtype=torch.float64)
        self._candidates = empty(rows, blocks, dtype=torch.int32)
        self._totals = empty(rows, blocks, dtype=torch.int64)
        self._masses = empty(rows, blocks, dtype=torch.int64)
        self._winners = empty(rows, dtype=torch.int32)
        self._settled = empty(ASKED, rows, dtype=torch.int32)
        self._likeliest = empty(rows, 20, blocks, dtype=torch.int64)
        self._raw_masses = empty(rows, blocks, dtype=torch.int64)
        self._sizes = {"SLOTS": tables.slots, "VOCABULARY": vocabulary}
        self._blocks = {"BLOCKS": blocks, "PARTS": 1 << (blocks - 1).bit_length()}
        self._grid_blocks = blocks

    def launch(self, logits: Tensor, kind: Kind) -> None:
        """Draws a token for each row of ``logits`` (rows, vocabulary): bf16, fp16 or fp32, rows one after another."""
        if kind == Kind():
            self._greedy(logits)
        else:
            if kind.shaped:
                self._shape(logits)
            self._choose(logits, kind)
        if kind.reports:
            self._report(logits)

    def _greedy(self, logits: Tensor) -> None:
        from engine.run.cuda.sampling import drawing

        drawing.greedy[(len(logits),)](
            logits, logits.stride(0), self.draws, self._tables.last, self.chosen,
            **self._sizes, BLOCK=GREEDY_BLOCK, **_options(16),
        )  # fmt: skip

    def _shape(self, logits: Tensor) -> None:
        from engine.run.cuda.sampling import shaping

        t, rows = self._tables, len(logits)
        shaping.shape[(rows, self._grid_blocks)](
            logits, logits.stride(0), self.draws, t.integers, t.numbers, t.counts, t.prompts, t.allowed, t.stops,
            t.bias_tokens, t.biases, t.bias_starts, self._shaped, self._others,
            **self._sizes, BLOCK=BLOCK, BLOCKS=self._grid_blocks, BIASES_MAX=t.bias_tokens.shape[1], **_options(8),
        )  # fmt: skip
        shaping.forbid[(rows,)](
            self.draws, t.integers, t.stops, self._shaped, self._others,
            **self._sizes, BLOCK=BLOCK, **self._blocks, **_options(8),
        )  # fmt: skip

    def _choose(self, logits: Tensor, kind: Kind) -> None:
        from engine.run.cuda.sampling import drawing

        t, rows = self._tables, len(logits)
        grid, digits = (rows, self._grid_blocks), 4 if kind.shaped else DIGITS[logits.dtype]
        source = (logits, logits.stride(0), self.draws, t.integers)
        drawing.scan[grid](
            *source, self._shaped, self._tops, self._histograms, self.rows,
            **self._sizes, BLOCK=BLOCK, BLOCKS=self._grid_blocks, SHAPED=kind.shaped,
            ROUNDS=digits if kind.top_k else 0, **_options(8),
        )  # fmt: skip
        if kind.top_k:
            self._cut_top_k(logits, kind, digits)
        if kind.sampled:
            drawing.draw[grid](
                *source, t.numbers, self._shaped, self._tops, self._floors, self._shares, self._candidates,
                self._totals, self._settled,
                **self._sizes, BLOCK=BLOCK, **self._blocks, SHAPED=kind.shaped,
                TOP_K_ROWS=kind.top_k, TOP_P_ROWS=kind.top_p, **_options(8),
            )  # fmt: skip
        if kind.top_p:
            self._cut_top_p(logits, kind)
        drawing.finish[(rows,)](
            self.draws, t.integers, t.numbers, self._tops, self._shares, self._candidates, self._winners,
            t.counts, t.last, self.chosen,
            **self._sizes, **self._blocks, SAMPLED=kind.sampled, TOP_P_ROWS=kind.top_p, SHAPED=kind.shaped,
            **_options(4),
        )  # fmt: skip

    def _cut_top_k(self, logits: Tensor, kind: Kind, rounds: int) -> None:
        from engine.run.cuda.sampling import cutting

        t, rows = self._tables, len(logits)
        lists = (self._histograms, self._prefixes)
        options: dict[str, Any] = {"DIGITS": DIGITS[logits.dtype], "SHAPED": kind.shaped}
        for turn in range(rounds):
            cutting.count[(rows, self._grid_blocks)](
                logits, logits.stride(0), self.draws, t.integers, t.numbers, self._shaped, *lists, self.rows,
                **self._sizes, BLOCK=BLOCK, TURN=turn, **options, **_options(8),
            )  # fmt: skip
        cutting.limit[(rows,)](
            self.draws, t.integers, *lists, self._floors, self.rows,
            SLOTS=t.slots, **options, **_options(4),
        )  # fmt: skip

    def _cut_top_p(self, logits: Tensor, kind: Kind) -> None:
        from engine.run.cuda.sampling import cutting

        t, rows = self._tables, len(logits)
        grid = (rows, self._grid_blocks)
        source = (logits, logits.stride(0), self.draws, t.integers, t.numbers, self._shaped, self._tops)
        drawn = (self._shares, self._candidates)
        state = (self._masses, self._winners)
        options: dict[str, Any] = {**self._sizes, **self._blocks, "BLOCK": BLOCK, "SHAPED": kind.shaped}
        cutting.judge[grid](*source, *drawn, *state, self._settled[0], **options, **_options(8))
        for now, then in pairwise(self._settled):
            cutting.again[grid](*source, *drawn, self._totals, *state, now, then, **options, **_options(8))
            cutting.judge[grid](*source, *drawn, *state, then, **options, **_options(8))
        cutting.settle[(rows,)](*source, self._totals, *state, self._settled[-1], **options, **_options(8))

    def _report(self, logits: Tensor) -> None:
        from engine.run.cuda.sampling import reporting

        t, grid = self._tables, (len(logits), self._grid_blocks)
        source = (logits, logits.stride(0), self.draws, t.integers, self._likeliest)
        reporting.survey[grid](*source, **self._sizes, BLOCK=BLOCK, BLOCKS=self._grid_blocks, **_options(8))
        reporting.add_up[grid](*source, self._raw_masses, **self._sizes, BLOCK=BLOCK, **self._blocks, **_options(8))
        reporting.report[(len(logits),)](
            *source, self._raw_masses, self.chosen, self.reports, **self._sizes, **self._blocks, **_options(4)
        )


def _options(warps: int) -> dict[str, Any]:
    """Of a launch. Nothing is contracted: the host adds and multiplies one after another."""
    return {"num_warps": warps, "enable_fp_fusion": False}
