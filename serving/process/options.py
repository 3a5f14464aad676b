"""The settings that both services share, declared once; ``settings.py`` says what a declaration gives.

Imports nothing heavy: the command line of a machine without torch reads these, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from chunk_store.password import password_in
from engine.run.backends import ATTENTIONS, AUTO, CASCADE, FLASHINFER
from serving.process.logs import FORMATS, LEVELS
from serving.process.settings import (
    COUNT,
    FILE,
    PORT,
    SECONDS,
    SWITCH,
    Kind,
    choice,
    or_zero,
    setting,
    settings_of,
    text,
)
from serving.process.sources import EPILOG, Resolved, SettingError, Sources, add_flags, resolve
from serving.rpc.exposure import exposure_refusal
from serving.rpc.tls import TlsFiles
from serving.tenancy.quotas import NO_QUOTAS, Quotas, parse_quotas

DTYPES = ("auto", "float32", "bfloat16")
PIECE_TOKENS = {"cpu": 512, "cuda": 8192}


def _device(words: str) -> str:
    name, colon, index = words.partition(":")
    if name not in PIECE_TOKENS or (colon and not index.isdecimal()):
        raise ValueError(f"{words!r} is not cpu, cuda or cuda:N")
    return words


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where the chunk store is, and the password of its server."""

    store: str = setting(
        text("URL"),
        "the chunk store: file:///DIR, redis://, rediss:// or mooncake:// (docs/scaling.md)",
        secret=True,  # it may have a password in it
    )
    store_password: str | None = setting(
        text("TEXT"), "password of the store's server", default=None, secret=True, flagless=True
    )
    store_password_file: Path | None = setting(
        FILE, "file whose first line is the password of the store's server", default=None
    )

    def password(self) -> str | None:
        """The password of the store's server, if it was given. Raises ``ValueError`` for a file without one."""
        if self.store_password_file is None:
            return self.store_password
        if self.store_password is not None:
            raise ValueError("store_password and store_password_file are both set; set one of them")
        return password_in(self.store_password_file, "store_password_file")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(StoreOptions):
    """Which model, and how it is run: its KV's keys follow from them."""

    model: str = setting(text("PATH_OR_ID"), "a model directory or hub id")
    device: str = setting(Kind("DEVICE", _device), "cpu, cuda or cuda:N", default="cpu", apart=True)
    dtype: str = setting(choice(*DTYPES), "of weights and KV", default="auto")
    attention: str = setting(
        choice(*ATTENTIONS),
        "the attention kernels: our own, FlashInfer's or torch's; part of the KV's identity",
        default=AUTO,
    )
    lora: Path | None = setting(
        Kind("DIR", Path),
        "a LoRA adapter of peft, merged into the weights at load (docs/weights.md)",
        default=None,
        unset="none",
    )
    threads: int = setting(COUNT, "compute threads", default=1)
    prefill_tokens_max: int | None = setting(
        COUNT,
        "tokens of a prefill forward at most; part of the KV's identity, so the same in both services",
        default=None,
        unset="512 on cpu, 8192 on cuda",
        group="memory and forwards",
    )

    @property
    def piece_tokens(self) -> int:
        """Tokens of a prefill forward at most: as told, else what its device is fast with."""
        return self.prefill_tokens_max or PIECE_TOKENS[self.device.partition(":")[0]]


@dataclass(frozen=True, kw_only=True)
class ServiceOptions(ModelOptions):
    """What a service was told to do. None leaves the choice to the service; port 0 is any free one."""

    model_name: str = setting(Kind("NAME"), "how metrics and replies name the model", default="")
    log_level: str = setting(choice(*LEVELS), "what is logged", default="info")
    log_format: str = setting(choice(*FORMATS), "of the lines on stderr", default="text")
    drain_s: float = setting(or_zero(SECONDS), "for running calls at the end", default=20.0)
    host: str = setting(text("ADDRESS"), "address to listen on", default="127.0.0.1", group="addresses")
    port: int = setting(PORT, "of the RPCs; 0 is any free one", default=0, group="addresses", own=True)
    metrics_port: int = setting(
        PORT, "of the Prometheus metrics; 0 is any free one", default=0, group="addresses", own=True
    )
    token_file: Path | None = setting(
        FILE, "bearer tokens, lines of TOKEN [SALT [OPTION ...]] (docs/tenants.md)", default=None, group="access"
    )
    tenant_quota: Quotas = setting(
        Kind("NAME=N", lambda words: parse_quotas(words.replace(",", " ").split())),
        "what a tenant may have whose token says nothing of it: chunks, bytes, pins, waiting, running or jobs",
        default=NO_QUOTAS,
        unset="any number",
        group="access",
        repeated=True,
    )
    tls_cert: Path | None = setting(FILE, "certificate chain, PEM", default=None, group="access")
    tls_key: Path | None = setting(FILE, "private key, PEM", default=None, group="access")
    insecure: bool = setting(SWITCH, "listen beyond this machine without tokens and TLS", default=False, group="access")
    hand_over: bool = setting(
        SWITCH,
        "computed KV goes from pool to pool on one host, beside the store",
        default=True,
        unset="on",
        group="hand-over",
    )
    kv_pages: int | None = setting(
        COUNT,
        "pages of the KV pool",
        default=None,
        unset="for the longest contexts, at most 1 GiB, on a GPU 40 % of what is free",
        group="memory and forwards",
        own=True,
    )
    page_size: int = setting(COUNT, "tokens a page", default=16, group="memory and forwards")

    def secrets(self) -> dict[str, Callable[[], object]]:
        """By the setting that names its file, how to read a secret; raises ``ValueError`` for one of no use."""
        return {"store_password_file": self.password}

    @property
    def tls(self) -> TlsFiles | None:
        """The certificate and its key; None to serve in the clear."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key)


Service = TypeVar("Service", bound=ServiceOptions)


def parse_options(
    options: type[Service], service: str, description: str, words: Sequence[str] | None = None
) -> Service:
    """What a service was told: by ``words`` (the command line), the environment and a file.

    Ends the program with a message for what cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {service}_service", description=description, epilog=EPILOG, allow_abbrev=False
    )
    add_flags(parser, settings_of(options))
    try:
        sources = Sources.read(vars(parser.parse_args(words)))
        sources.check_keys({service: settings_of(options)})
        resolved = resolve(options, service, sources)
        check(resolved)
    except SettingError as error:
        parser.error(str(error))
    return resolved.options


def check(resolved: Resolved[Service]) -> None:
    """Raises ``SettingError`` for settings that contradict each other, and for files that cannot be read."""
    options = resolved.options
    for one, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if getattr(options, one) is not None and getattr(options, other) is None:
            raise SettingError(resolved.about(one, "--tls-cert and --tls-key: give both or neither"))
    if options.device == "cpu" and options.attention in (CASCADE, FLASHINFER):
        words = f"{options.attention}'s kernels run on a GPU, and --device is cpu; give auto or torch"
        raise SettingError(resolved.about("attention", words))
    tokens, tls = options.token_file is not None, options.tls is not None
    refusal = exposure_refusal(options.host, tokens=tokens, tls=tls, insecure=options.insecure)
    if refusal:
        raise SettingError(resolved.about("host", refusal))
    resolved.check_files()
    for name, read in options.secrets().items():
        try:
            read()
        except ValueError as error:
            raise SettingError(resolved.about(name, str(error).removeprefix(f"{name}: "))) from None
