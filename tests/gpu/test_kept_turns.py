"""Kept turns on the card: what decode wrote has the bits of a prefill, in the pool, in the store and after restarts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cairn import ChunkRef, Client, Result, Tokens
from cairn.local.processes import free_port
from chunk_store.key import ChunkKey
from chunk_store.open import open_store
from tests.decode_service.pair import wait_until
from tests.end_to_end.processes import Process
from tests.models_for_tests import tiny_model_dir

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

SHAPE: Any = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 384}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
# Of questions and answers: within a tail's split and over several, whole pages and parts of them, one token.
LENGTHS = [(17, 31), (300, 1), (1, 700), (64, 64), (1500, 129)]


def fresh(seed: int, count: int) -> list[int]:
    return [6 + (seed * 7919 + j * j * 13 + j * seed) % 370 for j in range(count)]


SYSTEM, DOCUMENT = fresh(1, 333), fresh(2, 1100)


@contextmanager
def both(model: Path, store: Path) -> Iterator[tuple[Client, tuple[Process, Process]]]:
    words = ["--model", str(model), "--store", f"file://{store}", "--device", "cuda", "--dtype", "bfloat16"]
    prefill = Process("prefill_service", [*words, "--kv-pages", "4000"], free_port("127.0.0.1"))
    arguments = [*words, "--kv-pages", "6000", "--prefill", prefill.address]
    decode = Process("decode_service", arguments, free_port("127.0.0.1"))
    try:
        for process in (prefill, decode):
            process.launch()
        for process in (prefill, decode):
            process.wait_ready()
        with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
            yield client, (prefill, decode)
    finally:
        for process in (decode, prefill):
            process.end()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("kept")
    made: Path = tiny_model_dir(folder / "model", "qwen3", **SHAPE, max_position_embeddings=16384)
    return made


def ask(client: Client, parts: Sequence[Any], count: int = 48, **options: Any) -> Result:
    given = {"max_tokens": count, "ignore_eos": True, "logprobs": True, **options}
    return client.generate(parts, **given).finish()


def bits(result: Result) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return result.token_ids, result.logprobs


def conversation(client: Client, talk: int, sampling: dict[str, Any]) -> tuple[list[Tokens], list[Result]]:
    """Turns of all lengths, each named in the next request; as token ids, and as they were answered."""
    turns: list[Tokens] = []
    results: list[Result] = []
    names: list[ChunkRef] = []
    for at, (query, count) in enumerate(LENGTHS):
        result = ask(client, [SYSTEM, DOCUMENT, *names, fresh(100 * talk + at, query)], count, keep=True, **sampling)
        assert result.kept is not None and (result.kept.kv, result.kept.reason) == ("resident", "")
        found = result.reuse.segments[2:]
        assert [segment.source for segment in found] == ["device"] * at + ["computed"]
        assert [segment.cached_tokens for segment in found[:-1]] == [segment.tokens for segment in found[:-1]]
        names.append(ChunkRef(result.kept.id))
        turns.append(Tokens([*result.kept.query_token_ids, *result.token_ids], type="turn"))
        results.append(result)
    return turns, results


def check(client: Client, turns: Sequence[Tokens], results: Sequence[Result], talk: int, **options: Any) -> None:
    """Every answer once more, over the same tokens."""
    for at, (query, count) in enumerate(LENGTHS):
        parts = [SYSTEM, DOCUMENT, *turns[:at], fresh(100 * talk + at, query)]
        assert bits(ask(client, parts, count, **options)) == bits(results[at]), f"turn {at}"


def test_what_is_kept_has_the_bits_of_a_prefill(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with both(model, store) as (client, _):
        talks = [conversation(client, seed, sampling) for seed, sampling in enumerate(({}, SAMPLED))]
        with ThreadPoolExecutor(8) as threads:  # and kept among others
            crowd = [threads.submit(conversation, client, 10 + i, {}) for i in range(8)]
            talks += [each.result() for each in crowd]
        options: Any
        for seed, options in ((0, {}), (1, SAMPLED)):
            check(client, *talks[seed], seed, **{"cache": "bypass", **options})
        for i in (0, 5):
            check(client, *talks[2 + i], 10 + i, cache="bypass")
        for _, results in talks:
            for result in results:
                wait_until(lambda result=result: client.get(result.kept).kv_entries >= 1)  # type: ignore[misc]
    with both(model, store) as (client, _):  # loaded: what decode wrote, published behind
        check(client, *talks[0], 0)
        again = ask(client, [SYSTEM, DOCUMENT, *talks[3][0], [5, 6, 7]])
        assert {segment.source for segment in again.reuse.segments[2:-1]} == {"store"}
    with both(model, tmp_path / "empty") as (client, _):  # computed by the prefill service
        check(client, *talks[0], 0)
        assert bits(ask(client, [SYSTEM, DOCUMENT, *talks[3][0], [5, 6, 7]])) == bits(again)
    same_bytes(store, tmp_path / "empty")


def same_bytes(kept: Path, computed: Path) -> None:
    """Entries that decode wrote and those that a prefill wrote under the same keys."""
    stores = [open_store(f"file://{path}") for path in (kept, computed)]
    both_have = {entry.key: entry for entry in stores[1].list_entries(tenants=None)}
    compared = 0
    for entry in stores[0].list_entries(tenants=None):
        record = stores[0].get_records([entry.chunk_id])[0]
        if entry.key not in both_have or record is None:
            continue
        found = []
        for store in stores:
            buffer = bytearray(entry.nbytes)
            assert store.load(ChunkKey(entry.key), record.token_ids, planes(buffer, entry.tokens)) is None
            found.append(bytes(buffer))
        assert found[0] == found[1], f"{record.type}, {entry.tokens} tokens"
        compared += record.type == "turn"
    assert compared >= 2 * len(LENGTHS) - 1
    for store in stores:
        store.close()


def planes(buffer: bytearray, tokens: int) -> list[memoryview]:
    """Of a model all of whose planes have the same size."""
    layers = 2 * round(len(buffer) / (2 * tokens * 2 * SHAPE["num_key_value_heads"] * SHAPE["head_dim"]))
    size = len(buffer) // layers
    return [memoryview(buffer)[at : at + size] for at in range(0, len(buffer), size)]
