"""Forwards of any model by its own code on tensors that stay, for packed steps: what ``Forward`` asks for.

    sources, positions -> the module, its norms replaced -> each attention call: K and V to their slots, then the
    caller's attention -> the head over the rows that draw

Queries and keys reach attention turned to their positions by the model. The same kernels are launched whenever there
are as many rows, as far as the model's code has no choice of its own; ``trial`` finds out whether a graph can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import AttendFunction, BorrowedModel
from engine.model.probe import Findings
from engine.run.cuda.attention import cascade_refusal
from engine.run.cuda.cascade.tuning import RotationTable
from engine.run.cuda.joined import Forwards
from engine.run.cuda.norms import norm_modules
from engine.run.cuda.packed import Attend, AttentionCall, PlainInputs, PlainOutputs
from engine.run.cuda.prefill_attention import launch_options, piece_refusal
from engine.run.cuda.products import Way
from engine.run.cuda.replaced import (
    norm_forwards,
    product_forwards,
    replaced,
    rotary_forwards,
    widths_of,
)
from engine.run.cuda.single import StableSingles
from engine.run.cuda.turning import turn_forwards, watched_turns

POSITIONS = (0, 1, 2, 5, 33, 117)  # of a forward that is looked at


@dataclass(frozen=True)
class CapturedModel:
    """A borrowed model as its captured forwards run it. ``scores`` are by layer, ``forwards`` what is replaced."""

    borrowed: BorrowedModel
    findings: Findings
    heads: int
    scores: tuple[Scores, ...]
    vocabulary: int
    logits_dtype: torch.dtype
    forwards: Forwards

    @classmethod
    @torch.inference_mode()
    def of(cls, borrowed: BorrowedModel, findings: Findings) -> CapturedModel:
        """Looks at forwards of a few tokens. Of the module nothing is changed but where matrices lie."""
        longest = findings.context_length_max
        with widths_of(list(norm_modules(borrowed.module))) as widths:
            calls, logits = _calls(borrowed, longest)
        dtype = next(borrowed.module.parameters()).dtype
        forwards = {**norm_forwards(widths, borrowed.device, dtype), **rotary_forwards(borrowed, longest)}
        if borrowed.device.type == "cuda":
            seen = watched_turns(borrowed.attention_modules)
            with replaced(seen.forwards):
                _calls(borrowed, longest)
            forwards |= turn_forwards(seen)
        forwards |= product_forwards(borrowed, {})
        return cls(
            borrowed,
            findings,
            calls[0][0],
            tuple(scores for _, scores in calls),
            logits.shape[-1],
            logits.dtype,
            forwards,
        )

    def multiplied(self, ways: Mapping[str, Way]) -> CapturedModel:
        """The same with products in these ways, by the name of their modules."""
        return replace(self, forwards={**self.forwards, **product_forwards(self.borrowed, ways)})

    def run(
        self, token_ids: Tensor, positions: Tensor, attend: AttendFunction, rows: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """``BorrowedModel.forward_rows`` with what is replaced."""
        with self._ours():
            logits, more = self.borrowed.forward_rows(token_ids, positions, attend, rows)

        def of_more(wanted: Tensor) -> Tensor:
            with self._ours():
                return more(wanted)

        return logits, of_more

    @contextmanager
    def _ours(self) -> Iterator[None]:
        """In which forwards have what is replaced."""
        half = next(self.borrowed.module.parameters()).dtype != torch.float32
        with replaced(self.forwards), StableSingles() if half else nullcontext():
            yield


def captured_refusal(borrowed: BorrowedModel, findings: Findings) -> str:
    """Why steps of the model's own code are not captured, as far as can be known without trying; "" if they may be."""
    return cascade_refusal(findings, int(borrowed.config.get_text_config().num_attention_heads))


