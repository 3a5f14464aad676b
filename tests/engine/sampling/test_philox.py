"""Philox4x32-10 gives the words that its authors publish."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.sampling.philox import Words, grid, halves, philox, schedule, words_of

PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
KNOWN = [  # kat_vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: Any, key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in philox(counter, key)) == expected


def words(seed: int, position: int, tokens: int) -> Words:
    seeds, positions = (np.full(tokens, value, np.uint64) for value in (seed, position))
    return words_of(seeds, positions, np.arange(tokens, dtype=np.uint64))


def test_the_word_of_a_token_follows_from_seed_position_and_token_alone() -> None:
    many = words(2**40 + 7, 123456, 1001)
    assert np.array_equal(words(2**40 + 7, 123456, 17), many[:17])
    expected = philox((10, 123456, 0, 0), (7, 2**8))
    assert [int(word) for word in expected] == many[40:44].tolist()
    assert not np.any(words(2**40 + 7, 123457, 1001) == many)
    assert not np.any(words(7, 123456, 1001) == many)


def test_a_grid_of_rows_has_the_words_of_each() -> None:
    seeds, positions = [3, 2**62 + 5, 2**32 - 1], [0, 70000, 2**32 - 1]
    keys = schedule(halves(np.array(seeds, np.uint64)[:, None]))
    parts = grid(np.array(positions, np.uint64)[:, None], np.arange(300, dtype=np.uint64), keys)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        assert np.array_equal(np.stack([part[row] for part in parts], axis=1).reshape(-1), words(seed, position, 1200))
