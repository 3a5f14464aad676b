"""Small quantised checkpoints, made by the libraries that make large ones, or by hand in their formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.architectures import ARCHITECTURES, build
from tests.tokenizer_for_tests import VOCABULARY, byte_level_tokenizer

GROUP = 32
# name -> weights and activations as compressed-tensors has them
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "w4a16": ({"num_bits": 4, "strategy": "group", "group_size": GROUP}, None),
    "w4a16-asymmetric": ({"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False}, None),
    "w8a16": ({"num_bits": 8, "strategy": "channel"}, None),
    "fp8-dynamic": (
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    ),
    "fp8-static": (
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
    ),
    "fp8-block": (
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [GROUP, GROUP]},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": GROUP, "dynamic": True},
    ),
    "int8": ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "strategy": "token", "dynamic": True}),
}
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def plain_model(name: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model of ``tests.architectures`` in bfloat16; its matrices have a scale for their width."""
    model_type, settings = ARCHITECTURES[name]
    model = build(model_type, {**settings, **_TOKENS, **config}, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_((64 / model.config.hidden_size) ** 0.5)
    return model.to(torch.bfloat16)


def compressed_dir(path: Path, scheme: str, name: str = "llama-ratio1", *, seed: int = 0, **config: Any) -> Path:
    """A checkpoint that compressed-tensors made of a random model, with a tokenizer."""
    weights, activations = SCHEMES[scheme]
    model = plain_model(name, seed=seed, **config)
    group = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if activations is None else QuantizationArgs(**activations),
    )
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"]), show_progress=False
    )
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(str(path))
    byte_level_tokenizer().save_pretrained(path)
    return path


def _calibrate(linear: Any) -> None:
    """Scales by the least and the largest weight; activations of at most 8."""
    args, weight = linear.quantization_scheme.weights, linear.weight.data
    if args.strategy == "group":
        parts = weight.unflatten(-1, (-1, args.group_size))
        least, most = parts.amin(-1), parts.amax(-1)
    elif args.strategy == "block":
        parts = weight.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP))
        least, most = parts.amin((1, 3)), parts.amax((1, 3))
    elif args.strategy == "channel":
        least, most = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    else:
        least, most = weight.min().reshape(1), weight.max().reshape(1)
    scale, zero = calculate_qparams(least, most, args)
    linear.weight_scale.data.copy_(scale)
    if hasattr(linear, "weight_zero_point"):
        linear.weight_zero_point.data.copy_(zero)
    if hasattr(linear, "input_scale"):
        linear.input_scale.data.fill_(8 / 448)
    linear.quantization_status = QuantizationStatus.FROZEN


def fp8_blocks_dir(path: Path, name: str = "llama-ratio1", *, seed: int = 0, **config: Any) -> Path:
    """A checkpoint as DeepSeek's are: float8 weights and a scale for each block of them."""
    model = plain_model(name, seed=seed, **config)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for linear in linears:
        blocks, scales = _fp8_blocks(tensors[f"{linear}.weight"].float())
        tensors |= {f"{linear}.weight": blocks, f"{linear}.weight_scale_inv": scales}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    say(path, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[GROUP, GROUP])
    return path


def fp8_rows_dir(path: Path, model: PreTrainedModel, activations: dict[str, Any] | None = None) -> Path:
    """A model's checkpoint with every matrix but routers and ends in float8, by rows; experts are matrices too.

    In the form of compressed-tensors, which cannot quantise experts that transformers has stacked.
    """
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    kept = ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate")
    for name in [n for n, x in tensors.items() if x.dim() == 2 and not any(part in n for part in kept)]:
        weight = tensors[name].float()
        scale = weight.abs().amax(-1, keepdim=True) / 448
        tensors |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.to(torch.bfloat16)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    rows = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    group = {"format": "float-quantized", "targets": ["Linear"], "weights": rows, "input_activations": activations}
    ignored = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]
    settings = {"format": "float-quantized", "quantization_status": "compressed", "ignore": ignored}
    say(path, quant_method="compressed-tensors", config_groups={"group_0": group}, **settings)
    return path


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4_dir(path: Path, model: PreTrainedModel) -> Path:
    """GptOss' own form: of experts' matrices each 32 numbers are 4 bits each and an exponent."""
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        parts = tensors.pop(name).float().transpose(1, 2).unflatten(-1, (-1, 32))
        exponent = (parts.abs().amax(-1, keepdim=True) / 6).log2().ceil()
        scaled = parts / exponent.exp2()
        codes = (scaled.abs()[..., None] - torch.tensor(FP4)).abs().argmin(-1) + 8 * (scaled < 0)
        tensors[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = (exponent[..., 0] + 127).to(torch.uint8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    say(path, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router"])
    return path


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs is in each four bits of an int32, from the lowest on


def awq_dir(path: Path, model: PreTrainedModel) -> PreTrainedModel:
    """AutoAWQ's own form (GEMM): 4 bits a weight, transposed, with a scale and a zero for each group.

    Returns the model in float32 with the weights that this stands for.
    """
    model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    model = model.float()
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        parts = tensors.pop(f"{name}.weight").float().T.unflatten(0, (-1, GROUP))  # (groups, GROUP, out)
        least, most = parts.amin(1), parts.amax(1)
        scales = ((most - least) / 15).to(torch.float16)
        zeros = (-least / scales).round().clamp(0, 15)
        codes = (parts / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
        linear.weight.data = ((codes - zeros[:, None]) * scales[:, None].float()).flatten(0, 1).T.contiguous()
        tensors[f"{name}.qweight"] = _awq_packed(codes.flatten(0, 1))
        tensors |= {f"{name}.qzeros": _awq_packed(zeros), f"{name}.scales": scales}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    say(path, quant_method="awq", bits=4, group_size=GROUP, zero_point=True, version="gemm")
    return model


def _awq_packed(codes: Tensor) -> Tensor:
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)]
    return (eights << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def _fp8_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    parts = weight.unflatten(0, (-1, GROUP)).unflatten(2, (-1, GROUP))
    scales = parts.abs().amax((1, 3)) / 448
    return (parts / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn), scales


def say(path: Path, **quantization: Any) -> None:
    """Puts a ``quantization_config`` into a checkpoint's config.json."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
