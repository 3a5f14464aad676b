"""Models with windows on the card, as they are run there without being asked, against transformers: several windows
long, in every mode that they have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from engine.model.borrowed import BorrowedModel
from engine.plan import Window
from engine.reuse import ReuseMode
from engine.served import serve
from tests.architectures import build
from tests.engine.composer import Composer, Request
from tests.gpu.engine_models import tokens
from tests.gpu.test_backends import check_request

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_size": 256}
SOME = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA4 = {"num_local_experts": 1, "intermediate_size_mlp": 96, "num_hidden_layers": 4}

# name -> (model type, configuration, window of the first layer)
MODELS: dict[str, tuple[str, dict[str, Any], Window]] = {
    "mistral-32": ("mistral", {"sliding_window": 32}, Window(32)),
    "mistral-4096": ("mistral", {"sliding_window": 4096, "num_hidden_layers": 2}, Window(4096)),
    "exaone4": ("exaone4", SOME, Window(32)),
    "ministral": ("ministral", SOME, Window(32)),
    "olmo3": ("olmo3", SOME, Window(32)),
    "llama4": ("llama4_text", LLAMA4 | {"attention_chunk_size": 48, "floor_scale": 100}, Window(48, chunked=True)),
}


def requests(name: str) -> list[Request]:
    if name == "mistral-4096":
        return [([tokens(1, 30), tokens(2, 900), tokens(3, 3000)], tokens(4, 700), "exact")]
    modes = ["exact"] if name == "llama4" else list(ReuseMode)
    return [([tokens(1, 20), tokens(2, 90), tokens(3, 31)], tokens(4, 70), mode) for mode in modes]


@pytest.mark.parametrize("name", MODELS)
def test_as_near_to_fp32_as_eager_attention(name: str) -> None:
    kind, settings, window = MODELS[name]
    module = build(kind, HEADS | settings | {"max_position_embeddings": 8192})
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    module = module.to(torch.bfloat16)
    model = serve(BorrowedModel(copy.deepcopy(module).to("cuda"), name=name), piece_tokens=512)
    print(name, model.decision, {mode.value: check for mode, check in model.checks.items()}, flush=True)
    assert model.findings.windows[0] == window and model.context_length_max == 8192
    exact = copy.deepcopy(module).float()
    batch = requests(name)
    for request, answer in zip(batch, Composer(model, pages=700).generate(batch, 8), strict=True):
        check_request(request, answer, exact, module)
