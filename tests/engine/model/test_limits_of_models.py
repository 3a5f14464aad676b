"""How long a context may be is found out, said with its reason, and right up to the last token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.reuse import ReuseMode
from engine.served import ServedModel, serve
from serving.process.loading import restrictions
from tests import oracle
from tests.architectures import build, build_named
from tests.engine.composer import Composer

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def served(kind: str, **settings: Any) -> ServedModel:
    return serve(BorrowedModel(build(kind, HEADS | settings), name=kind), piece_tokens=64)


CAPPED = {
    "a window of every layer": ("mistral", {"sliding_window": 100}, 100, "3 of 3 layers have a sliding window of 100"),
    "a window of some layers": ("gemma3_text", {"sliding_window": 70}, 70, "layers have a sliding window of 70 tokens"),
    "sinks and windows": (
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128},
        128,
        "2 of 3 layers have a sliding window of 128 tokens",
    ),
    "chunked attention, scaled queries": (
        "llama4_text",
        {"num_local_experts": 2, "attention_chunk_size": 96, "floor_scale": 300, "intermediate_size_mlp": 96},
        96,
        "chunks of 96 tokens",
    ),
    "scaled queries": (
        "llama4_text",
        {"num_local_experts": 2, "attention_chunk_size": 512, "floor_scale": 80, "intermediate_size_mlp": 96},
        79,
        "scale queries from position 80",
    ),
}


@pytest.mark.parametrize("name", CAPPED)
def test_a_cap_is_said_with_its_reason(name: str) -> None:
    kind, settings, tokens_max, because = CAPPED[name]
    model = served(kind, **settings)
    assert model.context_length_max == tokens_max
    assert (model.limit().declared, because in model.limit().because) == (512, True), model.limit()
    assert f"limited to {tokens_max} of 512 tokens, because" in restrictions(model)[0]


def test_longrope_is_capped_where_its_frequencies_change_and_says_so() -> None:
    model = serve(BorrowedModel(build_named("phi3-longrope"), name="phi3"))
    assert model.refusals == dict.fromkeys(ReuseMode, "")
    assert str(model.limit()) == (
        "256 of 512 tokens, because beyond 256 tokens longrope takes other frequencies for every key of a longer prompt"
    )
    assert restrictions(serve(BorrowedModel(build_named("llama-dynamic"), name="llama"))) == []


@pytest.mark.parametrize("mode", ["exact", "anchored", "independent"])
@pytest.mark.parametrize("name", ["phi3-longrope", "llama-dynamic"])
def test_moved_chunks_are_right_up_to_the_last_token_before_frequencies_change(name: str, mode: str) -> None:
    model = serve(BorrowedModel(build_named(name), name=name), piece_tokens=64)
    room = model.context_length_max - 15
    chunks, query = [tokens(1, room // 2), tokens(2, 7), tokens(3, room - room // 2 - 7)], tokens(4, 12)
    ids, logits = Composer(model).generate([(chunks, query, mode)], 3)[0]
    expected, expected_logits = oracle.greedy(build_named(name), chunks, query, mode, 3)
    assert ids == expected
    torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-4)


def test_a_mask_of_the_models_own_is_refused() -> None:
    """Doge hides all but ``keep_window_size`` tokens that it picks itself, and adds a bias to the others."""
    with pytest.raises(ModelRefused, match="makes an attention mask of its own"):
        served("doge", keep_window_size=64)


def test_a_mask_that_hides_what_no_layer_names_caps_the_context() -> None:
    """A window that is in the mask alone: the attention call names none."""
    model = build("mistral", HEADS | {"sliding_window": 90})
    for layer in model.model.layers:
        attend = layer.self_attn.forward
        layer.self_attn.config = _WithoutWindow(layer.self_attn.config)
        assert attend is not None
    found = serve(BorrowedModel(model, name="masked")).limit()
    assert (found.tokens, "a mask of the model hides tokens" in found.because) == (90, True)


class _WithoutWindow:
    """A configuration that names no sliding window."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return None if name == "sliding_window" else getattr(self._config, name)


@pytest.mark.parametrize("limit", [4, 5, 9, 20, 56, 57, 58])
@pytest.mark.parametrize("which", ["max_position_embeddings", "sliding_window"])
def test_a_short_context_is_checked_and_served(which: str, limit: int) -> None:
    settings = HEADS | {"sliding_window": None, which: limit}
    model = serve(BorrowedModel(build("mistral", settings), name="short"))
    assert model.refusals == dict.fromkeys(ReuseMode, "")
    chunks, query = [tokens(1, 1), tokens(2, max(1, limit - 4))], tokens(3, 1)
    for mode in ("exact", "independent"):
        ids, _ = Composer(model, pages=32).generate([(chunks, query, mode)], 1)[0]
        assert ids == oracle.greedy(build("mistral", settings), chunks, query, mode, 1)[0]


def test_a_context_too_short_to_check_is_refused_with_the_reason() -> None:
    with pytest.raises(ModelRefused, match=r"a context of 3 of 512 tokens.*sliding window of 3.*too short"):
        served("mistral", sliding_window=3)
