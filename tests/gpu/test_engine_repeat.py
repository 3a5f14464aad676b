"""The same work gives the same bits every time: what races inside a kernel shows in repetitions, not in one run."""

from __future__ import annotations

import pytest
import torch

from engine.plan import StepSequence, behind_each_other, plan_levels, plan_step

pytestmark = pytest.mark.gpu

ROWS, HEADS, KV_HEADS, DIM, PAGE = 1517, 32, 8, 128, 16


@pytest.mark.parametrize("rows", [1, 63, ROWS])
def test_folding_two_results(rows: int) -> None:
    from engine.run.cuda.prefill_attention import fold_into

    torch.manual_seed(0)
    out, other = (torch.randn(rows, HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lse, other_lse = (torch.randn(HEADS, rows, device="cuda") for _ in range(2))
    share = torch.sigmoid((lse - other_lse).double()).t()[:, :, None]
    expected = out.double() * share + other.double() * (1 - share)
    kept = lse.clone()
    first, first_lse = fold_into(out, lse, other, other_lse, torch.empty_like(out))
    assert (first.double() - expected).abs().max() <= 2**-8 * expected.abs().max(), "one rounding to bfloat16"
    torch.testing.assert_close(
        first_lse.double(), torch.logaddexp(lse.double(), other_lse.double()), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(lse, kept)
    for _ in range(200):
        again, again_lse = fold_into(out, lse, other, other_lse, torch.empty_like(out))
        assert torch.equal(again, first) and torch.equal(again_lse, first_lse)


def test_attention_of_a_piece_over_chunks() -> None:
    from engine.run.cuda.prefill_attention import attend_piece, prepare_piece

    torch.manual_seed(0)
    pages = 400
    keys, values = (torch.randn(pages * PAGE, KV_HEADS, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    chunks = behind_each_other(((0, 1500, 0), (100 * PAGE, 700, 0), (150 * PAGE, 33, 0)))
    sequence = StepSequence(chunks, tuple(range(200, 300)), 0, ROWS, 2233)
    plan = plan_step([sequence], plan_levels([sequence], max_cascade_levels=1), page_size=PAGE)
    step = prepare_piece(plan, PAGE, torch.device("cuda"))
    q = torch.randn(ROWS, HEADS, DIM, device="cuda", dtype=torch.bfloat16)

    def run() -> torch.Tensor:
        return attend_piece(step, lambda offset: q, keys, values, DIM**-0.5)

    first = run().clone()
    for _ in range(200):
        assert torch.equal(run(), first)


@pytest.mark.parametrize("width", [64, 256, 1024, 4096])
def test_norms_that_write_what_they_read(width: int) -> None:
    from engine.run.cuda import kernels
    from engine.run.cuda.prefill_attention import launch_options

    torch.manual_seed(0)
    rows = 512
    residual, delta = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
    expected = residual + delta
    for _ in range(200):
        written, normed = residual.clone(), torch.empty_like(residual)
        kernels.add_norm[(rows,)](
            written, delta, weight, normed, 1e-6,
            ADD=True, WIDTH=width, BLOCK=width, num_warps=4, **launch_options(residual.device),
        )  # fmt: skip
        assert torch.equal(written, expected)
