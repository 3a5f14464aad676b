"""Both services as one process of the real command: it drains, it is killed, it starts again over the same store."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import cairn
from cairn import ChunkRef, Client
from cairn.local.processes import free_port
from chunk_store.open import open_store
from tests.decode_service.models import model_dir, tokens
from tests.end_to_end.processes import Process

PARTS = [tokens(n, 200) for n in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_dir(tmp_path_factory.mktemp("models") / "tiny")


class Both(Process):
    """One process; ``decode_port`` is of its second service."""

    decode_port = 0

    def client(self, timeout_s: float = 60) -> Client:
        return Client(self.address, f"127.0.0.1:{self.decode_port}", timeout_s=timeout_s)


@pytest.fixture
def both(folder: Path, tmp_path: Path) -> Iterator[Both]:
    shared = ["--model", str(folder), "--store", f"file://{tmp_path / 'store'}", "--log-level", "warning"]
    shared += ["--prefill-tokens-max", "16"]
    port = free_port("127.0.0.1")
    decode = ["--port", str(port), "--prefill", "unused:1", *shared]
    process = Both("cairn.local.together", [*shared, "--", *decode], free_port("127.0.0.1"))
    process.decode_port = port
    process.launch()
    process.wait_ready()
    yield process
    if process.child.poll() is None:
        process.kill()


def ask(client: Client, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    parts = [*draw.sample(PARTS, 3), tokens(1000 + seed, 6)]
    mode: Any = draw.choice(["exact", "independent"])
    return client.generate(parts, max_tokens=3, ignore_eos=True, reuse=mode).finish().token_ids


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_starts_again_and_gives_the_same_answers(
    both: Both, tmp_path: Path, kills: int
) -> None:
    """Nothing half-published is read, claims of the dead hold nobody up, and what was stored serves."""
    with both.client() as client:
        answers = {}
        for kill in range(kills):
            with ThreadPoolExecutor(4) as threads:
                asked = [threads.submit(ask, client, seed) for seed in range(4 * kill, 4 * kill + 4)]
                beside = [threads.submit(client.prefill, part) for part in PARTS[:2]]
                time.sleep(0.2 * (kill + 1))
                both.kill()
                for number, future in enumerate(asked):
                    with suppress(cairn.CairnError):
                        answers[4 * kill + number] = future.result(60)
                for prefill in beside:
                    with suppress(cairn.CairnError):
                        prefill.result(60)
            both.launch()
            both.wait_ready()
        for seed in range(4 * kills):
            again = ask(client, seed)
            assert answers.setdefault(seed, again) == again
        draw = random.Random(0)
        parts = [*draw.sample(PARTS, 3), tokens(1000, 6)]
        mode: Any = draw.choice(["exact", "independent"])
        plain = client.generate(parts, max_tokens=3, ignore_eos=True, reuse=mode, cache="bypass").finish()
        assert plain.token_ids == answers[0]
    assert both.end() == 0
    store = open_store(f"file://{tmp_path / 'store'}")
    assert store.list_entries() and store.stats().quarantined == 0
    store.close()


def test_asked_to_end_it_writes_out_what_it_computed_for_either_service(both: Both, tmp_path: Path) -> None:
    with both.client() as client:
        chunk = client.prefill(PARTS[0])
        answer = client.generate([ChunkRef(chunk.id), PARTS[1], tokens(7, 4)], max_tokens=2, ignore_eos=True).finish()
    assert [segment.source for segment in answer.reuse.segments[:2]] == ["device", "computed"]
    second = json.loads(both.child.stdout.readline())
    assert (both.ready["service"], second["service"]) == ("decode", "prefill")
    for ready in (both.ready, second):
        with urllib.request.urlopen(f"http://127.0.0.1:{ready['metrics_port']}/metrics", timeout=30) as reply:
            exported = reply.read().decode()
        assert exported.count("\nprocess_resident_memory_bytes ") == 1
        assert (f'service="{ready["service"]}"' in exported) and (ready["same_bits"] is not None)
    assert both.end() == 0
    store = open_store(f"file://{tmp_path / 'store'}")
    assert sorted(entry.tokens for entry in store.list_entries()) == [200, 200]
    store.close()


def test_cairn_up_has_both_services_in_one_process(folder: Path, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "cairn.cli", "up", "--json", "--no-separate", "--model", str(folder)]
    argv += ["--store", f"file://{tmp_path}"]
    for name in ("--prefill-port", "--decode-port", "--prefill-metrics-port", "--decode-metrics-port"):
        argv += [name, "0"]
    (tmp_path / "tokens").write_text("stone\nriver salt-1\n")
    argv += ["--token-file", str(tmp_path / "tokens")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        ready = json.loads(process.stdout.readline())
        assert ready["event"] == "ready" and {"dtype", "same_bits", "seconds"} <= ready.keys()
        addresses = (ready["prefill"]["address"], ready["decode"]["address"])
        children = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
        assert len(children.stdout.split()) == 1
        with Client(*addresses, token="river") as client:
            chunk = client.prefill(PARTS[0])
            found = client.generate([ChunkRef(chunk.id), tokens(7, 4)], max_tokens=2, ignore_eos=True).finish()
            assert found.reuse.segments[0].source == "device"
        with Client(*addresses, token="nobody") as client, pytest.raises(cairn.CairnError):
            client.prefill(PARTS[0])
        process.send_signal(signal.SIGINT)
        out, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert json.loads(out) == {"event": "stopped", "reason": "asked", "clean": True}
    assert process.returncode == 0 and "cairn | " in log
