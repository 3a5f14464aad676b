"""How long a context may be is found out, said with its reason, and right up to the last token."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.plan import Window
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


LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 96, "num_hidden_layers": 4, "floor_scale": 80}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_scaled_by_a_rows_number_are_scaled_by_its_position(dtype: torch.dtype) -> None:
    """Llama 4 counts rows of a forward, which ours are not numbered by."""
    module = build("llama4_text", HEADS | LLAMA4 | {"attention_chunk_size": 512}).to(dtype)
    model = serve(BorrowedModel(module, name="llama4"), piece_tokens=64)
    assert model.limit().tokens == 512 and not model.limit().because
    moved = model.limit(ReuseMode.INDEPENDENT)
    assert moved.tokens == 79 and "from position 79 on queries are scaled by their position" in moved.because
    assert any("limited to 79 of 512 tokens" in said for said in restrictions(model))
    if dtype is torch.float32:
        long: Any = ([tokens(1, 90), tokens(2, 41), tokens(3, 120)], tokens(4, 100), "exact")
        short: Any = ([tokens(1, 20), tokens(2, 9)], tokens(3, 7), "anchored")
        requests = [long, short, ([], tokens(5, 170), "exact")]
        answers = Composer(model).generate(requests, 4)
        for (chunks, query, mode), (ids, logits) in zip(requests, answers, strict=True):
            expected, expected_logits = oracle.greedy(module, chunks, query, mode, 4)
            assert ids == expected
            torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-4)


def test_a_cap_is_said_with_its_reason_where_rows_cannot_be_told_their_positions() -> None:
    module = build("llama4_text", HEADS | LLAMA4)
    for layer in module.model.layers:
        inner = layer.self_attn.forward
        layer.self_attn.forward = partial(_without_cache, inner)
    model = serve(BorrowedModel(module, name="llama4"))
    assert model.limit().declared == 512 and model.context_length_max == 79
    assert "limited to 79 of 512 tokens, because layers without rotation scale queries" in restrictions(model)[0]


def _without_cache(inner: Any, *arguments: Any, past_key_values: Any = None, **options: Any) -> Any:
    return inner(*arguments, **options)


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


def test_blocks_limit_contexts_whose_chunks_move() -> None:
    model = served("llama4_text", **LLAMA4 | {"attention_chunk_size": 96, "attn_temperature_tuning": False})
    assert model.limit().tokens == 512 and not model.limit().because
    moved = model.limit(ReuseMode.INDEPENDENT)
    assert moved.tokens == 96 and "layers attend within blocks of 96 tokens" in moved.because
    assert model.refusals == dict.fromkeys(ReuseMode, "")
    assert any("limited to 96 of 512 tokens" in said for said in restrictions(model))


@pytest.mark.parametrize("mode", ["anchored", "independent"])
def test_moved_chunks_are_right_up_to_the_end_of_the_first_block(mode: str) -> None:
    module = build("llama4_text", HEADS | LLAMA4 | {"attention_chunk_size": 64, "attn_temperature_tuning": False})
    model = serve(BorrowedModel(module, name="llama4"), piece_tokens=64)
    chunks, query = [tokens(1, 20), tokens(2, 17), tokens(3, 15)], tokens(4, 10)
    ids, logits = Composer(model).generate([(chunks, query, mode)], 3)[0]
    expected, expected_logits = oracle.greedy(module, chunks, query, mode, 3)
    assert ids == expected
    torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-4)


def test_a_window_that_is_in_the_mask_alone_is_found() -> None:
    """The attention call names none."""
    model = build("mistral", HEADS | {"sliding_window": 90})
    for layer in model.model.layers:
        layer.self_attn.config = _WithoutWindow(layer.self_attn.config)
    served = serve(BorrowedModel(model, name="masked"))
    assert served.findings.windows == (Window(90),) * 3 and served.limit().tokens == 512


def test_a_window_that_a_layer_names_and_no_mask_has_caps_the_context() -> None:
    model = build("llama", HEADS)
    for layer in model.model.layers:
        layer.self_attn.forward = partial(layer.self_attn.forward, sliding_window=90)
    found = serve(BorrowedModel(model, name="named")).limit()
    assert (found.tokens, "asks for a sliding window of 90 tokens" in found.because) == (90, True)


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
    with pytest.raises(ModelRefused, match=r"a context of 3 tokens is too short"):
        served("mistral", max_position_embeddings=3)
