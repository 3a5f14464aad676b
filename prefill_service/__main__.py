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
from chunk_store.quantities import human_bytes
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunks
from prefill_service.api.service import FULL_NAME, PrefillService
from prefill_service.assembly import assemble, prepare
from prefill_service.jobs.own_pool import OwnPool
from prefill_service.worker import DeviceThread
from serving.process.life import Listed, run_main
from serving.process.loading import Loaded, pool_nbytes_default, pool_pages

log = logging.getLogger(__name__)

CONTEXTS_RESIDENT_DEFAULT = 2  # the default pool holds this many contexts of the model's full length


def main(options: PrefillOptions) -> int:
    adopt_library_loggers()
    return run_main([Listed("prefill", FULL_NAME, options)], lambda loaded: [build(options, loaded)])


def build(options: PrefillOptions, loaded: Loaded) -> PrefillService:
    """The service around a loaded model. Raises ``ValueError`` or ``StoreUnavailable`` for the store's URL."""
    served, parts = loaded.served, prepare(options, loaded)
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
    publisher, lender = parts.publisher(residents, device.post), parts.lender(residents, device.post)
    computer = OwnPool(served, runner, residents, parts.store, device, publisher, drain_s=options.drain_s)
    computer.lender = lender
    return assemble(parts, computer, pool, lender)


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


if __name__ == "__main__":
    sys.exit(main(given))
