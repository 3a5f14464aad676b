"""The decode service's own settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from serving.process.options import ServiceOptions, parse_options
from serving.process.settings import COUNT, FILE, SECONDS, SHARE, SIZE, SWITCH, or_zero, setting, text
from serving.rpc.token_file import NO_SALT, token_lines

GROUP = "decode"


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(ServiceOptions):
    """What the decode service was told to do."""

    prefill: str = setting(text("HOST:PORT"), "the prefill service (a gRPC target)", group=GROUP)
    prefill_token: str | None = setting(
        text("TOKEN"), "token for the prefill service", default=None, group=GROUP, secret=True, flagless=True
    )
    prefill_token_file: Path | None = setting(
        FILE, "its first token goes to the prefill service", default=None, group=GROUP
    )
    prefill_tls_ca: Path | None = setting(
        FILE, "authority of the prefill service's certificate, PEM", default=None, group=GROUP
    )
    chunk_page_ratio: float = setting(SHARE, "share of the pool that chunks may take", default=0.5, group=GROUP)
    cascade_levels_max: int = setting(COUNT, "deeper sharing is folded", default=32, group=GROUP)
    batch_max: int = setting(COUNT, "requests decoded together at most", default=32, group=GROUP)
    waiting_max: int = setting(COUNT, "requests that may wait; more are refused", default=256, group=GROUP)
    waiting_max_s: float | None = setting(
        SECONDS,
        "until a request's turn comes; what would wait longer is refused",
        default=None,
        unset="10, or as long as a request runs",
        group=GROUP,
    )
    strict: bool = setting(
        SWITCH, "one batch size where bits would depend on it (not on GPUs)", default=False, group=GROUP
    )
    request_timeout_s: float = setting(SECONDS, "for a whole answer", default=600.0, group=GROUP)
    host_cache: int = setting(
        or_zero(SIZE), "pinned memory for loaded KV, cuda only", default=0, unset="0: none", group=GROUP
    )
    host_tails: int = setting(
        or_zero(SIZE), "host memory for KV of answers that gave up their pages", default=2**30, group=GROUP
    )

    def token_for_prefill(self) -> str:
        """The token that is sent to the prefill service: the given one, or the first of the file; "" without.

        Raises ``OSError``, or ``ValueError`` for a token with a salt: it would act for one tenant, whoever asks.
        """
        if self.prefill_token_file is None:
            return self.prefill_token or ""
        if self.prefill_token is not None:
            raise ValueError("prefill_token and prefill_token_file are both set; set one of them")
        _, words = next(token_lines(self.prefill_token_file.read_text()), (0, [""]))
        if words[1:2] not in ([], [NO_SALT]):
            raise ValueError(
                f"prefill_token_file: the first token of {self.prefill_token_file} has a salt; the decode service "
                "needs one without, which may act for every tenant"
            )
        return words[0]

    def secrets(self) -> dict[str, Callable[[], object]]:
        return {**super().secrets(), "prefill_token_file": self.token_for_prefill}

    @property
    def prefill_ca(self) -> bytes | None:
        """PEM of the authority that the prefill service's certificate is checked with. Raises ``OSError``."""
        return None if self.prefill_tls_ca is None else self.prefill_tls_ca.read_bytes()

    def decode_buckets(self, *, one_size: bool) -> tuple[int, ...]:
        """Batch sizes that steps are padded to: ``batch_max`` alone, or 1, 4, 8, 16, ... up to it."""
        if one_size:
            return (self.batch_max,)
        sizes = [1, 4]
        while sizes[-1] < self.batch_max:
            sizes.append(sizes[-1] * 2)
        return tuple(sizes)

    def row_multiple(self, *, one_size: bool) -> int:
        return self.batch_max if one_size else 4


def parse(words: Sequence[str] | None = None) -> DecodeOptions:
    """The options of this command line, environment and file; ends the program with a message for a bad one."""
    return parse_options(DecodeOptions, "decode", "Composes stored chunks, decodes, streams.", words)
