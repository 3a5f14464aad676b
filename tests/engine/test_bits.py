"""In EXACT the bits of stored KV, and with a fixed row multiple those of logits, depend on nothing but the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.model.borrowed import BorrowedModel
from engine.reuse import ReuseMode, key_composition
from engine.served import ServedModel, serve
from tests.architectures import build_named
from tests.engine.composer import Composer, Request

NAMES = ("qwen3-ratio4", "qwen2-ratio7", "llama-ratio8", "llama-ratio1")


def tokens(seed: int, count: int) -> list[int]:
    return torch.randint(0, 211, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=NAMES)
def served(request: pytest.FixtureRequest) -> ServedModel:
    return serve(BorrowedModel(build_named(request.param), name=request.param), piece_tokens=32)


def crowd() -> list[Request]:
    """32 requests: shared and private chunks, several lengths of query, three modes."""
    shared, pair = tokens(1, 70), [tokens(2, 33), tokens(3, 16)]
    requests: list[Request] = []
    for index in range(32):
        chunks = [shared, pair[index % 2], tokens(10 + index // 4, 5 + index)]
        mode = ("exact", "exact", "independent", "anchored")[index % 4]
        requests.append((chunks, tokens(100 + index, 1 + index * 3), mode))
    return requests


def test_logits_have_the_same_bits_alone_and_among_31_others(served: ServedModel) -> None:
    strict: Any = {"decode_buckets": (32,), "row_multiple": 32}
    together = Composer(served, pages=1024, **strict).generate(crowd(), 5)
    for request, (ids, logits) in list(zip(crowd(), together, strict=True))[::5]:
        alone_ids, alone = Composer(served, pages=1024, **strict).generate([request], 5)[0]
        assert alone_ids == ids
        assert torch.equal(alone, logits)


def test_default_buckets_give_the_same_bits_from_four_rows_on(served: ServedModel) -> None:
    """What ARCHITECTURE.md says of the CPU: only a batch of one takes other kernels."""
    together = Composer(served, pages=1024).generate(crowd(), 4)
    for size in (4, 7, 16):
        fewer = Composer(served, pages=1024).generate(crowd()[:size], 4)
        for (ids, logits), (fewer_ids, fewer_logits) in zip(together[:size], fewer, strict=True):
            assert ids == fewer_ids
            assert torch.equal(logits, fewer_logits)


@pytest.mark.parametrize("levels", [1, 2, 3, 8])
def test_levels_do_not_change_the_bits(served: ServedModel, levels: int) -> None:
    reference = Composer(served, pages=1024).generate(crowd(), 4)
    folded = Composer(served, pages=1024, max_cascade_levels=levels).generate(crowd(), 4)
    for (ids, logits), (folded_ids, folded_logits) in zip(reference, folded, strict=True):
        assert ids == folded_ids
        assert torch.equal(logits, folded_logits)


def test_stored_bytes_do_not_depend_on_what_was_computed_before(served: ServedModel) -> None:
    chunks = [tokens(1, 70), tokens(2, 33), tokens(3, 1)]

    def entry_bytes(composer: Composer) -> list[list[torch.Tensor]]:
        held, _ = composer.hold(chunks, "exact")
        return [[p.clone() for p in composer.pool.run_planes(c.run, c.tokens)] for c in held]

    fresh = entry_bytes(Composer(served, pages=512))
    busy = Composer(served, pages=512, page_size=8)
    busy.generate(crowd()[:8], 3)
    for mine, theirs in zip(fresh, entry_bytes(busy), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_repeated_chunk_in_exact_is_computed_once_for_each_context(served: ServedModel) -> None:
    chunk = tuple(tokens(1, 9))
    exact = key_composition(served.identity, [chunk, chunk], ReuseMode.EXACT)
    independent = key_composition(served.identity, [chunk, chunk], ReuseMode.INDEPENDENT)
    assert exact[0].key != exact[1].key
    assert independent[0].key == independent[1].key == exact[0].key
    assert [c.offset for c in independent] == [0, 9]
