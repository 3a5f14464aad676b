"""A text cut into pieces whose tokens are those of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from text.codec import TextCodec


@dataclass(frozen=True)
class Piece:
    """``text[start:end]`` and its tokens."""

    start: int
    end: int
    token_ids: tuple[int, ...]


def pieces(codec: TextCodec, text: str, cuts: Sequence[int]) -> list[Piece]:
    """``text`` cut at ``cuts`` (increasing, inside of it); the tokens of all pieces together are those of ``text``.

    Each is tokenized by itself. From the first to the last one whose tokens are not found in those of the whole, they
    are one piece; were it a single one, it takes in its neighbour: a cut beside it is no good.
    """
    whole = codec.encode(text)
    apart = [Piece(start, end, codec.encode(text[start:end])) for start, end in pairwise([0, *cuts, len(text)])]
    left, at = 0, 0  # pieces that agree from the beginning, and where they end in ``whole``
    while left < len(apart) and _stands(apart[left], whole, at):
        at += len(apart[left].token_ids)
        left += 1
    if left == len(apart) and at == len(whole):
        return apart
    left = min(left, len(apart) - 1)
    right, end = len(apart), len(whole)  # and those that agree from the end
    while right > left + 1 and _stands(apart[right - 1], whole, end - len(apart[right - 1].token_ids)):
        right -= 1
        end -= len(apart[right].token_ids)
    if left and right - left == 1:
        left -= 1
    elif right - left == 1 and right < len(apart):
        end += len(apart[right].token_ids)
        right += 1
    begins = sum(len(piece.token_ids) for piece in apart[:left])
    joined = Piece(apart[left].start, apart[right - 1].end, whole[begins:end])
    return [*apart[:left], joined, *apart[right:]]


def _stands(piece: Piece, whole: Sequence[int], at: int) -> bool:
    return at >= 0 and tuple(whole[at : at + len(piece.token_ids)]) == piece.token_ids
