"""What the decode service says about the bits of its answers, and what ``--strict`` still does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from decode_service.options import DecodeOptions
from decode_service.same_bits import needs_one_size, same_bits
from engine.check.rows import ProductRows, RowBits
from engine.run.backends import CASCADE, FLASHINFER, TORCH
from engine.run.cuda.products import Way
from tests.decode_service.models import loaded
from tests.decode_service.pair import pair
from tests.fakes import small_pool

EQUAL = RowBits((ProductRows("qkv"), ProductRows("o")))
PINNED = RowBits((ProductRows("qkv"), ProductRows("o", (1, 2), Way(8))))
UNEQUAL = RowBits((ProductRows("qkv"), ProductRows("o", (1, 2), Way(256, 256), (2,))))


def options(**given: Any) -> DecodeOptions:
    return DecodeOptions(**{"model": "m", "store": "file:///s", "prefill": "127.0.0.1:1", "threads": 1, **given})


@pytest.mark.parametrize(("given", "found", "always", "one_size", "words"), [
    ({}, None, False, False, "--strict prevents it"),
    ({"strict": True}, None, True, True, "padded to 32 rows"),
    ({"strict": True, "threads": 2}, None, False, True, "--threads 1"),
    ({"strict": True, "threads": 2, "device": "cuda"}, None, True, True, "padded to 32 rows"),
    ({"device": "cuda"}, EQUAL, True, False, "rows of qkv, o have the same bits at 1 to 1024 rows"),
    ({"device": "cuda", "strict": True}, EQUAL, True, False, "rows; --strict has nothing to add"),
    ({"device": "cuda", "strict": True}, PINNED, True, False, "o would differ at 1, 2 rows and is computed with"),
    ({"device": "cuda"}, UNEQUAL, False, False, "a row of o depends on its place"),
    ({"device": "cuda", "strict": True}, UNEQUAL, False, True, "a row of o depends on its place"),
])  # fmt: skip
def test_what_is_said(given: dict[str, Any], found: RowBits | None, always: bool, one_size: bool, words: str) -> None:
    said = same_bits(options(**given), found, TORCH if found is None else CASCADE, True)
    assert said.always == always and words in said.reason
    assert needs_one_size(options(**given), found) == one_size


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_is_promised_over_flashinfer(strict: bool) -> None:
    said = same_bits(options(device="cuda", strict=strict), None, FLASHINFER, True)
    assert not said.always and "FlashInfer splits keys" in said.reason


@pytest.mark.parametrize("strict", [False, True])
def test_nothing_is_promised_where_rows_depend_on_others(strict: bool) -> None:
    said = same_bits(options(strict=strict), None, TORCH, False)
    assert not said.always and "products of experts" in said.reason
    assert same_bits(options(strict=strict), EQUAL, CASCADE, True).always


def test_clients_are_told(folder: Path, tmp_path: Path) -> None:
    """As a card's service would be whose products had to be pinned."""
    here = loaded(folder, "decode")
    there = dataclasses.replace(here, served=dataclasses.replace(here.served, row_bits=PINNED))
    with pair(loaded(folder, "prefill"), there, tmp_path / "store", strict=True) as services:
        loads = services.client.loads()
    assert loads.same_bits and loads.same_bits_reason == f"{PINNED.reason}; --strict has nothing to add"


def test_a_runner_gets_the_buckets_that_are_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, given = loaded(folder, "decode").served, []
    monkeypatch.setattr("engine.served.make_runner", lambda *_, **options: given.append(options))
    for found in (None, EQUAL, PINNED, UNEQUAL):
        dataclasses.replace(served, row_bits=found).make_runner(small_pool())
    assert [options.get("row_buckets") for options in given] == [None, None, None, UNEQUAL.buckets]
