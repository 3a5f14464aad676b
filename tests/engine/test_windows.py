"""Models whose layers have windows, at contexts several windows long: equal to eager attention in every mode.

The oracle asks the models' own mask functions what each layer hides (``tests/oracle.py``).
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.model.borrowed import BorrowedModel
from engine.plan import Window
from engine.reuse import ReuseMode
from engine.served import ServedModel, serve
from tests import oracle
from tests.architectures import build
from tests.engine.composer import Composer, Request

W = 20
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING, BLOCKS = Window(W), Window(W, chunked=True)

# name -> (model type, configuration, windows that are to be found)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[Window | None, ...]]] = {
    "mistral": ("mistral", HEADS | {"sliding_window": W}, (SLIDING,) * 3),
    "mistral-32": ("mistral", HEADS | {"sliding_window": 32}, (Window(32),) * 3),
    "mistral-of-1": ("mistral", HEADS | {"sliding_window": 1}, (Window(1),) * 3),
    "mixtral": ("mixtral", HEADS | {"sliding_window": W}, (SLIDING,) * 3),
    "gemma2": ("gemma2", HEADS | {"sliding_window": W}, (SLIDING, None, SLIDING)),
    "gemma3": ("gemma3_text", HEADS | {"sliding_window": W, "layer_types": ALTERNATING}, (SLIDING, None, SLIDING)),
    "gpt-oss": (
        "gpt_oss",
        HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": W},
        (SLIDING, None, SLIDING),
    ),
    "exaone4": ("exaone4", HEADS | {"sliding_window": W, "layer_types": ALTERNATING}, (SLIDING, None, SLIDING)),
    "cohere2": ("cohere2", HEADS | {"sliding_window": W, "layer_types": ALTERNATING}, (SLIDING, None, SLIDING)),
    "qwen2-from-layer-1": (
        "qwen2",
        {"num_attention_heads": 4, "num_key_value_heads": 2}
        | {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 1},
        (None, SLIDING, SLIDING),
    ),
    "phi3": ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": W}, (SLIDING,) * 3),
    "starcoder2": ("starcoder2", HEADS | {"sliding_window": W}, (SLIDING,) * 3),
    "ministral": ("ministral", HEADS | {"sliding_window": W, "layer_types": ALTERNATING}, (SLIDING, None, SLIDING)),
    "olmo3": ("olmo3", HEADS | {"sliding_window": W, "layer_types": ALTERNATING}, (SLIDING, None, SLIDING)),
    "llama4": (
        "llama4_text",
        HEADS
        | {"attention_chunk_size": W, "num_local_experts": 2, "intermediate_size_mlp": 96}
        | {"attn_temperature_tuning": False, "num_hidden_layers": 4},
        (BLOCKS, BLOCKS, BLOCKS, None),
    ),
    "llama4-scaled": (
        "llama4_text",
        HEADS
        | {"attention_chunk_size": W, "num_local_experts": 2, "intermediate_size_mlp": 96}
        | {"floor_scale": 33, "num_hidden_layers": 4},
        (BLOCKS, BLOCKS, BLOCKS, None),
    ),
}
MOVING = [name for name in MODELS if not name.startswith("llama4")]
LENGTHS = st.sampled_from([1, 2, 7, 16, 19, 20, 21, 33, 47])


@functools.cache
def model(name: str) -> Any:
    return build(*MODELS[name][:2])


@functools.cache
def served(name: str) -> ServedModel:
    return serve(BorrowedModel(model(name), name=name), piece_tokens=24)


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def agree(name: str, batch: list[Request], count: int) -> None:
    """Greedy tokens and logits of all requests as one batch; the oracle's are those of one forward over the answer."""
    composer = Composer(served(name), pages=512, page_size=8)
    for (chunks, query, mode), (ids, logits) in zip(batch, composer.generate(batch, count), strict=True):
        expected = oracle.logits(model(name), chunks, query + ids[:-1], mode)[-count:]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert ids == expected.argmax(-1).tolist(), (name, mode, [len(c) for c in chunks], len(query))


@pytest.mark.parametrize("name", MODELS)
def test_windows_are_found_and_cap_nothing(name: str) -> None:
    findings = served(name).findings
    assert findings.windows == MODELS[name][2]
    assert findings.limit.tokens == findings.limit.declared == 512 and not findings.limit.because
    assert not served(name).refusals[ReuseMode.EXACT]


@pytest.mark.parametrize("name", MODELS)
def test_exact_far_beyond_the_window(name: str) -> None:
    """A chunk that begins before the window and ends in it, chunks out of it, a query and an answer longer than it."""
    chunks = [tokens(1, 50), tokens(2, 1), tokens(3, 17), tokens(4, 60)]
    agree(name, [(chunks, tokens(5, 45), "exact")], 25)


