"""EXACT on the device: the same bits of KV and logits cold, warm, reloaded, alone and among others."""

from __future__ import annotations

import pytest
import torch

from tests.engine.composer import Composer, Request
from tests.gpu.engine_models import served, tokens

pytestmark = pytest.mark.gpu

NAMES = ("qwen3-ratio4-128", "llama-ratio8-64")


def crowd() -> list[Request]:
    """32 requests: shared and private chunks, several lengths of query, three modes."""
    shared, pair = tokens(1, 70), [tokens(2, 33), tokens(3, 16)]
    requests: list[Request] = []
    for index in range(32):
        chunks = [shared, pair[index % 2], tokens(10 + index // 4, 5 + index)]
        mode = ("exact", "exact", "independent", "anchored")[index % 4]
        requests.append((chunks, tokens(100 + index, 1 + index * 3), mode))
    return requests


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_alone_and_among_31_others(name: str) -> None:
    together = Composer(served(name), pages=1024).generate(crowd(), 5)
    composer = Composer(served(name), pages=1024)
    for request, (ids, logits) in list(zip(crowd(), together, strict=True))[::5]:
        alone_ids, alone = composer.generate([request], 5)[0]
        assert alone_ids == ids
        assert torch.equal(alone, logits)


@pytest.mark.parametrize("name", NAMES)
def test_levels_do_not_change_the_bits(name: str) -> None:
    reference = Composer(served(name), pages=1024).generate(crowd(), 4)
    for levels in (1, 8):
        folded = Composer(served(name), pages=1024, max_cascade_levels=levels).generate(crowd(), 4)
        for (ids, logits), (folded_ids, folded_logits) in zip(reference, folded, strict=True):
            assert ids == folded_ids
            assert torch.equal(logits, folded_logits)


@pytest.mark.parametrize("name", NAMES)
def test_kv_bits_do_not_depend_on_what_was_computed_before_or_where(name: str) -> None:
    chunks = [tokens(1, 70), tokens(2, 333), tokens(3, 1)]

    def entry(composer: Composer) -> list[list[torch.Tensor]]:
        held, _ = composer.hold(chunks, "exact")
        return [[part.cpu() for part in composer.pool.run_planes(c.run, c.tokens)] for c in held]

    fresh = entry(Composer(served(name), pages=512))
    busy = Composer(served(name), pages=512)
    busy.generate(crowd()[:8], 3)
    for mine, theirs in zip(fresh, entry(busy), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("mode", ["exact", "anchored", "independent"])
@pytest.mark.parametrize("name", NAMES)
def test_cold_warm_and_reloaded_answers_have_the_same_bits(name: str, mode: str) -> None:
    request: Request = ([tokens(1, 70), tokens(2, 333)], tokens(3, 20), mode)
    composer = Composer(served(name), pages=512)
    cold = composer.generate([request], 4)[0]
    warm = composer.generate([request], 4)[0]
    held, _ = composer.hold(request[0], mode)
    kept = [[part.cpu() for part in composer.pool.run_planes(c.run, c.tokens)] for c in held]
    for chunk, parts in zip(held, kept, strict=True):
        for part, saved in zip(composer.pool.run_planes(chunk.run, chunk.tokens), parts, strict=True):
            part.zero_()
            part.copy_(saved)
        composer.residents.release(chunk)
    reloaded = composer.generate([request], 4)[0]
    for other in (warm, reloaded):
        assert other[0] == cold[0]
        assert torch.equal(other[1], cold[1])


def test_an_answer_decoded_has_the_bits_of_the_same_tokens_prefilled() -> None:
    """Teacher-forced: the tokens of an answer as part of another request's query give the logits they were drawn by."""
    composer = Composer(served(NAMES[0]), pages=512)
    chunks, query = [tokens(1, 70), tokens(2, 333)], tokens(3, 20)
    for mode in ("exact", "anchored", "independent"):
        ids, logits = composer.generate([(chunks, query, mode)], 6)[0]
        for count in range(1, 6):
            again, told = composer.generate([(chunks, query + ids[:count], mode)], 1)[0]
            assert again == ids[count : count + 1]
            assert torch.equal(told[0], logits[count])
