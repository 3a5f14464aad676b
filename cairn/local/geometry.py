"""The KV geometry of a model as its configuration tells it: no weights, no forward.

A service learns the geometry by watching the model, which is always right; this reads what the configuration says
and refuses what it cannot know. The test of ``cairn plan`` compares the two for every architecture of the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chunk_store.layout import DTYPE_BYTES, KVLayout, LayerLayout

STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors names them
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class GeometryUnknown(ValueError):
    """The configuration does not say what a layer's keys and values look like. Names the field and the remedy."""


def read_config(path: Path) -> Any:
    """The transformers configuration of a model directory or of a ``config.json``. Raises ``GeometryUnknown``."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise GeometryUnknown(f"model: {file} does not exist; name a model directory or a config.json")
    from transformers import AutoConfig  # only this command reads a configuration

    try:
        return AutoConfig.from_pretrained(str(file), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        words = str(error).strip().split("\n")[0]
        raise GeometryUnknown(f"model: {file} is not a configuration that transformers reads: {words}") from error


def layout_from_config(config: Any, dtype: str = "float32") -> KVLayout:
    """Layers, KV heads and widths, in ``dtype``. Raises ``GeometryUnknown``."""
    text = config.get_text_config()
    layers = _count(text, "num_hidden_layers")
    others = set(getattr(text, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        raise GeometryUnknown(f"layer_types: {sorted(others)} keep state that is not KV; Cairn does not serve them")
    if dtype not in DTYPE_BYTES:
        raise GeometryUnknown(f"dtype: {dtype} has no KV format; give --dtype {', '.join(DTYPE_BYTES)}")
    return KVLayout(dtype, (_layer(text),) * layers)


def _layer(text: Any) -> LayerLayout:
    heads = _count(text, "num_attention_heads")
    if getattr(text, "kv_lora_rank", None) and getattr(text, "qk_nope_head_dim", None):
        # Latent attention: what the attention sees, and what is stored, is expanded to one key and value a head.
        k_dim = _count(text, "qk_nope_head_dim") + _count(text, "qk_rope_head_dim")
        return LayerLayout(heads, k_dim, _count(text, "v_head_dim"))
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or _count(text, "hidden_size") // heads
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        raise GeometryUnknown("num_key_value_heads, head_dim: differ between layers in a way that is not known here")
    return LayerLayout(kv_heads, head_dim, head_dim)


def _count(text: Any, field: str) -> int:
    value = getattr(text, field, None)
    if not isinstance(value, int) or value < 1:
        raise GeometryUnknown(f"{field}: the configuration says {value!r}; a positive number is needed")
    return value


def served_dtype(config: Any, path: Path, device: str) -> tuple[str, str]:
    """The dtype that a service on this machine takes for ``--dtype auto``, and why.

    Reads the configuration and the headers of the weights. Raises ``GeometryUnknown``.
    """
    from engine.model.dtype import choose_dtype  # torch takes a second, and only this command needs it here

    choice = choose_dtype(_stored_dtype(config, path), _parameters(config), device)
    return choice.dtype, choice.reason


def _stored_dtype(config: Any, path: Path) -> str:
    """The checkpoint's dtype as transformers finds it: the configuration's, else that of the first weights."""
    text = config.get_text_config()
    said = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    if said is not None:
        return str(said).removeprefix("torch.")
    file = next(iter(sorted(path.glob("*.safetensors"))), None) if path.is_dir() else None
    if file is None:
        return "float32"
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        stored = (weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118
        return next((STORED[dtype] for dtype in stored if dtype in STORED), "float32")


def _parameters(config: Any) -> int:
    """How many parameters a model of this configuration has; no memory is taken for them."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(config).num_parameters())
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        words = str(error).strip().split("\n")[0]
        raise GeometryUnknown(f"model: transformers makes no causal model of its configuration: {words}") from error
