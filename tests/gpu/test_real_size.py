"""An 8B-shaped bf16 checkpoint from disk through the real services, on the first card and on a second one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_start import save_checkpoint
from cairn import Client, Result
from cairn.local.processes import free_port
from tests.end_to_end.processes import Process

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

CHUNKS = [[(7919 * i + 31 * j) % 2000 for j in range(1500 + 17 * i)] for i in range(4)]
QUERY = [9, 8, 7, 300, 12]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the shape of Qwen3-8B, with the shipped model's tokenizer."""
    place = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(place, layers=36)
    return place


@pytest.fixture(scope="module", params=["cuda", "cuda:1"])
def services(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Process, Process]]:
    if torch.device(request.param).index == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    store = tmp_path_factory.mktemp("store")
    shared = ["--model", str(checkpoint), "--store", f"file://{store}", "--device", request.param]
    prefill = Process("prefill_service", shared, free_port("127.0.0.1"))
    # Strict: with random weights two tokens are soon as likely to the last bit, and another batch size shows.
    decode = Process("decode_service", [*shared, "--prefill", prefill.address, "--strict"], free_port("127.0.0.1"))
    began = time.perf_counter()
    try:
        for process in (prefill, decode):
            process.launch()
        for process in (prefill, decode):
            process.wait_ready()
            print(json.dumps({"ready": process.module, "device": request.param, "s": time.perf_counter() - began}))
        sys.stdout.flush()
        yield prefill, decode
    finally:
        for process in (decode, prefill):
            process.end()


def ask(client: Client, order: list[int], reuse: str, cache: str = "shared") -> Result:
    """24 tokens with their log-probabilities: what tokens alone do not show, these do."""
    parts = [*(CHUNKS[i] for i in order), QUERY]
    options: Any = {"max_tokens": 24, "ignore_eos": True, "logprobs": True}
    return client.generate(parts, reuse=reuse, cache=cache, **options).finish()


def test_every_mode_is_allowed(services: tuple[Process, Process]) -> None:
    prefill, decode = services
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        loads = client.loads()
    assert {mode.mode: (mode.supported, mode.reason) for mode in loads.modes} == {
        mode: (True, "") for mode in ("exact", "anchored", "independent")
    }


@pytest.mark.parametrize("reuse", ["exact", "independent", "anchored"])
def test_cold_warm_and_bypassed_are_one_answer(services: tuple[Process, Process], reuse: str) -> None:
    prefill, decode = services
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        for order in ([0, 1], [2, 3, 0], [1]):
            cold = ask(client, order, reuse)
            warm = ask(client, order, reuse)
            assert {segment.source for segment in warm.reuse.segments[:-1]} == {"device"}
            for result in (warm, *(ask(client, order, reuse, cache="bypass") for _ in range(4))):
                assert (result.token_ids, result.logprobs) == (cold.token_ids, cold.logprobs)
            seconds = {"cold_s": cold.timings.first_token_s, "warm_s": warm.timings.first_token_s}
            print(json.dumps({"reuse": reuse, "order": order, **seconds}))


def test_many_at_once_answer_as_one(services: tuple[Process, Process]) -> None:
    prefill, decode = services
    with Client(prefill=prefill.address, decode=decode.address, timeout_s=120) as client:
        alone = ask(client, [0, 1], "exact")
        parts = [CHUNKS[0], CHUNKS[1], QUERY]
        began = time.perf_counter()
        streams = [client.generate(parts, max_tokens=24, ignore_eos=True) for _ in range(32)]
        assert {stream.finish().token_ids for stream in streams} == {alone.token_ids}
        print(json.dumps({"tokens_per_s": 32 * 24 / (time.perf_counter() - began)}))
