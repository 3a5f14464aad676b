"""Both services on the card without ``--strict``: an answer has the same bits alone, in a crowd, beside prefills."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cairn import Client, Result
from cairn.local.processes import free_port
from tests.end_to_end.processes import Process
from tests.models_for_tests import tiny_model_dir

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

SHAPE: Any = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 384}
CHUNKS = [[6 + (7 * i + 31 * j) % 370 for j in range(300 + 117 * i)] for i in range(4)]
PARTS = [CHUNKS[0], CHUNKS[1], [9, 8, 7, 300, 12]]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
TOKENS = 48


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("bits")
    model: Path = tiny_model_dir(folder / "model", "qwen3", **SHAPE, max_position_embeddings=16384)
    store = f"file://{folder / 'store'}"
    return ["--model", str(model), "--store", store, "--device", "cuda", "--dtype", "bfloat16", "--kv-pages", "6000"]


@pytest.fixture(scope="module")
def services(arguments: list[str]) -> Iterator[tuple[Process, Process]]:
    prefill = Process("prefill_service", arguments, free_port("127.0.0.1"))
    decode = Process("decode_service", [*arguments, "--prefill", prefill.address], free_port("127.0.0.1"))
    try:
        for process in (prefill, decode):
            process.launch()
        for process in (prefill, decode):
            process.wait_ready()
        yield prefill, decode
    finally:
        for process in (decode, prefill):
            process.end()


@pytest.fixture
def client(services: tuple[Process, Process]) -> Iterator[Client]:
    prefill, decode = services
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        yield client


def ask(client: Client, parts: Sequence[Sequence[int]], **options: Any) -> Any:
    """A stream of ``TOKENS`` tokens with their log-probabilities, which show a bit that tokens do not."""
    return client.generate(parts, **{"max_tokens": TOKENS, "ignore_eos": True, "logprobs": True, **options})


def answer(result: Result) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return result.token_ids, result.logprobs


def fresh(seed: int, count: int) -> list[int]:
    """A chunk that nobody had yet."""
    return [6 + (seed * 7919 + j * j * 13 + j * seed) % 370 for j in range(count)]


def test_they_say_so(services: tuple[Process, Process], client: Client) -> None:
    for process in services:
        assert process.ready["same_bits"] is True
        assert "have the same bits at 1 to 1024 rows" in process.ready["same_bits_reason"]
    loads = client.loads()
    assert loads.same_bits and loads.same_bits_reason == services[1].ready["same_bits_reason"]


@pytest.mark.parametrize("reuse", ["exact", "anchored", "independent"])
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_cold_warm_and_bypassed(client: Client, reuse: str, sampling: dict[str, Any]) -> None:
    parts = [fresh(900 + len(reuse) + 50 * len(sampling), 777), CHUNKS[2], [5, 6, 7]]
    cold, warm, bypassed = (
        ask(client, parts, reuse=reuse, cache=cache, **sampling).finish() for cache in ("shared", "shared", "bypass")
    )
    assert answer(cold) == answer(warm) == answer(bypassed)


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_alone_and_among_31_others(client: Client, sampling: dict[str, Any]) -> None:
    parts = [[*CHUNKS[: i % 4], fresh(i, 1 + 29 * i)] for i in range(31)]
    alone = ask(client, PARTS, **sampling).finish()
    streams = [ask(client, each, **sampling) for each in (*parts[:16], PARTS, *parts[16:])]
    together = [stream.finish() for stream in streams]
    assert answer(together[16]) == answer(alone)
    for i in (0, 15, 30):
        assert answer(together[i + (i > 15)]) == answer(ask(client, parts[i], **sampling).finish())


def test_decoding_beside_prefills(client: Client) -> None:
    """Chunks and long queries arrive all the time while it runs; and each of them answers as it does alone."""
    alone = ask(client, PARTS, max_tokens=400).finish()
    others = [[fresh(1000 + i, 400 + 250 * (i % 7)), fresh(2000 + i, 1 + 90 * (i % 5))] for i in range(24)]

    def finished(parts: Sequence[Sequence[int]], count: int) -> Result:
        return ask(client, parts, max_tokens=count).finish()

    with ThreadPoolExecutor(8) as threads:
        stream = threads.submit(finished, PARTS, 400)
        answers = []
        for parts in others:
            time.sleep(0.02)
            answers.append(threads.submit(finished, parts, 8))
        assert answer(stream.result()) == answer(alone)
        beside = [each.result() for each in answers]
    for parts, result in zip(others[::5], beside[::5], strict=True):
        assert answer(result) == answer(ask(client, parts, max_tokens=8, cache="bypass").finish())


def test_strict_has_nothing_to_add(services: tuple[Process, Process], arguments: list[str], client: Client) -> None:
    prefill, _ = services
    usual = ask(client, PARTS).finish()
    strict = Process("decode_service", [*arguments, "--prefill", prefill.address, "--strict"], free_port("127.0.0.1"))
    try:
        strict.launch()
        strict.wait_ready()
        assert strict.ready["same_bits"] is True
        assert strict.ready["same_bits_reason"].endswith("; --strict has nothing to add")
        with Client(prefill=prefill.address, decode=strict.address, timeout_s=120) as other:
            assert answer(ask(other, PARTS).finish()) == answer(usual)
            assert other.loads().model_identity == client.loads().model_identity
    finally:
        strict.end()


def test_what_an_operator_set_is_left_and_said(
    services: tuple[Process, Process], arguments: list[str], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the check finds out what comes of it; its KV is its own."""
    prefill, _ = services
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "32768")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    other = Process("decode_service", [*arguments, "--prefill", prefill.address], free_port("127.0.0.1"))
    try:
        other.launch()
        other.wait_ready()
        print(other.ready["same_bits"], other.ready["same_bits_reason"])
        other.said.seek(0)
        said = other.said.read()
        for line in (
            "CUBLASLT_WORKSPACE_SIZE is '32768', not '1'",
            "CUBLAS_WORKSPACE_CONFIG is ':4096:8', not ':16:8'",
        ):
            assert line in said
        with Client(prefill=prefill.address, decode=other.address, timeout_s=120) as theirs:
            assert theirs.loads().model_identity != client.loads().model_identity
    finally:
        other.end()
