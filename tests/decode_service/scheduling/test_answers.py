"""``n`` answers to one prompt: each is that of a request of its own, and all of them end together or one by one."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cairn
from cairn import AsyncClient, Delta
from decode_service.api.answers import answers_to
from decode_service.scheduling.sequence import Finished, FinishReason, Sequence, State
from tests.decode_service.content import content_request
from tests.decode_service.models import loaded, tokens
from tests.decode_service.packing import packing
from tests.decode_service.pair import Pair, pair, wait_until
from tests.decode_service.scheduling.scheduled import Scheduled, request
from tests.decode_service.test_packed import served

DOCUMENT, QUERY = tokens(301, 30), tokens(302, 7)


@pytest.fixture(scope="module", params=["packed", "stepwise", "strict"])
def services(request: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    model, store = loaded(folder, "decode"), tmp_path_factory.mktemp("answers")
    decode = packing(model) if request.param == "packed" else model
    with pair(loaded(folder, "prefill"), decode, store, strict=request.param == "strict") as running:
        yield running
        running.check_idle()


def answers(services: Pair, parts: list[Any], **options: Any) -> list[cairn.Result]:
    stream = services.client.generate(parts, **{"max_tokens": 12, "ignore_eos": True, **options})
    stream.finish()
    return stream.results


@pytest.mark.parametrize("cache", ["shared", "bypass"])
@pytest.mark.parametrize("reuse", ["exact", "anchored", "independent"])
def test_each_answer_is_that_of_a_request_with_its_seed(services: Pair, reuse: str, cache: str) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 40, "reuse": reuse, "cache": cache}
    found = answers(services, [DOCUMENT, DOCUMENT, QUERY], n=5, logprobs=True, **options)
    assert [(result.index, result.seed) for result in found] == [(index, 40 + index) for index in range(5)]
    assert len({result.token_ids for result in found}) > 1
    for index, result in enumerate(found):
        single = services.generate([DOCUMENT, DOCUMENT, QUERY], 12, logprobs=True, **{**options, "seed": 40 + index})
        assert (result.token_ids, result.text) == (single.token_ids, single.text)
        assert result.logprobs == pytest.approx(single.logprobs, abs=1e-5)
        if services.decode.same_bits.always:
            assert result.logprobs == single.logprobs


def test_the_tail_is_computed_once_and_every_answer_has_a_copy(services: Pair) -> None:
    """Looks at what the device is given: the query's rows once, with a draw for each answer."""
    runner, seen = services.decode.worker.runner, list[Any]()
    begin = runner.begin

    def noting(batch: Any) -> Any:
        seen.extend(rows for rows in batch if len(rows.sources) > 1)
        return begin(batch)

    document, query = tokens(311, 20), tokens(312, 150)
    services.client.prefill(document)
    runner.begin = noting
    try:
        found = answers(services, [document, query], n=4, temperature=1.0, seed=5)
    finally:
        del runner.begin
    rows = [source for each in seen for source in each.sources]
    assert rows == query and [len(each.draws) for each in seen][-1] == 4 and len(seen) > 2
    for index, result in enumerate(found):
        assert result.token_ids == services.generate([document, query], 12, temperature=1.0, seed=5 + index).token_ids


def test_the_prompt_is_counted_once(services: Pair) -> None:
    document = tokens(303, 25)
    before = {name: services.metric(f"cairn_{name}_total") for name in ("prompt_tokens", "generation_tokens")}
    first, *others = answers(services, [document, QUERY], n=4)
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (32, 12)
    assert first.usage.cached_tokens + first.usage.computed_tokens == 32
    assert [other.usage for other in others] == [cairn.Usage(0, 0, 0, 12)] * 3
    after = {name: services.metric(f"cairn_{name}_total") for name in before}
    assert {name: after[name] - before[name] for name in before} == {"prompt_tokens": 32, "generation_tokens": 48}


