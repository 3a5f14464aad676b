"""Quantised checkpoints are served as transformers runs them, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.entrypoints.convert import AutoAWQConverter, FP8BlockDequantizer, convert_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, PretrainedConfig
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.check.precision import redrawn, upcast
from engine.model import quantized
from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.probe import examine
from engine.model.quantized import is_opaque, is_plain, quantization_of
from engine.reuse import ReuseMode
from engine.run.cuda.weights import fused_refusal, merge_weights
from engine.served import look_into, serve
from tests import oracle
from tests.architectures import build
from tests.engine.composer import Composer
from tests.models_for_tests import tiny_model_dir
from tests.quantised import (
    GROUP,
    SCHEMES,
    awq_dir,
    compressed_dir,
    fp8_blocks_dir,
    fp8_rows_dir,
    mxfp4_dir,
    plain_model,
    say,
)
from tests.tokenizer_for_tests import VOCABULARY

ROUNDED = [name for name, (_, activations) in SCHEMES.items() if activations]
CHUNKS, QUERY = [[7, 8, 9, 10, 11], [30, 31], [40, 41, 42, 43]], [50, 51, 52]
NEAR = 0.3  # standard deviations of the logits by which a rounded activation that falls otherwise may move them


def check_served(folder: Path, reference: Any, apart: float, *, checked: bool = True) -> BorrowedModel:
    """In float32 tokens are those of transformers' model on the same prefix, to ``apart`` standard deviations.

    ``checked``: as a service starts, with the start check.
    """
    borrowed = BorrowedModel.load(str(folder), dtype="float32")
    served = serve(borrowed) if checked else look_into(borrowed)
    assert not any(served.refusals.values())
    composer = Composer(served)
    for mode in ReuseMode:
        ((tokens, logits),) = composer.generate([(CHUNKS, QUERY, mode.value)], 5)
        theirs = oracle.logits(reference, CHUNKS, QUERY + tokens[:-1], mode.value)[-5:]
        assert float((logits - theirs).abs().max()) < apart * float(theirs.std(dim=-1).mean())
        top = theirs.max(dim=-1).values
        assert float((top - theirs[range(5), tokens]).max()) <= 2 * apart * float(theirs.std(dim=-1).mean())
    return borrowed


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_compressed_tensors_made_is_served_as_transformers_runs_it(tmp_path: Path, scheme: str) -> None:
    folder = compressed_dir(tmp_path, scheme, "qwen3-ratio2" if scheme == "w4a16" else "llama-ratio1")
    # transformers' other loader cannot read packed zero points
    given = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "asym" in scheme else {}
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()
    apart = NEAR if scheme in ROUNDED else 1e-4
    borrowed = check_served(folder, reference, apart, checked=scheme in ("w4a16", "fp8-static", "int8"))
    assert bool(borrowed.quantization.activations) == (scheme in ROUNDED)
    projections = [part for name, part in borrowed.module.named_modules() if name.endswith("_proj")]
    assert projections and all(is_plain(part) == (scheme not in ROUNDED) for part in projections)


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "fp8-blocks"])
def test_in_bfloat16_a_quantised_model_rounds_no_more_than_eager_attention(tmp_path: Path, scheme: str) -> None:
    folder = fp8_blocks_dir(tmp_path) if scheme == "fp8-blocks" else compressed_dir(tmp_path, scheme)
    served = serve(BorrowedModel.load(str(folder), dtype="bfloat16"))
    assert served.layout.dtype == "bfloat16"
    assert not any(served.refusals.values())
    assert all(0 < check.rounding < 2.5 and check.structure < 1e-4 for check in served.checks.values())
    refused = "linear layers that do more than multiply" if scheme == "fp8-dynamic" else ""
    assert fused_refusal(served.borrowed, served.findings) == refused


def test_blocks_of_fp8_as_deepseek_has_them(tmp_path: Path) -> None:
    folder = fp8_blocks_dir(tmp_path, "qwen2-ratio7")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()
    borrowed = check_served(folder, reference, 1e-4)
    assert str(borrowed.quantization) == "fp8, 8-bit weights"
    module: Any = borrowed.module
    plain: Any = plain_model("qwen2-ratio7")
    own = plain.model.layers[0].mlp.up_proj.weight.detach().float()
    assert float((module.model.layers[0].mlp.up_proj.weight.detach() - own).abs().max()) < 0.05 * float(own.abs().max())


EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROWS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCABULARY}


def experts(kind: str, **settings: Any) -> Any:
    return build(kind, {**ROWS, **settings}).to(torch.bfloat16)


def test_experts_in_fp8_are_served_as_transformers_unpacks_them(tmp_path: Path) -> None:
    folder = fp8_rows_dir(tmp_path, experts("qwen3_moe", **EXPERTS))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    check_served(folder, reference, 1e-3, checked=False)


def test_experts_in_mxfp4_as_gpt_oss_has_them(tmp_path: Path) -> None:
    model = experts("gpt_oss", num_local_experts=4, num_experts_per_tok=2)
    folder = mxfp4_dir(tmp_path, model)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()
    check_served(folder, reference, 1e-3)
    own, unpacked = (each.model.layers[0].mlp.experts.down_proj.detach().float() for each in (model, reference))
    assert 0 < float((own - unpacked).abs().max()) < 0.3 * float(own.abs().max())


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_awq_is_served_once_compressed_tensors_has_converted_it(tmp_path: Path) -> None:
    reference = awq_dir(tmp_path / "awq", plain_model("llama-ratio1"))
    with pytest.raises(
        ModelRefused, match=r"it is quantised \(awq\), and its loader is missing: pip install gptqmodel"
    ):
        BorrowedModel.load(str(tmp_path / "awq"))
    converter = AutoAWQConverter.from_pretrained(str(tmp_path / "awq"))
    convert_checkpoint(str(tmp_path / "awq"), str(tmp_path / "made"), converter, device="cpu")
    served = check_served(tmp_path / "made", reference, NEAR, checked=False)
    assert str(served.quantization) == "compressed-tensors, 4-bit int weights"
    weight, own = (each.model.layers[1].mlp.up_proj.weight for each in (served.module, reference))  # type: ignore[union-attr, index]
    assert float((weight - own).abs().max().detach()) < 0.01 * float(own.abs().max().detach())


def test_blocks_of_fp8_become_a_plain_model_for_devices_without_kernels(tmp_path: Path) -> None:
    folder = fp8_blocks_dir(tmp_path / "fp8")
    made = tmp_path / "made"
    convert_checkpoint(
        str(folder),
        str(made),
        FP8BlockDequantizer.from_pretrained(str(folder), weight_block_size=[GROUP, GROUP]),
        device="cpu",
    )
    plain, packed = (BorrowedModel.load(str(each), dtype="bfloat16") for each in (made, folder))
    assert plain.quantization is None
    theirs = dict(packed.module.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in plain.module.named_parameters())


def test_layers_that_get_tokens_without_a_batch_are_refused_where_they_round(tmp_path: Path) -> None:
    rounded = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    shared = experts("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=32)
    folder = fp8_rows_dir(tmp_path / "shared", shared, rounded)
    with pytest.raises(ModelRefused, match=r"layers\.0\.mlp\.shared_expert\.gate_proj is given tokens without a batch"):
        BorrowedModel.load(str(folder), dtype="float32")
    kept = BorrowedModel.load(str(fp8_rows_dir(tmp_path / "kept", shared)), dtype="float32")
    assert kept.quantization.activations == ""
    BorrowedModel.load(str(fp8_rows_dir(tmp_path / "own", experts("qwen3_moe", **EXPERTS), rounded)), dtype="float32")


def test_what_a_model_is_follows_from_quantised_weights_and_their_scheme(tmp_path: Path) -> None:
    names = ("plain", "again", "other", "int8")
    made = {
        "plain": compressed_dir(tmp_path / "plain", "w4a16"),
        "again": compressed_dir(tmp_path / "again", "w4a16"),
        "other": compressed_dir(tmp_path / "other", "w4a16", seed=1),
        "int8": compressed_dir(tmp_path / "int8", "int8"),
    }
    found = {name: look_into(BorrowedModel.load(str(made[name]), dtype="float32")).identity for name in names}
    assert found["plain"] == found["again"]
    assert len({found["plain"], found["other"], found["int8"]}) == 3


def test_static_scales_are_part_of_what_a_model_is(tmp_path: Path) -> None:
    folder = compressed_dir(tmp_path, "fp8-static")
    before = look_into(BorrowedModel.load(str(folder), dtype="float32")).identity
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("input_scale"))
    save_file({**tensors, name: tensors[name] * 2}, folder / "model.safetensors", metadata={"format": "pt"})
    assert look_into(BorrowedModel.load(str(folder), dtype="float32")).identity != before


def described(**fields: Any) -> Any:
    return quantization_of(PretrainedConfig(quantization_config=fields))


def group(**activations: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}, "input_activations": activations or None}}


def test_a_scale_of_all_tokens_of_a_forward_is_refused() -> None:
    rounded = group(num_bits=8, strategy="tensor", dynamic=True)
    with pytest.raises(ValueError, match=r"config_groups\.group_0\.input_activations takes one scale of all tokens"):
        described(quant_method="compressed-tensors", config_groups=rounded)
    fixed = described(quant_method="compressed-tensors", config_groups=group(num_bits=8, strategy="tensor"))
    assert fixed.activations == "8-bit with fixed scales"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "no-such"}, "quant_method 'no-such' is not served; those that are: compressed-tensors, fp8"),
        ({"bits": 4}, "quant_method 'None' is not served"),
        (
            {"quant_method": "compressed-tensors", "config_groups": group(), "kv_cache_scheme": {"num_bits": 8}},
            "kv_cache_scheme asks for quantised KV",
        ),
    ],
)
def test_what_is_not_served_is_said_before_anything_is_loaded(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        described(**fields)


@pytest.mark.parametrize(
    ("method", "fields", "package"),
    [
        ("awq", {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, "gptqmodel"),
        ("gptq", {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}, "optimum"),
        ("fp8", {}, "accelerate"),
        ("mxfp4", {}, "accelerate"),
        ("compressed-tensors", {"config_groups": group()}, "compressed-tensors"),
    ],
)
def test_a_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, fields: dict[str, Any], package: str
) -> None:
    folder = tiny_model_dir(tmp_path, tokenizer=False)
    say(folder, quant_method=method, **fields)
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(
        ModelRefused, match=f"it is quantised \\({method}\\), and its loader is missing: pip install .*{package}"
    ):
        BorrowedModel.load(str(folder))


@register_quantization_config("eight-bit-rows")
class RowsConfig(QuantizationConfigMixin):
    """Of a library that this test is: each row of a weight as int8 and a scale."""

    def __init__(self, **options: Any) -> None:
        self.quant_method = "eight-bit-rows"


class RowsLinear(torch.nn.Module):
    qweight: torch.Tensor
    scales: torch.Tensor
    """A library's own linear layer: packed weights as buffers, a product that takes its own dtype alone."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.empty(linear.weight.shape, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(len(linear.weight), dtype=torch.bfloat16))
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.bfloat16 and self.scales.dtype == torch.bfloat16
        return torch.nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales[:, None], self.bias)


