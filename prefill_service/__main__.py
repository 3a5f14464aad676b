"""``python -m prefill_service``: options, logging, and the parts put together."""

from __future__ import annotations

import sys

from serving.process.logs import adopt_library_loggers, begin_logging

if __name__ == "__main__":
    begin_logging("prefill", sys.argv[1:])

import argparse
import os
from functools import partial

from chunk_store.open import open_store, shown_url
from chunk_store.password import password_from
from chunk_store.quantities import human_bytes
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from prefill_service.api.service import FULL_NAME, PrefillService
from prefill_service.jobs.computer import ChunkComputer
from prefill_service.jobs.job import PrefillJobs
from prefill_service.jobs.resolver import Resolver
from prefill_service.metrics import PrefillMetrics
from serving.process.life import run_main
from serving.process.loading import Loaded, pool_nbytes_default, pool_pages
from serving.process.options import ServiceOptions, add_service_options, nbytes, positive, service_options
from serving.store.gauges import StoreGauges
from serving.store.metered import MeteredStore, StoreMeter

JOBS_MAX_DEFAULT = 256
CONTEXTS_RESIDENT_DEFAULT = 2  # the default pool holds this many contexts of the model's full length


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m prefill_service", description="Computes chunk KV and publishes it to the chunk store."
    )
    add_service_options(parser)
    parser.add_argument("--registry-max", type=positive, metavar="N", help="registered chunks at most (store-wide)")
    parser.add_argument("--store-capacity", type=nbytes, metavar="BYTES", help="of stored KV, for example 10GiB")
    parser.add_argument(
        "--quarantine-days", type=days, metavar="DAYS", help="how long a file:// store keeps bad data (store-wide; 7)"
    )
    parser.add_argument(
        "--jobs-max", type=positive, default=JOBS_MAX_DEFAULT, metavar="N", help="requests that wait or run at most"
    )
    args = parser.parse_args()
    options = service_options(parser, args)
    adopt_library_loggers()
    make = partial(
        make_service,
        options=options,
        registry_max=args.registry_max,
        capacity_nbytes=args.store_capacity,
        quarantine_s=args.quarantine_days,
        jobs_max=args.jobs_max,
    )
    return run_main("prefill", FULL_NAME, options, make)


def make_service(
    loaded: Loaded,
    *,
    options: ServiceOptions,
    registry_max: int | None = None,
    capacity_nbytes: int | None = None,
    quarantine_s: int | None = None,
    jobs_max: int = JOBS_MAX_DEFAULT,
) -> PrefillService:
    """The service around a loaded model. Raises ``ValueError`` or ``StoreUnavailable`` for the store's URL."""
    served = loaded.served
    metrics = PrefillMetrics(loaded.model_name)
    with loaded.startup.stage("store", f"opening the store {shown_url(options.store)}"):
        opened = open_store(
            options.store,
            password=password_from(os.environ),
            capacity_nbytes=capacity_nbytes,
            records_max=registry_max,
            quarantine_s=quarantine_s,
        )
    store = MeteredStore(opened, StoreMeter(metrics.registry, loaded.model_name))
    metrics.registry.register(StoreGauges(store, loaded.model_name))
    pages = options.kv_pages or pool_pages(
        served.layout,
        options.page_size,
        CONTEXTS_RESIDENT_DEFAULT * served.context_length_max,
        pool_nbytes_default(options.device),
    )
    size = human_bytes(pages * served.layout.nbytes(options.page_size))
    with loaded.startup.stage("pool", f"preparing the KV pool: {pages} pages, {size}"):
        pool = PagedKVPool(
            served.layout, pages=pages, chunk_pages=pages, page_size=options.page_size, device=options.device
        )
    computer = ChunkComputer(served, served.make_runner(pool), ResidentChunks(pool), store)
    access = options.load_access()
    resolver = Resolver(store, served, loaded.codec, pool, options.quotas(access))
    jobs = PrefillJobs(resolver, computer, store, metrics, jobs_max=jobs_max)
    metrics.watch(lambda: jobs.queue.jobs, pool.count)
    return PrefillService(jobs, store, access, loaded.model_name)


def days(text: str) -> int:
    """Days as seconds. Raises ``ValueError``."""
    value = float(text)
    if not 0 <= value <= 36_500:
        raise ValueError(f"{text} is not in 0..36500")
    return round(value * 86_400)


if __name__ == "__main__":
    sys.exit(main())