def test_deltas_bear_the_number_of_their_answer(services: Pair) -> None:
    stream = services.client.generate([QUERY], max_tokens=9, n=3, temperature=1.5, seed=1, ignore_eos=True)
    deltas: list[Delta] = list(stream)
    for index, result in enumerate(stream.results):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == result.text
        assert tuple(token for delta in own for token in delta.token_ids) == result.token_ids
    assert stream.result == stream.results[0] and len(stream.results) == 3

    async def same() -> list[cairn.Result]:
        async with AsyncClient(services.prefill_address, services.decode_address) as client:
            again = client.generate([QUERY], max_tokens=9, n=3, temperature=1.5, seed=1, ignore_eos=True)
            await again.finish()
            return again.results

    assert [result.token_ids for result in asyncio.run(same())] == [result.token_ids for result in stream.results]


def test_a_stop_string_ends_its_own_answer_alone(services: Pair) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 7, "n": 4, "max_tokens": 40}
    plain = answers(services, [QUERY], **options)
    stop = next(plain[2].text[at : at + 2] for at in range(8, 40) if "\ufffd" not in plain[2].text[at : at + 2])
    for include in (False, True):
        stopped = answers(services, [QUERY], stop=[stop], include_stop=include, **options)
        for before, after in zip(plain, stopped, strict=True):
            at = before.text.find(stop)
            shown = before.text if at < 0 else before.text[: at + len(stop) * include]
            assert (after.text, after.finish_reason) == (shown, "length" if at < 0 else "stop")


def test_every_answer_is_kept(services: Pair) -> None:
    found = answers(services, [DOCUMENT, QUERY], n=3, keep=True, temperature=1.0, seed=3)
    assert len({result.kept.id for result in found if result.kept}) == 3
    for result in found:
        assert result.kept is not None
        turn = cairn.Tokens([*result.kept.query_token_ids, *result.token_ids], type="turn")
        named = services.generate([DOCUMENT, result.kept, tokens(304, 3)])
        assert named.usage.computed_tokens == 3 and named.reuse.segments[1].cached_tokens == len(turn.ids)
        assert named.token_ids == services.generate([DOCUMENT, turn, tokens(304, 3)], cache="bypass").token_ids


def test_each_answer_follows_the_grammar_by_itself(services: Pair) -> None:
    grammar = cairn.Grammar.regex("(cairn|stone|heap){3}[0-9]{2,4}")
    options: dict[str, Any] = {"grammar": grammar, "temperature": 2.0, "ignore_eos": False, "max_tokens": 40}
    found = answers(services, [QUERY], n=5, seed=20, **options)
    assert all(re.fullmatch("(cairn|stone|heap){3}[0-9]{2,4}", result.text) for result in found)
    for index, result in enumerate(found):
        assert result.token_ids == services.generate([QUERY], **{**options, "seed": 20 + index}).token_ids


def test_an_abort_and_a_caller_who_leaves_end_all_of_them(services: Pair) -> None:
    stream = services.client.generate([QUERY], max_tokens=1500, n=3, ignore_eos=True, request_id="together")
    next(iter(stream))
    assert services.client.abort("together")
    stream.finish()
    assert [result.finish_reason for result in stream.results] == ["abort"] * 3
    left = services.client.generate([QUERY], max_tokens=1500, n=3, ignore_eos=True)
    next(iter(left))
    left.close()
    wait_until(lambda: services.client.loads().running == 0)
    services.check_idle()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options", [{"packs": True, "runs_ahead": True}, {"packs": True, "runs_ahead": False}, {"packs": False}]
)
def test_answers_in_any_company_are_those_of_one_at_a_time(options: dict[str, Any], seed: int) -> None:
    """Tokens are a function of all that their rows find in the pool: a tail that is not copied, or too early, shows."""
    expected = one_at_a_time(seed, 12)
    rng, chance = random.Random(seed), random.Random(seed + 50)
    ended = set[str]()
    with served(batch_max=7, **options) as it:
        everyone = [each for n in range(12) for each in three(content_request(f"{n}", rng))]
        for each in everyone:
            it.submit(each)
        for each in chance.sample(everyone, 6):  # the first of them or another one
            it.worker.finish(each, FinishReason.ABORT)
            ended.add(each.request_id)
        for each in everyone:
            tokens, end = it.answer(each.request_id)
            if each.request_id in ended:
                assert tokens == expected[each.request_id][: len(tokens)]
            else:
                assert tokens == expected[each.request_id] and isinstance(end, Finished)
        it.check_idle()


