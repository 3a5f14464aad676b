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
from engine.plan import Window
from engine.run.backends import CPU, AttentionRefused, Decision, DeviceFacts
from engine.run.choice import choose_weights, decide, decide_and_try, make_runner, numerics_name
from engine.run.cuda.attention import cascade_refusal
from engine.run.cuda.borrowed import BorrowedForward, CapturedModel
from engine.run.cuda.runner import PackedRunner
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
    decision = decide(borrowed, findings)
    assert decision == Decision("eager", "torch", "the device is cpu")
    assert choose_weights(borrowed, findings, decision) is None
    assert [parameter.data_ptr() for parameter in borrowed.module.parameters()] == places, "nothing was merged"
    pool = PagedKVPool(findings.layout, pages=4, chunk_pages=2, page_size=5)
    runner = make_runner(pool, borrowed, findings, None, piece_tokens=7, row_multiple=2)
    assert isinstance(runner, EagerRunner) and isinstance(runner.attention, TorchAttention)
    assert (runner.piece_tokens, runner.row_multiple, runner.runs_ahead) == (7, 2, False)
    assert numerics_name(decision) == TorchAttention.name == "torch-2"


HOPPER = DeviceFacts(cuda=True)
WITHOUT = DeviceFacts(cuda=True, flashinfer="FlashInfer is not installed")
OTHER = DeviceFacts(cuda=True, hopper=False)
OTHER_WITHOUT = DeviceFacts(cuda=True, hopper=False, flashinfer="FlashInfer is not installed")


def as_it_is(findings: Findings) -> Findings:
    return findings


def other_family(findings: Findings) -> Findings:
    return replace(findings, rotation_refusal="unknown")  # the fused layers do not take it, the kernels do


@pytest.mark.parametrize(("device", "change", "asked", "runner", "attention", "words"), [
    (HOPPER, as_it_is, "auto", "fused", "cascade", "written for compute capability 9"),
    (HOPPER, other_family, "auto", "captured", "cascade", "written for compute capability 9"),
    (OTHER, as_it_is, "auto", "fused", "cascade", "portable kernels run in captured steps"),
    (OTHER, other_family, "auto", "captured", "cascade", "portable kernels run in captured steps"),
    (HOPPER, layout_of(dtype="float32"), "auto", "eager", "torch", "FlashInfer does not: its kernels take bfloat16"),
    (HOPPER, as_it_is, "torch", "eager", "torch", "--attention torch"),
    (HOPPER, layout_of(dtype="float32"), "torch", "eager", "torch", "--attention torch"),
    (HOPPER, as_it_is, "flashinfer", "eager", "flashinfer", "--attention flashinfer"),
    (OTHER, as_it_is, "cascade", "fused", "cascade", "--attention cascade"),
    (OTHER, other_family, "cascade", "captured", "cascade", "--attention cascade"),
    (CPU, as_it_is, "torch", "eager", "torch", "the device is cpu"),
])  # fmt: skip
def test_what_runs_a_model(
    plain: tuple[BorrowedModel, Findings],
    device: DeviceFacts, change: Change, asked: str, runner: str, attention: str, words: str,
) -> None:  # fmt: skip
    borrowed, findings = plain
    found = decide(borrowed, change(findings), asked, device)
    assert (found.runner, found.attention) == (runner, attention) and words in found.reason


WIDE = layout_of(LayerLayout(2, 128, 128))


@pytest.mark.parametrize(("device", "change", "asked", "pieces"), [
    (HOPPER, WIDE, "auto", "fa3"),
    (HOPPER, WIDE, "cascade", "fa3"),
    (HOPPER, WIDE, "torch", ""),
    (HOPPER, WIDE, "flashinfer", ""),
    (WITHOUT, WIDE, "auto", ""),
    (OTHER, WIDE, "auto", ""),
    (HOPPER, as_it_is, "auto", ""),
])  # fmt: skip
def test_long_pieces_take_fa3_where_it_is_faster(
    plain: tuple[BorrowedModel, Findings], device: DeviceFacts, change: Change, asked: str, pieces: str
) -> None:
    borrowed, findings = plain
    found = decide(borrowed, change(findings), asked, device)
    assert found.pieces == pieces and ("long pieces by FlashInfer's fa3" in found.reason) is bool(pieces)


