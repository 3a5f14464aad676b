"""Either service is killed, or stopped, in the middle of handing KV over: the same answers, nothing lent for ever."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import urlopen

import pytest

from cairn import Client, Result
from tests.decode_service.models import tokens
from tests.decode_service.pair import wait_until
from tests.end_to_end.processes import Process

pytestmark = pytest.mark.timeout(1500)
TIMES = [1, pytest.param(100, marks=pytest.mark.slow)]
ANSWER: dict[str, Any] = {"max_tokens": 3, "ignore_eos": True}


@pytest.fixture
def client(running: tuple[Process, Process]) -> Iterator[Client]:
    for process in running:
        process.revive()
    with Client(*(process.address for process in running), timeout_s=120) as opened:
        yield opened


def parts(seed: int) -> list[list[int]]:
    """A prompt whose chunks nobody has, each computed in some milliseconds."""
    return [*(tokens(10 * seed + n, 24) for n in range(4)), [5]]


def generate(client: Client, seed: int) -> Result:
    return client.generate(parts(seed), **ANSWER).finish()


def metric(process: Process, name: str) -> float:
    with urlopen(f"http://127.0.0.1:{process.metrics_port}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    found = [float(line.split()[-1]) for line in lines if line.startswith(name)]
    assert found, name
    return sum(found)


def borrowed(decode: Process) -> float:
    return metric(decode, 'cairn_hand_over_chunks_total{model_name="tiny",outcome="borrowed"}')


def check_right(client: Client, seed: int, answer: tuple[int, ...]) -> None:
    again = client.generate(parts(seed), cache="bypass", **ANSWER).finish()
    assert again.token_ids == answer


def check_nothing_lent(prefill: Process) -> None:
    wait_until(lambda: metric(prefill, "cairn_hand_over_leased_chunks") == 0)


@pytest.mark.parametrize("times", TIMES)
def test_prefill_is_killed(running: tuple[Process, Process], client: Client, times: int) -> None:
    prefill, decode = running
    moments = random.Random(times)
    for number in range(times):
        seed = 1000 * times + number
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(generate, client, seed)
            time.sleep(moments.uniform(0.0, 0.12))
            prefill.kill()
            prefill.launch()
            prefill.wait_ready()
            check_right(client, seed, asked.result(120).token_ids)
    before = borrowed(decode)

    def borrows() -> bool:
        nonlocal seed
        seed += 1
        generate(client, 500_000 + seed)
        return borrowed(decode) > before

    wait_until(borrows)  # the new one's pool has been opened
    check_nothing_lent(prefill)
    wait_until(lambda: client.loads().running == 0 and client.loads().pages_tails == 0)


@pytest.mark.parametrize("times", TIMES)
def test_decode_is_killed(running: tuple[Process, Process], client: Client, times: int) -> None:
    prefill, decode = running
    moments = random.Random(times)
    for number in range(times):
        seed = 200_000 + 1000 * times + number
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(generate, client, seed)
            time.sleep(moments.uniform(0.0, 0.12))
            decode.kill()
            decode.launch()
            decode.wait_ready()
            asked.exception(120)  # the client may have tried again, or not
        check_nothing_lent(prefill)
        check_right(client, seed, generate(client, seed).token_ids)
    assert metric(prefill, "cairn_hand_over_borrowers") <= 1


def test_prefill_is_stopped_and_goes_on(running: tuple[Process, Process], client: Client) -> None:
    prefill, decode = running
    generate(client, 300_000)
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(generate, client, number) for number in range(300_001, 300_005)]
        time.sleep(0.03)
        prefill.pause()
        time.sleep(3.0)  # longer than a lease is asked about
        prefill.resume()
        for number, answer in enumerate(asked, 300_001):
            check_right(client, number, answer.result(120).token_ids)
    check_nothing_lent(prefill)
    wait_until(lambda: client.loads().running == 0 and client.loads().pages_tails == 0)
    assert decode.child.poll() is None
