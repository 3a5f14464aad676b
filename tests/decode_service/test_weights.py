"""Quantised models and models with an adapter, through both services: transformers' and peft's own tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import cairn
from serving.process.loading import Loaded, load
from serving.process.options import ServiceOptions
from tests import oracle
from tests.decode_service.models import model_dir, tokens
from tests.decode_service.pair import pair
from tests.engine.model.test_lora import adapter_dir
from tests.quantised import compressed_dir, fp8_blocks_dir

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")

CHUNKS, QUERY = [tokens(1, 17), tokens(2, 16), tokens(3, 33)], tokens(4, 9)
MODES = ("exact", "anchored", "independent")


def started(folder: Path, lora: Path | None = None, dtype: str = "float32") -> Loaded:
    options = ServiceOptions(model=str(folder), store="", model_name="tiny", prefill_tokens_max=64, dtype=dtype)
    return load(replace(options, lora=lora))


def check(folder: Path, reference: Any, store: Path, lora: Path | None = None) -> None:
    """Cold, warm and from the store the same tokens: those that the reference picks, in every mode."""
    with pair(started(folder, lora), started(folder, lora), store) as services:
        for mode in MODES:
            expected, _ = oracle.greedy(reference, CHUNKS, QUERY, mode, 6)
            for _ in range(2):
                assert list(services.generate([*CHUNKS, QUERY], 6, reuse=mode).token_ids) == expected
            services.forget()
            again = services.generate([*CHUNKS, QUERY], 6, reuse=mode)
            assert list(again.token_ids) == expected
            assert {segment.source for segment in again.reuse.segments[:3]} == {"store"}
        services.check_idle()


@pytest.mark.parametrize("scheme", ["w4a16", "fp8-blocks"])
def test_packed_weights_through_both_services(tmp_path: Path, scheme: str) -> None:
    folder = tmp_path / "model"
    if scheme == "fp8-blocks":
        fp8_blocks_dir(folder, "qwen3-ratio2")
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").float().eval()
    else:
        compressed_dir(folder, scheme, "llama-ratio8")
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    check(folder, reference, tmp_path / "store")


def test_an_adapter_through_both_services_and_one_service_without_it(tmp_path: Path) -> None:
    folder = model_dir(tmp_path / "model", "llama-ratio8")
    adapter = adapter_dir(tmp_path / "adapter", folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain, _ = oracle.greedy(base.eval(), CHUNKS, QUERY, "exact", 6)
    reference: Any = PeftModel.from_pretrained(base, adapter).eval()
    expected, _ = oracle.greedy(reference.base_model.model, CHUNKS, QUERY, "exact", 6)
    assert plain != expected
    check(folder, reference.base_model.model, tmp_path / "store", adapter)
    with pair(started(folder, adapter), started(folder), tmp_path / "store") as services:
        with pytest.raises(cairn.Unsupported, match="another model identity"):
            services.generate([*CHUNKS, QUERY])
        found = services.generate([*CHUNKS, QUERY], 6, cache="bypass")
        assert list(found.token_ids) == plain
        services.check_idle()