def test_fa3_that_cannot_be_built_is_left_out(
    plain: tuple[BorrowedModel, Findings], monkeypatch: pytest.MonkeyPatch
) -> None:
    borrowed, findings = plain[0], WIDE(plain[1])
    monkeypatch.setattr("engine.run.choice.device_facts", lambda _: HOPPER)
    monkeypatch.setattr("importlib.metadata.version", {"flashinfer-python": "0.6.13"}.__getitem__)
    monkeypatch.setattr("engine.run.choice.capture_failure", lambda *_: "")
    monkeypatch.setattr("engine.run.choice.block_failure", lambda *_: "")
    found = decide_and_try(borrowed, findings)
    assert found.pieces == "fa3" and numerics_name(found).endswith("cuda-3 fa3 0.6.13")
    monkeypatch.setattr("engine.run.choice.block_failure", lambda *_: "no nvcc")
    without = decide_and_try(borrowed, findings)
    assert without.pieces == "" and "fa3" not in without.reason + numerics_name(without)


@pytest.mark.parametrize(("device", "asked", "attention", "words"), [
    (HOPPER, "auto", "cascade", "written for compute capability 9; its steps are not captured: it waits"),
    (OTHER, "auto", "flashinfer", "not of compute capability 9"),
    (OTHER_WITHOUT, "auto", "cascade", "FlashInfer is not installed; its steps are not captured: it waits"),
    (HOPPER, "cascade", "cascade", "--attention cascade; its steps are not captured: it waits"),
])  # fmt: skip
def test_what_no_graph_can_hold_runs_eagerly_and_says_why(
    plain: tuple[BorrowedModel, Findings], device: DeviceFacts, asked: str, attention: str, words: str
) -> None:
    borrowed, findings = plain
    found = decide(borrowed, other_family(findings), asked, device, uncaptured="it waits")
    assert (found.runner, found.attention) == ("eager", attention) and words in found.reason
    fused = decide(borrowed, findings, asked, device, uncaptured="it waits")
    assert fused.runner == "fused", "which is not the model's own code"


def test_what_is_captured_is_tried_first(
    plain: tuple[BorrowedModel, Findings], monkeypatch: pytest.MonkeyPatch
) -> None:
    borrowed, findings = plain[0], other_family(plain[1])
    tried: list[BorrowedModel] = []

    def trial(model: BorrowedModel, findings: Findings) -> str:
        tried.append(model)
        return "" if len(tried) == 1 else "capturing fails"

    monkeypatch.setattr("engine.run.choice.device_facts", lambda _: HOPPER)
    monkeypatch.setattr("engine.run.choice.capture_failure", trial)
    taken, refused = decide_and_try(borrowed, findings), decide_and_try(borrowed, findings)
    assert taken.runner == "captured" and tried[0] is borrowed
    assert refused.runner == "eager" and refused.reason.endswith("its steps are not captured: capturing fails")
    weights = choose_weights(borrowed, findings, taken)
    assert isinstance(weights, CapturedModel) and choose_weights(borrowed, findings, refused) is None
    pool = PagedKVPool(findings.layout, pages=40, chunk_pages=20, page_size=16)
    options: dict[str, Any] = {"slots": 4, "rows_max": 8, "piece_tokens": 7, "graphs": False}
    runner = make_runner(pool, borrowed, findings, weights, decode_buckets=(8,), together=False, **options)
    assert isinstance(runner, PackedRunner) and isinstance(runner.forward, BorrowedForward)
    assert runner.steps.buckets == (8,) and runner.alone(1, chunk=False), "one size, and prompts alone"
    runner = make_runner(pool, borrowed, findings, weights, decode_buckets=(8,), **options)
    assert isinstance(runner, PackedRunner) and runner.steps.buckets == (1, 8) and not runner.alone(1, chunk=True)


