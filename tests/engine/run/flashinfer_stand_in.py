"""FlashInfer's wrappers in torch, as they are documented; and random steps through ``FlashInferAttention`` over them.

``python -m tests.engine.run.flashinfer_stand_in FIRST LAST`` with TRITON_INTERPRET=1 merges with the Triton kernel too:
a process of its own, since what Triton's kernels become is settled when Triton is imported.
"""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from chunk_store.layout import KVLayout, LayerLayout
from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.rotary import Rotation
from engine.plan import CascadePlan, StepSequence, Window, behind_each_other, plan_levels, plan_step

PAGE = 4
LOG2_E = 1.4426950408889634


class _Wrapper:
    """One planned call; natural softmax over what each request's rows see, and its base-2 log-sum-exp."""

    def __init__(self, workspace: Tensor, layout: str, *, backend: str) -> None:
        assert layout == "NHD" and backend in ("fa2", "fa3") and workspace.dtype == torch.uint8
        self.told: dict[str, Any] = {}

    def reset_workspace_buffer(self, workspace: Tensor, lists: Tensor) -> None:
        assert workspace.dtype == lists.dtype == torch.uint8 and lists.numel() >= 1 << 16

    def _run(self, q: Tensor, keys: list[Tensor], values: list[Tensor], out: Tensor, lse: Tensor) -> None:
        told, starts = self.told, self.told["rows"].tolist()
        assert len(q) == starts[-1] and len(keys) == len(starts) - 1
        assert told.get("max_token_per_sequence") in (None, max(b - a for a, b in pairwise(starts)))
        for at, (k, v) in enumerate(zip(keys, values, strict=True)):
            rows = slice(starts[at], starts[at + 1])
            count, tokens = starts[at + 1] - starts[at], len(k)
            assert tokens >= (count if told["causal"] else 1)
            x = q[rows].double().view(count, k.shape[1], -1, q.shape[-1])
            scores = torch.einsum("rghd,ngd->rghn", x, k.double()) * told["sm_scale"]
            if cap := told.get("logits_soft_cap"):
                scores = cap * torch.tanh(scores / cap)
            if told["causal"]:
                hidden = torch.ones(count, tokens, dtype=torch.bool).triu(tokens - count + 1)
                scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
            out[rows] = torch.einsum("rghn,ngd->rghd", scores.softmax(-1), v.double()).reshape(out[rows].shape)
            lse[rows] = (scores.logsumexp(-1) * LOG2_E).reshape(lse[rows].shape)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self, rows: Tensor, page_starts: Tensor, pages: Tensor, last: Tensor, heads: int, kv_heads: int, **told: Any
    ) -> None:
        assert all(x.dtype == torch.int32 for x in (rows, page_starts, pages, last))
        assert told["head_dim_qk"] == told["head_dim_vo"] in (64, 128, 256)
        self.told = {**told, "rows": rows, "starts": page_starts.tolist(), "pages": pages, "last": last.tolist()}

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor], *, out: Tensor, lse: Tensor, return_lse: bool) -> None:
        told, requests = self.told, range(len(self.told["last"]))
        assert cache[0].shape[1] == told["page_size"] and return_lse

        def keys_of(plane: Tensor, at: int) -> Tensor:
            used = told["pages"][told["starts"][at] : told["starts"][at + 1]].long()
            tokens = (len(used) - 1) * told["page_size"] + told["last"][at]
            return plane[used].flatten(0, 1)[:tokens]

        keys, values = ([keys_of(plane, at) for at in requests] for plane in cache)
        self._run(q, keys, values, out, lse)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def plan(self, rows: Tensor, starts: Tensor, heads: int, kv_heads: int, **told: Any) -> None:
        self.told = {**told, "rows": rows, "starts": starts.tolist()}

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, lse: Tensor | None = None, return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        starts = self.told["starts"]
        lse = q.new_empty(q.shape[:2], dtype=torch.float32) if lse is None else lse
        assert (q.shape[-1], v.shape[-1]) == (self.told["head_dim_qk"], self.told["head_dim_vo"])
        assert len(k) == starts[-1] and return_lse
        keys, values = ([x[a:b] for a, b in pairwise(starts)] for x in (k, v))
        self._run(q, keys, values, out, lse)
        return out, lse


LIBRARY = SimpleNamespace(
    BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper=BatchPrefillWithRaggedKVCacheWrapper,
)


