"""The text decoders of transformers as they were published, narrow enough to be built: what docs/models.md is about.

Each is the default configuration of its class, which is that of a published model, with fewer layers, a smaller
vocabulary, fewer heads and experts. Lengths, windows, kinds of layers, rotation, widths of heads and heads per KV head
stay as they are: limits and the choice of kernels follow from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

_NARROW: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 211),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input"), 16),
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "dim_model")
DROP = object()  # a setting that is left as it is


@dataclass(frozen=True)
class Published:
    """A kind of model: transformers' model type, the families that people know it by, and settings of its own.

    ``variant`` names the settings for a reader where they are not the class's defaults.
    """

    model_type: str
    families: str
    settings: dict[str, Any] = field(default_factory=dict)
    variant: str = ""


def narrow(published: Published) -> dict[str, Any]:
    """The settings that make a published configuration narrow."""
    config = AutoConfig.for_model(published.model_type).to_dict()
    given = {name: size for name, size in _NARROW.items() if config.get(name) is not None}
    layers = _first(config, _LAYERS)
    if layers:
        given[layers] = _layers(config.get("layer_types") or (), config.get("no_rope_layers") or ())
    if _first(config, _HEADS):
        given |= _heads(config)
    return {name: value for name, value in (given | published.settings).items() if value is not DROP}


def _first(config: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in config), "")


def _heads(config: dict[str, Any]) -> dict[str, Any]:
    """Few heads as wide as they are, as many for each KV head as there are."""
    name, hidden = _first(config, _HEADS), _first(config, _HIDDEN)
    heads = int(config[name])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    few = 2 if kv_heads == heads else 1
    given: dict[str, Any] = {name: few * (heads // kv_heads)}
    if "num_key_value_heads" in config:
        given["num_key_value_heads"] = few
    head_dim = config.get("head_dim") or config[hidden] // heads
    if "head_dim" in config:
        given["head_dim"] = head_dim
        given[hidden] = given[name] * 16
    else:
        given[hidden] = given[name] * head_dim
    return given


def _layers(*kinds: Sequence[Any]) -> int:
    """As many layers as have every kind."""
    return max([2, *(list(each).index(kind) + 1 for each in kinds for kind in set(each))])


_MLA = {"num_key_value_heads": 2, "num_attention_heads": 2, "hidden_size": 64, "head_dim": DROP}
_LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_PHI_3_LONG = {"rope_type": "longrope", "short_factor": [1.05] * 48, "long_factor": [4.0] * 48, "rope_theta": 10000.0}
_FULL = "full_attention"
_SLIDING = "sliding_attention"

PUBLISHED = (
    Published("afmoe", "Trinity (Arcee AFMoE)"),
    Published("apertus", "Apertus"),
    Published("arcee", "Arcee AFM", {"head_dim": 128}, "heads of 128"),
    Published("aria_text", "Aria (its text part)"),
    Published("axk1", "A.X K1", _MLA),
    Published("biogpt", "BioGPT"),
    Published("bitnet", "BitNet b1.58"),
    Published("cohere", "Command R, R+; Aya 23, Expanse"),
    Published("cohere2", "Command R7B, Command A"),
    Published("cohere2_moe", "Cohere's mixtures of experts"),
    Published("ctrl", "CTRL"),
    Published("cwm", "Code World Model"),
    Published(
        "dbrx",
        "DBRX",
        {
            **{"n_heads": 6, "d_model": 96, "head_dim": DROP},
            **{"attn_config": {"kv_n_heads": 1, "rope_theta": 500000.0, "clip_qkv": 8}},
            **{"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}},
        },
    ),
    Published("deepseek_v2", "DeepSeek-V2, V2-Lite, Coder-V2", _MLA | {"num_experts_per_tok": 2}),
    Published("deepseek_v3", "DeepSeek-V3, R1; Moonlight; Kimi K2", _MLA),
    Published(
        "dots1",
        "dots.llm1",
        {"hidden_size": 256, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
        "heads of 128",
    ),
    Published("ernie4_5", "ERNIE 4.5, dense"),
    Published("ernie4_5_moe", "ERNIE 4.5, mixtures of experts"),
    Published("exaone4", "EXAONE 4.0"),
    Published("exaone_moe", "K-EXAONE"),
    Published("flex_olmo", "FlexOlmo"),
    Published("gemma", "Gemma, CodeGemma"),
    Published("gemma2", "Gemma 2"),
    Published("gemma3_text", "Gemma 3 (text)"),
    Published("gemma4_text", "Gemma 4 (text)"),
    Published("glm", "GLM-4-9B, GLM-Edge"),
    Published("glm4", "GLM-4-0414, GLM-Z1"),
    Published("glm4_moe", "GLM-4.5, 4.6", {"head_dim": 128, "hidden_size": 192}, "heads of 128"),
    Published("glm4_moe_lite", "GLM-4.7-Flash", _MLA),
    Published("gpt2", "GPT-2"),
    Published("gpt_bigcode", "SantaCoder, StarCoder"),
    Published("gpt_neox", "GPT-NeoX, Pythia, Dolly"),
    Published("gpt_oss", "gpt-oss"),
    Published("granite", "Granite 3, dense"),
    Published("granitemoe", "Granite 3, mixtures of experts"),
    Published(
        "granitemoehybrid", "Granite 4 without Mamba layers", {"layer_types": ["attention"] * 2}, "attention only"
    ),
    Published("granitemoeshared", "Granite 4 (shared experts)"),
    Published("helium", "Helium", {"hidden_size": 256}),
    Published("hrm_text", "Hierarchical Reasoning Model (text)"),
    Published("hunyuan_v1_dense", "Hunyuan 0.5B to 7B"),
    Published("hunyuan_v1_moe", "Hunyuan-A13B"),
    Published("hy_v3", "Hunyuan 3"),
    Published("hyperclovax", "HyperCLOVA X SEED"),
    Published("internlm3", "InternLM 3"),
    Published("iquestcoder", "IQuest-Coder"),
    Published("jais2", "Jais 2"),
    Published("jetmoe", "JetMoE"),
    Published("laguna", "Laguna"),
    Published("llama", "Llama 1 and 2, Vicuna, Yi, TinyLlama, SmolLM 1 and 2, Falcon 3, DeepSeek-LLM"),
    Published(
        "llama",
        "Llama 3.1 to 3.3",
        {
            **{"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 131072},
            **{"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **_LLAMA_3_1}},
        },
        "rotation llama3, 131072 positions",
    ),
    Published("llama4_text", "Llama 4 (text)"),
    Published("mellum", "Mellum 2"),
    Published("mimo_v2_flash", "MiMo-V2-Flash"),
    Published("minicpm3", "MiniCPM3", _MLA),
    Published("minimax_m2", "MiniMax-M2"),
    Published("ministral", "Ministral 8B"),
    Published("ministral3", "Ministral 3"),
    Published("mistral", "Mistral 7B v0.1"),
    Published("mistral", "Mistral 7B v0.2 on, NeMo, Small", {"sliding_window": None}, "no window"),
    Published("mixtral", "Mixtral"),
    Published("modernbert-decoder", "Ettin decoders"),
    Published("nanochat", "nanochat"),
    Published("nemotron", "Nemotron 3 and 4, Minitron"),
    Published("olmo", "OLMo"),
    Published("olmo2", "OLMo 2"),
    Published("olmo3", "OLMo 3"),
    Published("olmoe", "OLMoE"),
    Published("opt", "OPT"),
    Published("persimmon", "Persimmon"),
    Published("phi", "Phi-1, 1.5, 2"),
    Published("phi3", "Phi-3, 3.5, Phi-4"),
    Published(
        "phi3",
        "Phi-3-mini-128k, Phi-4-mini",
        {
            **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096},
            **{"rope_parameters": _PHI_3_LONG, "sliding_window": None},
        },
        "rotation longrope, 131072 positions",
    ),
    Published("phimoe", "Phi-3.5-MoE"),
    Published("qwen2", "Qwen 1.5, 2, 2.5; QwQ"),
    Published("qwen2_moe", "Qwen1.5-MoE, Qwen2-57B-A14B"),
    Published("qwen3", "Qwen 3"),
    Published("qwen3_moe", "Qwen3-30B-A3B, 235B-A22B"),
    Published("seed_oss", "Seed-OSS"),
    Published("smollm3", "SmolLM 3"),
    Published("solar_open", "Solar Open"),
    Published("stablelm", "StableLM"),
    Published("starcoder2", "StarCoder 2"),
    Published("vaultgemma", "VaultGemma"),
    Published("youtu", "Youtu-LLM", _MLA),
    # Of these some or all are refused.
    Published("bamba", "Bamba", {"mamba_n_heads": 16, "mamba_d_head": 64}),
    Published("bert", "BERT"),
    Published("bloom", "BLOOM"),
    Published("codegen", "CodeGen"),
    Published("deepseek_v32", "DeepSeek-V3.2", _MLA),
    Published(
        "deepseek_v4",
        "DeepSeek-V4",
        {"num_key_value_heads": 1, "num_attention_heads": 8, "o_groups": 4, "o_lora_rank": 16},
    ),
    Published("diffllama", "DiffLlama"),
    Published("doge", "Doge"),
    Published("falcon", "Falcon 7B, 40B", {"head_dim": DROP}),
    Published("falcon_h1", "Falcon-H1", {"mamba_d_ssm": 64, "mamba_n_heads": 8}),
    Published("falcon_mamba", "Falcon-Mamba"),
    Published("glm_moe_dsa", "GLM-5", _MLA),
    Published("gpt_neo", "GPT-Neo", {"attention_types": [[["global", "local"], 1]], "hidden_size": 64, "num_heads": 4}),
    Published("gptj", "GPT-J"),
    Published("jamba", "Jamba"),
    Published("kimi_linear", "Kimi Linear", _MLA),
    Published("lfm2", "LFM2", {"layer_types": ["conv", _FULL]}, "with convolutions, as published"),
    Published("longcat_flash", "LongCat-Flash", _MLA | {"ffn_hidden_size": 64, "expert_ffn_hidden_size": 32}),
    Published("mamba", "Mamba"),
    Published("mamba2", "Mamba 2, Codestral Mamba", {"hidden_size": 64, "num_heads": 8, "head_dim": 16}),
    Published("minimax", "MiniMax-Text-01, M1"),
    Published("mpt", "MPT"),
    Published("nemotron_h", "Nemotron-H, Nemotron Nano"),
    Published("olmo_hybrid", "OLMo Hybrid"),
    Published("openai-gpt", "GPT"),
    Published("qwen3_5_text", "Qwen 3.5 (text)"),
    Published("qwen3_next", "Qwen3-Next"),
    Published("recurrent_gemma", "RecurrentGemma"),
    Published("rwkv", "RWKV 4", {"hidden_size": 64, "attention_hidden_size": 64}),
    Published("xglm", "XGLM"),
    Published("zamba2", "Zamba 2", {"num_hidden_layers": DROP}),
)
