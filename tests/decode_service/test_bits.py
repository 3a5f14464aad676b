"""In EXACT, answers and stored bytes do not depend on caches, neighbours, processes or levels."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cairn import Result
from tests import oracle
from tests.decode_service.models import loaded, oracle_model, tokens
from tests.decode_service.pair import Pair, pair, wait_until

PAGE = 16
ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = [tokens(1, 70), tokens(2, PAGE), tokens(3, 33)]
QUERY = tokens(4, 9)
SAMPLED = {"temperature": 0.9, "seed": 11, "top_p": 0.95}


def answer(result: Result) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return result.token_ids, result.logprobs


def sources(result: Result) -> list[str]:
    return [segment.source for segment in result.reuse.segments]


def kv_digests(services: Pair) -> dict[str, str]:
    """SHA-256 of the KV bytes of every resident chunk."""
    residents = services.decode.worker.residents

    def look() -> dict[str, str]:
        return {
            chunk.key: hashlib.sha256(
                b"".join(part.numpy().tobytes() for part in residents.pool.run_planes(chunk.run, chunk.tokens))
            ).hexdigest()
            for chunk in residents._chunks.values()
        }

    return services.in_device_thread(look)


def stored_files(store: Path) -> dict[str, bytes]:
    """The data of a store by key."""
    return {path.name.partition(".")[0]: path.read_bytes() for path in store.glob("data/*/*")}


@pytest.fixture
def fresh(folder: Path, tmp_path: Path) -> Iterator[Pair]:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store") as services:
        yield services
        services.check_idle()


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_cold_warm_reloaded_and_bypass_are_the_same(fresh: Pair, sampling: dict[str, Any]) -> None:
    parts = [*DOCUMENTS, QUERY]
    options = {"max_tokens": 12, "logprobs": True, **sampling}
    cold = fresh.generate(parts, **options)
    digests = kv_digests(fresh)
    warm = fresh.generate(parts, **options)
    fresh.forget()
    reloaded = fresh.generate(parts, **options)
    bypass = fresh.generate(parts, cache="bypass", **options)
    assert sources(cold) == sources(bypass) == ["computed"] * 4
    assert sources(warm) == ["device"] * 3 + ["computed"]
    assert sources(reloaded) == ["store"] * 3 + ["computed"]
    assert answer(cold) == answer(warm) == answer(reloaded) == answer(bypass)
    assert kv_digests(fresh) == digests and len(digests) == 3


def test_evicted_for_want_of_room_and_reloaded(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), store, kv_pages=32, chunk_page_ratio=0.3
    ) as services:
        first = services.generate([*DOCUMENTS, QUERY], logprobs=True)
        digests = kv_digests(services)
        services.generate([tokens(50, 150), QUERY])  # ten pages hold no more than this
        assert not digests.keys() & kv_digests(services).keys()
        again = services.generate([*DOCUMENTS, QUERY], logprobs=True)
        assert sources(again) == ["store"] * 3 + ["computed"]
        assert answer(first) == answer(again)
        assert kv_digests(services) == digests
        services.check_idle()


def crowd() -> list[list[list[int]]]:
    """31 other requests: shared, private and no chunks, many lengths."""
    return [
        [
            *DOCUMENTS[: index % 4],
            *([tokens(200 + index, 5 + index)] if index % 3 else []),
            tokens(300 + index, 1 + index),
        ]
        for index in range(31)
    ]


@pytest.mark.parametrize("strict", [False, True])
def test_alone_and_among_31_others(folder: Path, tmp_path: Path, strict: bool) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store", strict=strict) as services:
        parts = [*DOCUMENTS, QUERY]
        loads = services.client.loads()
        assert loads.same_bits == strict and "--strict" in loads.same_bits_reason
        alone = services.generate(parts, 24, logprobs=True)
        with services.held_decode():  # so that all of them are there when the first step begins
            futures = _ask(services, [parts, *crowd()], 24)
        among, *others = [future.result() for future in futures]
        # They did run together: 33 answers took less than a third of the steps of one after another. (Not fewer:
        # on a busy machine they join as their KV comes.)
        assert services.metric("cairn_decode_steps_total") < 11 * 24
        assert among.token_ids == alone.token_ids
        # Without strict a batch of one takes other kernels: the tokens are the same, the last bits need not be.
        assert among.logprobs == (alone.logprobs if strict else pytest.approx(alone.logprobs, abs=1e-5))
        for index in (0, 13, 30):
            again = services.generate(crowd()[index], 24, logprobs=True)
            assert again.token_ids == others[index].token_ids
            if strict:
                assert again.logprobs == others[index].logprobs
        services.check_idle()


def _ask(services: Pair, requests: list[list[list[int]]], max_tokens: int) -> list[Any]:
    threads = ThreadPoolExecutor(len(requests))
    futures = [threads.submit(services.generate, parts, max_tokens, logprobs=True) for parts in requests]
    wait_until(lambda: services.client.loads().waiting == len(requests))
    threads.shutdown(wait=False)
    return futures


def test_levels_do_not_change_an_answer(folder: Path, tmp_path: Path) -> None:
    requests = [[*DOCUMENTS, QUERY], *crowd()[:7]]
    answers = []
    levels_seen = []
    for levels in (1, 2, 3):
        with pair(
            loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "store", cascade_levels_max=levels
        ) as services:
            results = services.together(requests, 16)
            answers.append([result.token_ids for result in results])
            levels_seen.append({segment.level for result in results for segment in result.reuse.segments})
    assert answers[0] == answers[1] == answers[2]
    assert all(max(seen) < levels for seen, levels in zip(levels_seen, (2, 3, 4), strict=True))


def test_128_identical_requests(services: Pair) -> None:
    parts = [tokens(401, PAGE), tokens(402, 5)]
    alone = services.generate(parts, 8)
    results = services.together([parts] * 128, 8)
    assert {result.token_ids for result in results} == {alone.token_ids}


@pytest.mark.parametrize("prefix", [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
@pytest.mark.parametrize("tail", [1, PAGE])
def test_short_prefixes_and_tails_after_a_hit(services: Pair, folder: Path, prefix: int, tail: int) -> None:
    parts = [tokens(500 + prefix, prefix), tokens(600 + tail, tail)]
    expected, _ = oracle.greedy(oracle_model(folder), parts[:-1], parts[-1], "exact", 4)
    for wanted in ("computed", "device"):
        result = services.generate(parts, 4)
        assert list(result.token_ids) == expected
        assert sources(result)[0] == (wanted if tail == 1 else "device")


@pytest.mark.parametrize("length", [1, 2, PAGE, PAGE + 1])
def test_a_full_hit(services: Pair, folder: Path, length: int) -> None:
    """The query is named by its id: its KV is reused but for the last token, which gives the logits."""
    document = services.client.prefill(tokens(700, 20))
    query = services.client.prefill(tokens(701 + length, length), context=[document])
    inline = services.generate([document, tokens(701 + length, length)], 5, cache="bypass")
    for _ in range(2):
        result = services.generate([document, query], 5)
        assert result.token_ids == inline.token_ids
        assert result.usage.computed_tokens == 1
        assert result.usage.cached_tokens == 20 + length - 1
    alone = services.generate([query], 5)
    expected, _ = oracle.greedy(oracle_model(folder), [], tokens(701 + length, length), "exact", 5)
    assert list(alone.token_ids) == expected


def test_order_swapped(services: Pair, folder: Path) -> None:
    a, b, query = tokens(801, 19), tokens(802, 31), tokens(803, 6)
    answers = {}
    for mode in ("exact", "independent"):
        for chunks in ([a, b], [b, a], [a, b]):
            expected, _ = oracle.greedy(oracle_model(folder), chunks, query, mode, 5)
            result = services.generate([*chunks, query], 5, reuse=mode)
            assert list(result.token_ids) == expected
            answers[mode, str(chunks)] = result
    assert sources(services.generate([b, a, query], reuse="independent"))[:2] == ["device"] * 2


SCRIPT = """
import sys, json, torch
from pathlib import Path
from tests.decode_service.models import loaded
from tests.decode_service.pair import pair
folder, store, requests = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, kv_pages=256, page_size=8) as services:
    print(json.dumps([services.generate(parts, 8, logprobs=True).token_ids for parts in requests]))
"""


def test_another_process_with_another_hash_seed_stores_the_same_bytes(
    fresh: Pair, folder: Path, tmp_path: Path
) -> None:
    requests = [[*DOCUMENTS, QUERY], [*reversed(DOCUMENTS), QUERY]]
    mine = [list(fresh.generate(parts, 8).token_ids) for parts in requests]
    other = tmp_path / "other"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(other), json.dumps(list(reversed(requests)))],
        env={**os.environ, "PYTHONHASHSEED": "4242"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(reversed(json.loads(done.stdout))) == mine
    files = stored_files(tmp_path / "store")
    assert len(files) == 6
    assert files == stored_files(other)