def one_at_a_time(seed: int, count: int) -> dict[str, list[int]]:
    rng, found = random.Random(seed), {}
    with served() as it:
        for n in range(count):
            for each in three(content_request(f"{n}", rng)):
                it.submit(replace(each, prompt=object()))
                found[each.request_id] = it.answer(each.request_id)[0]
    return found


def three(one: Sequence) -> list[Sequence]:
    """Answers to one prompt, with names of their own."""
    made = answers_to(one, 3, lambda events, answer: None)
    for each in made:
        each.request_id = f"{one.request_id}/{each.answer}"
    return made


def test_when_the_first_has_gone_the_next_computes_the_prompt() -> None:
    on = Scheduled()
    made = three(request("one", tail=40, max_tokens=3))
    on.submit(*made)
    first = on.step().rows
    assert {rows.sequence for rows in first} == {made[0]} and not first[0].also
    on.abort(made[0])
    while made[1].state is State.PREFILLING:
        rows = on.step().rows
        assert {each.sequence for each in rows} == {made[1]}
    assert rows[-1].also == (made[2],) and made[2].generated == made[1].generated == [7]
    late = replace(made[2], request_id="late", state=State.WAITING, slot=-1, tail_pages=(), tail_tokens=0, generated=[])
    on.submit(late)
    on.finish()
    assert sum(rows.count for rows in on.ran if rows.sequence is late and not rows.decodes) == 40
    on.check_idle()


def test_more_answers_than_places_come_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path, batch_max=2, kv_pages=24) as services:
        found = answers(services, [DOCUMENT, QUERY], n=16, temperature=1.0, seed=9)
        assert [len(result.token_ids) for result in found] == [12] * 16
        assert found[9].token_ids == services.generate([DOCUMENT, QUERY], 12, temperature=1.0, seed=18).token_ids
        services.check_idle()


def test_answers_that_give_way_to_one_another_are_the_same(folder: Path, tmp_path: Path) -> None:
    """Tail pages run out while they grow; what was scored of a prompt is told, whatever happens to its answer."""
    with pair(
        *(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path),
        kv_pages=40,
        chunk_page_ratio=0.5,
        host_tails=0,
    ) as services:
        parts: list[Any] = [DOCUMENT, tokens(320, 20)]
        options: dict[str, Any] = {"max_tokens": 100, "temperature": 1.0, "logprobs": True}
        found = answers(services, parts, n=8, seed=50, prompt_logprobs=1, **options)
        assert sum(result.preemptions for result in found) > 0
        for index, result in enumerate(found):
            single = services.generate(parts, seed=50 + index, **options)
            assert result.token_ids == single.token_ids
            assert result.logprobs == pytest.approx(single.logprobs, abs=1e-5)
        assert len(found[0].prompt_logprobs) == 50
        services.check_idle()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"n": 17}, "sampling.n"),
        ({"n": 1 << 31}, "sampling.n"),
        ({"n": 3, "seed": 2**63 - 2}, "sampling.seed"),
        ({"n": 8}, "sampling.n"),
    ],
)
def test_what_is_refused(folder: Path, tmp_path: Path, options: dict[str, Any], field: str) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path, waiting_max=6) as services:
        with pytest.raises(cairn.InvalidRequest, match=field):
            answers(services, [QUERY], **options)
        assert len(answers(services, [QUERY], n=2, seed=2**63 - 2)) == 2
        services.check_idle()


def test_a_time_limit_ends_all_of_them(folder: Path, tmp_path: Path) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path, request_timeout_s=0.3) as services:
        with pytest.raises(cairn.CairnError, match="took longer than") as caught:
            answers(services, [QUERY], n=3, max_tokens=2000)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        wait_until(lambda: services.client.loads().running == 0)
