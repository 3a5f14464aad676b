"""``python -m decode_service``: puts the decode service together and runs it."""

from __future__ import annotations

import sys

from serving.process.logs import adopt_library_loggers, begin_logging

if __name__ == "__main__":
    begin_logging("decode", sys.argv[1:])

import os
import signal
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from chunk_store.open import open_store, shown_url
from chunk_store.password import password_from
from chunk_store.quantities import human_bytes
from decode_service.api.service import DecodeService
from decode_service.kv_source.prefill_client import RemotePrefiller
from decode_service.kv_source.store_source import StoreSource
from decode_service.metrics import DecodeMetrics
from decode_service.options import DecodeOptions, parse
from decode_service.prompt.resolver import Resolver
from decode_service.worker import DecodeWorker
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from serving.process.life import run_main
from serving.process.loading import Loaded, pool_nbytes_default, pool_pages
from serving.store.gauges import StoreGauges
from serving.store.metered import MeteredStore, StoreMeter

FULL_NAME = "cairn.v1.DecodeService"


def build(options: DecodeOptions, loaded: Loaded, on_failure: Callable[[], None] = lambda: None) -> DecodeService:
    """The service over a loaded model; ``on_failure`` is called when its device thread ends because of a fault.

    Raises ``StoreUnavailable``, ``OSError`` or ``ValueError``.
    """
    served, shared = loaded.served, options.service
    tokens = options.max_batch * served.context_length_max
    pages = shared.kv_pages or pool_pages(served.layout, shared.page_size, tokens, pool_nbytes_default(shared.device))
    chunk_pages = min(pages - 1, max(1, round(pages * options.chunk_page_ratio)))
    size = human_bytes(pages * served.layout.nbytes(shared.page_size))
    with loaded.startup.stage("pool", f"preparing the KV pool: {pages} pages, {size}"):
        pool = PagedKVPool(
            served.layout, pages=pages, chunk_pages=chunk_pages, page_size=shared.page_size, device=shared.device
        )
        runner = served.make_runner(
            pool,
            decode_buckets=options.decode_buckets,
            row_multiple=options.row_multiple,
            max_cascade_levels=options.max_cascade_levels,
        )
        runner.prepare()
    metrics = DecodeMetrics(CollectorRegistry(), model_name=loaded.model_name, token_nbytes=served.layout.nbytes(1))
    with loaded.startup.stage("store", f"opening the store {shown_url(shared.store)}"):
        store = MeteredStore(
            open_store(shared.store, password=password_from(os.environ)),
            StoreMeter(metrics.registry, loaded.model_name),
        )
    metrics.registry.register(StoreGauges(store, loaded.model_name))
    prefiller = RemotePrefiller(options.prefill, token=options.prefill_token, ca=options.prefill_ca)
    residents = ResidentChunks(pool)
    access = shared.load_access()
    quotas = shared.quotas(access)
    resolver = Resolver(served, loaded.codec, store, quotas)
    worker = DecodeWorker(
        runner,
        residents,
        StoreSource(store, prefiller, served.identity, resolver.register),
        metrics,
        eos_token_ids=served.eos_token_ids,
        batch_max=options.max_batch,
        waiting_max=options.max_waiting,
        quotas=quotas,
        host_nbytes=options.host_cache,
        on_failure=on_failure,
    )
    metrics.watch_worker(worker.load)

    def close() -> None:
        prefiller.close()
        store.close()

    return DecodeService(
        worker,
        resolver,
        access,
        metrics.registry,
        model_name=loaded.model_name,
        request_timeout_s=options.request_timeout_s,
        close=close,
    )


def main() -> int:
    options = parse()
    adopt_library_loggers()
    failed: list[bool] = []

    def on_failure() -> None:
        """A service that can decode no more ends, so that what supervises it starts another one."""
        failed.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    code = run_main("decode", FULL_NAME, options.service, lambda loaded: build(options, loaded, on_failure))
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
