"""Philox4x32-10, a random number generator without state (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011): a key and a counter give four random words, whoever asks, whenever.

Here the key is a request's seed and the counter says which token of the vocabulary at which position of the sequence,
so that a draw is the same in any batch, in any slot and on any device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]  # each below 2^32

ROUNDS = 10
FACTORS = (0xD2511F53, 0xCD9E8D57)
STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four words (uint64 below 2^32) for each counter; the counter's words are broadcast against each other."""
    a, b, c, d = (np.asarray(word, np.uint64) for word in counter)
    for turn in range(ROUNDS):
        first, second = a * np.uint64(FACTORS[0]), c * np.uint64(FACTORS[1])
        a = second >> HALF ^ b ^ np.uint64((key[0] + turn * STEPS[0]) % 2**32)
        c = first >> HALF ^ d ^ np.uint64((key[1] + turn * STEPS[1]) % 2**32)
        b, d = second & LOW, first & LOW
    return a, b, c, d


def words(seed: int, position: int, tokens: int) -> Words:
    """The random words (tokens,) of the tokens 0 .. tokens - 1 at a position."""
    counters = np.arange(-(-tokens // 4), dtype=np.uint64)
    parts = philox((counters, position, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack([np.broadcast_to(part, counters.shape) for part in parts], axis=1).reshape(-1)[:tokens]
