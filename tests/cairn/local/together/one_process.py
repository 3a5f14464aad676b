"""Both services over one model in this process, as ``cairn up --no-separate`` has them: the real parts on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cairn.local.together.assembly import build
from cairn.local.together.shared_pool import SharedPool
from decode_service.__main__ import FULL_NAME as DECODE
from decode_service.options import DecodeOptions
from prefill_service.api.service import FULL_NAME as PREFILL
from prefill_service.options import PrefillOptions
from serving.process.loading import Loaded
from tests.decode_service.pair import DEADLINE_S, Pair, serve, servers, wait_until


class Together(Pair):
    """A pair whose services share a pool and a device thread; ``url`` is of their store."""

    url = ""

    @property
    def pool(self) -> SharedPool:
        assert self.prefill is not None and isinstance(self.prefill.jobs.computer, SharedPool)
        return self.prefill.jobs.computer

    def flush(self) -> None:
        """Returns when all that was computed is in the store."""
        assert self.pool.publisher.flush(DEADLINE_S)
        self.in_device_thread(lambda: None)  # what was posted has run

    def check_idle(self) -> None:
        """Nothing runs, nothing is held or claimed, every page and byte is accounted for."""
        assert self.prefill is not None
        wait_until(lambda: self.client.loads().running == 0 and self.client.loads().waiting == 0)
        wait_until(lambda: self.prefill.jobs.queue.jobs == 0)
        residents = self.decode.worker.residents
        wait_until(lambda: not self.in_device_thread(lambda: self.decode.worker.scheduler.everyone))
        self.flush()
        wait_until(lambda: self.in_device_thread(lambda: residents.held) == 0)
        self.in_device_thread(residents.check_integrity)
        assert not self.pool.claims._open
        wait_until(lambda: self.pool.publisher.room.taken == 0)
        pages = {owner: self.metric("cairn_kv_pages", owner=owner) for owner in ("free", "chunk", "tail")}
        assert pages["tail"] == 0 and sum(pages.values()) == residents.pool.pages


@contextmanager
def together(loaded: Loaded, store: Path | str, *, kv_pages: int = 512, **options: Any) -> Iterator[Together]:
    """Both services; ``options`` are those of either."""
    url = store if isinstance(store, str) else f"file://{store}"
    shared: dict[str, Any] = {"model": "", "store": url, "kv_pages": kv_pages}
    of_prefill = {name: options.pop(name) for name in list(options) if name in PREFILLS}
    both = {name: options.pop(name) for name in list(options) if name in SHARED}
    prefill = PrefillOptions(**{**shared, "kv_pages": None, **both, **of_prefill})
    decode = DecodeOptions(**{"prefill": "unused:1", "request_timeout_s": DEADLINE_S, **shared, **both, **options})
    made, chunks = build(prefill, decode, loaded)
    running = servers()
    server, decode_address = running.run(serve(made, DECODE, decode, loaded))
    other, prefill_address = running.run(serve(chunks, PREFILL, prefill, loaded))
    services = Together(chunks, made, (prefill_address, decode_address))
    services.url = url
    try:
        yield services
    finally:
        services.client.close()
        running.run(server.drain(5.0))
        running.run(other.drain(5.0))
        running.run(chunks.stop())
        running.run(made.stop())


PREFILLS = {each for each in PrefillOptions.__dataclass_fields__ if each not in DecodeOptions.__dataclass_fields__}
SHARED = {each for each in PrefillOptions.__dataclass_fields__ if each in DecodeOptions.__dataclass_fields__}
