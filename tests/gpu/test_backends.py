"""Models served on the card with each attention backend that can be asked for, against transformers, in every mode.

FlashInfer's kernels are compiled when first used, which takes minutes: ``python -m bench.flashinfer_build 128 128cap``.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from engine.model.borrowed import BorrowedModel
from engine.run.backends import AttentionRefused
from engine.run.cuda.cascade.tuning import PORTABLE
from engine.run.cuda.runner import PackedRunner
from engine.run.eager.runner import EagerRunner
from engine.served import ServedModel, serve
from tests import oracle
from tests.architectures import build
from tests.engine.composer import Composer, Request
from tests.gpu.engine_models import FUSED, served, tokens, twins

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

MODES = ("exact", "anchored", "independent")
SHARE_MAX = 1.5  # our rms error of logits over that of bf16 eager attention
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128}
ONE_EXPERT = {"num_local_experts": 1, "num_experts_per_tok": 1}  # no choice that hangs on a rounding

# Windows that are shorter and longer than chunks, caps, sinks, K and V that differ.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("qwen3", HEADS),
    "mistral": ("mistral", HEADS | {"sliding_window": 150}),
    "gemma2": ("gemma2", HEADS | {"sliding_window": 32}),
    "gpt-oss": ("gpt_oss", HEADS | {"sliding_window": 32} | ONE_EXPERT),
    "deepseek-mla": (
        "deepseek_v3",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32}
        | {"qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 3},
    ),
}
BACKENDS = ("flashinfer", "torch") if importlib.util.find_spec("flashinfer") else ("torch",)


@functools.cache
def pair_of(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in fp32 with weights that bf16 holds exactly, and the same in bf16; both on the CPU."""
    kind, settings = MODELS[name]
    model = build(kind, {**settings, "hidden_size": 128, "max_position_embeddings": 2048}).to(torch.bfloat16)
    return copy.deepcopy(model).float(), model


def serve_with(attention: str, name: str, *, piece_tokens: int = 24) -> ServedModel:
    model = copy.deepcopy(pair_of(name)[1]).to("cuda")
    return serve(BorrowedModel(model, name=name), piece_tokens=piece_tokens, attention=attention)


def requests(mode: str) -> list[Request]:
    """Lengths around pages, pieces of 24 and splits; a chunk twice; single tokens."""
    long = tokens(7, 300)
    return [
        ([tokens(1, 17), tokens(2, 1), tokens(3, 30), tokens(1, 17), tokens(4, 8)], tokens(5, 9), mode),
        ([long, tokens(3, 30)], tokens(6, 40), mode),
        ([tokens(3, 30), long], tokens(8, 1), mode),
    ]


def check_logits(composer: Composer, mode: str, exact: PreTrainedModel, rounded: PreTrainedModel) -> None:
    """Three tokens of three requests in one batch are as near to fp32 as transformers' bf16 attention."""
    batch = requests(mode)
    for request, answer in zip(batch, composer.generate(batch, 3), strict=True):
        check_request(request, answer, exact, rounded)


def check_request(
    request: Request, answer: tuple[list[int], torch.Tensor], exact: PreTrainedModel, rounded: PreTrainedModel
) -> None:
    """Logits (tokens, vocabulary) of the tokens that were generated."""
    (chunks, query, mode), (ids, logits) = request, answer
    known = query + ids[:-1]
    wanted, eager = (oracle.logits(model, chunks, known, mode)[-len(ids) :] for model in (exact, rounded))
    ours, theirs = ((x.cpu() - wanted).square().mean().sqrt() for x in (logits, eager))
    assert ours <= SHARE_MAX * theirs, (mode, float(ours), float(theirs))


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_backend_that_is_asked_for_serves_every_mode(name: str, attention: str) -> None:
    model = serve_with(attention, name)
    assert model.decision.attention == attention and model.decision.runner == "eager"
    composer = Composer(model, pages=256)
    assert isinstance(composer.runner, EagerRunner)
    for mode in MODES:
        if model.refusals[next(each for each in model.refusals if each.value == mode)]:
            assert mode != "exact", "windows of blocks move no chunks, every model has EXACT"
            continue
        check_logits(composer, mode, *pair_of(name))


@pytest.mark.skipif("flashinfer" not in BACKENDS, reason="FlashInfer is not installed")
@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_kv_and_answers_have_the_same_bits_again(name: str) -> None:
    """Cold and warm, in other pages, and beside chunks that were there before."""
    model = serve_with("flashinfer", name)
    answers = []
    for before in ([], [tokens(50, 40), tokens(51, 400)]):
        composer = Composer(model, pages=512)
        if before:
            composer.generate([(before, tokens(52, 5), "exact")], 2)
        for mode in MODES:
            cold, warm = (composer.generate([requests(mode)[1]], 4)[0] for _ in range(2))
            assert cold[0] == warm[0] and torch.equal(cold[1], warm[1])
            answers.append(warm[1])
    for first, second in zip(answers[:3], answers[3:], strict=True):
        assert torch.equal(first, second)


def test_every_backend_is_another_model_identity() -> None:
    identities = {attention: serve_with(attention, "qwen3").identity for attention in ("auto", "cascade", *BACKENDS)}
    assert identities["auto"] == identities["cascade"] and len(set(identities.values())) == 1 + len(BACKENDS)


def test_what_cannot_be_is_refused() -> None:
    model = copy.deepcopy(pair_of("qwen3")[0]).to("cuda")
    for attention in ("cascade", "flashinfer"):
        with pytest.raises(AttentionRefused, match=f"attention: {attention} cannot serve model fp32: .*float32.*torch"):
            serve(BorrowedModel(model, name="fp32"), attention=attention)


# -- portable tiles, as other devices than compute capability 9 run them ----------------------------
@pytest.mark.parametrize("name", FUSED)
def test_portable_tiles_serve_every_mode(name: str) -> None:
    composer = Composer(served(name), pages=256, tuning=PORTABLE)
    assert isinstance(composer.runner, PackedRunner)
    for mode in MODES:
        check_logits(composer, mode, *twins(name))


def test_rows_of_portable_tiles_have_the_same_bits_in_any_company() -> None:
    model = served("qwen3-ratio4-128")
    for mode in MODES:
        alone = [Composer(model, pages=512, tuning=PORTABLE).generate([each], 4)[0] for each in requests(mode)]
        crowd = requests(mode) + [([tokens(7, 300)], tokens(60 + i, 1 + i), mode) for i in range(20)]
        among = Composer(model, pages=512, tuning=PORTABLE).generate(crowd, 4)
        for (ids, logits), (same, others) in zip(alone, among, strict=False):
            assert ids == same and torch.equal(logits, others)
