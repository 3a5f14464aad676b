"""The command-line options that both services have, parsed once into a frozen value."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from chunk_store.quantities import parse_nbytes
from serving.process.logs import FORMATS, LEVELS
from serving.rpc.access import Access
from serving.rpc.exposure import exposure_refusal
from serving.rpc.server import TlsFiles
from serving.tenancy.quotas import NO_QUOTAS, Quotas, TenantQuotas, parse_quota

DTYPES = ("auto", "float32", "bfloat16")
PIECE_TOKENS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class ServiceOptions:
    """What a service was told to do. None leaves the choice to the service; port 0 is any free one."""

    model: str
    store: str
    device: str = "cpu"
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 0
    metrics_port: int = 0
    threads: int = 1
    model_name: str = ""
    token_file: Path | None = None
    tenant_quota: Quotas = NO_QUOTAS
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    log_level: str = "info"
    log_format: str = "text"
    kv_pages: int | None = None
    page_size: int = 16
    prefill_tokens_max: int | None = None
    drain_s: float = 20.0

    @property
    def piece_tokens(self) -> int:
        """Tokens of a prefill forward at most: as told, else what its device is fast with."""
        return self.prefill_tokens_max or PIECE_TOKENS[self.device.partition(":")[0]]

    @property
    def tls(self) -> TlsFiles | None:
        """The certificate and its key; None to serve in the clear."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return TlsFiles(self.tls_cert, self.tls_key)

    def load_access(self) -> Access:
        """Reads the token file. Raises ``OSError`` or ``ValueError``."""
        return Access() if self.token_file is None else Access.from_file(self.token_file)

    def quotas(self, access: Access) -> TenantQuotas:
        """What each tenant may have: by the token file, else by default."""
        return TenantQuotas(access.quotas, self.tenant_quota)


def add_service_options(parser: argparse.ArgumentParser) -> None:
    """Adds every shared option to ``parser``."""
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="a model directory or hub id")
    parser.add_argument(
        "--store",
        required=True,
        metavar="URL",
        help="the chunk store: file:///DIR, redis://, rediss:// or mooncake:// (docs/scaling.md)",
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of weights and KV (default %(default)s)")
    parser.add_argument("--model-name", default="", metavar="NAME", help="how metrics and replies name the model")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="compute threads (default 1)")
    parser.add_argument("--log-level", choices=LEVELS, default="info", help="default %(default)s")
    parser.add_argument("--log-format", choices=FORMATS, default="text", help="of the lines on stderr (default text)")
    parser.add_argument("--drain-s", type=float, default=20.0, metavar="S", help="for running calls at the end")
    address = parser.add_argument_group("addresses (port 0: any free one)")
    address.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    address.add_argument("--port", type=port, default=0, metavar="N", help="of the RPCs")
    address.add_argument("--metrics-port", type=port, default=0, metavar="N", help="of the Prometheus metrics")
    access = parser.add_argument_group("access")
    access.add_argument(
        "--token-file", type=Path, metavar="FILE", help="bearer tokens, lines of TOKEN [SALT [OPTION ...]]"
    )
    access.add_argument(
        "--tenant-quota",
        type=quota,
        action="append",
        default=[],
        metavar="NAME=N",
        help="what a tenant may have whose token says nothing of it: chunks, bytes, pins, waiting, running or jobs; "
        "may be repeated (default: any number)",
    )
    access.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    access.add_argument("--tls-key", type=Path, metavar="FILE", help="private key, PEM")
    access.add_argument(
        "--insecure",
        action="store_true",
        help="listen beyond this machine without tokens and TLS",
    )
    memory = parser.add_argument_group("memory and forwards")
    memory.add_argument("--kv-pages", type=positive, metavar="N", help="pages of the KV pool")
    memory.add_argument("--page-size", type=positive, default=16, metavar="N", help="tokens a page (default 16)")
    memory.add_argument(
        "--prefill-tokens-max",
        type=positive,
        metavar="N",
        help="tokens of a prefill forward at most; part of the KV's identity, so the same in both services "
        "(default 512 on cpu, 8192 on cuda)",
    )


def service_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> ServiceOptions:
    """The parsed options; ends the program with a message when two of them contradict each other."""
    if (args.tls_cert is None) != (args.tls_key is None):
        parser.error("--tls-cert and --tls-key: give both or neither")
    tokens, tls = args.token_file is not None, args.tls_cert is not None
    refusal = exposure_refusal(args.host, tokens=tokens, tls=tls, insecure=args.insecure)
    if refusal:
        parser.error(refusal)
    values = {name: getattr(args, name) for name in ServiceOptions.__dataclass_fields__}
    return ServiceOptions(**{**values, "tenant_quota": Quotas(**dict(args.tenant_quota))})


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def device(text: str) -> str:
    """A device that there is an engine for."""
    if text.partition(":")[0] not in PIECE_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PIECE_TOKENS)}")
    return text


def port(text: str) -> int:
    """A TCP port; 0 means any free one."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is not in 0..65535")
    return number


def nbytes(text: str) -> int:
    """A size in bytes, for example ``10GiB``, ``500MB`` or ``1048576``."""
    try:
        return parse_nbytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def quota(text: str) -> tuple[str, int]:
    """``NAME=LIMIT`` of what each tenant may have."""
    try:
        return parse_quota(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
