"""A prefill and a decode service on one Mooncake cluster: what one computes the other loads; both survive its owner.

Two services, not four: the four on Redis show the rules, which are the same ledger here. This shows the data's way.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cairn import Tokens
from tests.chunk_store.servers import Mooncake, mooncake, mooncake_url, redis_server
from tests.scaling.cluster import Cluster, cluster

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        importlib.util.find_spec("mooncake") is None
        or not (Path(sys.executable).parent / "mooncake_master").exists()
        or shutil.which("redis-server") is None,
        reason="needs pip install 'cairn[mooncake]' and redis-server",
    ),
]

QUERY = Tokens([20, 21, 22])


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Mooncake]]:
    root = tmp_path_factory.mktemp("mooncake")
    redis = redis_server(tmp_path_factory.mktemp("redis"))
    redis.start()
    lent = mooncake(root, redis)
    try:
        lent.start()
        with cluster(tmp_path_factory.mktemp("workers"), mooncake_url(lent), each=1) as running:
            yield running, lent
    finally:
        lent.kill()
        redis.kill()


def test_what_prefill_computes_decode_loads(workers: tuple[Cluster, Mooncake]) -> None:
    running, _ = workers
    (client,) = running.clients
    document = Tokens([10 + place % 300 for place in range(100)])
    chunk = client.prefill(document, durable=True)
    result = client.generate([chunk, QUERY], max_tokens=4, ignore_eos=True).finish()
    assert [part.source for part in result.reuse.segments] == ["store", "computed"]
    assert client.generate([chunk, QUERY], max_tokens=4, cache="bypass", ignore_eos=True).finish().token_ids == (
        result.token_ids
    )
    assert client.prefill(document).outcome == "already_stored"
    assert running.computed() == [100]


def test_the_store_command_works_beside_the_services(workers: tuple[Cluster, Mooncake], tmp_path: Path) -> None:
    running, lent = workers
    chunk = running.clients[0].prefill(Tokens([12 + place * 5 % 300 for place in range(40)]))

    def store(*argv: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "cairn.cli", "store", *argv, "--json"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    url, archive, copy = mooncake_url(lent), str(tmp_path / "archive"), f"file://{tmp_path}/copy"
    assert store("verify", "--store", url)["sound"] is True
    assert store("export", archive, chunk.id, "--store", url)["entries"] == 1
    assert store("import", archive, "--store", copy)["entries"] == 1
    assert store("verify", "--store", copy)["entries"] == 1


def test_the_owner_of_the_memory_dies_and_comes_back(workers: tuple[Cluster, Mooncake]) -> None:
    """Its entries are gone: they are misses, computed again, and answers stay right."""
    running, lent = workers
    (client,) = running.clients
    first = client.prefill(Tokens([11 + place * 3 % 300 for place in range(60)]))
    expected = client.generate([first, QUERY], max_tokens=4, cache="bypass", ignore_eos=True).finish()
    lent.owner.kill()
    lent.owner.start()
    result = client.generate([first, QUERY], max_tokens=4, ignore_eos=True, timeout_s=60).finish()
    assert result.token_ids == expected.token_ids
    assert result.reuse.segments[0].source == "computed" and result.reuse.segments[0].miss_reason == "load_failed"
