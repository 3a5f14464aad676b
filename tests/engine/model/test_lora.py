"""A merged adapter answers as peft's own model does, is part of the identity, and is refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from engine.model import lora
from engine.model.borrowed import BorrowedModel, ModelRefused
from engine.served import look_into, serve
from tests.engine.composer import Composer
from tests.models_for_tests import tiny_model_dir
from tests.quantised import compressed_dir

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model with `tie_word_embeddings=True`",
    "ignore:Model has `tie_word",
    "ignore:`is_gradient_checkpointing`",
    "ignore:Setting `save_emb",
)

CHUNKS, QUERY = [[7, 8, 9, 10, 11], [30, 31]], [50, 51, 52]
PROMPT = [token for chunk in CHUNKS for token in chunk] + QUERY
KINDS: dict[str, dict[str, Any]] = {
    "every linear layer": {},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "the tied head": {"target_modules": ["q_proj", "lm_head"]},
    "the tied embeddings": {"target_modules": ["v_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [7, 51]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "biases": {"bias": "all"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("base"), "qwen2", tokenizer=False, initializer_range=0.3)


def adapter_dir(path: Path, base: Path, *, seed: int = 1, **config: Any) -> Path:
    """A random adapter of peft for a model directory."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(path)
    return path


def pefts_own(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_answers_as_pefts_model_does(tmp_path: Path, base: Path, kind: str) -> None:
    adapter = adapter_dir(tmp_path, base, **KINDS[kind])
    borrowed = BorrowedModel.load(str(base), lora=adapter)
    assert borrowed.adapter.startswith("rank ")
    theirs = pefts_own(base, adapter)
    with torch.inference_mode():
        ours, expected, plain = (
            model(torch.tensor([PROMPT])).logits
            for model in (borrowed.module, theirs, AutoModelForCausalLM.from_pretrained(base))
        )
    assert float((ours - expected).abs().max()) < 1e-4 * float(expected.std())
    assert float((plain - expected).abs().max()) > 0.05 * float(expected.std())
    module: Any = borrowed.module
    tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert tied == (kind not in ("a head of its own", "the tied head", "the tied embeddings"))


def test_served_tokens_are_those_that_peft_generates(tmp_path: Path, base: Path) -> None:
    adapter = adapter_dir(tmp_path, base)
    served = serve(BorrowedModel.load(str(base), lora=adapter))
    assert not any(served.refusals.values())
    ((tokens, _),) = Composer(served).generate([(CHUNKS, QUERY, "exact")], 8)
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert tokens == pefts_own(base, adapter).generate(input_ids=torch.tensor([PROMPT]), **asked)[0, -8:].tolist()


def test_an_adapter_is_part_of_the_models_identity_by_its_content(tmp_path: Path, base: Path) -> None:
    adapters = [None, adapter_dir(tmp_path / "a", base), adapter_dir(tmp_path / "b", base, seed=2)]
    adapters.append(adapter_dir(tmp_path / "elsewhere" / "a", base))
    none, a, b, again = (look_into(BorrowedModel.load(str(base), lora=each)).identity for each in adapters)
    assert a == again and len({none, a, b}) == 3


def test_a_base_whose_weights_were_packed_takes_one_and_one_that_rounds_activations_does_not(tmp_path: Path) -> None:
    packed, rounded = (compressed_dir(tmp_path / scheme, scheme) for scheme in ("w4a16", "fp8-dynamic"))
    adapter = adapter_dir(tmp_path / "adapter", tiny_of(tmp_path))
    borrowed = BorrowedModel.load(str(packed), dtype="float32", lora=adapter)
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    with torch.inference_mode():
        theirs(torch.tensor([PROMPT]))  # unpacks it
        expected = PeftModel.from_pretrained(theirs, adapter).eval()(torch.tensor([PROMPT])).logits
        ours = borrowed.module(torch.tensor([PROMPT])).logits
    assert float((ours - expected).abs().max()) < 1e-4 * float(expected.std())
    with pytest.raises(ModelRefused, match=r"lora: .*q_proj is quantised and stays so"):
        BorrowedModel.load(str(rounded), dtype="float32", lora=adapter)


def tiny_of(tmp_path: Path) -> Path:
    """A plain model of the geometry of ``compressed_dir``'s."""
    from tests.quantised import plain_model

    plain_model("llama-ratio1").float().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"num_hidden_layers": 1}, "which the model has no place for"),
        ({"num_hidden_layers": 3}, "which would be random numbers"),
        ({"hidden_size": 64}, "size mismatch for"),
    ],
)
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, base: Path, other: dict[str, Any], words: str) -> None:
    adapter = adapter_dir(tmp_path / "adapter", base, target_modules=["q_proj", "down_proj"])
    model = tiny_model_dir(tmp_path / "other", "qwen2", tokenizer=False, **other)
    with pytest.raises(ModelRefused, match=f"lora: the adapter .* does not fit the model: .*{words}"):
        BorrowedModel.load(str(model), lora=adapter)
    layers = tiny_model_dir(tmp_path / "gpt", "gpt_neox", tokenizer=False)
    with pytest.raises(ModelRefused, match="not found in the base model"):
        BorrowedModel.load(str(layers), lora=adapter)


def test_what_is_no_adapter_to_merge_is_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**fields: Any) -> str:
        (tmp_path / lora.CONFIGURATION).write_text(json.dumps(fields))
        with pytest.raises(ModelRefused) as refused:
            BorrowedModel.load("no such model", lora=tmp_path)
        return str(refused.value)

    with pytest.raises(ModelRefused, match=r"lora: .* is no directory with an adapter_config\.json"):
        BorrowedModel.load("no such model", lora=tmp_path)
    assert "is of type PREFIX_TUNING; only LORA is merged" in said(peft_type="PREFIX_TUNING")
    assert "acts from some tokens on" in said(peft_type="LORA", alora_invocation_tokens=[1])
    assert "has no adapter_model.safetensors" in said(peft_type="LORA")
    (tmp_path / lora.WEIGHTS[0]).touch()
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    assert "lora: adapters need peft: pip install 'cairn[lora]'" in said(peft_type="LORA")
    for text, words in (("{", "is not JSON"), ("[1, 2]", "is no JSON object")):
        (tmp_path / lora.CONFIGURATION).write_text(text)
        with pytest.raises(ModelRefused, match=words):
            BorrowedModel.load("no such model", lora=tmp_path)


def test_an_adapter_whose_file_is_cut_off_is_refused(tmp_path: Path, base: Path) -> None:
    file = adapter_dir(tmp_path, base) / lora.WEIGHTS[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelRefused, match=r"lora: the adapter .* does not fit the model: .*not fully covered"):
        BorrowedModel.load(str(base), lora=tmp_path)
