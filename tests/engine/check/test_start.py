"""The start check tells right models from planted faults at any scale of weights, and sees what attention does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from bench.start_check import FAULTS, model_of, row
from engine.check.start import ROUNDING_MAX, STRUCTURE_MAX, check_structure, rounding_ratio
from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.isolation import alone
from engine.model.probe import examine
from engine.plan import CascadePlan, Window
from engine.reuse import ReuseMode
from engine.served import ServedModel, serve
from tests import oracle
from tests.architectures import build, build_named
from tests.engine.composer import Composer

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "scale"), [("qwen3", 1.0), ("llama yarn", 0.25), ("gemma2", 4.0)])
def test_a_planted_fault_is_found_at_every_scale_of_weights(name: str, scale: float, fault: str) -> None:
    structure, rounding, _ = row(model_of(name, scale, "cpu"), fault)
    if fault == "none":
        assert structure < STRUCTURE_MAX / 20 and rounding < ROUNDING_MAX
    else:
        assert structure > 5 * STRUCTURE_MAX


SOME = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 96, "attn_temperature_tuning": False, "num_hidden_layers": 4}
WINDOWED: dict[str, tuple[str, str, dict[str, Any]]] = {  # model type, the option that is the window, others
    "every layer": ("mistral", "sliding_window", {}),
    "some layers": ("gemma3_text", "sliding_window", SOME),
    "blocks": ("llama4_text", "attention_chunk_size", LLAMA4),
}
RIGHT = CascadePlan.seen_through


def seen_otherwise(change: Callable[[CascadePlan, Window], CascadePlan]) -> Any:
    """What layers with windows compute is what ``change`` makes of a plan."""

    def seen_through(plan: CascadePlan, window: Window | None) -> CascadePlan:
        return plan if window is None else change(plan, window)

    return mock.patch.object(CascadePlan, "seen_through", seen_through)


WINDOW_FAULTS: dict[str, Callable[[CascadePlan, Window], CascadePlan]] = {
    "forgotten": lambda plan, window: plan,
    "one token longer": lambda plan, window: RIGHT(plan, replace(window, tokens=window.tokens + 1)),
    "one token shorter": lambda plan, window: RIGHT(plan, replace(window, tokens=window.tokens - 1)),
    "of the other kind": lambda plan, window: RIGHT(plan, replace(window, chunked=not window.chunked)),
    "chunks alone": lambda plan, window: replace(RIGHT(plan, window), tails=plan.tails),
    "tails alone": lambda plan, window: replace(RIGHT(plan, window), levels=plan.levels),
}


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        *(("every layer", 8192), ("some layers", 4), ("blocks", 40)),
        *(pytest.param(name, tokens, marks=pytest.mark.slow) for name in WINDOWED for tokens in (15, 300)),
    ],
)
def test_a_window_is_at_work_in_the_check_whatever_its_size(name: str, tokens: int) -> None:
    kind, option, others = WINDOWED[name]
    module = build(kind, HEADS | others | {option: tokens, "max_position_embeddings": 20_000})
    borrowed = BorrowedModel(module, name=name)
    findings = examine(borrowed)
    assert any(findings.windows) and findings.limit.tokens == 20_000
    errors = check_structure(borrowed, findings).errors
    assert max(errors.values()) < STRUCTURE_MAX / 2 and errors[ReuseMode.EXACT] < STRUCTURE_MAX / 20
    for fault, change in WINDOW_FAULTS.items():
        if fault == "chunks alone" and tokens > 15:
            continue  # a tail is no longer than the check's query
        with seen_otherwise(change):
            assert check_structure(borrowed, findings).errors[ReuseMode.EXACT] > 5 * STRUCTURE_MAX, fault


def test_a_deep_model_of_large_weights_is_served() -> None:
    """At 24 layers and ten times the usual deviation bfloat16 alone moves logits by a third of theirs."""
    model = build("qwen3", HEADS | {"num_hidden_layers": 24}).bfloat16()
    served = serve(BorrowedModel(model, name="deep"))
    assert served.refusals == dict.fromkeys(ReuseMode, "")


def test_r_is_in_units_of_eager_attentions_own_rounding() -> None:
    exact, noise = torch.randn(8, 500), torch.randn(3, 8, 500)
    eager = exact + 0.01 * noise[0]
    assert rounding_ratio(exact + 0.01 * noise[1], eager, exact) == pytest.approx(2**0.5, rel=0.1)
    assert rounding_ratio(exact + 0.1 * noise[1], eager, exact) > ROUNDING_MAX
    one_off = exact + 0.01 * noise[1]
    one_off[3] += noise[2, 3]  # a router that chose otherwise for one row
    assert rounding_ratio(one_off, eager, exact) < ROUNDING_MAX
    assert not rounding_ratio(exact * float("nan"), eager, exact) <= ROUNDING_MAX


FALCON_H1 = {
    **{"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 1},
    **{"mamba_chunk_size": 16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deviation", [0.005, 0.15])
def test_state_beside_attention_is_refused(dtype: torch.dtype, deviation: float) -> None:
    """FalconH1 has attention and a state space model in every layer: one attention call a layer, as others have."""
    model = build("falcon_h1", HEADS | FALCON_H1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(deviation / 0.15)
    with pytest.raises(ModelRefused, match=r"information passes between tokens outside of attention.*state"):
        serve(BorrowedModel(model.to(dtype), name="falcon_h1"))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_a_layer_that_mixes_tokens_is_refused(part: str, layer: int) -> None:
    """A token shift in front of a part, as recurrent models have it."""
    model = build("llama", {"num_attention_heads": 4, "num_key_value_heads": 2})
    module = getattr(model.model.layers[layer], part)
    inner = module.forward

    def shifted(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = torch.nn.functional.pad(hidden_states, (0, 0, 1, -1))
        return inner(hidden_states + 0.05 * before, *args, **kwargs)

    module.forward = shifted
    with pytest.raises(ModelRefused, match="cannot be served exactly"):
        serve(BorrowedModel(model, name="shifted"))


@pytest.mark.parametrize("name", ["qwen3-ratio4", "gemma3-two-ropes", "deepseek-v3-mla"])
def test_right_models_pass_no_information_outside_of_attention(name: str) -> None:
    borrowed = BorrowedModel(build_named(name), name=name)
    ids = torch.tensor(tokens(1, 12))
    other = ids.clone()
    other[2] = 7
    before, after = (alone(borrowed, x, torch.arange(12))[0] for x in (ids, other))
    moved = (before - after).abs().amax(-1) / before.std()
    moved[2] = 0
    assert float(moved.max()) < 1e-5


MINISTRAL = {
    "rope_parameters": {
        **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
        **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
    }
}


def ministral(dtype: torch.dtype = torch.float32) -> tuple[Any, ServedModel]:
    model = build("ministral3", HEADS | MINISTRAL).to(dtype)
    return model, serve(BorrowedModel(copy.deepcopy(model), name="ministral3"), piece_tokens=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_scaled_by_position_limit_the_modes_that_move_chunks(dtype: torch.dtype) -> None:
    _, served = ministral(dtype)
    assert served.refusals == dict.fromkeys(ReuseMode, "")
    assert served.limit().tokens == 512
    for mode in (ReuseMode.ANCHORED, ReuseMode.INDEPENDENT):
        limit = served.limit(mode)
        assert (limit.tokens, "from position 128 on queries are scaled by their position" in str(limit)) == (128, True)


@pytest.mark.parametrize(("mode", "length"), [("exact", 300), ("independent", 120), ("anchored", 120)])
def test_queries_scaled_by_position_are_right_within_the_limits(mode: str, length: int) -> None:
    model, served = ministral()
    chunks, query = [tokens(1, length // 2), tokens(2, length // 2 - 8)], tokens(3, 5)
    ids, logits = Composer(served).generate([(chunks, query, mode)], 3)[0]
    expected, expected_logits = oracle.greedy(model, chunks, query, mode, 3)
    assert ids == expected
    torch.testing.assert_close(logits, expected_logits, atol=2e-4, rtol=1e-4)


def test_a_model_that_fails_without_a_mask_is_refused_with_its_error() -> None:
    model = build("llama", {"num_attention_heads": 4, "num_key_value_heads": 2})
    inner = model.model.layers[1].forward

    def needs_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return inner(*args, attention_mask=attention_mask[:, :, :1], **kwargs)

    model.model.layers[1].forward = needs_mask
    with pytest.raises(ModelRefused, match=r"fails without a mask and a cache \(TypeError"):
        serve(BorrowedModel(model, name="picky"))


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = build("qwen3", HEADS).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    serve(BorrowedModel(model, name="qwen3"))
    assert len(model.model.layers) == 3
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
