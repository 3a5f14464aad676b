"""The two services of one machine as commands: what each is told, on which ports, in one process or in two."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from cairn.demo.shipped import MODEL
from cairn.local.processes import Command, Place, free_port
from decode_service.options import DecodeOptions
from prefill_service.options import PrefillOptions
from serving.process.options import ServiceOptions, check
from serving.process.settings import FILE, PORT, SECONDS, SWITCH, Setting, setting, settings_of
from serving.process.sources import CONFIG_VARIABLE, Resolved, SettingError, Sources, resolve

# What the decode service is told of the prefill service that it is started with.
OF_THE_OTHER = ("prefill", "prefill_token", "prefill_token_file", "prefill_tls_ca")
# What two services can only have in common if they are one process.
OF_THE_MODEL = (
    "model",
    "lora",
    "device",
    "dtype",
    "attention",
    "threads",
    "prefill_tokens_max",
    "page_size",
    "model_name",
)
OF_THE_STORE = ("store", "store_password", "store_password_file")
IN_COMMON = (*OF_THE_MODEL, *OF_THE_STORE, "log_level", "log_format")
TOGETHER = "cairn.local.together"
PORTS = {"prefill": {"port": 50071, "metrics_port": 9471}, "decode": {"port": 50072, "metrics_port": 9472}}


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """What ``cairn up`` was told for itself."""

    separate: bool | None = setting(
        SWITCH, "each service in a process of its own", default=None, unset="on cpu, or if their settings differ"
    )
    http_port: int | None = setting(
        PORT, "OpenAI's HTTP too, by a gateway at this port; 0 is any free one", default=None, unset="none"
    )
    start_timeout: float = setting(SECONDS, "for both services to become ready", default=300.0)
    tls_ca: Path | None = setting(
        FILE, "authority of the certificate, PEM", default=None, unset="the certificate", group="access"
    )


@dataclass(frozen=True)
class Settings:
    """All that ``cairn up`` was told, for itself and for each service."""

    up: Resolved[UpOptions]
    prefill: Resolved[PrefillOptions]
    decode: Resolved[DecodeOptions]

    @classmethod
    def read(cls, sources: Sources) -> Settings:
        """The settings that ``sources`` give. Raises ``SettingError``."""
        services = {"up": UpOptions, "prefill": PrefillOptions, "decode": DecodeOptions}
        sources.check_keys({service: settings_of(options) for service, options in services.items()})
        ours = {"model": str(MODEL), "store": default_store()}
        prefill = resolve(PrefillOptions, "prefill", sources, defaults={**PORTS["prefill"], **ours})
        decode = resolve(
            DecodeOptions,
            "decode",
            sources,
            defaults={**PORTS["decode"], **ours},
            fixed={"prefill": "", **dict.fromkeys(OF_THE_OTHER[1:])},
        )
        found = cls(resolve(UpOptions, "up", sources), prefill, decode)
        check(prefill)
        check(decode)
        if found.up.options.tls_ca is not None and prefill.options.tls_cert is None:
            raise SettingError(found.up.about("tls_ca", "belongs to --tls-cert and --tls-key"))
        found.up.check_files()
        return found


def in_one_process(settings: Settings) -> bool:
    """Whether both services are to run over one copy of the model: where they share a GPU, unless told otherwise.

    Raises ``SettingError`` if they are told to, and cannot.
    """
    prefill, decode, separate = settings.prefill, settings.decode, settings.up.options.separate
    differ = [each for each in IN_COMMON if getattr(prefill.options, each) != getattr(decode.options, each)]
    if separate is None:
        return not differ and prefill.options.device != "cpu"
    for name in [] if separate else differ:
        service = decode if name in decode.sources else prefill
        words = "differs between the two services, which --no-separate makes one process; give both the same"
        raise SettingError(service.about(name, words))
    return not separate


def default_store() -> str:
    """A directory below the user's cache."""
    return f"file://{os.environ.get('XDG_CACHE_HOME') or str(Path.home() / '.cache')}/cairn/store"


def flagged() -> list[Setting]:
    """The settings that are flags of ``cairn up``, each once."""
    found = (*settings_of(PrefillOptions), *settings_of(DecodeOptions), *settings_of(UpOptions))
    return list({each.name: each for each in found if each.name not in OF_THE_OTHER}.values())


def service_commands(
    prefill: PrefillOptions, decode: DecodeOptions, tls_ca: Path | None = None
) -> tuple[Command, Command]:
    """The commands of both services, with every port chosen; ``tls_ca`` is the authority of their certificate."""
    prefill, decode = _with_ports(prefill, decode)
    first = _command("prefill", prefill, tls_ca)
    return first, _command("decode", replace(decode, prefill=first.address, prefill_tls_ca=tls_ca), tls_ca)


def together_command(prefill: PrefillOptions, decode: DecodeOptions, tls_ca: Path | None = None) -> Command:
    """The command of one process that serves both, with every port chosen."""
    prefill, decode = _with_ports(prefill, decode)
    places = [Place(name, _address(one), tls_ca) for name, one in (("prefill", prefill), ("decode", decode))]
    first, environment = _told(prefill, without_settings(os.environ))
    second, environment = _told(replace(decode, prefill=places[0].address), environment)
    argv = (*python_module(TOGETHER), *first, "--", *second)
    return Command("cairn", argv, environment=environment, serves=tuple(places))


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


def _command(name: str, options: ServiceOptions, tls_ca: Path | None) -> Command:
    """The service with exactly these options: secrets in its environment, the rest on its command line."""
    words, environment = _told(options, without_settings(os.environ))
    argv = (*python_module(type(options).__module__.rpartition(".")[0]), *words)
    return Command(name, argv, _address(options), tls_ca, environment)


def _with_ports(prefill: PrefillOptions, decode: DecodeOptions) -> tuple[PrefillOptions, DecodeOptions]:
    """Both with every port chosen, no two of them the same."""
    taken = [prefill.port, prefill.metrics_port, decode.port, decode.metrics_port]
    for index, host in enumerate((prefill.host, prefill.host, decode.host, decode.host)):
        taken[index] = taken[index] or free_port(host, *taken)
    chosen = replace(prefill, port=taken[0], metrics_port=taken[1])
    return chosen, replace(decode, port=taken[2], metrics_port=taken[3])


def _address(options: ServiceOptions) -> str:
    return f"{options.host}:{options.port}"


def python_module(module: str) -> list[str]:
    """How a module of ours is run.

    The child looks for modules in the working directory only if this process was found there itself: whatever a user's
    own directory holds, it is not imported.
    """
    found_here = sys.path[:1] == [str(Path(__file__).parents[2])]
    return [sys.executable, *([] if found_here else ["-P"]), "-m", module]


def _told(options: ServiceOptions, environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The words of a command line and the environment that say what is not a default; secrets are in the latter."""
    words: list[str] = []
    secrets_too = dict(environment)
    for declared in settings_of(type(options)):
        value = getattr(options, declared.name)
        if value == declared.default:
            continue
        if declared.secret:
            secrets_too[declared.variable] = str(value)
        else:
            switched = [declared.flag if value else declared.flag_off]
            words += switched if declared.kind is SWITCH else [declared.flag, str(value)]
    return words, secrets_too


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which no setting is left: what it said of one has been read."""
    read = {
        variable
        for service, options in (("prefill", PrefillOptions), ("decode", DecodeOptions))
        for declared in settings_of(options)
        for variable in declared.variables(service)
    }
    return {name: value for name, value in environment.items() if name not in read | {CONFIG_VARIABLE}}
