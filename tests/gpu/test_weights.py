"""Quantised checkpoints and adapters on the card: transformers' own logits, by the path that each can take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

pytest.importorskip("compressed_tensors")

from engine.check.start import rounding_ratio
from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.model.quantized import is_opaque
from engine.run.cuda.weights import FusedWeights
from engine.served import ServedModel, serve
from tests.engine.composer import Composer
from tests.gpu.engine_models import tokens
from tests.quantised import SCHEMES, compressed_dir, fp8_blocks_dir, plain_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("default"),  # of libraries in other versions than those of the lock
]

ROUNDED = [name for name, (_, activations) in SCHEMES.items() if activations]
SHAPE: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
ROUNDING_MAX = 2.5  # as the start check has it


@torch.inference_mode()
def check(served: ServedModel, reference: Any) -> None:
    """Greedy answers in every mode; EXACT is no further from transformers' logits than its rounding puts those.

    That is: from those of the same weights, rounding activations alike, in float32.
    """
    assert not any(served.refusals.values())
    chunks, query = [tokens(1, 17), tokens(2, 16), tokens(3, 33)], tokens(4, 9)
    composer = Composer(served)
    found = {mode: composer.generate([(chunks, query, mode)], 6)[0] for mode in ("exact", "anchored", "independent")}
    answer, logits = found["exact"]
    prompt = [token for chunk in chunks for token in chunk] + query
    ids = torch.tensor([prompt + answer[:-1]], device=served.borrowed.device)
    theirs = reference(ids).logits[0, -6:].float()
    exact = torch.nn.Module.float(reference)(ids).logits[0, -6:]
    ratio = rounding_ratio(logits.to(ids.device), theirs, exact)
    print(served.borrowed.name, served.borrowed.quantization, served.decision, f"rounding {ratio:.3g}")
    print({mode.value: (c.structure, c.rounding, c.kernels) for mode, c in served.checks.items()}, flush=True)
    assert ratio < ROUNDING_MAX


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_compressed_tensors_made(tmp_path: Path, scheme: str) -> None:
    folder = compressed_dir(tmp_path, scheme, **SHAPE)
    served = serve(BorrowedModel.load(str(folder), dtype="bfloat16", device="cuda", name=scheme))
    assert isinstance(served.weights, FusedWeights) == (scheme not in ROUNDED)
    given: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": "cuda"}}
    if "asymmetric" in scheme:
        given["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(folder, **given).eval()
    check(served, reference)


def test_blocks_of_fp8_are_served_or_the_package_of_their_kernels_is_named(tmp_path: Path) -> None:
    folder = fp8_blocks_dir(tmp_path, **SHAPE)
    try:
        served = serve(BorrowedModel.load(str(folder), dtype="bfloat16", device="cuda", name="fp8-blocks"))
    except ModelRefused as refused:
        print(refused)
        assert "kernels" in str(refused)
        return
    print("opaque", any(is_opaque(part) for part in served.borrowed.module.modules()))
    assert not any(served.refusals.values())
    print(served.decision, {mode.value: (c.structure, c.rounding) for mode, c in served.checks.items()})


def test_an_adapter_is_merged_on_the_card(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain_model("llama-ratio1", **SHAPE).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).to("cuda")

    torch.manual_seed(1)
    adapted = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "base")
    borrowed = BorrowedModel.load(path, dtype="bfloat16", device="cuda", lora=tmp_path / "adapter")
    served = serve(borrowed)
    assert isinstance(served.weights, FusedWeights)
    assert served.identity != serve(BorrowedModel(base(), name="base")).identity
    check(served, adapted.eval())


def test_a_tied_head_is_the_embeddings_in_memory(tmp_path: Path) -> None:
    model = plain_model("llama-ratio1", **SHAPE, tie_word_embeddings=True, vocab_size=384).to("cuda")
    weights = serve(BorrowedModel(model, name="tied")).weights
    assert isinstance(weights, FusedWeights) and weights.head.data_ptr() == weights.embedding.data_ptr()
