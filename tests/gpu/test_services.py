"""Both services on the card, as processes: one answer cold, warm, from the host tier, from the store, bypassed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cairn import Client, Result
from cairn.local.processes import free_port
from tests.end_to_end.processes import Process
from tests.models_for_tests import tiny_model_dir

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(280)]

SHAPE: Any = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 384}
CHUNKS = [list(range(6 + i, 300 + i)) for i in range(4)]
QUERY = [9, 8, 7, 300, 12]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    folder = tmp_path_factory.mktemp("cuda")
    model = tiny_model_dir(folder / "model", "qwen3", **SHAPE, max_position_embeddings=8192)
    shared = ["--model", str(model), "--store", f"file://{folder / 'store'}", "--device", "cuda", "--dtype", "bfloat16"]
    prefill = Process("prefill_service", [*shared, "--kv-pages", "2000"], free_port("127.0.0.1"))
    # Room for three chunks: the others leave the pool and come back from the host tier.
    # What is handed over does not pass through host memory, so nothing is.
    small = ["--kv-pages", "120", "--chunk-page-ratio", "0.5", "--host-cache", "256MiB", "--no-hand-over"]
    decode = Process("decode_service", [*shared, *small, "--prefill", prefill.address], free_port("127.0.0.1"))
    for process in (prefill, decode):
        process.launch()
    for process in (prefill, decode):
        process.wait_ready()
    yield prefill, decode
    for process in (decode, prefill):
        process.end()


def ask(client: Client, order: list[int], reuse: str, cache: str = "shared") -> Result:
    parts = [CHUNKS[i] for i in order]
    return client.generate([*parts, QUERY], max_tokens=24, reuse=reuse, cache=cache, ignore_eos=True).finish()


def sources(result: Result) -> list[str]:
    return [segment.source for segment in result.reuse.segments[:-1]]


@pytest.mark.parametrize("reuse", ["exact", "independent", "anchored"])
def test_answers_do_not_depend_on_where_kv_comes_from(services: tuple[Process, Process], reuse: str) -> None:
    assert torch.cuda.is_available()
    prefill, decode = services
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        cold = {order: ask(client, list(order), reuse) for order in ((0, 1), (2, 3), (1, 0))}
        again = {order: ask(client, list(order), reuse) for order in cold}
        seen = {source for result in again.values() for source in sources(result)}
        assert "host" in seen and seen <= {"host", "device"}
        warm = ask(client, [1, 0], reuse)
        assert sources(warm) == ["device", "device"]
        assert warm.token_ids == cold[1, 0].token_ids
        for order, result in cold.items():
            assert again[order].token_ids == result.token_ids
            assert ask(client, list(order), reuse, cache="bypass").token_ids == result.token_ids
            usage = again[order].usage
            assert usage.cached_tokens + usage.computed_tokens == usage.prompt_tokens
    decode.kill()
    decode.revive()
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        stored = ask(client, [2, 3], reuse)
        assert set(sources(stored)) <= {"store", "device"} and "store" in sources(stored)
        assert stored.token_ids == cold[2, 3].token_ids


def test_many_at_once_answer_as_one(services: tuple[Process, Process]) -> None:
    prefill, decode = services
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        alone = ask(client, [0, 1], "exact")
        streams = [client.generate([CHUNKS[0], CHUNKS[1], QUERY], max_tokens=24, ignore_eos=True) for _ in range(12)]
        assert {stream.finish().token_ids for stream in streams} == {alone.token_ids}