@pytest.mark.parametrize("name", MOVING)
def test_chunks_that_are_moved_behind_a_window(name: str) -> None:
    chunks = [tokens(1, 9), tokens(2, 41), tokens(3, 12), tokens(2, 41), tokens(4, 5)]
    agree(name, [(chunks, tokens(5, 7), mode) for mode in ("anchored", "independent")], 6)


@st.composite
def compositions(draw: st.DrawFn, modes: tuple[str, ...]) -> Request:
    library = [tokens(seed, draw(LENGTHS)) for seed in range(draw(st.integers(1, 4)))]
    picks = draw(st.lists(st.integers(0, len(library) - 1), min_size=0, max_size=6))
    return [library[i] for i in picks], tokens(99, draw(LENGTHS)), draw(st.sampled_from(modes))


@pytest.mark.parametrize("name", ["mistral-32", "gemma2", "gpt-oss", "exaone4", "llama4-scaled"])
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_random_compositions_in_mixed_batches(name: str, data: st.DataObject) -> None:
    modes = ("exact", "anchored", "independent") if name in MOVING else ("exact",)
    agree(name, data.draw(st.lists(compositions(modes), min_size=1, max_size=5)), 3)


def test_a_window_of_4096_in_a_longer_context() -> None:
    """Chunks before, across and in the window, a query of several pieces, and an answer."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2}
    module = build("mistral", heads | {"sliding_window": 4096, "max_position_embeddings": 8192})
    model = serve(BorrowedModel(module, name="mistral"))
    assert model.findings.windows == (Window(4096),) * 2 and model.context_length_max == 8192
    chunks, query = [tokens(1, 30), tokens(2, 400), tokens(3, 3200)], tokens(4, 700)
    ids, logits = Composer(model, pages=600).generate([(chunks, query, "exact")], 2)[0]
    expected = oracle.logits(module, chunks, query + ids[:-1], "exact")[-2:]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma2", "llama4"])
def test_bits_of_logits_and_of_stored_kv_follow_from_the_prompt(name: str) -> None:
    """As in ``test_bits.py``: in a crowd, and from four rows on in a smaller one."""
    crowd: list[Request] = []
    for index in range(9):
        own = [tokens(1, 70), tokens(2 + index % 2, 33), tokens(10 + index // 4, 5 + 3 * index)]
        mode = "exact" if name == "llama4" else ("exact", "independent", "anchored")[index % 3]
        crowd.append((own, tokens(100 + index, 1 + index * 5), mode))
    together = Composer(served(name), pages=1024).generate(crowd, 4)
    fewer = Composer(served(name), pages=1024).generate(crowd[3:8], 4)
    for (ids, logits), (fewer_ids, fewer_logits) in zip(together[3:8], fewer, strict=True):
        assert ids == fewer_ids and torch.equal(logits, fewer_logits)
    strict: Any = {"decode_buckets": (16,), "row_multiple": 16}
    same = Composer(served(name), pages=1024, **strict).generate(crowd, 4)
    for at in (0, 8):
        ids, logits = Composer(served(name), pages=1024, **strict).generate([crowd[at]], 4)[0]
        assert ids == same[at][0] and torch.equal(logits, same[at][1])


def test_chunks_computed_in_a_busy_pool_have_the_same_bytes() -> None:
    chunks = [tokens(1, 70), tokens(2, 33), tokens(3, 90)]

    def planes(composer: Composer) -> list[list[torch.Tensor]]:
        held, _ = composer.hold(chunks, "exact")
        return [[plane.clone() for plane in composer.pool.run_planes(c.run, c.tokens)] for c in held]

    busy = Composer(served("gemma3"), pages=512, page_size=8)
    busy.generate([([tokens(9, 40)], tokens(8, 30), "exact")] * 4, 3)
    for mine, theirs in zip(planes(Composer(served("gemma3"), pages=512)), planes(busy), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("name", "mode"), [("mistral", "independent"), ("gemma2", "exact"), ("gpt-oss", "anchored")])
def test_windows_in_bfloat16(name: str, mode: str) -> None:
    """Queries that are turned by us to where each chunk stands, behind windows: close to float32, which a model without
    its windows is not."""
    rounded = copy.deepcopy(model(name)).bfloat16()
    served = serve(BorrowedModel(rounded, name=name), piece_tokens=24)
    assert served.refusals == dict.fromkeys(ReuseMode, "")
    chunks, query = [tokens(seed, 40) for seed in range(4)], tokens(50, 30)
    _, logits = Composer(served).generate([(chunks, query, mode)], 1)[0]
    exact = copy.deepcopy(rounded).float()
    expected = oracle.logits(exact, chunks, query, mode)[-1]
    exact.config.sliding_window = 500
    wide = oracle.logits(exact, chunks, query, mode)[-1]
    assert float((logits[0] - expected).abs().mean()) < 0.3 * float((wide - expected).abs().mean())
