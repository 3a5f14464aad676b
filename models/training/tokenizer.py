"""The small model's tokenizer: byte-level BPE trained on stories, with the turn markup as special tokens.

Byte level means that any UTF-8 text round-trips. Invented names never repeat, so the merges they get
are syllables, and a name is always several tokens. The chat template only concatenates turns; it is
*separable*: rendering the messages one by one and joining the token ids gives the ids of the whole.
"""

import random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models.training.data import END, Shape, make_story

ROLES = ("system", "document", "user", "assistant")
PAD = "<pad>"
SPECIAL_TOKENS = (PAD, END, *(f"<|{role}|>" for role in ROLES))
VOCABULARY = 2048
POSITIONS_MAX = 8192

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'document', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<end>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(seed: int, stories: int = 4000) -> Tokenizer:
    """A BPE tokenizer from the text of this many stories."""
    rng = random.Random(f"tokenizer {seed}")
    drawn = (make_story(rng, Shape(documents=3, facts=12, fillers=6)) for _ in range(stories))
    texts = [message["content"] for story in drawn for message in story.messages()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer as `transformers` saves and loads it, chat template included."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS_MAX,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
