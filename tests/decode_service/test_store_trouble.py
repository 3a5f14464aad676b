"""A store that takes nothing more, is locked or away: requests are answered, with the right bits, and say so."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import pytest

import cairn
from cairn import Result
from chunk_store.errors import StoreUnavailable
from chunk_store.limits import StoreLimits
from decode_service.kv_source import full_stores
from tests.chunk_store.servers import need_redis, redis_server, redis_url
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair, wait_until
from tests.decode_service.test_pressure import asking, later


@pytest.fixture(autouse=True)
def a_full_store_stays_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until ``forget_trouble``, however slow this machine is."""
    monkeypatch.setattr(full_stores, "FULL_FOR_S", 600.0)


STORE: dict[str, Any] = {"hand_over": False}  # the store is the way that KV takes here


def check_without_store(services: Pair, seed: int, why: str) -> None:
    """What cannot be stored is computed here: the bits of the bypass, reported, counted, and kept in the pool."""
    before = services.metric("cairn_unpublished_chunks_total", reason=why)
    for parts, options in (
        ([tokens(seed, 40), tokens(seed + 1, 200), [5]], {"reuse": "exact"}),
        ([tokens(seed, 40), tokens(seed + 2, 30), tokens(seed + 3, 20), [5]], {"reuse": "anchored"}),
    ):
        expected = services.generate(parts, cache="bypass", logprobs=True, **cast(Any, options))
        first = services.generate(parts, logprobs=True, **cast(Any, options))
        assert (first.token_ids, first.logprobs) == (expected.token_ids, expected.logprobs)
        new = [segment for segment in first.reuse.segments[:-1] if segment.source != "device"]
        assert new and {(segment.source, segment.unpublished) for segment in new} == {("computed", why)}
        again = services.generate(parts, logprobs=True, **cast(Any, options))
        assert {segment.source for segment in again.reuse.segments[:-1]} == {"device"}
        assert not any(segment.unpublished for segment in again.reuse.segments)
        assert (again.token_ids, again.logprobs) == (expected.token_ids, expected.logprobs)
    assert services.metric("cairn_unpublished_chunks_total", reason=why) - before == 4
    services.check_idle()


def forget_trouble(services: Pair) -> None:
    """As if some seconds had gone by."""
    services.decode.worker.loader.source.full._until.clear()


def is_stored(services: Pair, seed: int) -> bool:
    """Whether what comes now is stored again."""
    forget_trouble(services)
    result: Result = services.generate([tokens(seed, 25), [5]])
    return result.reuse.segments[0].source == "computed" and not result.reuse.segments[0].unpublished


def test_pins_fill_the_store(folder: Path, tmp_path: Path) -> None:
    nbytes = loaded(folder, "decode").served.layout.nbytes(40) + 8192
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", store_capacity=nbytes, **STORE
    ) as services:
        pinned = services.client.prefill(tokens(1, 40), pin=True, durable=True)
        with asking(services) as asked:
            check_without_store(services, 10, "store_full")
        assert len(asked) == 1  # after that the store is known to be full for some seconds
        assert services.generate([pinned, [5]]).reuse.segments[0].source == "store"
        services.client.unpin(pinned)
        assert is_stored(services, 20)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 12 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mount)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_others_fill_the_disk(folder: Path, small_disk: Path) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), small_disk / "s", **STORE) as services:
        assert is_stored(services, 29)
        other = small_disk / "other"
        with open(other, "wb") as file, pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        services.forget()
        forget_trouble(services)
        result = services.generate([tokens(29, 25), [5]])  # what is stored can still be read
        assert result.reuse.segments[0].source == "store"
        check_without_store(services, 30, "store_full")
        other.unlink()
        assert is_stored(services, 40)


def test_the_registry_is_full(folder: Path, tmp_path: Path) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", **STORE) as services:
        stored = services.client.prefill(tokens(50, 40), pin=True, durable=True)
        cast(Any, services.decode.store).ledger.upkeep.set_limits(StoreLimits(records_max=1))
        check_without_store(services, 60, "store_full")
        assert services.generate([stored, [5]]).reuse.segments[0].source == "store"


