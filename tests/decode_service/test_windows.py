"""Models with windows through the services, many windows far: what is given back changes no token and no byte."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cairn
from cairn import ChunkRef, Grammar, Result
from tests import oracle
from tests.decode_service.models import CONTEXT_LENGTH, oracle_model, tokens
from tests.decode_service.packing import packing
from tests.decode_service.pair import Pair, pair
from tests.decode_service.scheduling.test_answers import answers
from tests.decode_service.test_bits import answer, crowd, kv_digests, sources, stored_files
from tests.decode_service.windowed import ALL_WINDOWS, MODELS, WINDOW, both, keep_everything, windowed_dir

PAGE = 8
DOCUMENTS = [tokens(1, 3 * WINDOW), tokens(2, 16), tokens(3, WINDOW + 1)]  # the first is longer than the window
QUERY = tokens(4, 9)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: windowed_dir(tmp_path_factory.mktemp(name) / name, name) for name in MODELS}


def longest_by_mode(services: Pair) -> dict[str, int]:
    """Of the modes that are offered."""
    return {mode.mode: mode.context_length_max for mode in services.client.loads().modes if mode.supported}


CASES = [(name, mode) for name in MODELS for mode in ("exact", "anchored", "independent")]
QUICK = [("mistral", "exact"), ("mistral", "anchored"), ("llama4-blocks", "exact"), ("gemma2", "independent")]


@pytest.mark.parametrize(
    ("name", "mode"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_cold_warm_reloaded_bypassed_and_among_others_are_the_same(
    folders: dict[str, Path], tmp_path: Path, name: str, mode: str
) -> None:
    folder, count, parts = folders[name], 2 * WINDOW, [*DOCUMENTS, QUERY]
    with pair(*both(folder), tmp_path / "store", page_size=PAGE) as services:
        loads = services.client.loads()
        assert loads.context_length_max == loads.context_length_declared == CONTEXT_LENGTH
        if longest_by_mode(services)[mode] < CONTEXT_LENGTH:  # moved chunks see other blocks
            assert name == "llama4-blocks" and longest_by_mode(services)[mode] == WINDOW and mode != "exact"
            with pytest.raises(cairn.InvalidRequest, match="blocks of 32 tokens"):
                services.generate(parts, count, reuse=mode)
            return
        options: dict[str, Any] = {"reuse": mode, "logprobs": True}
        cold = services.generate(parts, count, **options)
        digests = kv_digests(services)
        warm = services.generate(parts, count, **options)
        services.forget()
        told = services.client.explain(parts, reuse=mode)
        assert [segment.source for segment in told.reuse.segments] == ["store"] * 3 + ["computed"]
        reloaded = services.generate(parts, count, **options)
        assert kv_digests(services) == digests and len(digests) == 3
        bypass = services.generate(parts, count, cache="bypass", **options)
        among, *_ = services.together([parts, *crowd()[:6]], count, **options)
        assert answer(cold) == answer(warm) == answer(reloaded) == answer(bypass)
        assert among.token_ids == cold.token_ids
        assert sources(warm) == ["device"] * 3 + ["computed"] and sources(reloaded) == ["store"] * 3 + ["computed"]
        assert cold.usage.cached_tokens + cold.usage.computed_tokens == cold.usage.prompt_tokens
        expected, _ = oracle.greedy(oracle_model(folder), parts[:-1], QUERY, mode, 6)
        assert list(cold.token_ids[:6]) == expected
        assert bool(services.metric("cairn_kv_pages_given_back_total")) == (name in ALL_WINDOWS)
        services.check_idle()


@contextmanager
def watched(services: Pair) -> Iterator[list[int]]:
    """The pages that tails have at each step."""
    runner, tails = services.decode.worker.runner, list[int]()
    before = runner.begin

    def begin(batch: Any) -> Any:
        tails.append(runner.pool.count()["tail"])
        return before(batch)

    runner.begin = begin
    yield tails
    runner.begin = before


def test_a_prompt_and_an_answer_many_windows_long_take_few_pages(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 pages of 8 tokens hold a query of 150 and an answer of 600."""
    models, parts = both(folders["mistral"]), [DOCUMENTS[0], tokens(9, 150)]
    with monkeypatch.context() as patched:
        keep_everything(patched)
        with pair(*models, tmp_path / "store", page_size=PAGE) as all_kept, watched(all_kept) as tails:
            expected = all_kept.generate(parts, 600, logprobs=True)
        assert max(tails) == -(-(150 + 600 - 1) // PAGE)
        with (
            pair(*models, tmp_path / "store", page_size=PAGE, kv_pages=48) as services,
            pytest.raises(cairn.CairnError, match="pages of the KV pool; at most 24 hold tails"),
        ):
            services.generate(parts, 600)
    with pair(*models, tmp_path / "store", page_size=PAGE, kv_pages=48) as services, watched(services) as tails:
        got = services.generate(parts, 600, logprobs=True)
        assert answer(got) == answer(expected)
        assert max(tails[-590:]) == WINDOW // PAGE + 1 and max(tails) <= 24
        loads, token_nbytes = services.client.loads(), services.decode.worker.runner.pool.layout.nbytes(1)
        assert loads.step_bytes_read == loads.step_bytes_flat == loads.steps * WINDOW * token_nbytes
        assert services.client.explain(parts).bytes_read_per_step == WINDOW * token_nbytes
        services.check_idle()


def requests() -> list[tuple[list[Any], dict[str, Any]]]:
    """All that has to do with a tail: answers that share one, are kept, follow grammars, whose prompt is scored."""
    made: list[tuple[list[Any], dict[str, Any]]] = []
    asked: list[dict[str, Any]] = [{"n": 3}, {"keep": True}, {"prompt_logprobs": 2}, {"logprobs": True}, {}]
    for index in range(12):
        options: dict[str, Any] = {"max_tokens": 90 - index % 4, "priority": (0, 0, 7)[index % 3]}
        options |= asked[index % 5]
        if index % 2:
            options |= {"temperature": 0.9, "seed": index}
        if index % 4 == 3:
            options |= {"grammar": Grammar.regex("(abcdefghijklmnop|x){20}"), "max_tokens": 120}
        made.append(([DOCUMENTS[index % 3], tokens(50 + index, (3, 70, 41)[index % 3])], options))
    return made


def all_answers(services: Pair) -> list[list[Result]]:
    """To all requests at once, of each request all answers."""
    with ThreadPoolExecutor(12) as threads:
        return list(threads.map(lambda asked: answers(services, asked[0], **asked[1]), requests()))


@pytest.mark.parametrize(
    ("packs", "aside"),
    [
        pytest.param(False, 0, marks=pytest.mark.slow, id="pieces, computed again"),
        pytest.param(False, 2**30, id="pieces, from host memory"),
        pytest.param(True, 0, id="packed, computed again"),
        pytest.param(True, 2**30, marks=pytest.mark.slow, id="packed, from host memory"),
    ],
)
def test_whatever_is_asked_of_a_tail_is_as_if_all_was_kept(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packs: bool, aside: int
) -> None:
    prefill, decode = both(folders["mistral"])
    decode = packing(decode) if packs else decode
    options: dict[str, Any] = {"page_size": PAGE, "batch_max": 8, "strict": True, "host_tails": aside}
    with monkeypatch.context() as patched:
        keep_everything(patched)
        with pair(prefill, decode, tmp_path / "all", kv_pages=900, **options) as all_kept:
            expected = all_answers(all_kept)
    with pair(prefill, decode, tmp_path / "some", kv_pages=58, chunk_page_ratio=0.66, **options) as services:
        got = all_answers(services)
        for (one, *more), (want, *more_wanted) in zip(got, expected, strict=True):
            assert [each.token_ids for each in more] == [each.token_ids for each in more_wanted]
            assert (one.token_ids, one.finish_reason) == (want.token_ids, want.finish_reason)
            assert packs or one.logprobs == want.logprobs
            scores = [[each.logprob for each in found.prompt_logprobs[1:]] for found in (one, want)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5 if packs else 0)
        assert services.metric("cairn_kv_pages_given_back_total") > 50
        assert services.metric("cairn_preemptions_total") > 0
        for (parts, _), (result, *_) in zip(requests(), got, strict=True):
            if result.kept is not None:
                assert result.kept.registered
                again = services.generate([parts[0], ChunkRef(result.kept.id), tokens(7, 3)], 8)
                turn = [*parts[1], *result.token_ids]
                fresh = services.generate([parts[0], turn, tokens(7, 3)], 8, cache="bypass")
                assert again.token_ids == fresh.token_ids
        services.check_idle()


def test_a_long_context_is_computed_by_who_can_hold_little_of_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefill service with room for 192 tokens, and a context of 480: its chunks have the same bytes."""
    models, parts = both(folders["mistral"]), [*(tokens(20 + index, 40) for index in range(12)), QUERY]
    with monkeypatch.context() as patched:
        keep_everything(patched)
        with pair(*models, tmp_path / "all", page_size=PAGE) as all_kept:
            expected = all_kept.generate(parts, 20, logprobs=True)
            all_kept.check_idle()
    with pair(*models, tmp_path / "some", page_size=PAGE, of_prefill={"kv_pages": 24}) as services:
        assert answer(services.generate(parts, 20, logprobs=True)) == answer(expected)
        services.check_idle()
    assert stored_files(tmp_path / "some") == stored_files(tmp_path / "all")
    with pair(*models, tmp_path / "some", page_size=PAGE, of_prefill={"kv_pages": 24}) as services:
        longer = services.generate([*parts[:-1], tokens(40, 40), QUERY], 20, logprobs=True)
        assert sources(longer) == ["store"] * 12 + ["computed"] * 2
        bypass = services.generate([*parts[:-1], tokens(40, 40), QUERY], 20, logprobs=True, cache="bypass")
        assert answer(longer) == answer(bypass)
        services.check_idle()
