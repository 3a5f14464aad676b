"""Log-probabilities of prompts through the services: those of transformers' eager attention under the mode's mask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import cairn
from tests import oracle
from tests.decode_service.models import loaded, model_dir, oracle_model, tokens
from tests.decode_service.packing import PackingRunner, packing
from tests.decode_service.pair import Pair, pair

MODES = ("exact", "anchored", "independent")
OTHERS = ("gemma2-softcap", "cohere-interleaved", "granite")  # whose heads do something of their own
MORE = ("llama-ratio8", "qwen2-ratio7", "phi3", "gpt-neox", "stablelm", "gemma3-two-ropes", "gpt2-learned-positions")
CHUNKS, QUERY = [tokens(401, 30), tokens(402, 70), tokens(403, 1), tokens(401, 30)], tokens(404, 9)


@pytest.fixture(scope="module", params=["packed", "stepwise"])
def services(request: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model, store = loaded(folder, "decode"), tmp_path_factory.mktemp("scored")
    decode = packing(model) if request.param == "packed" else model
    with pair(loaded(folder, "prefill"), decode, store) as running:
        yield running
        running.check_idle()


@torch.inference_mode()
def expected(model: PreTrainedModel, chunks: list[list[int]], query: list[int], mode: str) -> list[torch.Tensor | None]:
    """Of each token the log-probabilities (vocabulary,) that the row directly before it gives, if it may see that."""
    ids, positions, allowed = oracle.rows_of(chunks, query, mode)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo(torch.float32).min)[None, None]
    given = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions]), "attention_mask": mask}
    logprobs = model(**given, use_cache=False).logits[0].float().log_softmax(-1)
    model.set_attn_implementation(before)
    found: list[torch.Tensor | None] = []
    row = 0
    for index, part in enumerate([*chunks, query]):
        row += len(chunks[0]) if mode == "anchored" and 1 < index < len(chunks) else 0  # a copy of the first
        for _ in part:
            found.append(logprobs[row - 1] if row and allowed[row, row - 1] else None)
            row += 1
    assert row == len(ids)
    return found


def check(result: cairn.Result, model: PreTrainedModel, chunks: list[list[int]], query: list[int], mode: str) -> None:
    prompt = [token for part in (*chunks, query) for token in part]
    assert [each.token_id for each in result.prompt_logprobs] == prompt
    for each, row in zip(result.prompt_logprobs, expected(model, chunks, query, mode), strict=True):
        if row is None:
            assert each.logprob is None and not each.top
            continue
        assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-4)
        values = row.topk(3)
        assert [value for _, value in each.top] == pytest.approx(values.values.tolist(), abs=1e-4)
        assert [token for token, _ in each.top] == values.indices.tolist()
    usage = result.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens) == (len(prompt), 0, len(prompt))
    assert {segment.source for segment in result.reuse.segments} == {"computed"}


@pytest.mark.parametrize("mode", MODES)
def test_they_are_those_of_the_modes_mask_and_the_answer_is_the_same(services: Pair, folder: Path, mode: str) -> None:
    options: dict[str, Any] = {"reuse": mode, "logprobs": True}
    warm = services.generate([*CHUNKS, QUERY], **options)
    warm = services.generate([*CHUNKS, QUERY], **options)
    assert warm.usage.cached_tokens == 131
    result = services.generate([*CHUNKS, QUERY], prompt_logprobs=3, **options)
    check(result, oracle_model(folder), CHUNKS, QUERY, mode)
    assert result.token_ids == warm.token_ids
    if isinstance(services.decode.worker.runner, PackingRunner):  # whose rows' bits depend on the others on a CPU
        assert result.logprobs == pytest.approx(warm.logprobs, abs=1e-5)
    else:
        assert result.logprobs == warm.logprobs
    none = [place for place, each in enumerate(result.prompt_logprobs) if each.logprob is None]
    assert none == ([0, 30, 100, 101] if mode == "independent" else [0])
    again = services.generate([*CHUNKS, QUERY], **options)
    assert again.usage.cached_tokens == 131, "what was cached stays"


def test_prompts_of_every_shape(services: Pair, folder: Path) -> None:
    """No chunk; one token; a prompt that is one chunk's name; a tail of several pieces."""
    document = services.client.prefill(CHUNKS[1])
    for parts, chunks, query in (
        ([QUERY], [], QUERY),
        ([QUERY[:1]], [], QUERY[:1]),
        ([CHUNKS[2], QUERY[:1]], [CHUNKS[2]], QUERY[:1]),
        ([tokens(405, 150)], [], tokens(405, 150)),
        ([CHUNKS[0], document], [CHUNKS[0]], CHUNKS[1]),
    ):
        check(services.generate(parts, prompt_logprobs=3), oracle_model(folder), chunks, query, "exact")