@pytest.mark.parametrize(("device", "change", "asked", "words"), [
    (CPU, as_it_is, "cascade", "its kernels run on a GPU, and the device is cpu; give --attention auto"),
    (CPU, as_it_is, "flashinfer", "its kernels run on a GPU, and the device is cpu; give --attention auto"),
    (WITHOUT, as_it_is, "flashinfer", "FlashInfer is not installed; give --attention auto or --attention cascade"),
    (HOPPER, layout_of(dtype="float32"), "flashinfer", "bfloat16 and float16, and the model is served in float32"),
    (HOPPER, layout_of(LayerLayout(2, 576, 512)), "flashinfer", "head widths 576 and 512"),
    (HOPPER, layout_of(LayerLayout(3, 16, 16)), "flashinfer", "4 heads are not a multiple of 3"),
    (HOPPER, layout_of(dtype="float32"), "cascade", "dtype float32; give --attention auto or --attention torch"),
    (HOPPER, as_it_is, "sdpa", "attention: 'sdpa' is none of auto, cascade, flashinfer, torch"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_the_remedy(
    plain: tuple[BorrowedModel, Findings], device: DeviceFacts, change: Change, asked: str, words: str
) -> None:
    borrowed, findings = plain
    with pytest.raises(AttentionRefused) as refused:
        decide(borrowed, change(findings), asked, device)
    assert str(refused.value).startswith("attention: ") and words in str(refused.value)


def test_kernels_that_cannot_be_built_are_not_chosen(
    plain: tuple[BorrowedModel, Findings], monkeypatch: pytest.MonkeyPatch
) -> None:
    borrowed, findings = plain[0], other_family(plain[1])
    there: Any = SimpleNamespace(device=torch.device("cuda"), config=borrowed.config, name="tiny")
    monkeypatch.setattr("engine.run.choice.device_facts", lambda _: OTHER)
    monkeypatch.setattr("engine.run.choice.captured_refusal", lambda *_: "it waits")
    monkeypatch.setattr("engine.run.choice.build_refusal", lambda *_: "its kernels cannot be built: no nvcc")
    found = decide_and_try(there, findings)
    assert found.attention == "cascade" and "no nvcc" in found.reason
    with pytest.raises(AttentionRefused, match="no nvcc; give --attention auto or --attention cascade"):
        decide_and_try(there, findings, "flashinfer")
    monkeypatch.setattr("engine.run.choice.build_refusal", lambda *_: "")
    assert decide_and_try(there, findings).attention == "flashinfer"


def test_names_of_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"flashinfer-python": "0.6.13"}.__getitem__)
    pairs = (
        ("fused", "cascade"),
        ("captured", "cascade"),
        ("eager", "cascade"),
        ("eager", "flashinfer"),
        ("eager", "torch"),
    )
    names = {numerics_name(Decision(*pair, "")) for pair in pairs}
    assert names == {"fused-5 cuda-3", "captured-2 cuda-3", "cuda-3", "flashinfer-2 0.6.13", "torch-2"}


@pytest.mark.parametrize(
    ("change", "fused", "cascade"),
    [
        (lambda f: f, "", ""),
        (layout_of(dtype="float32"), "dtype float32", "dtype float32"),
        (layout_of(LayerLayout(2, 16, 16), LayerLayout(1, 16, 16)), "layers that differ", "layers that differ"),
        (layout_of(LayerLayout(2, 24, 24)), "head widths 24", ""),
        (lambda f: replace(f, windows=(Window(7), None)), "", ""),
        (layout_of(LayerLayout(2, 20, 20)), "head widths 20", "heads of 20"),
        (layout_of(LayerLayout(2, 16, 8)), "head widths 16 and 8", ""),
        (layout_of(LayerLayout(2, 16, 2048)), "head widths 16 and 2048", "heads of 16 and 2048"),
        (layout_of(LayerLayout(3, 16, 16)), "", "over 3 KV heads"),
        (rotated(interleaved=True), "a rotation of other", ""),
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
