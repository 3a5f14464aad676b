"""FlashInfer's calls on the card against float64: windows, soft caps, sinks, widths, moved chunks.

The first run compiles its kernels, which takes minutes: ``python -m bench.flashinfer_build`` does so side by side.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chunk_store.layout import KVLayout, LayerLayout
from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.rotary import Rotation
from engine.plan import CascadePlan, Window
from tests.gpu.cascade_cases import PAGE, Sequences, frequencies, random_sequences, turned

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]
pytest.importorskip("flashinfer")

from engine.run.cuda.flashinfer.attention import FlashInferAttention  # noqa: E402

TOLERANCE = 8e-3  # relative, of bf16 outputs: results are rounded once more before they are merged than ours


def seen_by(sequences: Sequences, plan: CascadePlan, row: int, window: Window | None) -> tuple[list[int], list[int]]:
    """Slots that a row of the plan sees, and how far it is turned back for each."""
    first = 0 if window is None else window.first(plan.positions[row])
    slots: list[int] = []
    offsets: list[int] = []
    at = 0
    for sequence in sequences.sequences:
        if row >= at + sequence.rows:
            at += sequence.rows
            continue
        for chunk in sequence.chunks:
            own = range(max(0, first - chunk.start), chunk.tokens)
            slots += [chunk.first_slot + i for i in own]
            offsets += [chunk.offset] * len(own)
        start = sequence.position - sequence.tail_tokens
        own = range(max(0, first - start), sequence.tail_tokens + row - at + 1)
        slots += [sequence.tail_pages[i // PAGE] * PAGE + i % PAGE for i in own]
        return slots, offsets + [0] * len(own)
    raise IndexError(row)


def expected(
    sequences: Sequences, plan: CascadePlan, pool: PagedKVPool, q: Tensor, scores: Scores, window: Window | None
) -> Tensor:
    """Attention in float64 over what each row sees; ``q`` are raw."""
    keys, values = pool.keys[0].double(), pool.values[0].double()
    rotation = Rotation(frequencies(q.shape[-1]), False, 0)
    outs = []
    for row, position in enumerate(plan.positions):
        slots, offsets = seen_by(sequences, plan, row, window)
        k, v = keys[slots], values[slots]
        angles = {o: torch.tensor([position - o], device="cuda") for o in set(offsets)}
        x = {o: turned(q[row : row + 1], angle, rotation)[0] for o, angle in angles.items()}
        queries = torch.stack([x[o] for o in offsets]).view(len(slots), k.shape[1], -1, q.shape[-1])
        s = torch.einsum("nghd,ngd->ghn", queries, k) * scores.scaling
        if scores.softcap:
            s = scores.softcap * torch.tanh(s / scores.softcap)
        if scores.sinks is not None:
            sink = scores.sinks.double().view(*s.shape[:2], 1)
            weights = torch.cat((s, sink), -1).softmax(-1)[..., :-1]
        else:
            weights = s.softmax(-1)
        outs.append(torch.einsum("ghn,ngd->ghd", weights, v).reshape(q.shape[1], -1))
    return torch.stack(outs)


def attended(
    sequences: Sequences, *, ratio: int = 4, k_dim: int = 128, v_dim: int = 128, window: Window | None = None,
    rows_max: int | None = None, **scores: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashInferAttention over random keys, and what it should give."""
    torch.manual_seed(3)
    plan, kv_heads = sequences.plan(), 2
    pool = PagedKVPool(
        KVLayout("bfloat16", (LayerLayout(kv_heads, k_dim, v_dim),)),
        pages=sequences.slots // PAGE, chunk_pages=1, page_size=PAGE, device="cuda",
    )  # fmt: skip
    for plane in pool.planes:
        plane.normal_()
    rows = len(plan.slots)
    q = torch.randn(rows, kv_heads * ratio, k_dim, device="cuda").to(torch.bfloat16)
    rotation = Rotation(frequencies(k_dim), False, 0)
    attention = FlashInferAttention(pool, [rotation], windows=[window])
    asked = Scores(scaling=k_dim**-0.5, **scores)
    slots = torch.tensor(plan.slots, device="cuda")
    k, v = pool.keys[0][slots], pool.values[0][slots]
    standing = turned(q, torch.tensor(plan.positions, device="cuda"), rotation).to(q.dtype)
    out = attention.attend(attention.prepare(plan), 0, standing, k, v, asked)
    return out, expected(sequences, plan, pool, q, asked, window)


def relative_error(out: Tensor, wanted: Tensor) -> float:
    return float((out.double() - wanted).norm() / wanted.norm())


SINKS = [0.5, -2.0, 3.0, 0.0, 1.0, -1.0, 2.0, 0.25]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "width 64": {"k_dim": 64, "v_dim": 64},
    "width 256": {"k_dim": 256, "v_dim": 256},
    "ratio 7": {"ratio": 7},
    "capped": {"softcap": 5.0, "window": Window(128)},
    "sinks": {"sinks": SINKS},
    "window 32": {"window": Window(32)},
    "window 700": {"window": Window(700)},
    "blocks of 512": {"window": Window(512, chunked=True)},
    "window and sinks": {"window": Window(128), "sinks": SINKS},
    "padded 96": {"k_dim": 96, "v_dim": 96},
    "K and V that differ": {"k_dim": 96, "v_dim": 64, "window": Window(700)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [(1,), (1, 5, 64), (300,)], ids=["decode", "mixed", "prefill"])
def test_random_plans_agree_with_float64(case: str, rows: tuple[int, ...]) -> None:
    given = dict(CASES[case])
    if "sinks" in given:
        given["sinks"] = torch.tensor(given["sinks"], device="cuda")
    count = 12 if rows == (1,) else 1 if rows == (300,) else 4
    for seed in (1, 2):
        out, wanted = attended(random_sequences(seed, count, rows=rows), **given)
        assert relative_error(out, wanted) < TOLERANCE


def test_many_results_are_merged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = random_sequences(5, 6, rows=(1, 30))
    whole, wanted = attended(sequences, sinks=torch.tensor(SINKS, device="cuda"))
    monkeypatch.setattr("engine.run.cuda.flashinfer.attention.PARTIALS_NBYTES_MAX", 40 * 8 * 256 * 2)
    parts, _ = attended(sequences, sinks=torch.tensor(SINKS, device="cuda"))
    assert relative_error(parts, wanted) < TOLERANCE and relative_error(parts, whole.double()) < TOLERANCE
