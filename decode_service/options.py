"""The decode service's own command-line options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from serving.process.options import ServiceOptions, add_service_options, nbytes, positive, service_options
from serving.rpc.access import NO_SALT


@dataclass(frozen=True)
class DecodeOptions:
    """What the decode service was told to do, besides what both services share."""

    service: ServiceOptions
    prefill: str
    prefill_token_file: Path | None
    prefill_tls_ca: Path | None
    chunk_page_ratio: float
    max_cascade_levels: int
    max_batch: int
    max_waiting: int
    strict: bool
    request_timeout_s: float
    host_cache: int = 0

    @property
    def prefill_token(self) -> str:
        """The first token of the file, sent to the prefill service; "" without a file.

        Raises ``OSError``, or ``ValueError`` for a token with a salt: it would act for one tenant, whoever asks.
        """
        if self.prefill_token_file is None:
            return ""
        lines = (line.split() for line in self.prefill_token_file.read_text().splitlines())
        words = next((words for words in lines if words and not words[0].startswith("#")), [""])
        if words[1:2] not in ([], [NO_SALT]):
            raise ValueError(
                f"--prefill-token-file: the first token of {self.prefill_token_file} has a salt; the decode service "
                "needs one without, which may act for every tenant"
            )
        return words[0]

    @property
    def prefill_ca(self) -> bytes | None:
        """PEM of the authority that the prefill service's certificate is checked with. Raises ``OSError``."""
        return None if self.prefill_tls_ca is None else self.prefill_tls_ca.read_bytes()

    @property
    def decode_buckets(self) -> tuple[int, ...]:
        """Batch sizes that steps are padded to: one if strict, else 1, 4, 8, 16, ... up to ``max_batch``."""
        if self.strict:
            return (self.max_batch,)
        sizes = [1, 4]
        while sizes[-1] < self.max_batch:
            sizes.append(sizes[-1] * 2)
        return tuple(sizes)

    @property
    def row_multiple(self) -> int:
        return self.max_batch if self.strict else 4


def parse(arguments: list[str] | None = None) -> DecodeOptions:
    """Parses the command line; ends the program with a message for a bad one."""
    parser = argparse.ArgumentParser(prog="decode_service", description="Composes stored chunks, decodes, streams.")
    add_service_options(parser)
    group = parser.add_argument_group("decode")
    group.add_argument("--prefill", required=True, metavar="HOST:PORT", help="the prefill service (a gRPC target)")
    group.add_argument(
        "--prefill-token-file", type=Path, metavar="FILE", help="its first token goes to the prefill service"
    )
    group.add_argument(
        "--prefill-tls-ca", type=Path, metavar="FILE", help="authority of the prefill service's certificate"
    )
    group.add_argument("--chunk-page-ratio", type=_share, default=0.5, help="share of the pool that chunks may take")
    group.add_argument("--max-cascade-levels", type=positive, default=3, help="deeper sharing is folded (default 3)")
    group.add_argument("--max-batch", type=positive, default=32, help="requests decoded together (default 32)")
    group.add_argument("--max-waiting", type=positive, default=256, help="requests that may wait (default 256)")
    group.add_argument("--strict", action="store_true", help="one batch size: equal bits whatever the batch")
    group.add_argument("--request-timeout-s", type=float, default=600.0, help="for a whole answer (default 600)")
    group.add_argument(
        "--host-cache", type=_size, default=0, metavar="SIZE", help="pinned memory for loaded KV, cuda only (default 0)"
    )
    args = parser.parse_args(arguments)
    return DecodeOptions(
        service=service_options(parser, args),
        **{name: getattr(args, name) for name in DecodeOptions.__dataclass_fields__ if name != "service"},
    )


def _size(text: str) -> int:
    return 0 if text == "0" else nbytes(text)


def _share(text: str) -> float:
    share = float(text)
    if not 0.0 < share < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share