def test_redis_goes_away_and_comes_back(folder: Path, tmp_path: Path) -> None:
    need_redis()
    server = redis_server(tmp_path)
    server.start()
    try:
        with pair(loaded(folder, "prefill"), loaded(folder, "decode"), redis_url(server), **STORE) as services:
            known = services.client.prefill(tokens(70, 40), durable=True)
            warm = services.generate([known, [5]])
            server.kill()
            assert services.generate([known, [5]]).token_ids == warm.token_ids
            check_without_store(services, 80, "store_unavailable")
            services.forget()
            again = services.generate([known, [5]])  # its content is remembered, its KV is computed
            assert again.token_ids == warm.token_ids
            assert again.reuse.segments[0].unpublished == "store_unavailable"
            server.start()
            wait_until(lambda: is_stored(services, 90))
    finally:
        server.kill()


def test_the_prefill_service_has_no_store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the prefill service's side of the store is gone: it says why, and the decode service computes."""
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", **STORE) as services:

        def gone(*_: Any, **__: Any) -> None:
            raise StoreUnavailable("the mount is gone")

        monkeypatch.setattr(services.prefill.store, "get_records", gone)
        check_without_store(services, 100, "store_unavailable")


def test_the_directory_is_deleted(folder: Path, tmp_path: Path) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", **STORE) as services:
        first = services.generate([tokens(110, 40), [5]])
        shutil.rmtree(tmp_path / "s")
        (tmp_path / "s").write_text("in the way")
        services.forget()
        again = services.generate([tokens(110, 40), [5]])
        assert again.token_ids == first.token_ids
        assert again.reuse.segments[0].unpublished == "store_unavailable"
        check_without_store(services, 120, "store_unavailable")
        (tmp_path / "s").unlink()
        assert is_stored(services, 130)


def test_a_locked_index_delays_no_warm_request(folder: Path, tmp_path: Path) -> None:
    """Another process holds the write lock, and many cold requests wait for it: warm ones ask nobody."""
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", batch_max=8, **STORE) as services:
        named = services.client.prefill(tokens(140, 40), durable=True)
        parts: list[list[Any]] = [[named, [5]], [tokens(140, 40), [6]], [tokens(141, 30), [7]], [[8, 9]]]
        expected = [services.generate(each) for each in parts]
        stored, early = (services.client.prefill(tokens(n, 40), durable=True) for n in (142, 143))
        with closing(sqlite3.connect(tmp_path / "s" / "index.sqlite", isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            cold = [later(services, [tokens(150 + n, 20), [5]], timeout_s=50) for n in range(24)]
            # Comes while all who may be read for find out that their KV has to be computed; then nothing else comes.
            assert later(services, [early, [5]], timeout_s=8).result(20).reuse.segments[0].source == "store"
            wait_until(lambda: services.client.loads().running >= 8)
            for each, before in zip(parts * 3, expected * 3, strict=True):
                warm = services.generate(each, timeout_s=8)
                assert warm.token_ids == before.token_ids
                assert {segment.source for segment in warm.reuse.segments[:-1]} <= {"device"}
            read = services.generate([stored, [5]], timeout_s=8)  # read without a lease
            assert read.reuse.segments[0].source == "store"
            assert not any(future.done() for future in cold)
            holder.execute("ROLLBACK")
        assert {future.result(50).reuse.segments[0].source for future in cold} == {"computed"}
        services.check_idle()


def test_unknown_content_cannot_be_had_without_the_store(folder: Path, tmp_path: Path) -> None:
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), tmp_path / "s", **STORE) as services:
        shutil.rmtree(tmp_path / "s")
        (tmp_path / "s").write_text("in the way")
        with pytest.raises(cairn.Unavailable, match=r"index\.sqlite|cannot"):
            services.generate([cairn.ChunkRef("0" * 64), [5]], timeout_s=5)
