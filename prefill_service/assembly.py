"""The parts of a prefill service and how they stand together, whoever computes the chunks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from chunk_store.open import open_store, shown_url
from engine.kv.exported import NotExportable
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.model.processor import memory_nbytes
from prefill_service.api.service import ALONE, PrefillService
from prefill_service.jobs.computer import ChunkComputer
from prefill_service.jobs.job import PrefillJobs
from prefill_service.jobs.resolver import Resolver
from prefill_service.metrics import PrefillMetrics
from prefill_service.options import PrefillOptions
from serving.handover.lender import Lender
from serving.handover.metrics import LenderMetrics
from serving.process.loading import Loaded
from serving.process.same_bits import SameBits
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.publisher import Publisher
from serving.rpc.access import Access
from serving.store.gauges import StoreGauges
from serving.store.metered import MeteredStore, StoreMeter
from serving.tenancy.quotas import TenantQuotas

Post = Callable[[Callable[[], None]], None]

QUEUE_NBYTES_MAX, QUEUE_MEMORY_SHARE = 8 * 2**30, 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a prefill service stands on: the store, what is counted, and who may use it."""

    options: PrefillOptions
    loaded: Loaded
    store: MeteredStore
    metrics: PrefillMetrics
    access: Access
    quotas: TenantQuotas

    def publisher(self, residents: ResidentChunks, post: Post) -> Publisher:
        """Writes chunks of a pool behind; ``post`` runs a function in the thread that the pool belongs to."""
        return Publisher(
            residents,
            self.store,
            post=post,
            nbytes_max=self.options.publish_queue or queue_nbytes_default(),
            threads=self.options.publishers,
            metrics=PublicationMetrics(self.metrics.registry, self.loaded.model_name),
        )

    def lender(self, residents: ResidentChunks, post: Post) -> Lender | None:
        """Who hands KV over on this host; None, with the reason in the log, where that cannot be."""
        options = self.options
        if not options.hand_over:
            return None
        metrics = LenderMetrics(self.metrics.registry, self.loaded.model_name)
        try:
            return Lender(residents, post, metrics, lease_s=options.hand_over_lease_s, directory=options.hand_over_dir)
        except (NotExportable, OSError) as error:
            log.warning("KV is handed over through the store only: %s", error)
            return None


def queue_nbytes_default() -> int:
    """Bytes that may wait to be stored where nobody says how many."""
    memory = memory_nbytes() or QUEUE_MEMORY_SHARE * QUEUE_NBYTES_MAX
    return min(QUEUE_NBYTES_MAX, memory // QUEUE_MEMORY_SHARE)


def prepare(options: PrefillOptions, loaded: Loaded) -> Parts:
    """Opens the store. Raises ``ValueError`` or ``StoreUnavailable`` for its URL."""
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
    access = Access.from_file(options.token_file)
    quotas = TenantQuotas(access.quotas, options.tenant_quota)
    return Parts(options, loaded, store, metrics, access, quotas)


def assemble(
    parts: Parts, computer: ChunkComputer, pool: PagedKVPool, lender: Lender | None, *, pages: bool = True
) -> PrefillService:
    """The service over its parts. ``pages``: it reports the pages of ``pool``, which nobody else does."""
    options, loaded = parts.options, parts.loaded
    resolver = Resolver(parts.store, loaded.served, loaded.codec, pool, parts.quotas)
    jobs = PrefillJobs(
        resolver, computer, parts.store, parts.metrics, jobs_max=options.jobs_max, durable=options.durable
    )
    parts.metrics.watch(lambda: jobs.queue.jobs, pool.count if pages else dict)
    found = loaded.served.row_bits
    same_bits = ALONE if found is None else SameBits(found.equal, found.reason)
    return PrefillService(jobs, parts.store, parts.access, loaded.model_name, same_bits, lender)
