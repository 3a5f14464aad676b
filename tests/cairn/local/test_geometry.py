"""KV geometry out of configurations, and a refusal for what a configuration does not say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cairn.local.geometry import GeometryUnknown, layout_from_config, read_config
from chunk_store.layout import LayerLayout


def config(**fields: Any) -> Any:
    text = SimpleNamespace(**{"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64, **fields})
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("fields", "layer"),
    [
        ({}, LayerLayout(8, 8, 8)),
        ({"num_key_value_heads": 2}, LayerLayout(2, 8, 8)),
        ({"num_key_value_heads": 2, "head_dim": 32}, LayerLayout(2, 32, 32)),
        (
            {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6},
            LayerLayout(8, 12, 6),
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, LayerLayout(8, 8, 8)),
    ],
)
def test_layers_are_what_the_configuration_says(fields: dict[str, Any], layer: LayerLayout) -> None:
    layout = layout_from_config(config(**fields), "bfloat16")
    assert layout.layers == (layer, layer) and layout.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("fields", "dtype", "words"),
    [
        ({"num_hidden_layers": None}, "float32", "num_hidden_layers: the configuration says None"),
        ({"num_attention_heads": 0}, "float32", "num_attention_heads"),
        ({"hidden_size": "64"}, "float32", "hidden_size"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "float32", "layer_types: .*linear_attention"),
        ({"num_key_value_heads": [1, 2]}, "float32", "num_key_value_heads, head_dim: differ between layers"),
        ({}, "int4", "dtype: int4 has no KV format; give --dtype"),
    ],
)
def test_what_is_not_known_is_named(fields: dict[str, Any], dtype: str, words: str) -> None:
    with pytest.raises(GeometryUnknown, match=words):
        layout_from_config(config(**fields), dtype)


def test_a_configuration_is_a_file_or_in_a_directory(tmp_path: Path) -> None:
    with pytest.raises(GeometryUnknown, match="does not exist"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(GeometryUnknown, match="not a configuration"):
        read_config(file)
    fields = {"model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}
    file.write_text(json.dumps(fields))
    for path in (tmp_path, file):
        assert len(layout_from_config(read_config(path)).layers) == 3
