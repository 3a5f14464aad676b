"""``python -m prefill_service``: options, logging, and the parts put together."""

from __future__ import annotations

import sys

from prefill_service.options import PrefillOptions, parse
from serving.process.logs import adopt_library_loggers, begin_logging

if __name__ == "__main__":
    given = parse()
    begin_logging("prefill", given.log_level, given.log_format)

import logging

from chunk_store.layout import KVLayout
from chunk_store.open import open_store, shown_url
from chunk_store.quantities import human_bytes
from engine.kv.exported import NotExportable
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from prefill_service.api.service import ALONE, FULL_NAME, PrefillService
from prefill_service.jobs.job import PrefillJobs
from prefill_service.jobs.own_pool import OwnPool
from prefill_service.jobs.resolver import Resolver
from prefill_service.metrics import PrefillMetrics
from prefill_service.worker import DeviceThread
from serving.handover.lender import Lender
from serving.handover.metrics import LenderMetrics
from serving.process.life import Listed, run_main
from serving.process.loading import Loaded, pool_nbytes_default, pool_pages
from serving.process.same_bits import SameBits
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.publisher import Publisher
from serving.rpc.access import Access
from serving.store.gauges import StoreGauges
from serving.store.metered import MeteredStore, StoreMeter
from serving.tenancy.quotas import TenantQuotas

log = logging.getLogger(__name__)

CONTEXTS_RESIDENT_DEFAULT = 2  # the default pool holds this many contexts of the model's full length


def main(options: PrefillOptions) -> int:
    adopt_library_loggers()
    return run_main([Listed("prefill", FULL_NAME, options)], lambda loaded: [build(options, loaded)])


def build(options: PrefillOptions, loaded: Loaded) -> PrefillService:
    """The service around a loaded model. Raises ``ValueError`` or ``StoreUnavailable`` for the store's URL."""
    served = loaded.served
    metrics = PrefillMetrics(loaded.model_name)
    with loaded.startup.stage("store", f"opening the store {shown_url(options.store)}"):
        opened = open_store(
            options.store,
            password=options.password(),
            capacity_nbytes=options.store_capacity,
            records_max=options.records_max,
            quarantine_s=options.quarantine_s,
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
        pool = make_pool(options, served.layout, pages)
        runner = served.make_runner(pool, slots=1)
        runner.prepare()
    residents, device = ResidentChunks(pool), DeviceThread()
    publisher = Publisher(
        residents,
        post=device.post,
        nbytes_max=options.publish_queue,
        threads=options.publishers,
        metrics=PublicationMetrics(metrics.registry, loaded.model_name),
    )
    computer = OwnPool(served, runner, residents, store, device, publisher, drain_s=options.drain_s)
    access = Access.from_file(options.token_file)
    resolver = Resolver(store, served, loaded.codec, pool, TenantQuotas(access.quotas, options.tenant_quota))
    jobs = PrefillJobs(resolver, computer, store, metrics, jobs_max=options.jobs_max, durable=options.durable)
    computer.lender = make_lender(options, residents, device, LenderMetrics(metrics.registry, loaded.model_name))
    metrics.watch(lambda: jobs.queue.jobs, pool.count)
    found = served.row_bits
    same_bits = ALONE if found is None else SameBits(found.equal, found.reason)
    return PrefillService(jobs, store, access, loaded.model_name, same_bits, computer.lender)


def make_pool(options: PrefillOptions, layout: KVLayout, pages: int) -> PagedKVPool:
    """The pool, in memory that other processes may read if it is to be handed over and there is such memory."""

    def make(*, share: bool) -> PagedKVPool:
        size, device = options.page_size, options.device
        return PagedKVPool(layout, pages=pages, chunk_pages=pages, page_size=size, device=device, share=share)

    try:
        return make(share=options.hand_over)
    except OSError as error:
        log.warning("there is no memory here that can be shared: %s", error)
        return make(share=False)


def make_lender(
    options: PrefillOptions, residents: ResidentChunks, device: DeviceThread, metrics: LenderMetrics
) -> Lender | None:
    """Who hands KV over on this host; None, with the reason in the log, where that cannot be."""
    if not options.hand_over:
        return None
    try:
        return Lender(
            residents,
            device.post,
            metrics,
            lease_s=options.hand_over_lease_s,
            directory=options.hand_over_dir,
        )
    except (NotExportable, OSError) as error:
        log.warning("KV is handed over through the store only: %s", error)
        return None


if __name__ == "__main__":
    sys.exit(main(given))
