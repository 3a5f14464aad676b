"""The two services of one machine as command lines: which flags each gets, on which ports."""

from __future__ import annotations

import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import decode_service
import prefill_service
from cairn.local.processes import Command, free_port


@dataclass(frozen=True)
class Settings:
    """What ``cairn up`` was asked for. None leaves a value to the service's own default; port 0 is any free one.

    ``prefill_token_file`` holds what the prefill service accepts: the tokens of ``token_file``, and first the one that
    the decode service comes with. ``tls_ca`` is the authority of ``tls_cert``.
    """

    model: str
    store: str
    device: str = "cpu"
    dtype: str | None = None
    model_name: str | None = None
    host: str = "127.0.0.1"
    prefill_port: int = 0
    decode_port: int = 0
    prefill_metrics_port: int = 0
    decode_metrics_port: int = 0
    threads: int | None = None
    page_size: int | None = None
    pool_pages: int | None = None
    prefill_pool_pages: int | None = None
    prefill_tokens_max: int | None = None
    registry_max: int | None = None
    store_capacity: str | None = None
    chunk_page_ratio: float | None = None
    max_cascade_levels: int | None = None
    max_batch: int | None = None
    max_waiting: int | None = None
    strict: bool = False
    drain_s: float | None = None
    log_level: str | None = None
    log_format: str | None = None
    token_file: Path | None = None
    prefill_token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    insecure: bool = False


def service_commands(settings: Settings) -> tuple[Command, Command]:
    """The prefill and the decode service's commands, with every port chosen."""
    prefill_address = f"{settings.host}:{settings.prefill_port or free_port(settings.host)}"
    decode_address = f"{settings.host}:{settings.decode_port or free_port(settings.host)}"
    prefill = {
        **_shared_flags(settings, prefill_address, settings.prefill_metrics_port),
        "--token-file": settings.prefill_token_file,
        "--kv-pages": settings.prefill_pool_pages,
        "--registry-max": settings.registry_max,
        "--store-capacity": settings.store_capacity,
    }
    decode = {
        **_shared_flags(settings, decode_address, settings.decode_metrics_port),
        "--token-file": settings.token_file,
        "--kv-pages": settings.pool_pages,
        "--prefill": prefill_address,
        "--prefill-token-file": settings.prefill_token_file,
        "--prefill-tls-ca": settings.tls_ca,
        "--chunk-page-ratio": settings.chunk_page_ratio,
        "--max-cascade-levels": settings.max_cascade_levels,
        "--max-batch": settings.max_batch,
        "--max-waiting": settings.max_waiting,
        "--strict": settings.strict,
    }
    return (
        Command("prefill", _argv(prefill_service.__name__, prefill), prefill_address, settings.tls_ca),
        Command("decode", _argv(decode_service.__name__, decode), decode_address, settings.tls_ca),
    )


@contextmanager
def private_tokens(token_file: Path | None) -> Iterator[Path | None]:
    """A file of the same tokens behind a new one without a salt, which the decode service uses; gone at the end.

    It must be a token of its own: one with a salt would keep every tenant's KV under that salt. None without a file.
    """
    if token_file is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="cairn-") as directory:  # readable by this user only
        path = Path(directory) / "tokens"
        path.write_bytes(f"{secrets.token_urlsafe(32)}\n".encode() + token_file.read_bytes())
        yield path


def _shared_flags(settings: Settings, address: str, metrics_port: int) -> dict[str, object]:
    return {
        "--model": settings.model,
        "--store": settings.store,
        "--device": settings.device,
        "--dtype": settings.dtype,
        "--model-name": settings.model_name,
        "--host": settings.host,
        "--port": address.rpartition(":")[2],
        "--metrics-port": metrics_port or free_port(settings.host),
        "--threads": settings.threads,
        "--page-size": settings.page_size,
        "--prefill-tokens-max": settings.prefill_tokens_max,
        "--drain-s": settings.drain_s,
        "--log-level": settings.log_level,
        "--log-format": settings.log_format,
        "--tls-cert": settings.tls_cert,
        "--tls-key": settings.tls_key,
        "--insecure": settings.insecure,
    }


def _argv(module: str, flags: dict[str, object]) -> tuple[str, ...]:
    """``python -m module`` with the flags that have a value; a flag that is True stands alone.

    The child looks for modules in the working directory only if this process was found there itself: whatever a
    user's own directory holds, it is not imported.
    """
    found_here = sys.path[:1] == [str(Path(__file__).parents[2])]
    argv = [sys.executable, *([] if found_here else ["-P"]), "-m", module]
    for flag, value in flags.items():
        if value is True:
            argv.append(flag)
        elif value is not None and value is not False:
            argv += [flag, str(value)]
    return tuple(argv)