# -- the comparison ---------------------------------------------------------------------------------
def random_step(source: random.Random) -> tuple[tuple[StepSequence, ...], CascadePlan, int]:
    """Sequences over shared chunks, perhaps one with many rows; their plan, and pages of the pool."""
    pages, chunks = 0, []
    for tokens in (source.randint(1, 30) for _ in range(4)):
        chunks.append((pages * PAGE, tokens))
        pages += -(-tokens // PAGE)
    sequences = []
    for _ in range(source.choice((1, 1, 3, 6))):
        still = source.random() < 0.5
        picked = source.choices(chunks, k=source.randint(0, 4))
        placed = behind_each_other((slot, tokens, 0 if still else source.choice((0, 5, 40))) for slot, tokens in picked)
        rows, before = source.choice((1, 1, 2, 25)), source.randint(0, 20)
        own = list(range(pages, pages + -(-(rows + before) // PAGE)))
        source.shuffle(own)
        pages += len(own)
        start = sum(chunk.tokens for chunk in placed)
        sequences.append(StepSequence(placed, tuple(own), before, rows, start + before))
    plan = plan_step(sequences, plan_levels(sequences, max_cascade_levels=3), page_size=PAGE)
    return tuple(sequences), plan, pages


def seen_by(sequences: tuple[StepSequence, ...], window: Window | None) -> list[tuple[list[int], list[int]]]:
    """Of every row the slots that it sees, and how far it is turned back for each: by the sequences, not the plan."""
    found = []
    for sequence in sequences:
        for row in range(sequence.rows):
            position = sequence.position + row
            first = 0 if window is None else window.first(position)
            keys = [(c.start + i, c.first_slot + i, c.offset) for c in sequence.chunks for i in range(c.tokens)]
            start = sequence.position - sequence.tail_tokens
            for i in range(sequence.tail_tokens + row + 1):
                keys.append((start + i, sequence.tail_pages[i // PAGE] * PAGE + i % PAGE, 0))
            kept = [(slot, offset) for at, slot, offset in keys if first <= at]
            found.append(([slot for slot, _ in kept], [offset for _, offset in kept]))
    return found


def run(number: int) -> None:
    """One random step, window, width, cap and sinks."""
    from engine.run.cuda.flashinfer import attention as backend

    source = random.Random(number)
    torch.manual_seed(number)
    sequences, plan, pages = random_step(source)
    tokens = source.choice((1, 2, 7, 16, 40))
    window = source.choice((None, Window(tokens), Window(tokens, chunked=True)))
    k_dim, v_dim = source.choice(((64, 64), (64, 64), (24, 24), (24, 16), (72, 80)))
    heads, kv_heads = source.choice(((4, 2), (3, 3), (7, 1)))
    pool = PagedKVPool(
        KVLayout("bfloat16", (LayerLayout(kv_heads, k_dim, v_dim),)), pages=pages, chunk_pages=1, page_size=PAGE
    )
    for plane in pool.planes:
        plane.normal_()
    pairs = k_dim // 2
    rotation = Rotation(1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs), False, 0)
    sinks = torch.randn(heads) if source.random() < 0.4 else None
    scores = Scores(k_dim**-0.5, source.choice((None, None, 3.0)), sinks)
    backend.PARTIALS_NBYTES_MAX = source.choice((1 << 30, 20 * heads * 2 * (k_dim + v_dim)))
    q = torch.randn(len(plan.slots), heads, k_dim).bfloat16()
    attention = backend.FlashInferAttention(pool, [rotation], windows=[window], library=LIBRARY)
    new = torch.tensor(plan.slots)
    k, v = pool.keys[0][new], pool.values[0][new]
    out = attention.attend(attention.prepare(plan), 0, q, k, v, scores)
    for row, (slots, offsets) in enumerate(seen_by(sequences, window)):
        x = rotation.turn_back(q[[row] * len(slots)], *rotation.table(torch.tensor(offsets), "cpu")).double()
        keys, values = pool.keys[0][slots].double(), pool.values[0][slots].double()
        s = torch.einsum("nghd,ngd->ghn", x.view(len(slots), kv_heads, -1, k_dim), keys) * scores.scaling
        if scores.softcap:
            s = scores.softcap * torch.tanh(s / scores.softcap)
        sink = torch.full(s.shape[:2], float("-inf")) if sinks is None else sinks.view(s.shape[:2])
        weights = torch.cat((s, sink[..., None].double()), -1).softmax(-1)[..., :-1]
        wanted = torch.einsum("ghn,ngd->ghd", weights, values).reshape(heads, v_dim)
        error = float((out[row].double() - wanted).norm() / wanted.norm())
        assert error < 1e-2, (number, row, error, window)


def merge(
    results: Tensor, lses: Tensor, batch: Any, sums: Any, sinks: Tensor | None, out: Tensor, *, first: bool, last: bool
) -> None:
    """What the merge kernel does, in float64."""
    for row in range(len(out)):
        order = batch.order[batch.starts[row] : batch.starts[row + 1]].long()
        parts, scores = results[order].double()[..., : out.shape[-1]], lses[order].double() / LOG2_E
        if not first:
            parts = torch.cat((sums.out[row][None].double(), parts))
            scores = torch.cat((sums.lse[row][None].double() / LOG2_E, scores))
        known = scores if sinks is None else torch.cat((scores, sinks[None].double()))
        total = known.logsumexp(0) if len(known) else torch.full(out.shape[1:2], float("-inf"), dtype=torch.double)
        merged = (parts * (scores - total).exp().nan_to_num()[..., None]).sum(0)
        if last:
            out[row] = merged
        else:
            sums.out[row], sums.lse[row] = merged, total * LOG2_E


def main() -> None:
    first, last = map(int, sys.argv[1:])
    for number in range(first, last):
        run(number)
    print("agree")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
