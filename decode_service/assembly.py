"""The parts of a decode service and how they stand together, whoever makes the KV that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from chunk_store.open import open_store, shown_url
from chunk_store.quantities import human_bytes
from decode_service.api.service import DecodeService
from decode_service.device.worker import DecodeWorker
from decode_service.kv_source.asking import PrefillClient
from decode_service.kv_source.claims import ChunkClaims
from decode_service.kv_source.fetcher import KVFetcher
from decode_service.metrics import DecodeMetrics
from decode_service.options import DecodeOptions
from decode_service.prompt.resolver import Resolver
from decode_service.same_bits import needs_one_size, same_bits
from decode_service.turns import ClaimTurn, claim_with
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from engine.run.protocol import Runner
from serving.errors import Unavailable
from serving.handover.borrower import Borrower
from serving.handover.lent import Offer
from serving.handover.metrics import BorrowerMetrics
from serving.process.loading import Loaded
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.publisher import Publisher
from serving.rpc.access import Access
from serving.store.gauges import StoreGauges
from serving.store.metered import MeteredStore, StoreMeter
from serving.tenancy.quotas import TenantQuotas

KEPT_NBYTES_MAX = 2**30  # of kept turns that wait to be stored: 18 of 384 tokens of an 8B model
PUBLISHERS = 4  # entries written beside each other
DRAIN_S = 10.0  # for kept turns that are not stored yet when the service ends


@dataclass(frozen=True)
class PoolSize:
    """Pages of a pool, and how many of them chunks may take."""

    pages: int
    chunk_pages: int


@dataclass(frozen=True)
class Parts:
    """What a decode service stands on: the device's parts, the store, and who may use it."""

    options: DecodeOptions
    loaded: Loaded
    runner: Runner
    residents: ResidentChunks
    store: MeteredStore
    metrics: DecodeMetrics
    access: Access
    quotas: TenantQuotas

    def borrower(self, ask: Callable[[str], Offer]) -> Borrower:
        """Who copies what a prefill service of this host has just computed; ``ask`` calls its ``OpenHandOver``."""
        metrics = BorrowerMetrics(self.metrics.registry, self.loaded.model_name)
        made = Borrower(self.loaded.served.layout, self.residents.pool.device, ask, metrics)
        made.open()
        return made


def prepare(options: DecodeOptions, loaded: Loaded, size: PoolSize) -> Parts:
    """Makes pool and runner, and opens the store. Raises ``StoreUnavailable``, ``OSError`` or ``ValueError``."""
    served = loaded.served
    nbytes = human_bytes(size.pages * served.layout.nbytes(options.page_size))
    one_size = needs_one_size(options, served.row_bits)
    with loaded.startup.stage("pool", f"preparing the KV pool: {size.pages} pages, {nbytes}"):
        pool = PagedKVPool(
            served.layout,
            pages=size.pages,
            chunk_pages=size.chunk_pages,
            page_size=options.page_size,
            device=options.device,
        )
        runner = served.make_runner(
            pool,
            slots=options.batch_max,
            decode_buckets=options.decode_buckets(one_size=one_size),
            row_multiple=options.row_multiple(one_size=one_size),
            max_cascade_levels=options.cascade_levels_max,
        )
        runner.prepare()
    metrics = DecodeMetrics(CollectorRegistry(), model_name=loaded.model_name, token_nbytes=served.layout.nbytes(1))
    with loaded.startup.stage("store", f"opening the store {shown_url(options.store)}"):
        store = MeteredStore(
            open_store(options.store, password=options.password()), StoreMeter(metrics.registry, loaded.model_name)
        )
    metrics.registry.register(StoreGauges(store, loaded.model_name))
    access = Access.from_file(options.token_file)
    quotas = TenantQuotas(access.quotas, options.tenant_quota)
    return Parts(options, loaded, runner, ResidentChunks(pool), store, metrics, access, quotas)


def assemble(
    parts: Parts,
    client: PrefillClient,
    *,
    on_failure: Callable[[], None],
    close: Callable[[], None],
    claim_turn: ClaimTurn | None = None,
    drain: Callable[[], None] = lambda: None,
    borrower: Borrower | None = None,
) -> DecodeService:
    """The service over its parts. ``client`` makes KV that the store lacks; ``claim_turn`` lets kept turns go there.

    ``borrower`` copies what a prefill service of this host has just computed. ``on_failure`` is called when its device
    thread ends because of a fault, ``drain`` before it ends because it is asked to, and ``close`` once it has ended.
    """
    options, served = parts.options, parts.loaded.served
    resolver = Resolver(served, parts.loaded.codec, parts.store, parts.quotas)
    worker = DecodeWorker(
        parts.runner,
        parts.residents,
        KVFetcher(parts.store, client, served.identity, resolver.register, borrower),
        parts.metrics,
        eos_token_ids=served.eos_token_ids,
        batch_max=options.batch_max,
        waiting_max=options.waiting_max,
        waiting_max_s=options.waiting_max_s,
        quotas=parts.quotas,
        host_nbytes=options.host_cache,
        aside_nbytes=options.host_tails,
        sight=served.sight,
        on_failure=on_failure,
    )
    parts.metrics.watch_worker(worker.occupancy)

    def end() -> None:
        if borrower is not None:
            borrower.close()
        close()
        parts.store.close()

    return DecodeService(
        worker,
        resolver,
        parts.access,
        parts.metrics.registry,
        model_name=parts.loaded.model_name,
        same_bits=same_bits(options, served.row_bits, served.decision.attention, served.rows_stand_alone),
        request_timeout_s=options.request_timeout_s,
        close=end,
        claim_turn=claim_turn,
        drain=drain,
    )


def assemble_alone(
    parts: Parts,
    client: PrefillClient,
    *,
    on_failure: Callable[[], None],
    close: Callable[[], None],
    borrower: Borrower | None = None,
) -> DecodeService:
    """``assemble`` for a process that publishes nothing but kept turns, where they are kept as they were generated."""
    if parts.runner.alone(1, chunk=True):
        return assemble(parts, client, on_failure=on_failure, close=close, borrower=borrower)

    def post(call: Callable[[], None]) -> None:
        try:
            service.worker.call(call)
        except Unavailable as error:
            raise RuntimeError("the device thread has ended") from error

    served, quotas = parts.loaded.served, parts.quotas
    metrics = PublicationMetrics(parts.metrics.registry, parts.loaded.model_name)
    publisher = Publisher(
        parts.residents, parts.store, post=post, nbytes_max=KEPT_NBYTES_MAX, threads=PUBLISHERS, metrics=metrics
    )
    claims = ChunkClaims(
        parts.store, publisher, served.identity, served.layout, lambda tenant: quotas.of(tenant).limits
    )

    def drain() -> None:
        publisher.stop(DRAIN_S)

    def end() -> None:
        claims.stop()
        close()

    service = assemble(
        *(parts, client),
        on_failure=on_failure,
        close=end,
        claim_turn=claim_with(claims),
        drain=drain,
        borrower=borrower,
    )
    return service
