"""Whether rows of one forward have bits of their own is found out, and is so in batches of one size."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.check.company import has_experts, rows_stand_alone
from engine.model.borrowed import BorrowedModel
from engine.served import ServedModel, serve
from tests.architectures import build
from tests.engine.composer import Composer
from tests.published import PUBLISHED, narrow

WIDE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 512,
}
EXPERTS = {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}


def served(model_type: str, dtype: torch.dtype) -> ServedModel:
    return serve(BorrowedModel(build(model_type, WIDE | EXPERTS).to(dtype), name=model_type), piece_tokens=24)


def bits_in_company(model: ServedModel) -> bool:
    """Whether one answer has the same bits alone and among many, in steps of one number of rows."""
    requests = [([[5 + n for n in range(17)]], [30 + n, 7, 9], "exact") for n in range(24)]
    (_, alone), *_ = Composer(model, decode_buckets=(32,)).generate(requests[:1], 4)
    (_, among), *_ = Composer(model, decode_buckets=(32,)).generate(requests, 4)
    return torch.equal(alone, among)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_said_of_a_models_rows_holds(model_type: str, dtype: torch.dtype) -> None:
    model = served(model_type, dtype)
    if dtype is torch.float32:
        assert model.rows_stand_alone == (model_type == "llama")
    assert not model.rows_stand_alone or bits_in_company(model)


def test_a_row_that_takes_from_others_is_seen() -> None:
    """By a rounding's worth: what a library does that sums otherwise for other rows."""
    model = served("llama", torch.bfloat16)
    layers = model.borrowed.decoder_layers()
    assert layers is not None
    layers[1].register_forward_hook(lambda module, given, out: out + 2**-7 * out.mean(dim=1, keepdim=True))
    assert not rows_stand_alone(model.borrowed, model.findings, layers)


def test_soft_caps_are_computed_by_products_on_the_cpu() -> None:
    assert not served("gemma2", torch.float32).rows_stand_alone
    assert served("gemma3_text", torch.float32).rows_stand_alone


@pytest.mark.parametrize("model_type", ["granitemoe", "jetmoe", "deepseek_v3", "gpt_oss", "llama4_text", "phimoe"])
def test_experts_are_known_by_their_modules(model_type: str) -> None:
    published = next(each for each in PUBLISHED if each.model_type == model_type)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **narrow(published)))
    assert has_experts(module)
