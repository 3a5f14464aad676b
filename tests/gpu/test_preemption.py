"""Answers whose pages run out on the card: the bits of undisturbed ones, from host memory and computed again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cairn import ChunkRef, Client, Result
from cairn.local.processes import free_port
from engine.kv.pool import PagedKVPool
from engine.kv.tails_aside import TailsAside
from tests.end_to_end.processes import Process
from tests.fakes import LAYOUT
from tests.models_for_tests import tiny_model_dir

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

SHAPE: Any = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 384}
REQUESTS, TOKENS = 14, 500


def fresh(seed: int, count: int) -> list[int]:
    return [6 + (seed * 7919 + j * j * 13 + j * seed) % 370 for j in range(count)]


CHUNKS = [fresh(1, 333), fresh(2, 700)]


def requests() -> list[tuple[list[Any], dict[str, Any]]]:
    """Greedy, sampled and with penalties; of two priorities; some keep their turn."""
    made: list[tuple[list[Any], dict[str, Any]]] = []
    for n in range(REQUESTS):
        options: dict[str, Any] = {"max_tokens": TOKENS - 7 * n, "priority": n % 2, "keep": n % 4 == 0}
        if n % 3:
            options |= {"temperature": 0.9, "top_p": 0.95, "seed": n}
        if n % 3 == 2:
            options |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "min_tokens": 40}
        made.append(([*CHUNKS[: n % 3], fresh(100 + n, 1 + 41 * n)], options))
    return made


def answers(client: Client) -> list[Result]:
    def ask(request: tuple[list[Any], dict[str, Any]]) -> Result:
        return client.generate(request[0], ignore_eos=True, logprobs=True, **request[1]).finish()

    with ThreadPoolExecutor(REQUESTS) as threads:
        return list(threads.map(ask, requests()))


@contextmanager
def decode(arguments: list[str], prefill: Process, pages: int, aside: str) -> Iterator[Client]:
    """A decode service whose tails have a third of ``pages``."""
    of_pool = ["--kv-pages", str(pages), "--chunk-page-ratio", "0.67", "--host-tails", aside, "--batch-max", "16"]
    process = Process("decode_service", [*arguments, *of_pool, "--prefill", prefill.address], free_port("127.0.0.1"))
    try:
        process.launch()
        process.wait_ready()
        with Client(prefill=prefill.address, decode=process.address, timeout_s=200) as client:
            yield client
    finally:
        process.end()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], Process]]:
    folder = tmp_path_factory.mktemp("preemption")
    model: Path = tiny_model_dir(folder / "model", "qwen3", **SHAPE, max_position_embeddings=16384)
    store = f"file://{folder / 'store'}"
    arguments = ["--model", str(model), "--store", store, "--device", "cuda", "--dtype", "bfloat16"]
    prefill = Process("prefill_service", [*arguments, "--kv-pages", "2000"], free_port("127.0.0.1"))
    try:
        prefill.launch()
        prefill.wait_ready()
        yield arguments, prefill
    finally:
        prefill.end()


def test_answers_have_the_bits_of_undisturbed_ones(started: tuple[list[str], Process]) -> None:
    arguments, prefill = started
    with decode(arguments, prefill, 6000, "0") as large:
        expected = answers(large)
        assert not any(result.preemptions for result in expected)
    for aside in ("0", "64KiB", "1GiB"):
        with decode(arguments, prefill, 600, aside) as small:
            results = answers(small)
            print(aside, [result.preemptions for result in results])
            assert sum(result.preemptions for result in results) > 2, aside
            for at, (one, want) in enumerate(zip(results, expected, strict=True)):
                assert (one.token_ids, one.logprobs) == (want.token_ids, want.logprobs), (aside, at)
            _go_on_behind_kept_turns(small, results)
            loads = small.loads()
            assert loads.pages_tails == 0 and loads.running == loads.waiting == 0


def _go_on_behind_kept_turns(client: Client, results: list[Result]) -> None:
    for (parts, _), result in zip(requests(), results, strict=True):
        if result.kept is not None:
            turn = [*parts[-1], *result.token_ids]
            again = client.generate([*parts[:-1], ChunkRef(result.kept.id), [9, 8, 7]], max_tokens=16, logprobs=True)
            fresh = client.generate([*parts[:-1], turn, [9, 8, 7]], max_tokens=16, logprobs=True, cache="bypass")
            one, want = again.finish(), fresh.finish()
            assert (one.token_ids, one.logprobs) == (want.token_ids, want.logprobs)


def test_bytes_go_to_pinned_memory_and_come_back_behind_what_was_launched() -> None:
    """A tail is put aside, its pages are overwritten and it comes back into others, without the host waiting."""
    pool = PagedKVPool(LAYOUT, pages=400, chunk_pages=40, page_size=16, device="cuda")
    aside = TailsAside(pool, 1 << 28)
    pages = list(range(399, 99, -1))
    run = aside.table.allocate_run(len(pages) * 16)
    assert run is not None
    for round_ in range(5):
        for plane in pool.planes:
            plane.copy_(torch.randn(plane.shape, device="cuda"))
        wanted = [plane.view(-1, 16, *plane.shape[1:])[pages].clone() for plane in pool.planes]
        aside.put(pages, run)
        for plane in pool.planes:
            plane.fill_(float(round_))
        back = list(range(50, 350))
        aside.bring_back(run, back)
        for plane, want in zip(pool.planes, wanted, strict=True):
            assert torch.equal(plane.view(-1, 16, *plane.shape[1:])[back], want)
