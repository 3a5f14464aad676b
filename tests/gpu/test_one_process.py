"""Both services in one process on the card: the bits of two processes, chunks without a load, streams that go on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cairn import ChunkRef, Client, Result
from cairn.local.processes import free_port
from chunk_store.open import open_store
from tests.end_to_end.processes import Process
from tests.models_for_tests import tiny_model_dir

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

SHAPE: Any = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 384}
TOKENS = 40


def fresh(seed: int, count: int) -> list[int]:
    """A chunk that nobody had yet."""
    return [6 + (seed * 7919 + j * j * 13 + j * seed) % 370 for j in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    model: Path = tiny_model_dir(folder / "model", "qwen3", **SHAPE, max_position_embeddings=16384)
    return ["--model", str(model), "--device", "cuda", "--dtype", "bfloat16"]


def client_of(process: Process) -> Client:
    return Client(process.address, f"127.0.0.1:{process.arguments[-1]}", timeout_s=120)


@pytest.fixture(scope="module")
def one(folder: Path, arguments: list[str]) -> Iterator[Client]:
    told = [*arguments, "--store", f"file://{folder / 'one'}"]
    port = str(free_port("127.0.0.1"))
    process = Process(
        "cairn.local.together",
        [*told, "--", *told, "--kv-pages", "6000", "--prefill", "unused:1", "--port", port],
        free_port("127.0.0.1"),
    )
    process.launch()
    try:
        process.wait_ready()
        with client_of(process) as client:
            yield client
        assert process.end() == 0
        store = open_store(f"file://{folder / 'one'}")
        assert store.list_entries() and store.stats().quarantined == 0, "what was computed is stored when it ends"
        store.close()
    finally:
        if process.child.poll() is None:
            process.kill()


@pytest.fixture(scope="module")
def two(folder: Path, arguments: list[str]) -> Iterator[Client]:
    told = [*arguments, "--store", f"file://{folder / 'two'}", "--kv-pages", "3000"]
    prefill = Process("prefill_service", told, free_port("127.0.0.1"))
    decode = Process("decode_service", [*told, "--prefill", prefill.address], free_port("127.0.0.1"))
    try:
        for process in (prefill, decode):
            process.launch()
        for process in (prefill, decode):
            process.wait_ready()
        with Client(prefill.address, decode.address, timeout_s=120) as client:
            yield client
    finally:
        for process in (decode, prefill):
            process.end()


def ask(client: Client, parts: Any, **options: Any) -> Any:
    return client.generate(parts, **{"max_tokens": TOKENS, "ignore_eos": True, "logprobs": True, **options})


def answer(result: Result) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return result.token_ids, result.logprobs


@pytest.mark.parametrize("reuse", ["exact", "anchored", "independent"])
@pytest.mark.parametrize("tokens", [777, 5000])  # packed, and in pieces of library attention
def test_bits_are_those_of_two_processes(one: Client, two: Client, reuse: str, tokens: int) -> None:
    parts = [fresh(tokens + len(reuse), tokens), fresh(tokens + 31 + len(reuse), 300), [5, 6, 7]]
    cold, warm, bypassed = (
        ask(one, parts, reuse=reuse, cache=cache).finish() for cache in ("shared", "shared", "bypass")
    )
    apart = ask(two, parts, reuse=reuse).finish()
    assert [segment.source for segment in cold.reuse.segments[:2]] == ["computed"] * 2
    assert [segment.source for segment in warm.reuse.segments[:2]] == ["device"] * 2
    assert answer(cold) == answer(warm) == answer(bypassed) == answer(apart)
    assert cold.reuse.segments[0].unpublished == ""


def test_what_prefill_computed_is_read_where_it_is(one: Client, two: Client) -> None:
    document, query = fresh(77, 1500), [9, 8, 7]
    here = ask(one, [ChunkRef(one.prefill(document).id), query]).finish()
    apart = ask(two, [ChunkRef(two.prefill(document).id), query]).finish()
    assert here.reuse.segments[0].source == "device" and answer(here) == answer(apart)


def test_streams_go_on_beside_chunks_with_the_same_bits(one: Client, capsys: pytest.CaptureFixture[str]) -> None:
    """Chunks of both kinds are computed meanwhile; prints the gaps, for who runs it."""
    queries = [fresh(500 + n, 20 + n) for n in range(8)]
    alone = [answer(ask(one, [query], max_tokens=400).finish()) for query in queries]
    gaps: list[float] = []

    def stream(query: list[int]) -> Any:
        with ask(one, [query], max_tokens=400) as going:
            before = 0.0
            for _ in going:
                now = time.perf_counter()
                if before:
                    gaps.append(now - before)
                before = now
            return answer(going.finish())

    with ThreadPoolExecutor(12) as threads:
        streams = [threads.submit(stream, query) for query in queries]
        chunks = [threads.submit(one.prefill, fresh(600 + n, count)) for n, count in enumerate((2000, 4000, 6000, 900))]
        beside = [future.result() for future in streams]
        assert all(future.result().outcome == "computed" for future in chunks)
    assert beside == alone
    gaps.sort()
    with capsys.disabled():
        print(
            f"\ngaps ms: p50 {gaps[len(gaps) // 2] * 1e3:.1f}, p99 {gaps[len(gaps) * 99 // 100] * 1e3:.1f}, "
            f"max {gaps[-1] * 1e3:.1f}"
        )
