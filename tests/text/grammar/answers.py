"""Answers drawn by grammars without a model, with tokenizers of each kind."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from tests.tokenizer_for_tests import VOCABULARY, byte_level_tokenizer, sentencepiece_like
from text.codec import TextCodec
from text.errors import TextRefused
from text.grammar.compiler import GrammarCompiler
from text.grammar.forms import Form
from text.grammar.matcher import Bits, Matcher

BYTE_LEVEL = TextCodec(byte_level_tokenizer(), "byte level")
PIECES = TextCodec(sentencepiece_like(), "pieces")
END = {"byte level": 1, "pieces": 2}


def compiler(codec: TextCodec = BYTE_LEVEL, vocabulary: int = VOCABULARY, ends: Any = None) -> GrammarCompiler:
    return GrammarCompiler(codec, vocabulary=vocabulary, end_token_ids=[END[codec.name]] if ends is None else ends)


def mask(matcher: Matcher, vocabulary: int = VOCABULARY) -> list[int]:
    """The tokens that may come."""
    row: Bits = np.full(-(-vocabulary // 32), -1, np.int32)
    matcher.fill(row)
    return [int(token) for token in np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))]


def answer(matcher: Matcher, seed: int, *, most: int = 400, vocabulary: int = VOCABULARY) -> list[int]:
    """Tokens drawn evenly among those that may come, until nothing more can."""
    source, tokens = random.Random(seed), list[int]()
    while not matcher.is_over and len(tokens) < most:
        tokens.append(source.choice(mask(matcher, vocabulary)))
        matcher.accept(tokens[-1])
    return tokens


def refusal(form: Form, source: str) -> str:
    """Why a grammar is refused."""
    with pytest.raises(TextRefused) as caught:
        compiler().compile(form, source)
    return str(caught.value)