@pytest.mark.parametrize("name", [*OTHERS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_other_architectures(tmp_path: Path, name: str) -> None:
    folder = model_dir(tmp_path / name, name)
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store") as running:
        refused = {mode.mode for mode in running.client.loads().modes if not mode.supported}
        for mode in (mode for mode in MODES if mode not in refused):
            result = running.generate([*CHUNKS, QUERY], 2, reuse=mode, prompt_logprobs=3)
            check(result, oracle_model(folder), CHUNKS, QUERY, mode)
        running.check_idle()


def test_they_come_with_the_first_of_several_answers_beside_others(services: Pair, folder: Path) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3}
    stream = services.client.generate(
        [*CHUNKS, QUERY], max_tokens=6, ignore_eos=True, n=3, prompt_logprobs=3, request_id="scored", **options
    )
    others = services.together([[CHUNKS[0], tokens(410 + n, 40)] for n in range(6)], 30)
    first, *rest = (stream.finish(), *stream.results[1:])
    check(first, oracle_model(folder), CHUNKS, QUERY, "exact")
    assert not any(result.prompt_logprobs for result in rest)
    for index, result in enumerate([first, *rest]):
        single = services.generate([*CHUNKS, QUERY], **{**options, "seed": 3 + index})
        assert result.token_ids == single.token_ids
    for n, other in enumerate(others):
        assert other.token_ids == services.generate([CHUNKS[0], tokens(410 + n, 40)], 30).token_ids


def test_they_are_there_without_the_likeliest_and_with_twenty(services: Pair) -> None:
    for top in (0, 20):
        result = services.generate([CHUNKS[0], QUERY], prompt_logprobs=top)
        assert [len(each.top) for each in result.prompt_logprobs] == [0] + [top] * 38
        assert all(each.logprob is not None for each in result.prompt_logprobs[1:])
        told = {each.token_id for each in result.prompt_logprobs}
        told |= {token for each in result.prompt_logprobs for token, _ in each.top}
        assert result.token_bytes == {token: services.decode.resolver.codec.token_bytes(token) for token in told}
    assert not services.generate([CHUNKS[0], QUERY]).prompt_logprobs


def test_they_do_not_depend_on_what_others_have_cached(services: Pair) -> None:
    """A tenant sees what its prompt gives, computed by itself, whatever another one has computed of it."""
    document = tokens(430, 40)
    cold = services.generate([document, QUERY], prompt_logprobs=2, salt="one")
    services.generate([document, QUERY], salt="other")
    warm = services.generate([document, QUERY], prompt_logprobs=2, salt="one")
    assert (cold.prompt_logprobs, cold.usage) == (warm.prompt_logprobs, warm.usage)
    assert cold.reuse == warm.reuse


def test_a_chats_prompt_too(services: Pair) -> None:
    messages = [{"role": "user", "content": "Where is Crystalton?"}]
    chat = services.client.chat(messages, max_tokens=4, ignore_eos=True, prompt_logprobs=1, n=2)
    first = chat.finish()
    prompt = services.decode.resolver.codec.encode("Where is Crystalton?", role="user", generation_prompt=True)
    assert [each.token_id for each in first.prompt_logprobs] == list(prompt)
    assert len(chat.results) == 2 and not chat.results[1].prompt_logprobs


def test_explain_says_that_nothing_is_reused(services: Pair) -> None:
    services.generate([CHUNKS[0], QUERY])
    assert services.client.explain([CHUNKS[0], QUERY]).cached_tokens == 30
    told = services.client.explain([CHUNKS[0], QUERY], prompt_logprobs=0)
    assert (told.cached_tokens, told.computed_tokens) == (0, 39)


@pytest.mark.parametrize(
    ("parts", "options", "field"),
    [
        ([QUERY], {"prompt_logprobs": 21}, "sampling.prompt_logprobs: 21 must be in 0..20"),
        ([QUERY], {"prompt_logprobs": 1, "keep": True}, "keep: .*prompt_logprobs"),
    ],
)
def test_what_is_refused(services: Pair, parts: list[Any], options: dict[str, Any], field: str) -> None:
    with pytest.raises(cairn.InvalidRequest, match=field):
        services.generate(parts, **options)


def test_an_answer_that_is_aborted_before_its_prompt_is_read_has_none(services: Pair) -> None:
    with services.held_decode():
        stream = services.client.generate([CHUNKS[1], QUERY], prompt_logprobs=1, request_id="gone", max_tokens=9)
        assert services.client.abort("gone")
    result = stream.finish()
    assert result.finish_reason == "abort" and not result.prompt_logprobs
