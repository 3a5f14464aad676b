"""Pieces of a text have its tokens, whatever a cut breaks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer_for_tests import byte_level_tokenizer, sentencepiece_like
from text.chat.pieces import pieces
from text.codec import TextCodec

BYTES, WORDS = TextCodec(byte_level_tokenizer(), "bytes"), TextCodec(sentencepiece_like(), "words")
TEXT = "<|user|>Where is Crystalton?<end><|assistant|>In Nebulonia.<end><|user|>Why?<end>"


def test_cuts_before_special_tokens_hold() -> None:
    cuts = [TEXT.index("<|assistant|>"), TEXT.rindex("<|user|>")]
    found = pieces(BYTES, TEXT, cuts)
    assert [piece.start for piece in found] == [0, *cuts]
    assert [piece.token_ids for piece in found] == [BYTES.encode(TEXT[p.start : p.end]) for p in found]


def test_a_cut_that_breaks_a_token_is_joined() -> None:
    inside = TEXT.index("stalton")
    cuts = [inside, TEXT.index("<|assistant|>"), TEXT.rindex("<|user|>")]
    assert BYTES.encode(TEXT[:inside]) + BYTES.encode(TEXT[inside:]) != BYTES.encode(TEXT)
    assert [piece.start for piece in pieces(BYTES, TEXT, cuts)] == [0, *cuts[1:]]
    assert [piece.start for piece in pieces(BYTES, TEXT, [cuts[1], cuts[2], cuts[2] + 3])] == [0, cuts[1], cuts[2]]
    assert len(pieces(BYTES, "Crystalton", [3])) == 1


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(["<|user|>", "<end>", "Crystalton", " ", "a", "é", "\n", "<s>", "</s>", "▁", "stone"]),
        max_size=12,
    ),
    places=st.lists(st.integers(1, 60), max_size=6),
    words=st.booleans(),
)
def test_all_pieces_together_are_the_text(parts: list[str], places: list[int], words: bool) -> None:
    text, codec = "".join(parts), WORDS if words else BYTES
    cuts = sorted({place for place in places if place < len(text)})
    found = pieces(codec, text, cuts)
    assert tuple(token for piece in found for token in piece.token_ids) == codec.encode(text)
    assert "".join(text[piece.start : piece.end] for piece in found) == text
    assert {piece.start for piece in found} <= {0, *cuts}