@register_quantizer("eight-bit-rows")
class RowsQuantizer(HfQuantizer):
    requires_calibration = True

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear) and name != "lm_head":
                    setattr(parent, name, RowsLinear(child))

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        return None

    is_trainable = False

    def is_serializable(self, *given: Any) -> bool:
        return True


@pytest.fixture
def rows_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of that library, of a model whose projections have biases."""
    monkeypatch.setitem(quantized.LIBRARIES, "eight-bit-rows", ())
    plain_model("qwen2-ratio7", hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        weight = tensors.pop(name)
        scales = (weight.float().abs().amax(-1) / 127).to(torch.bfloat16)
        tensors[name.replace("weight", "qweight")] = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)
        tensors[name.replace("weight", "scales")] = scales
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    say(tmp_path, quant_method="eight-bit-rows")
    return tmp_path


@torch.inference_mode()
def test_a_library_of_its_own_kernels_is_checked_and_served(rows_dir: Path) -> None:
    served = serve(BorrowedModel.load(str(rows_dir), dtype="bfloat16"))
    module: Any = served.borrowed.module
    linear = module.model.layers[1].self_attn.q_proj
    assert is_opaque(linear) and "forward" not in vars(linear)
    assert not any(served.refusals.values())
    assert all(check.structure < 1e-4 and 0.5 < check.rounding < 2.5 for check in served.checks.values())
    reference = AutoModelForCausalLM.from_pretrained(rows_dir, dtype=torch.bfloat16).eval()
    ((tokens, logits),) = Composer(served).generate([(CHUNKS, QUERY, "exact")], 4)
    prompt = [token for chunk in CHUNKS for token in chunk] + QUERY
    theirs = reference(torch.tensor([prompt + tokens[:-1]])).logits[0, -4:].float()
    assert float((logits - theirs).abs().max()) < NEAR * float(theirs.std(dim=-1).mean())
    with pytest.raises(
        ModelRefused, match="dtype: float32 was asked for; eight-bit-rows weights are served in their own"
    ):
        BorrowedModel.load(str(rows_dir), dtype="float32")


def test_opaque_weights_are_read_off_their_products(rows_dir: Path) -> None:
    borrowed = BorrowedModel.load(str(rows_dir))
    assert borrowed.dtype_name == "bfloat16" and "checkpoint's own" in borrowed.dtype_reason
    module: Any = borrowed.module
    linear = module.model.layers[0].self_attn.q_proj
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(3))
    weight = (linear.qweight.to(torch.bfloat16) * linear.scales[:, None]).float()
    with upcast(borrowed, None):
        assert torch.allclose(linear(x), torch.nn.functional.linear(x, weight, linear.bias.float()), atol=1e-3)
    with redrawn(borrowed):
        drawn = linear(x)
    assert drawn.dtype == torch.float32 and 0.3 < float(drawn.std()) < 3 and not is_plain(linear)
    assert linear(x.bfloat16()).dtype == torch.bfloat16


def test_a_tied_head_is_merged_without_a_copy() -> None:
    model = plain_model("llama-ratio1", tie_word_embeddings=True, vocab_size=384)
    borrowed = BorrowedModel(model, name="tied")
    weights = merge_weights(borrowed, examine(borrowed))
    assert weights.head.data_ptr() == weights.embedding.data_ptr()
    assert weights.layers[0].qkv.data_ptr() == model.model.layers[0].self_attn.q_proj.weight.data_ptr()


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_outside_of_queries_keys_and_values_take_the_other_path(bias: str) -> None:
    borrowed = BorrowedModel(plain_model("llama-ratio1", **{bias: True}), name="biased")
    assert fused_refusal(borrowed, examine(borrowed)) == "biases outside of q, k and v"


def test_configurations_without_a_scheme_are_not_quantised(tmp_path: Path) -> None:
    assert quantization_of(AutoConfig.from_pretrained(tiny_model_dir(tmp_path, tokenizer=False))) is None
