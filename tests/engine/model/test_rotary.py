"""Rotation: in a short dtype a query is turned once, and that is closer than turning a turned one back."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch

from engine.model.borrowed import BorrowedModel
from engine.model.probe import examine
from engine.model.rotary import Rotation
from engine.reuse import ReuseMode
from engine.served import serve
from tests import oracle
from tests.architectures import ARCHITECTURES, build, build_named
from tests.engine.composer import Composer


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_turning_once_rounds_less_than_turning_a_turned_query_back() -> None:
    """Attention scores of bfloat16 queries and keys, against the same in float64."""
    generator = torch.Generator().manual_seed(3)
    pairs, rows = 32, 4000
    rotation = Rotation(10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs), False, 0)
    raw, keys = (torch.randn(rows, 1, 2 * pairs, generator=generator).bfloat16() for _ in range(2))
    place = torch.randint(2000, 4000, (rows,), generator=generator)
    offset = torch.randint(0, 2000, (rows,), generator=generator)
    once = rotation.turn_back(raw, *rotation.table(offset - place))
    turned = rotation.turn_back(raw, *rotation.table(-place))
    twice = rotation.turn_back(turned, *rotation.table(offset))
    exact = rotation.turn_back(raw.float(), *rotation.table(offset - place))

    def error(query: torch.Tensor) -> float:
        scores = ((query.double() - exact.double()) * keys.double()).sum(-1) / (2 * pairs) ** 0.5
        return float(scores.pow(2).mean().sqrt())

    assert 1.2 * error(once) < error(twice)


def test_a_turned_chunk_is_served_from_unturned_queries() -> None:
    """The logits of a bfloat16 model with chunks far from home are close to the oracle's in float32."""
    rounded = copy.deepcopy(build_named("qwen3-ratio2")).bfloat16()
    served = serve(BorrowedModel(rounded, name="qwen3"))
    assert served.findings.deferred
    chunks, query = [tokens(seed, 40) for seed in range(6)], tokens(50, 30)
    _, logits = Composer(served).generate([(chunks, query, "independent")], 1)[0]
    expected = oracle.logits(copy.deepcopy(rounded).float(), chunks, query, "independent")[-1]
    other = oracle.logits(copy.deepcopy(rounded).float(), chunks, query, "exact")[-1]
    assert float((logits[0] - expected).abs().max()) < 0.1 * float((other - expected).abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_mode_holds_in_bfloat16(name: str) -> None:
    """R is the unit in which a bound holds for every model: ours rounds as often as eager attention in bfloat16 does.

    Two independent roundings of one size are sqrt(2) of it apart. Where a router's choice hangs on a rounding, R has
    no such bound of its own; that it is at most the start check's is that no mode is refused.
    """
    served = serve(BorrowedModel(copy.deepcopy(build_named(name)).bfloat16(), name=name))
    assert served.refusals == dict.fromkeys(ReuseMode, "")
    if name not in ("mixtral-moe", "gpt-oss-sinks", "deepseek-v3-mla"):
        assert all(check.rounding is not None and 0.3 < check.rounding < 2.0 for check in served.checks.values())


def test_the_module_is_as_it_came_outside_of_a_forward() -> None:
    model = build("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}).bfloat16()
    ids = torch.tensor([tokens(1, 20)])
    with torch.inference_mode():
        before = model(ids).logits
        borrowed = BorrowedModel(model, name="llama")
        assert examine(borrowed).deferred
        cast(Any, borrowed.module).set_attn_implementation("sdpa")
        assert torch.equal(model(ids).logits, before)


def test_yarns_factor_is_applied_once() -> None:
    findings = examine(BorrowedModel(copy.deepcopy(build_named("llama-yarn")).bfloat16(), name="yarn"))
    assert findings.deferred
    rotation = findings.rotations[0]
    assert rotation is not None
    assert rotation.scale == pytest.approx(build_named("llama-yarn").model.rotary_emb.attention_scaling)
    assert rotation.scale > 1.0


@pytest.mark.parametrize("mode", ["anchored", "independent"])
def test_a_model_that_turns_the_other_way_round_is_served_in_every_mode(mode: str) -> None:
    model = build("nanochat", {"num_attention_heads": 4, "num_key_value_heads": 2})
    served = serve(BorrowedModel(model, name="nanochat"))
    assert served.refusals == dict.fromkeys(ReuseMode, "")
    rotation = served.findings.rotations[0]
    assert rotation is not None and float(rotation.inv_freq.max()) < 0
    chunks, query = [tokens(1, 17), tokens(2, 30), tokens(3, 5)], tokens(4, 9)
    ids, logits = Composer(served).generate([(chunks, query, mode)], 3)[0]
    expected, expected_logits = oracle.greedy(model, chunks, query, mode, 3)
    assert ids == expected
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
