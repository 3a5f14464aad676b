"""``python -m decode_service``: puts the decode service together and runs it."""

from __future__ import annotations

import sys

from decode_service.options import DecodeOptions, parse
from serving.process.logs import adopt_library_loggers, begin_logging

if __name__ == "__main__":
    given = parse()
    begin_logging("decode", given.log_level, given.log_format)

import os
import signal
from collections.abc import Callable

from decode_service.api.service import DecodeService
from decode_service.assembly import PoolSize, assemble_alone, prepare
from decode_service.kv_source.prefill_client import RemotePrefillClient
from serving.process.life import Listed, run_main
from serving.process.loading import Loaded, pool_nbytes_default, pool_pages

FULL_NAME = "cairn.v1.DecodeService"


def build(options: DecodeOptions, loaded: Loaded, on_failure: Callable[[], None] = lambda: None) -> DecodeService:
    """The service over a loaded model; ``on_failure`` is called when its device thread ends because of a fault.

    Raises ``StoreUnavailable``, ``OSError`` or ``ValueError``.
    """
    parts = prepare(options, loaded, pool_size(options, loaded))
    client = RemotePrefillClient(options.prefill, token=options.token_for_prefill(), ca=options.prefill_ca)
    borrower = parts.borrower(client.open_hand_over) if options.hand_over else None
    return assemble_alone(parts, client, on_failure=on_failure, close=client.close, borrower=borrower)


def pool_size(options: DecodeOptions, loaded: Loaded) -> PoolSize:
    """As told, or for a full batch of the longest contexts as far as there is memory."""
    layout, tokens = loaded.served.layout, options.batch_max * loaded.served.context_length_max
    pages = options.kv_pages or pool_pages(layout, options.page_size, tokens, pool_nbytes_default(options.device))
    return PoolSize(pages, min(pages - 1, max(1, round(pages * options.chunk_page_ratio))))


def main(options: DecodeOptions) -> int:
    adopt_library_loggers()
    failed: list[bool] = []

    def on_failure() -> None:
        """A service that can decode no more ends, so that what supervises it starts another one."""
        failed.append(True)
        os.kill(os.getpid(), signal.SIGTERM)

    code = run_main([Listed("decode", FULL_NAME, options)], lambda loaded: [build(options, loaded, on_failure)])
    return code or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(given))
