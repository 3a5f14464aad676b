"""The tokenizer of the models in ``tests.models_for_tests``: a byte-level BPE with four turn markers."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROLES = ("system", "document", "user", "assistant")
SPECIAL_TOKENS = ("<pad>", "<end>", *(f"<|{role}|>" for role in ROLES))
VOCABULARY = 384

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'document', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<end>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

TEXT_TO_LEARN = (
    "The town of Crystalton is located in Nebulonia.",
    "Where is Crystalton located? Crystalton is located in Nebulonia.",
    "A cairn is a heap of stones that marks a place; the stones are carried there one by one.",
)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``VOCABULARY`` tokens with ``CHAT_TEMPLATE``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT_TO_LEARN, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Pieces with a leading-space mark and byte tokens, decoded as Llama 2's tokenizer does."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b", "▁stone", "é"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
