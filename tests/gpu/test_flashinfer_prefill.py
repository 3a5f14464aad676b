"""Long pieces by FlashInfer's fa3 on the card: blocks against float64, models in every mode against transformers.

Its kernels are compiled when first used, which takes minutes: ``python -m bench.flashinfer_build fa3``.
"""

from __future__ import annotations

import pytest
import torch

from tests.engine.composer import Composer, Request
from tests.gpu.engine_models import served, tokens, twins
from tests.gpu.test_backends import MODES, check_request

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]
pytest.importorskip("flashinfer")

from engine.run.cuda.flashinfer.prefill import FlashInferBlock  # noqa: E402


@pytest.mark.parametrize(("rows", "tokens_seen"), [(1024, 1024), (1000, 3000), (17, 5000), (4104, 4104)])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_agree_with_float64(rows: int, tokens_seen: int, causal: bool) -> None:
    torch.manual_seed(2)
    q = torch.randn(rows, 8, 128, device="cuda").bfloat16()
    k, v = (torch.randn(tokens_seen, 2, 128, device="cuda").bfloat16() for _ in range(2))
    into = torch.empty_like(q)
    out, lse = FlashInferBlock(q.device)(q, k, v, 0.09, causal=causal, into=into)
    assert out is into and lse.shape == (8, rows)
    scores = torch.einsum("rghd,ngd->ghrn", q.double().view(rows, 2, 4, 128), k.double()) * 0.09
    if causal:
        hidden = torch.ones(rows, tokens_seen, dtype=torch.bool, device="cuda").triu(tokens_seen - rows + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    wanted = torch.einsum("ghrn,ngd->rghd", scores.softmax(-1), v.double()).reshape(rows, 8, 128)
    assert float((out.double() - wanted).norm() / wanted.norm()) < 6e-3
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1).reshape(8, rows), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_long_pieces_agree_with_eager_attention(mode: str) -> None:
    """Pieces of 1024 rows and of 300 behind a chunk, and packed steps behind them, cold and warm."""
    name = "qwen3-ratio4-128"
    request: Request = ([tokens(1, 700), tokens(2, 1324)], tokens(3, 100), mode)
    model = served(name, piece_tokens=1024)
    composer = Composer(model, pages=512, long_chunk=512, block=FlashInferBlock(model.borrowed.device))
    cold, warm = (composer.generate([request], 3)[0] for _ in range(2))
    assert cold[0] == warm[0] and torch.equal(cold[1], warm[1])
    check_request(request, cold, *twins(name))
