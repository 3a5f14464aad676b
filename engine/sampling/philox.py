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
Schedule = list[tuple[Any, Any]]  # a key for each round

ROUNDS = 10
FACTORS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Words, Words, Words, Words]:
    """Four words (uint64 below 2^32) for each counter; words of counters and keys are broadcast against each other."""
    words = np.broadcast_arrays(*(np.asarray(word, np.uint64) for word in (*counter, *key)))
    a, b, c, d = (word.copy() for word in words[:4])
    return _rounds((a, b, c, d), schedule(key))


def words_of(seeds: Words, positions: Words, tokens: Words) -> Words:
    """The random word of each token (n,) at a position (n,) for a seed (n,)."""
    parts = philox((tokens >> np.uint64(2), positions, 0, 0), halves(seeds))
    last = tokens & np.uint64(3)
    lower = np.where(last & np.uint64(1), parts[1], parts[0])
    return np.where(last & np.uint64(2), np.where(last & np.uint64(1), parts[3], parts[2]), lower)


def grid(positions: Words, counters: Words, keys: Schedule) -> tuple[Words, Words, Words, Words]:
    """As ``philox`` for counters (n,) of the first word and positions (rows, 1) of the second: words (rows, n).

    ``keys``: the schedule of keys (rows, 1). Two words of the counter are 0 and the second is one number a row, so that
    two rounds are next to nothing.
    """
    first = counters * FACTORS[0]
    c = first >> HALF ^ keys[0][1]
    second = c * FACTORS[1]
    single = (positions ^ keys[0][0]) * FACTORS[0]
    a = second >> HALF
    a ^= keys[1][0]
    c = (first & LOW) ^ (single >> HALF ^ keys[1][1])
    second &= LOW
    d = np.broadcast_to(single & LOW, a.shape).copy()
    return _rounds((a, second, c, d), keys[2:])


def schedule(key: tuple[Any, Any]) -> Schedule:
    """The keys of all rounds."""
    parts = tuple(np.asarray(part, np.uint64) for part in key)
    return [
        (parts[0] + np.uint64(turn * STEPS[0]) & LOW, parts[1] + np.uint64(turn * STEPS[1]) & LOW)
        for turn in range(ROUNDS)
    ]


def halves(seeds: Words) -> tuple[Words, Words]:
    """Seeds as keys."""
    return seeds & LOW, seeds >> HALF


def _rounds(words: tuple[Words, Words, Words, Words], keys: Schedule) -> tuple[Words, Words, Words, Words]:
    """One round for each of the keys, in place."""
    a, b, c, d = words
    first, second = np.empty_like(a), np.empty_like(a)
    for key in keys:
        np.multiply(a, FACTORS[0], out=first)
        np.multiply(c, FACTORS[1], out=second)
        np.right_shift(second, HALF, out=a)
        a ^= b
        a ^= key[0]
        np.right_shift(first, HALF, out=c)
        c ^= d
        c ^= key[1]
        np.bitwise_and(second, LOW, out=b)
        np.bitwise_and(first, LOW, out=d)
    return a, b, c, d
