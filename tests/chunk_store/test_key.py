"""Names of content and of KV: stable for ever, and different for everything that differs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunk_store.key import (
    TOKEN_ID_MAX,
    ChunkType,
    ModelIdentity,
    TokenizerIdentity,
    chunk_id,
    chunk_key,
    digest,
    pack_token_ids,
    unpack_token_ids,
)

MODEL, TOKENIZER = ModelIdentity("model"), TokenizerIdentity("tokenizer")


def test_names_do_not_change() -> None:
    """What is stored today is found tomorrow, by any process."""
    assert chunk_id(TOKENIZER, ChunkType.CODE, [1, 2]) == PINNED_ID
    key = chunk_key(MODEL, [], [1, 2])
    assert (key, chunk_key(MODEL, [key], [3], "salt")) == PINNED_KEYS
    script = "import tests.chunk_store.test_key as t; t.test_names_do_not_change()"
    if os.environ.get("PYTHONHASHSEED") != "7":
        environment = {**os.environ, "PYTHONHASHSEED": "7"}
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env=environment)


PINNED_ID = "0dc1614e533d1888e053a579497680f81ddcc9621c7eacc31f115445a4253c27"
PINNED_KEYS = (
    "d6583d7caa0b9c5b7a404d8d0e48c821bf6f681cc8e2eddd7e1ec6f12cb2b3fc",
    "54ec08ba79ec48a158b1391303ac939612fe16a3ab0186d1197e5ee85f454aeb",
)


def test_everything_that_differs_is_another_name() -> None:
    one, two = chunk_key(MODEL, [], [1]), chunk_key(MODEL, [], [2])
    keys = [
        one,
        two,
        chunk_key(ModelIdentity("other"), [], [1]),
        chunk_key(MODEL, [one], [1]),
        chunk_key(MODEL, [one, two], [1]),
        chunk_key(MODEL, [two, one], [1]),
        chunk_key(MODEL, [], [1], "salt"),
        chunk_key(MODEL, [], [1, 1]),
    ]
    ids = [chunk_id(TOKENIZER, type, [1]) for type in ChunkType] + [
        chunk_id(TokenizerIdentity("x"), ChunkType.CODE, [1])
    ]
    assert len(set(keys) | set(ids)) == len(keys) + len(ids)


@given(st.lists(st.binary(max_size=4), max_size=5), st.lists(st.binary(max_size=4), max_size=5))
def test_no_two_lists_of_fields_have_one_digest(one: list[bytes], other: list[bytes]) -> None:
    assert (digest("d", one) == digest("d", other)) == (one == other)
    assert digest("d", one) != digest("e", one)


@given(st.lists(st.integers(0, TOKEN_ID_MAX)))
def test_token_ids_survive_packing(token_ids: list[int]) -> None:
    assert unpack_token_ids(pack_token_ids(token_ids)) == tuple(token_ids)


@pytest.mark.parametrize("token_ids", [[-1], [TOKEN_ID_MAX + 1]])
def test_what_is_no_token_id_is_refused(token_ids: list[int]) -> None:
    with pytest.raises(ValueError, match="token_ids"):
        pack_token_ids(token_ids)


def test_a_cut_list_of_token_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes"):
        unpack_token_ids(b"12345")
