"""An 8B-shaped bf16 checkpoint from disk through the real services, on the first card and on a second one."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_start import save_checkpoint
from bench.serving_options import FOLDER
from cairn import Client, Result
from cairn.local.processes import free_port
from tests.end_to_end.processes import Process
from tests.gpu.traffic import TOKENS, Asked, alone, mixed_traffic, together

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

CHUNKS = [[(7919 * i + 31 * j) % 2000 for j in range(1500 + 17 * i)] for i in range(4)]
QUERY = [9, 8, 7, 300, 12]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the shape of Qwen3-8B, with the shipped model's tokenizer; what the bench wrote will do."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if (FOLDER / "model" / "config.json").exists():
        return FOLDER / "model"
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
    # Not strict: with random weights two tokens are soon equally likely, and a bit that hangs on the batch shows.
    decode = Process("decode_service", [*shared, "--prefill", prefill.address], free_port("127.0.0.1"))
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
        options: Any = {"max_tokens": 24, "ignore_eos": True, "logprobs": True}
        results = [stream.finish() for stream in [client.generate(parts, **options) for _ in range(32)]]
        print(json.dumps({"tokens_per_s": 32 * 24 / (time.perf_counter() - began)}))
    assert {(result.token_ids, result.logprobs) for result in results} == {(alone.token_ids, alone.logprobs)}


def test_in_mixed_traffic_everybody_has_the_answer_of_one_who_is_alone(services: tuple[Process, Process]) -> None:
    """Cold in the crowd, warm in the crowd, then one by one: tokens and log-probabilities to the bit."""
    traffic = mixed_traffic(CHUNKS, 2000)
    crowds = [asyncio.run(together(services, traffic, label)) for label in ("cold", "warm")]
    ones = asyncio.run(alone(services, traffic))
    for crowd in crowds:
        differ = [
            asked.name
            for asked, one, other in zip(traffic, ones, crowd, strict=True)
            if (one.token_ids, one.logprobs) != (other.token_ids, other.logprobs)
        ]
        assert differ == []
    assert all(len(one.token_ids) == TOKENS for one in ones)
    assert len({one.token_ids for one in ones}) > len(ones) // 2  # it is not one answer to everything


def test_sampled_crowds_draw_what_one_draws_and_keep_their_pace(services: tuple[Process, Process]) -> None:
    """48 streams of a seed each, 16 seeds in all: equal seeds draw equal tokens, others do not."""
    options = {"temperature": 0.8, "top_p": 0.95, "logprobs": True}
    traffic = [Asked("sampled", [CHUNKS[0], QUERY], {**options, "seed": number % 16}) for number in range(48)]
    drawn = asyncio.run(together(services, traffic, "sampled"))
    greedy = [Asked("greedy", [CHUNKS[0], QUERY], {"logprobs": True})] * len(traffic)
    asyncio.run(together(services, greedy, "greedy"))
    (one,) = asyncio.run(alone(services, traffic[5:6]))
    answers = [(result.token_ids, result.logprobs) for result in drawn]
    by_seed = [set(answers[seed::16]) for seed in range(16)]
    assert [len(each) for each in by_seed] == [1] * 16
    assert by_seed[5] == {(one.token_ids, one.logprobs)} and len(set.union(*by_seed)) > 8
