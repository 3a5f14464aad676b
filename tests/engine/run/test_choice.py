"""What runs a model is chosen by its device and by what was found out about it, and named in its identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from chunk_store.layout import LayerLayout
from engine.kv.pool import PagedKVPool
from engine.model.borrowed import BorrowedModel
from engine.model.probe import Findings, examine
from engine.run.choice import choose_weights, make_runner, numerics_name
from engine.run.cuda.attention import cascade_refusal
from engine.run.cuda.weights import fused_refusal, merge_weights
from engine.run.eager.attention import TorchAttention
from engine.run.eager.runner import EagerRunner
from tests.architectures import ARCHITECTURES, build

Change = Callable[[Findings], Findings]


@pytest.fixture(scope="module")
def plain() -> tuple[BorrowedModel, Findings]:
    """A plain decoder in bfloat16, as it is found on a device: nothing is deferred there."""
    borrowed = BorrowedModel(build(*ARCHITECTURES["qwen3-ratio2"]).bfloat16(), name="plain")
    return borrowed, replace(examine(borrowed), deferred=False)


def layout_of(*layers: LayerLayout, dtype: str = "bfloat16") -> Change:
    return lambda f: replace(f, layout=replace(f.layout, dtype=dtype, layers=layers or f.layout.layers))


def rotated(**change: Any) -> Change:
    def changed(findings: Findings) -> Findings:
        assert findings.rotations[0] is not None
        rotation = replace(findings.rotations[0], **change)
        return replace(findings, rotations=(rotation,) * len(findings.rotations))

    return changed


def test_on_the_cpu_every_model_runs_its_own_code(plain: tuple[BorrowedModel, Findings]) -> None:
    borrowed, findings = plain
    places = [parameter.data_ptr() for parameter in borrowed.module.parameters()]
    assert choose_weights(borrowed, findings) is None
    assert [parameter.data_ptr() for parameter in borrowed.module.parameters()] == places, "nothing was merged"
    pool = PagedKVPool(findings.layout, pages=4, chunk_pages=2, page_size=5)
    runner = make_runner(pool, borrowed, findings, None, piece_tokens=7, row_multiple=2)
    assert isinstance(runner, EagerRunner) and isinstance(runner.attention, TorchAttention)
    assert (runner.piece_tokens, runner.row_multiple, runner.runs_ahead) == (7, 2, False)
    assert numerics_name(borrowed, findings, None) == TorchAttention.name == "torch-2"


def test_names_of_what_computes_on_a_device(plain: tuple[BorrowedModel, Findings]) -> None:
    borrowed, findings = plain
    there: Any = SimpleNamespace(device=torch.device("cuda"), config=borrowed.config)
    weights: Any = object()
    assert numerics_name(there, findings, weights) == "fused-4 cuda-1"
    assert numerics_name(there, findings, None) == "cuda-1"
    assert numerics_name(there, layout_of(dtype="float32")(findings), None) == "torch-2"


@pytest.mark.parametrize(
    ("change", "fused", "cascade"),
    [
        (lambda f: f, "", ""),
        (layout_of(dtype="float32"), "dtype float32", "dtype float32"),
        (layout_of(LayerLayout(2, 16, 16), LayerLayout(1, 16, 16)), "layers that differ", "layers that differ"),
        (layout_of(LayerLayout(2, 24, 24)), "head widths 24", "heads of 24"),
        (layout_of(LayerLayout(2, 16, 8)), "head widths 16 and 8", "heads of 16 and 8"),
        (layout_of(LayerLayout(3, 16, 16)), "", "over 3 KV heads"),
        (rotated(interleaved=True), "a rotation of other", "a rotation of neighbouring"),
        (rotated(inv_freq=torch.ones(4)), "a rotation of other", ""),
        (lambda f: replace(f, rotation_refusal="unknown"), "unknown", ""),
    ],
)
def test_what_kernels_refuse_is_said(
    plain: tuple[BorrowedModel, Findings], change: Change, fused: str, cascade: str
) -> None:
    borrowed, findings = plain
    changed = change(findings)
    for refusal, words in ((fused_refusal(borrowed, changed), fused), (cascade_refusal(changed, 4), cascade)):
        assert words in refusal and bool(words) is bool(refusal)


def test_other_families_are_not_merged() -> None:
    borrowed = BorrowedModel(build(*ARCHITECTURES["gemma2-softcap"]).bfloat16(), name="other")
    findings = examine(borrowed)
    assert "gemma2" in fused_refusal(borrowed, findings)
    with pytest.raises(ValueError, match="cannot take the fused path: model type 'gemma2'"):
        merge_weights(borrowed, findings)


def test_merged_weights_are_the_models_own(plain: tuple[BorrowedModel, Findings]) -> None:
    _, findings = plain
    module: Any = build(*ARCHITECTURES["qwen3-ratio2"]).bfloat16()
    borrowed, attention = BorrowedModel(module, name="merged"), module.model.layers[1].self_attn
    expected = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).clone()
    weights = merge_weights(borrowed, findings)
    assert torch.equal(weights.layers[1].qkv, expected)
    assert attention.k_proj.weight.untyped_storage().data_ptr() == weights.layers[1].qkv.untyped_storage().data_ptr()
    again = merge_weights(borrowed, findings)
    assert again.layers[1].qkv.data_ptr() == weights.layers[1].qkv.data_ptr(), "merging twice changes nothing"
