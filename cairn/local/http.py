"""The gateway beside the services of one machine, as a command: OpenAI's HTTP over them.

It is known by its module's name alone: it stands on the client, as this room does, and not below it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cairn.local.processes import Command, Place, free_port
from cairn.local.services import python_module, without_settings
from decode_service.options import DecodeOptions
from serving.process.options import ServiceOptions

NAME = "gateway"
# What the gateway is told as the services are: these are its settings too.
IN_COMMON = ("token_file", "tls_cert", "tls_key", "drain_s", "log_level", "log_format")


def gateway_command(
    http_port: int,
    services: Sequence[Command],
    decode: DecodeOptions,
    token_file: Path | None,
    tls_ca: Path | None = None,
    config: Path | None = None,
) -> Command:
    """The gateway over ``services``, at the address that the decode service listens on; ``http_port`` 0 is a free one.

    ``token_file`` is the callers' own; ``config`` the file whose table [gateway] says the rest.
    """
    places = {place.name: place for command in services for place in command.places}
    taken = [int(place.address.rpartition(":")[2]) for place in places.values()]
    port = http_port or free_port(decode.host, *taken)
    words = ["--http-host", decode.host, "--http-port", str(port)]
    words += [word for name in ("prefill", "decode") for word in (f"--{name}", places[name].address)]
    for name in IN_COMMON:
        value = token_file if name == "token_file" else getattr(decode, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name, path in (("tls-ca", tls_ca), ("config", config)):
        words += [f"--{name}", str(path)] if path is not None else []
    words += ["--insecure"] if decode.insecure else []
    prefix = ServiceOptions.__module__.partition("serving")[0]  # where the rooms are in a wheel
    place = Place(NAME, f"{decode.host}:{port}", tls_ca, rpcs=False)
    argv = (*python_module(f"{prefix}{NAME}"), *words)
    return Command(NAME, argv, environment=without_settings(os.environ), serves=(place,))
