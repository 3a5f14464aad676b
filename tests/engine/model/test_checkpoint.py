"""A checkpoint is loaded whole, in whatever files it lies, or refused; transformers would draw what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.checkpoint import _whole, dtype_name
from engine.served import look_into
from tests.architectures import build
from tests.models_for_tests import tiny_model_dir


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Puts tensors into a checkpoint, by names with ``__`` for dots; None takes one away."""
    path = folder / "model.safetensors"
    found = load_file(path) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: x for name, x in found.items() if x is not None}, path, metadata={"format": "pt"})


def test_a_checkpoint_that_lacks_weights_is_refused_by_their_names(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama", tokenizer=False)
    changed(folder, model__layers__1__mlp__up_proj__weight=None, model__norm__weight=None)
    with pytest.raises(ModelRefused, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight, which"):
        BorrowedModel.load(str(folder))


def test_of_many_that_are_missing_some_are_named(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama", tokenizer=False)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(ModelRefused, match=r"lacks model\.layers\.2\.\S+, \S+, \S+, \S+ and 5 more, which"):
        BorrowedModel.load(str(folder))


def test_a_head_of_its_own_that_is_missing_is_refused_and_a_tied_one_is_not(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path / "own", "llama", tokenizer=False, tie_word_embeddings=False)
    changed(folder, lm_head__weight=None)
    with pytest.raises(ModelRefused, match=r"lacks lm_head\.weight"):
        BorrowedModel.load(str(folder))
    tied = tiny_model_dir(tmp_path / "tied", "llama", tokenizer=False)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    module: Any = BorrowedModel.load(str(tied)).module
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama", tokenizer=False)
    changed(folder, model__norm__weight=torch.ones(7))
    with pytest.raises(ModelRefused, match=r"has model\.norm\.weight in another shape than its config\.json says"):
        BorrowedModel.load(str(folder))


def test_what_is_not_used_is_noted(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama", tokenizer=False)
    changed(folder, model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    assert BorrowedModel.load(str(folder)).notes == (
        "not used of the checkpoint: model.layers.0.self_attn.q_proj.bias",
    )


def test_packed_weights_that_the_configuration_does_not_explain_are_refused(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama", tokenizer=False)
    weight = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    changed(
        folder,
        model__layers__0__mlp__up_proj__weight=weight.to(torch.float8_e4m3fn),
        model__layers__0__mlp__up_proj__weight_scale=torch.ones(64, 1),
    )
    with pytest.raises(
        ModelRefused, match=r"up_proj\.weight_scale, of which its config\.json's quantization_config says nothing"
    ):
        BorrowedModel.load(str(folder))


def test_shards_and_files_of_pickle_hold_the_same_model(tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path / "one", "llama", tokenizer=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    places = [folder, tmp_path / "shards", tmp_path / "bin"]
    assert len({look_into(BorrowedModel.load(str(place))).identity for place in places}) == 1
    next(iter(sorted((tmp_path / "shards").glob("*.safetensors")))).unlink()
    with pytest.raises(ModelRefused, match="cannot be loaded"):
        BorrowedModel.load(str(tmp_path / "shards"))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_norms_that_a_checkpoint_has_in_float32_are_served_in_the_weights_dtype(tmp_path: Path, dtype: str) -> None:
    model = build("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    changed(tmp_path, model__norm__weight=torch.full((64,), 1.001))
    borrowed = BorrowedModel.load(str(tmp_path), dtype=dtype, device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    module: Any = borrowed.module
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16 if dtype != "auto" else torch.float32}
    assert torch.equal(module.model.norm.weight, reference.model.norm.weight.to(module.dtype))


def test_the_dtype_is_that_of_the_embeddings_not_of_the_first_tensor() -> None:
    model = build("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}).to(torch.bfloat16)
    model.register_parameter("early", torch.nn.Parameter(torch.ones(2)))
    assert next(model.parameters()).dtype == torch.float32
    assert dtype_name(model) == "bfloat16"


def test_tables_that_code_computes_may_be_missing() -> None:
    model = build("llama", {"num_attention_heads": 4, "num_key_value_heads": 2})
    model.register_buffer("table", torch.ones(2))
    info = {"missing_keys": {"table"}, "unexpected_keys": set(), "mismatched_keys": set()}
    assert _whole(model, info) == ("computed, since the checkpoint lacks them: table",)


def test_a_checkpoint_that_is_broken_is_refused(tmp_path: Path) -> None:
    path = tiny_model_dir(tmp_path, "qwen3", tokenizer=False)
    weights, config = path / "model.safetensors", path / "config.json"
    whole, fields = weights.read_bytes(), json.loads(config.read_text())
    for broken in (whole[:-100], b"garbage" * 50):
        weights.write_bytes(broken)
        with pytest.raises(ModelRefused, match="a file of it may be broken: SafetensorError"):
            BorrowedModel.load(str(path))
    weights.write_bytes(whole)
    for quantization in ("fp8", [4]):
        config.write_text(json.dumps(fields | {"quantization_config": quantization}))
        with pytest.raises(ModelRefused, match="cannot be loaded"):
            BorrowedModel.load(str(path))
