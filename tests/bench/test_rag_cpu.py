"""The other side of ``bench.rag_cpu``: generate with a prefix cache gives what generate gives, and computes less."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from bench.models import FABLE
from bench.rag_cpu import PROMPTS_KEPT, PrefixCaching, common_prefix, theirs
from bench.traces import rag


def test_common_prefixes() -> None:
    assert common_prefix((), (1,)) == 0 == common_prefix((2, 1), (1, 1))
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2 and common_prefix((1, 2), (1, 2, 3)) == 2
    long = tuple(range(1000))
    assert [common_prefix(long, (*long[:n], -1)) for n in (0, 1, 500, 999, 1000)] == [0, 1, 500, 999, 1000]


def test_generate_with_a_prefix_cache_answers_like_generate() -> None:
    module = AutoModelForCausalLM.from_pretrained(FABLE, dtype=torch.float32, attn_implementation="sdpa")
    caching, draw = PrefixCaching(module), torch.Generator().manual_seed(1)
    start = tuple(torch.randint(100, 2000, (40,), generator=draw).tolist())
    prompts = [(*start, *torch.randint(100, 2000, (9,), generator=draw).tolist()) for _ in range(3)]
    for prompt in [*prompts, prompts[0]]:
        answer, times = caching.generate(prompt, 5)
        ids = torch.tensor([prompt])
        plain = module.generate(ids, attention_mask=torch.ones_like(ids), max_length=len(prompt) + 5, min_new_tokens=5)
        assert answer == plain[0, len(prompt) :].tolist() and len(times) == 5
    assert caching.prompt_tokens == 4 * 49 and caching.computed == 49 + 9 + 9 + 1
    for number in range(PROMPTS_KEPT):
        caching.generate((number + 100, 7), 1)
    assert len(caching.kept) == PROMPTS_KEPT
    found = theirs(rag(0.01).within(2048), module)
    assert 0 < found["computed"] < found["prompt_tokens"] and found["tokens_per_s"] > 0