@torch.inference_mode()
def _calls(borrowed: BorrowedModel, positions_max: int) -> tuple[list[tuple[int, Scores]], Tensor]:
    """Heads and scores of each layer's attention call, and logits (1, vocabulary), of a forward of a few tokens."""
    calls: list[tuple[int, Scores]] = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        sinks = None if scores.sinks is None else scores.sinks.clone()
        calls.append((q.shape[1], replace(scores, sinks=sinks)))
        return own_values(q, v)

    positions = torch.tensor(sorted({min(at, positions_max - 1) for at in POSITIONS}), device=borrowed.device)
    tokens = torch.arange(1, len(positions) + 1, device=borrowed.device)
    logits, _ = borrowed.forward_rows(tokens, positions, attend, tokens[:1])
    return calls, logits


def own_values(q: Tensor, v: Tensor) -> Tensor:
    """Attention of rows that see themselves alone: (rows, heads, v_dim)."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


class BorrowedForward:
    """The ``Forward`` of a captured model over one pool. ``positions`` is the largest position + 1."""

    name = "captured-2"

    def __init__(self, model: CapturedModel, pool: PagedKVPool, *, positions: int) -> None:
        self.model = model
        self.pool = pool
        self.heads, self.vocabulary, self.windows = model.heads, model.vocabulary, model.findings.windows
        self.watch: Callable[[int, Tensor], None] | None = None
        distinct = {id(rotation): rotation for rotation in model.findings.rotations if rotation is not None}
        tables = {key: RotationTable.of(rotation, positions, pool.device) for key, rotation in distinct.items()}
        self._calls = [
            AttentionCall(scores, None if rotation is None else tables[id(rotation)], turned=True)
            for scores, rotation in zip(model.scores, model.findings.rotations, strict=True)
        ]
        self._no_rows = torch.zeros(0, dtype=torch.int64, device=pool.device)
        self._options = launch_options(pool.device)

    @property
    def piece_refusal(self) -> str:
        return piece_refusal(self.pool.layout.layers[0], self.windows, (call.scores for call in self._calls))

    def call(self, layer: int) -> AttentionCall:
        return self._calls[layer]

    def inputs(self, rows: int) -> PlainInputs:
        return PlainInputs.of(rows, self.pool.device)

    def outputs(self, rows: Tensor) -> PlainOutputs:
        logits = torch.zeros(len(rows), self.vocabulary, dtype=self.model.logits_dtype, device=rows.device)
        return PlainOutputs(rows, logits)

    def layers(
        self, b: PlainInputs, last: Tensor, attend: Attend, *, turn: bool, drawn: Iterable[PlainOutputs]
    ) -> None:
        """As ``Forward.layers``; queries always come turned. All rows go through the last layer."""
        rows = b.sources.shape[0]

        def hook(layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
            self.store(layer, k, v, b.slots)
            q = q if q.stride(2) == 1 and q.stride(1) == q.shape[2] else q.contiguous()
            out = torch.empty(rows, self.heads, v.shape[2], dtype=q.dtype, device=q.device)
            attend(layer, q, q, out)
            return out

        named = last.index_select(0, (-1 - b.sources).clamp_(min=0))
        tokens = torch.where(b.sources < 0, named, b.sources).clamp_(min=0).long()
        remaining = iter(drawn)
        first = next(remaining, None)
        with self._watching():
            wanted = self._no_rows if first is None else first.rows.long()
            logits, more = self.model.run(tokens, b.positions.long(), hook, wanted)
        if first is None:
            return
        first.logits.copy_(logits)
        for each in remaining:
            each.logits.copy_(more(each.rows.long()))

    def _watching(self) -> AbstractContextManager[None]:
        return nullcontext() if self.watch is None else self.model.borrowed.watching_layers(self.watch)

    def store(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Keys and values (rows, kv_heads, dim) of the new tokens go to their slots."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        if not k.is_cuda:
            keys.index_copy_(0, slots.long(), k)
            values.index_copy_(0, slots.long(), v)
            return
        from engine.run.cuda import borrowed_kernels

        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        (_, heads, k_dim), v_dim = keys.shape, values.shape[2]
        borrowed_kernels.store[(k.shape[0],)](
            k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1), slots, keys, values,
            HEADS=heads, K_DIM=k_dim, V_DIM=v_dim, K_BLOCK=_power_of_two(k_dim), V_BLOCK=_power_of_two(v_dim),
            HEADS_BLOCK=_power_of_two(heads), num_warps=4, **self._options,
        )  # fmt: skip


def _power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()
